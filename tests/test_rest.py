"""What is not a compressed expert in 8 or 4 bits: what it stands for, how much it takes, loading, saving, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import moefactor
from models import IDS, load, logits, on_disk
from moefactor.checkpoint import INDEX
from moefactor.errors import UserError
from moefactor.evaluation import evaluate
from moefactor.export import export_dense
from moefactor.fitting.rounding import round_to_nearest
from moefactor.forms.packing import values
from moefactor.healing import heal
from moefactor.rest import GROUP, packing, rest_bytes, rest_tensors
from moefactor.runtime.engine import unpacked
from moefactor.runtime.format import Rest
from moefactor.runtime.linear import PART, QuantisedEmbedding, QuantisedLinear
from moefactor.streaming import StreamedModel
from tiny import COMMON, QWEN, tokenizer

# Wide enough for matrices that are worth it.
WIDE = {"hidden_size": 64, "head_dim": 32}
MLA = {"hidden_size": 64, "kv_lora_rank": 64, "q_lora_rank": 64, "intermediate_size": 96}
KINDS = {
    "qwen3_moe": WIDE,
    "mixtral": {"hidden_size": 64},
    "deepseek_v3": MLA,
    "glm4_moe": {**WIDE, "moe_intermediate_size": 64},
    "gpt_oss": WIDE,
    "qwen3_next": {"hidden_size": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "nemotron_h": WIDE,  # whose names on disk are others
}
TIED = ("qwen3_moe", {**WIDE, "tie_word_embeddings": True})


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made("mixtral", 8)`: that tiny model with factors of svd and its rest in so many bits."""
    root, known = tmp_path_factory.mktemp("rest"), {}

    def make(kind: str, bits: int, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        key = f"{kind}-{bits}-{dtype}-{sorted(changes.items())}"
        if key not in known:
            source = tiny_model(kind, dtype, **(changes or KINDS[kind]))
            known[key] = moefactor.compress(str(source), "svd", 0.4, root / str(len(known)), rest_bits=bits)
        return known[key]

    return make


def rest_of(folder: Path) -> Rest:
    return Rest.from_json(json.loads((folder / "config.json").read_text())["quantization_config"])


def numbers(folder: Path) -> dict[str, Tensor]:
    """Name on disk -> what is packed there, by the format's description alone."""
    stored, rest = on_disk(folder), rest_of(folder)
    names = [name.removesuffix("_codes") for name in stored if rest.bits(name.removesuffix("_codes"))]
    return {n: rest.numbers(n, stored[f"{n}_codes"], stored[f"{n}_scale"]) for n in names if f"{n}_codes" in stored}


def packed(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear | QuantisedEmbedding)}


# -- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_as_near_as_its_levels_allow(bits: int) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))  # the last group is half a one
    codes, scale = round_to_nearest(weight, bits, GROUP)
    found = values(codes, scale, bits, 160, GROUP)
    spread = scale.repeat_interleave(GROUP, 1)[:, :160]
    levels = (torch.arange(2**bits) - (2**bits - 1) / 2).view(-1, 1, 1) * spread
    nearest = (levels - weight).abs().amin(0)
    torch.testing.assert_close((found - weight).abs(), nearest, atol=1e-5, rtol=0)
    # Clipping the few largest pays with few levels, and does no harm with many.
    unclipped = torch.stack([part.abs().amax(1) for part in weight.split(GROUP, 1)], 1) / ((2**bits - 1) / 2)
    uniform = unclipped.square().mean() / 12  # of an error that lies anywhere within a step
    assert (found - weight).square().mean() < {8: 1.02, 4: 0.95}[bits] * uniform


def test_empty_groups_and_scales_in_bfloat16() -> None:
    weight = torch.randn(64, 128).bfloat16()
    weight[3, :64] = 0
    codes, scale = round_to_nearest(weight, 8, GROUP)
    found = values(codes, scale, 8, 128, GROUP)
    assert scale.dtype == found.dtype == torch.bfloat16
    assert not found[3, :64].any()
    # Half a step of the code, and half of what bfloat16 has left of such a number.
    assert ((found - weight).abs() <= scale.repeat_interleave(GROUP, 1) * 0.51 + weight.abs() * 2**-8).all()


