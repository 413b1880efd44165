"""Every model of the papers, tiny and random, in the file layout that the published one has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu

import moefactor
from models import load, logits, on_disk, read_plan, rebuilt
from moefactor.checkpoint import INDEX
from moefactor.errors import UserError
from moefactor.experts import ExpertLayer
from moefactor.runtime.module import FactorisedExperts
from moefactor.streaming import StreamedModel
from tiny import TINY, build

BLOCK = (16, 16)  # 24 rows make a whole block and a shorter one
FP8_MAXIMUM = 448.0
DEEPSEEK_MOE = (
    "deepseek",
    {
        "moe_intermediate_size": 24, "intermediate_size": 48, "n_routed_experts": 8, "n_shared_experts": 2,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_hidden_layers": 3, "num_key_value_heads": 4,
    },
)  # fmt: skip
CLASSIC = {"w1": "block_sparse_moe.experts.0.w1.weight", "router": "block_sparse_moe.gate.weight"}
MODERN = {"w1": "mlp.experts.0.gate_proj.weight", "router": "mlp.gate.weight"}
# Model of a paper -> (kind, dtype, what its published names have, FP8).
MODELS: dict[str, tuple[str, torch.dtype, dict[str, str], bool]] = {
    "Mixtral": ("mixtral", torch.bfloat16, CLASSIC, False),
    "Phi-3.5-MoE": ("phimoe", torch.bfloat16, CLASSIC, False),
    "Qwen1.5-MoE": ("qwen2_moe", torch.bfloat16, MODERN | {"shared": "mlp.shared_expert_gate.weight"}, False),
    "Qwen3-MoE": ("qwen3_moe", torch.bfloat16, MODERN | {"norm": "self_attn.q_norm.weight"}, False),
    "DeepSeek-V2": ("deepseek_v2", torch.bfloat16, MODERN | {"shared": "mlp.shared_experts.up_proj.weight"}, False),
    "DeepSeek-V3": ("deepseek_v3", torch.bfloat16, MODERN | {"bias": "mlp.gate.e_score_correction_bias"}, True),
    "Kimi-K2": ("kimi_k2", torch.bfloat16, MODERN | {"bias": "mlp.gate.e_score_correction_bias"}, True),
    "DeepSeekMoE-16B": ("deepseek", torch.bfloat16, MODERN | {"shared": "mlp.shared_experts.up_proj.weight"}, False),
}
METHODS = {
    "rfid": {},
    # r = I, the default, leaves nothing for bases where I is three quarters of H.
    "mobe": {"steps": 20, "rank": 12},
    "d2moe": {},
}


@pytest.fixture(scope="module", autouse=True)
def _with_deepseek_moe() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "deepseek", DEEPSEEK_MOE)
        yield


def is_fp8(name: str) -> bool:
    """As published: every linear layer but the router and the head."""
    return name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight")


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3, float32 scales), a scale for each block, blocks at the edge cut off."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    values = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16))
            # Scales of the blocks far apart, so that a wrong block can't pass.
            scales[i, j] = weight[block].float().abs().max() / FP8_MAXIMUM * (1 + 3 * ((i + j) % 2))
            values[block] = weight[block].float() / scales[i, j]
    return values.to(torch.float8_e4m3fn), scales


def by_hand(weight: Tensor, scales: Tensor) -> Tensor:
    out = weight.float().clone()
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] *= scales[row // 16, column // 16]
    return out.bfloat16()


def to_fp8(folder: Path, model_type: str) -> Path:
    """A checkpoint rewritten as DeepSeek-V3 and Kimi-K2 are published: FP8, and a layer of multi-token prediction."""
    tensors = {}
    for name, tensor in on_disk(folder).items():
        if is_fp8(name):
            tensors[name], tensors[name + "_scale_inv"] = quantised(tensor)
        else:
            tensors[name] = tensor
    extra = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.2." in n}
    tensors |= extra | {"model.layers.3.enorm.weight": torch.ones(32).bfloat16()}
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    shards, weight_map = 3, {}
    for shard in range(shards):
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}  # weights and scales apart
        file = f"model-{shard + 1:05d}-of-{shards:06d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def source(model: str) -> Path:
        if model not in made:
            kind, dtype, _, fp8 = MODELS[model]
            made[model] = build(kind, tmp_path_factory.mktemp(kind) / kind, dtype=dtype)
            if fp8:
                to_fp8(made[model], kind)
        return made[model]

    return source


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


def compressed(source: Path, method: str, out: Path, text_file: Path) -> Path:
    text = {"calibration": str(text_file), "samples": 3, "seqlen": 16} if method != "mobe" else {}
    return moefactor.compress(str(source), method, 0.25, out, **text, **METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_compressed_loaded_and_run(
    model: str, method: str, sources: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    source = sources(model)
    kind, dtype, names, fp8 = MODELS[model]
    published = on_disk(source)
    assert len(list(source.glob("*.safetensors"))) > 1
    for name in names.values():
        assert "model.layers.1." + name in published
    assert any(name.endswith("_scale_inv") for name in published) == fp8
    out = compressed(source, method, tmp_path / "out", text_file)
    loaded = load(out)
    found = logits(loaded)
    assert torch.isfinite(found).all()
    experts = [m for m in loaded.modules() if isinstance(m, FactorisedExperts)]
    assert len(experts) == (3 if "first_k_dense_replace" in TINY[kind][1] else 2) - ("deepseek" in TINY[kind][0])
    stored = on_disk(out)
    assert {t.dtype for t in stored.values()} <= {dtype, torch.int32, torch.float32}
    # All that is not an expert is there under its name, FP8 undone, no scale left.
    ours = tuple(e.layer.name + "." for e in experts)
    rest = {n for n in published if (".experts." not in n or "layers.3." in n) and not n.endswith("_scale_inv")}
    assert {n for n in stored if not n.startswith(ours)} == rest
    for name in rest:
        scale = published.get(name + "_scale_inv")
        expected = published[name] if scale is None else by_hand(published[name], scale)
        assert stored[name].dtype == expected.dtype
        assert torch.equal(stored[name], expected), name
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "moefactor"
    dense = load_dense(source)
    kept = read_plan(out, dense)
    assert kept.parameter_count() <= 0.75 * kept.original_count
    exact = logits(load(out, dtype=torch.float32))
    expected = logits(rebuilt(dense.float(), out))
    torch.testing.assert_close(exact, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def load_dense(source: Path) -> nn.Module:
    """The model behind a checkpoint, FP8 undone by hand."""
    config = json.loads((source / "config.json").read_text())
    if "quantization_config" not in config:
        return load(source)
    tensors, plain = on_disk(source), source.with_name(source.name + "-plain")
    if not plain.exists():
        plain.mkdir()
        del config["quantization_config"]
        (plain / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
        save_file(
            {
                n: by_hand(t, tensors[n + "_scale_inv"]) if n + "_scale_inv" in tensors else t
                for n, t in tensors.items()
                if not n.endswith("_scale_inv") and "layers.3." not in n
            },
            plain / "model.safetensors", metadata={"format": "pt"},
        )  # fmt: skip
    return load(plain)


@pytest.mark.parametrize("model", ["DeepSeek-V3", "Kimi-K2"])
def test_fp8_is_read_with_the_declared_block(model: str, sources: Callable[[str], Path]) -> None:
    """24 rows in blocks of 16: rows 16 to 23 have the second scale, which rows // scales would not find."""
    published, streamed = on_disk(sources(model)), StreamedModel(str(sources(model)))
    for layer in streamed.experts:
        weights = streamed.expert_weights(layer)
        for ours, theirs in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
            for expert in range(8):
                name = f"{layer.name}.{expert}.{theirs}.weight"
                expected = by_hand(published[name], published[name + "_scale_inv"])
                assert torch.equal(getattr(weights, ours)[expert].bfloat16(), expected)
    with streamed.loaded("model.layers.1") as decoder:
        name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"  # 24 rows as well
        expected = by_hand(published[name], published[name + "_scale_inv"])
        assert torch.equal(decoder.self_attn.kv_a_proj_with_mqa.weight.bfloat16(), expected)