def test_large_tensors_are_rounded_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(reader=SimpleNamespace(checkpoint=SimpleNamespace(folder=Path("model"))))
    weight = torch.randn(100, 96)
    whole = packing(model, {"w": 4})("w", weight)
    monkeypatch.setattr("moefactor.fitting.rounding.PART", 7 * 96)
    parts = packing(model, {"w": 4})("w", weight)
    assert whole.keys() == parts.keys() == {"w_codes", "w_scale"}
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# -- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits"), [("qwen3_moe", 8), *((kind, 4) for kind in KINDS)])
def test_logits_are_those_of_the_numbers_that_the_codes_stand_for(
    kind: str, bits: int, made: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    """Written into transformers' own layers; the experts are those of the same folder without `rest_bits`."""
    folder = made(kind, bits)
    model, plain = load(folder), load(made(kind, 16))
    targets = StreamedModel(str(tiny_model(kind, **KINDS[kind]))).reader.targets
    for name, tensor in numbers(folder).items():
        plain.get_parameter(targets[name][0]).data.copy_(tensor)
    assert {f"{path}.weight" for path in packed(model)} == {targets[name][0] for name in numbers(folder)}
    assert torch.equal(logits(model), logits(plain))
    source, rest = on_disk(tiny_model(kind, **KINDS[kind])), rest_of(folder)
    for name, tensor in numbers(folder).items():
        assert (tensor - source[name]).norm() < {8: 0.007, 4: 0.12}[rest.bits(name)] * source[name].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed(kind: str, made: Callable[..., Path]) -> None:
    folder = made(kind, 4)
    found, rest = set(numbers(folder)), rest_of(folder)
    outer = {name for name in found if ".layers." not in name}
    tails = {name.rpartition("layers.")[2].partition(".")[2].removesuffix(".weight") for name in found - outer}
    assert len(outer) == 2
    assert {rest.bits(name) for name in outer} == {8}
    assert {rest.bits(name) for name in found - outer} == {4}
    assert not [tail for tail in tails if tail.endswith(("gate", "router")) or "norm" in tail or ".experts" in tail]
    expected = {
        "qwen3_moe": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
        "deepseek_v3": {"self_attn.q_a_proj", "self_attn.kv_b_proj", "mlp.gate_proj", "mlp.down_proj"},
        "glm4_moe": {"mlp.shared_experts.gate_proj", "mlp.shared_experts.down_proj"},
        "qwen3_next": {"linear_attn.out_proj"},
    }  # fmt: skip
    assert tails >= expected.get(kind, set())
    assert len(rest.tensors) == len(tails) + len(outer)  # a pattern for all layers


@pytest.mark.parametrize(("kind", "bits"), [("qwen3_moe", 16), ("qwen3_moe", 8), *((kind, 4) for kind in KINDS)])
def test_bytes_are_known_from_the_headers(
    kind: str, bits: int, made: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    model, stored = StreamedModel(str(tiny_model(kind, **KINDS[kind]))), on_disk(made(kind, bits))
    ours = tuple(f"{layer.name}." for layer in model.experts)
    plain = {name: tensor for name, tensor in stored.items() if not name.startswith(ours)}
    assert rest_bytes(model, bits) == sum(t.numel() * t.element_size() for t in plain.values())
    assert len([name for name in plain if name.endswith("_codes")]) == (len(rest_tensors(model)) if bits < 16 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_bytes(dtype: torch.dtype, made: Callable[..., Path]) -> None:
    folder = made(*TIED[:1], 8, torch.bfloat16, **TIED[1])
    model = load(folder, dtype=dtype)
    count = {name: (m.rows, m.columns) for name, m in packed(model).items() if name != "lm_head"}
    resident = sum(p.numel() * p.element_size() for n in count for p in packed(model)[n].parameters())
    assert resident == sum(r * c + r * -(-c // GROUP) * dtype.itemsize for r, c in count.values())
    assert logits(model).dtype == dtype


def test_numbers_are_counted_not_words(made: Callable[..., Path], text_file: Path) -> None:
    found = [evaluate(str(made(TIED[0], b, **TIED[1])), [str(text_file)], max_windows=1, window=16) for b in (16, 8)]
    assert found[0].parameters == found[1].parameters
    assert found[0].expert_parameters == found[1].expert_parameters
    assert found[0].resident_bytes > found[1].resident_bytes


def test_a_tied_head_is_the_embedding(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(TIED[0], 8, **TIED[1])
    assert not [name for name in on_disk(folder) if "lm_head" in name]
    model = load(folder)
    for _ in range(2):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight_codes is embedding.weight_codes
        assert head.weight_scale is embedding.weight_scale
        assert torch.equal(embedding(IDS), head.weight[IDS])
        model.tie_weights()  # as users call it: everything looked up again
    model.save_pretrained(tmp_path)
    assert not [name for name in on_disk(tmp_path) if "lm_head" in name]
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["deepseek_v3", "mixtral"])
def test_a_saved_copy_is_the_same(kind: str, made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(kind, 4)
    load(folder).save_pretrained(tmp_path)
    stored, saved = on_disk(folder), on_disk(tmp_path)
    names = [name for name in stored if name.endswith(("weight_codes", "weight_scale"))]
    assert len(names) == 2 * len(numbers(folder))
    assert all(torch.equal(stored[name], saved[name]) for name in names)
    assert torch.equal(logits(load(tmp_path)), logits(load(folder)))


def test_gradients_reach_what_stays(made: Callable[..., Path]) -> None:
    """Through packed layers to the inputs; norms and factors before them get theirs as with dense ones."""
    folder = made("qwen3_moe", 8)
    model, plain = load(folder), load(made("qwen3_moe", 16))
    for name, tensor in numbers(folder).items():
        plain.get_parameter(name).data.copy_(tensor)
    for each in (model, plain):
        each(input_ids=IDS, labels=IDS).loss.backward()
    norm = "model.layers.0.input_layernorm.weight"
    torch.testing.assert_close(model.get_parameter(norm).grad, plain.get_parameter(norm).grad)
    assert all(m.weight_codes.grad is None for m in packed(model).values())


def test_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = nn.Linear(64, 100)
    layer = QuantisedLinear(dense, 4, GROUP)
    codes, scale = round_to_nearest(dense.weight.data, 4, GROUP)
    layer.weight_codes, layer.weight_scale = nn.Parameter(codes, requires_grad=False), nn.Parameter(scale)
    x = torch.randn(3, 5, 64)
    whole = layer(x)
    torch.testing.assert_close(whole, nn.functional.linear(x, layer.weight, dense.bias))
    monkeypatch.setitem(PART, "cpu", 7 * 64)
    torch.testing.assert_close(layer(x), whole)


def test_models_that_read_a_weight_themselves(made: Callable[..., Path]) -> None:
    model = load(made("qwen3_moe", 8, torch.bfloat16, **WIDE))
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.shape == (260, 64)
    assert model.get_input_embeddings().weight.device == model.device


def test_fp8_sources_and_prediction_layers(
    tiny_model: Callable[..., Path], copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    """FP8 is undone first; what transformers has no place for is kept as it is."""
    source = copied(tiny_model("deepseek_v3", torch.bfloat16, **MLA))
    tensors = on_disk(source)
    extra = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.2." in n}
    fp8 = [name for name in tensors if name.endswith("_proj.weight")]
    for name in fp8:
        rows, columns = tensors[name].shape
        tensors[f"{name}_scale_inv"] = torch.full((-(-rows // 16), -(-columns // 16)), 0.5)
        tensors[name] = (tensors[name].float() / 0.5).to(torch.float8_e4m3fn)
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config["num_nextn_predict_layers"] = 1
    (source / "config.json").write_text(json.dumps(config))
    out = moefactor.compress(str(source), "svd", 0.4, tmp_path / "out", rest_bits=8)
    found, rest = on_disk(out), numbers(out)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    undone = tensors[name].float() * 0.5
    assert name in fp8
    assert rest[name].dtype == torch.bfloat16
    assert (rest[name] - undone).norm() < 0.01 * undone.norm()
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())
    model = StreamedModel(str(source))
    ours = tuple(f"{layer.name}." for layer in model.experts)
    kept = {name: t.numel() * t.element_size() for name, t in found.items() if not name.startswith(ours)}
    assert rest_bytes(model, 8) == sum(kept.values())
    assert rest_bytes(model, 8, without=extra.keys()) == sum(size for name, size in kept.items() if name not in extra)


def test_healing(made: Callable[..., Path], tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    folder = made("qwen3_moe", 8)
    source = str(tiny_model("qwen3_moe", **WIDE))
    heal(folder, source, tmp_path / "out", steps=3, text=str(text_file), seqlen=16, device="cpu")
    before, after = on_disk(folder), on_disk(tmp_path / "out")
    assert before.keys() == after.keys()
    codes = [name for name in before if name.endswith("weight_codes")]
    assert codes
    assert all(torch.equal(before[name], after[name]) for name in codes)


def test_export_dense_gives_the_numbers(made: Callable[..., Path], tiny_model: Callable, tmp_path: Path) -> None:
    folder = made("deepseek_v3", 8)
    export_dense(str(folder), tmp_path / "dense")
    exported = on_disk(tmp_path / "dense")
    assert exported.keys() == on_disk(tiny_model("deepseek_v3", **MLA)).keys()
    for name, tensor in numbers(folder).items():
        assert torch.equal(exported[name], tensor)
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(load(folder)), atol=1e-3, rtol=1e-3)


def test_no_rule_of_parallelism_cuts_words(made: Callable[..., Path]) -> None:
    model = load(made("qwen3_moe", 8))
    assert not model._tp_plan
    assert not model._ep_plan


def test_readers_of_the_first_version_refuse(made: Callable[..., Path]) -> None:
    """They would leave `rest` out, and have embeddings at random."""
    versions = [json.loads((made("qwen3_moe", bits) / "config.json").read_text()) for bits in (16, 8)]
    assert [config["quantization_config"]["format_version"] for config in versions] == [1, 2]


def test_engines_are_given_numbers(made: Callable[..., Path]) -> None:
    """Whatever the order of codes and scales, which may lie in different shards; in the dtype that is served."""
    folder = made("qwen3_moe", 8)
    stored, rest = on_disk(folder), rest_of(folder)
    for names in (sorted(stored), sorted(stored, reverse=True), sorted(stored, key=lambda n: (n[-5:], n))):
        found = dict(unpacked(((name, stored[name]) for name in names), rest, torch.float32))
        expected = numbers(folder)
        assert found.keys() == expected.keys() | {n for n in stored if not n.endswith(("t_codes", "t_scale"))}
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    stored.pop("lm_head.weight_scale")
    with pytest.raises(UserError, match=r"lm_head.weight: its codes or its scales are missing"):
        dict(unpacked(iter(stored.items()), rest, torch.float32))


def test_wrappers(tmp_path: Path) -> None:
    """Names on disk that are others in the wrapper and in its text model alone; towers stay as they are."""
    if "qwen3_5_moe" not in CONFIG_MAPPING:
        pytest.skip("transformers has no qwen3_5_moe")
    vision = {"hidden_size": 64, "intermediate_size": 64, "depth": 1, "num_heads": 4, "out_hidden_size": 64}
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    text = {
        **COMMON, **QWEN, **WIDE, **linear, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 64,
        "num_hidden_layers": 4,
    }  # fmt: skip
    config = CONFIG_MAPPING["qwen3_5_moe"](text_config=text, vision_config=vision)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    out = moefactor.compress(str(tmp_path / "m"), "svd", 0.25, tmp_path / "out", rest_bits=8)
    found = set(numbers(out))
    assert {"lm_head.weight", "model.language_model.layers.0.mlp.shared_expert.up_proj.weight"} <= found
    assert not [name for name in found if "visual" in name or "gate.weight" in name]
    wrapper, told = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert len(packed(wrapper)) == len(packed(load(out))) == len(found)
    assert torch.equal(logits(wrapper.eval()), logits(load(out)))


# -- another choice, bad choices -----------------------------------------------------------------------------------


def test_a_run_goes_on_with_other_bits(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """What the layers became stays: bits of the rest concern only writing."""
    source = str(tiny_model("qwen3_moe", **WIDE))
    moefactor.compress(source, "svd", 0.4, tmp_path / "first", run=tmp_path / "run")
    journal = (tmp_path / "run" / "journal.json").read_bytes()
    moefactor.compress(source, "svd", 0.4, tmp_path / "second", run=tmp_path / "run", rest_bits=4)
    assert (tmp_path / "run" / "journal.json").read_bytes() == journal
    assert numbers(tmp_path / "second")
    assert not rest_of(tmp_path / "first").tensors


def test_the_command_line(command: Callable, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source, run = tiny_model("qwen3_moe", **WIDE), tmp_path / "run"
    assert command("compress", source, "-m", "svd", "--rest-bits", 8, "-o", tmp_path / "a", "--run", run)[0] == 0
    assert "--rest-bits 8" in (tmp_path / "a" / "README.md").read_text()
    assert command("factorise", source, "--rest-bits", 8, "-o", tmp_path / "b", "--run", run)[0] == 0
    a, b = on_disk(tmp_path / "a"), on_disk(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("method", "bits", "message"),
    [
        ("svd", 5, "--rest-bits must be one of 16, 8, 4, found 5"),
        ("reap", 8, "moefactor export --quantised"),
    ],
)
def test_refused(
    method: str, bits: int, message: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    text = {"calibration": str(text_file)} if method == "reap" else {}
    with pytest.raises(UserError, match=message):
        moefactor.compress(str(tiny_model("qwen3_moe")), method, 0.5, tmp_path / "out", rest_bits=bits, **text)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite(
    tiny_model: Callable[..., Path], copied: Callable[[Path], Path], tmp_path: Path
) -> None:  # fmt: skip
    source = copied(tiny_model("qwen3_moe", **WIDE))
    name = "model.layers.1.self_attn.q_proj.weight"
    file = source / json.loads((source / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name}: has values that are not finite"):
        moefactor.compress(str(source), "svd", 0.4, tmp_path / "out", rest_bits=8)


def without(part: str) -> Callable[[dict, dict], None]:
    def change(config: dict, tensors: dict[str, Tensor]) -> None:
        tensors.pop(f"model.layers.1.self_attn.q_proj.weight_{part}")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("codes"), "q_proj.weight_codes: missing from the checkpoint"),
        (without("scale"), "q_proj.weight_scale: missing from the checkpoint"),
        (lambda config, tensors: config["rest"].update(group=0), "group 0 does not fit"),
        (lambda config, tensors: config["rest"]["tensors"].update({"lm_head.weight": 9}), "'lm_head.weight' must be"),
        (lambda config, tensors: config["rest"].pop("tensors"), "'tensors' is missing"),
    ],
)
def test_a_folder_that_was_damaged(
    change: Callable, message: str, made: Callable[..., Path], copied: Callable[[Path], Path]
) -> None:
    folder = copied(made("qwen3_moe", 8))
    config, tensors = json.loads((folder / "config.json").read_text()), on_disk(folder)
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load(folder)