def test_an_fp8_source_of_another_shape(sources: Callable[[str], Path], copied: Callable[[Path], Path]) -> None:
    folder = copied(sources("DeepSeek-V3"))
    name = "model.layers.1.input_layernorm.weight"
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: tensors[name][:-1].clone()}, path, metadata={"format": "pt"})
    streamed = StreamedModel(str(folder))
    with pytest.raises(UserError, match=rf"{name}: has shape \(31,\) in the checkpoint, the model expects \(32,\)"):
        streamed.reader.load("model.layers.1", torch.device("cpu"))


# -- DeepSeekMoE-16B, whose class is ours ---------------------------------------------------------------------------


@torch.no_grad()
def naive_block(tensors: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """Its hub code: one module an expert, softmax over all of them, the top two's weights as they are, plus the
    shared experts as one wide MLP."""

    def mlp(path: str, rows: Tensor) -> Tensor:
        gate, up, down = (tensors[f"{path}.{n}_proj.weight"].float() for n in ("gate", "up", "down"))
        return (silu(rows @ gate.T) * (rows @ up.T)) @ down.T

    if f"{prefix}.gate.weight" not in tensors:
        return mlp(prefix, x)
    scores = (x @ tensors[f"{prefix}.gate.weight"].float().T).softmax(-1)
    out = mlp(f"{prefix}.shared_experts", x)
    for t in range(len(x)):
        for expert in scores[t].topk(2).indices.tolist():
            out[t] += scores[t, expert] * mlp(f"{prefix}.experts.{expert}", x[t : t + 1])[0]
    return out


def test_deepseek_moe_is_its_hub_code(tmp_path: Path) -> None:
    source = build("deepseek", tmp_path / "deepseek")
    tensors, dense = on_disk(source), load(source)
    expected = logits(dense)
    for index, layer in enumerate(dense.model.layers):
        assert (f"model.layers.{index}.mlp.gate.weight" in tensors) == (index > 0)
        prefix = f"model.layers.{index}.mlp"
        layer.mlp.forward = lambda x, prefix=prefix: naive_block(tensors, prefix, x.flatten(0, 1)).view_as(x)
    assert tensors["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (48, 32)  # two of 24
    torch.testing.assert_close(logits(dense), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_deepseek_moe_keeps_its_names_when_exported(text_file: Path, tmp_path: Path) -> None:
    source = build("deepseek", tmp_path / "deepseek")
    out = compressed(source, "rfid", tmp_path / "out", text_file)
    moefactor.export_dense(str(out), tmp_path / "dense")
    exported, original = on_disk(tmp_path / "dense"), on_disk(source)
    assert {n: (t.shape, t.dtype) for n, t in exported.items()} == {n: (t.shape, t.dtype) for n, t in original.items()}
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "deepseek"
    expected = logits(rebuilt(load(source), out))
    found = logits(load(tmp_path / "dense"))
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def test_standard_from_fp8(sources: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """Experts dropped from an FP8 model: an ordinary bfloat16 checkpoint that says nothing of FP8."""
    out = moefactor.compress(
        str(sources("DeepSeek-V3")), "reap", 0.25, tmp_path / "out", calibration=str(text_file), samples=3, seqlen=16
    )
    stored = on_disk(out)
    assert not [n for n in stored if n.endswith("_scale_inv")]
    assert {t.dtype for t in stored.values()} <= {torch.bfloat16, torch.float32}
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["n_routed_experts"] == 6
    # The prediction layer, which transformers does not build, has as many, and is no longer FP8 either.
    published, prefix = on_disk(sources("DeepSeek-V3")), "model.layers.3.mlp.experts."
    experts = {n.removeprefix(prefix).split(".")[0] for n in stored if n.startswith(prefix)}
    assert experts == set("012345")
    names = [f"{prefix}{e}.up_proj.weight" for e in range(8)]
    dense = [by_hand(published[n], published[n + "_scale_inv"]) for n in names]
    assert all(any(torch.equal(stored[n], d) for d in dense) for n in names[:6])
    assert stored["model.layers.3.mlp.gate.weight"].shape == (6, 32)
    assert torch.isfinite(logits(load(out))).all()


@pytest.mark.parametrize("model", ["DeepSeek-V3", "Kimi-K2"])
def test_quantised_from_fp8(sources: Callable[[str], Path], tmp_path: Path, model: str) -> None:
    """A source's blocks are undone before its experts get scales of their own; the prediction layer stays plain."""
    pytest.importorskip("compressed_tensors", reason="pip install 'moefactor[quant]'")
    source = sources(model)
    out = moefactor.export_quantised(str(source), tmp_path / "out", "fp8")
    published, stored = on_disk(source), on_disk(out)
    assert not [n for n in stored if n.endswith("_scale_inv")]
    name = "model.layers.{}.mlp.experts.5.down_proj.weight"
    for layer in (2, 3):
        plain = by_hand(published[name.format(layer)], published[name.format(layer) + "_scale_inv"]).float()
        found = stored[name.format(layer)].float()
        if layer == 2:
            found *= stored[name.format(2) + "_scale"].float()
        assert (found - plain).norm() < (0.04 if layer == 2 else 1e-6) * plain.norm()
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert any("layers\\.3" in pattern for pattern in config["quantization_config"]["ignore"])
    expected = logits(load_dense(source))
    assert (logits(load(out)) - expected).norm() < 0.3 * expected.norm()


def test_dropping_from_kimi_k2(sources: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """transformers has no `kimi_k2`: a standard checkpoint must name the architecture that it has."""
    out = moefactor.compress(
        str(sources("Kimi-K2")), "reap", 0.25, tmp_path / "out", calibration=str(text_file), samples=3, seqlen=16
    )
    assert json.loads((out / "config.json").read_text())["model_type"] == "deepseek_v3"
    assert torch.isfinite(logits(load(out))).all()


def test_layers_are_where_they_should_be(sources: Callable[[str], Path]) -> None:
    """Dense first layers and prediction layers are no expert layers."""
    streamed = StreamedModel(str(sources("DeepSeek-V3")))
    assert [layer.name for layer in streamed.experts] == [f"model.layers.{i}.mlp.experts" for i in (1, 2)]
    assert isinstance(streamed.experts[0], ExpertLayer)
    assert streamed.experts[0].router_groups == 2
