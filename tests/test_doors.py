"""A folder is what transformers says it is; what is written is whole and loads with the class that its config names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moefactor
from layers import Experts
from models import IDS, load, logits, on_disk
from moefactor.checkpoint import INDEX, WEIGHTS, Checkpoint
from moefactor.discover import find_experts
from moefactor.errors import UserError
from moefactor.experts import ExpertLayer
from moefactor.healing import trainable
from moefactor.run_folder import RunFolder
from moefactor.stages import Recipe, Run
from moefactor.stats import LayerStats
from moefactor.streaming import StreamedModel, _observed_forward
from tiny import COMMON, MLA, QWEN, TINY, build, tokenizer

MOE = {"moe_intermediate_size": 24, "intermediate_size": 40, "num_experts_per_tok": 2, "head_dim": 8}
SPARSE = {
    **MLA,
    **MOE,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 4,
}
INDEXED = {"index_topk": 16, "index_n_heads": 2, "index_head_dim": 16}
ODD: dict[str, tuple[str, dict]] = {
    # Layers hand indices on, every other one makes its own.
    "glm_moe_dsa": ("glm_moe_dsa", {**SPARSE, **INDEXED, "index_topk_freq": 2, "index_skip_topk_offset": 1}),
    # The router's hidden states go from layer to layer, and gradients back.
    "zaya": ("zaya", {**MOE, "num_experts": 8, "num_experts_per_tok": 1, "router_hidden_size": 16, "head_dim": 16}),
    # What a layer is given is made of what several before it put out.
    "inkling2_text": (
        "inkling2_text",
        {**MOE, "n_routed_experts": 8, "n_shared_experts": 1, "num_hidden_layers": 4, "unpadded_vocab_size": 260,
         "n_layers_per_attn_res_block": 2, "head_dim": 16},
    ),
    # q, k and v are one tensor on disk, three in the model.
    "sarvam_moe": ("sarvam_moe", {**MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "hunyuan": ("hunyuan_v1_moe", {"intermediate_size": 24, "num_experts": 8, "moe_topk": 2, "head_dim": 8}),
    # intermediate_size is the experts' width and that of dense layers.
    "jamba": (
        "jamba",
        {"intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 2, "expert_layer_period": 2,
         "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    # q_norm and k_norm have as many entries as there are experts.
    "gemma4_text": (
        "gemma4_text",
        {**MOE, "num_experts": 8, "top_k_experts": 2, "enable_moe_block": True, "global_head_dim": 16,
         "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
         "num_kv_shared_layers": 0, "sliding_window": 16, "vocab_size_per_layer_input": 260,
         "num_global_key_value_heads": 2},
    ),
    # The router has outputs for shared experts too.
    "inkling_text": ("inkling_text", {**MOE, "n_routed_experts": 8, "n_shared_experts": 1, "head_dim": 16}),
    # A table of expert numbers for every token.
    "deepseek_v4": ("deepseek_v4", {**SPARSE, **INDEXED, "head_dim": 16, "sliding_window": 16}),
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 4,
    "num_heads": 4, "out_hidden_size": 32, "patch_size": 14, "num_position_embeddings": 16, "spatial_merge_size": 2,
    "deepstack_visual_indexes": [0], "head_dim": 8, "num_key_value_heads": 4, "position_embedding_size": 64,
}  # fmt: skip
AUDIO = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "output_proj_dims": 32, "num_mel_bins": 16,
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32, "output_dim": 32,
    "downsample_hidden_size": 16, "n_window": 10,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 32, "num_hidden_layers": 4,
}  # fmt: skip
# Wrapper -> its text model's fields. The audio tower of gemma4 has infinities in buffers; qwen3_omni initialises its
# experts by name while it is loaded; qwen3_5 has a text model of its own that reads the same folder.
WRAPPERS = {
    "qwen3_5_moe": {**QWEN, **LINEAR},
    "qwen3_omni_moe_thinker": QWEN,
    "gemma4": ODD["gemma4_text"][1] | {"layer_types": ["sliding_attention", "full_attention"]},
}
# Prediction layers: what DeepSeek, GLM and Kimi name them, and what Qwen and Nemotron do.
NUMBERED, NAMED = "model.layers.3.", "mtp.layers.0."


@pytest.fixture(scope="module", autouse=True)
def _with_odd_kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for kind, made in ODD.items():
            patch.setitem(TINY, kind, made)
        yield


def known(kind: str) -> None:
    if ODD.get(kind, TINY.get(kind, (kind,)))[0] not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {kind}")


def change_config(folder: Path, **fields: object) -> dict:
    """None removes a field."""
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | fields).items() if v is not None}
    path.write_text(json.dumps(config))
    return config


def compressed(source: Path, method: str, ratio: float, out: Path, text_file: Path, **options: object) -> Path:
    text = {"calibration": str(text_file), "samples": 3, "seqlen": 16, "own_text": 0.0} if method != "svd" else {}
    return moefactor.compress(str(source), method, ratio, out, **text, **options)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


# -- which tensors a folder has --------------------------------------------------------------------------------------


def test_a_single_file_wins_over_an_index(tiny_model: Callable[..., Path], copied: Callable) -> None:
    folder = copied(tiny_model("mixtral"))
    assert (folder / INDEX).is_file()
    save_file({n: t + 1 for n, t in on_disk(folder).items()}, folder / WEIGHTS, metadata={"format": "pt"})
    whole, streamed = load(folder), StreamedModel(str(folder))
    with streamed.loaded("model.layers.0.mlp.experts") as experts:
        assert torch.equal(experts.down_proj, whole.model.layers[0].mlp.experts.down_proj)


def test_what_an_index_forgets_is_read_from_its_shard(tiny_model: Callable[..., Path], copied: Callable) -> None:
    folder = copied(tiny_model("mixtral"))
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert load(folder) is not None
    assert "model.norm.weight" in Checkpoint(folder).files


def test_the_file_that_the_config_names(tiny_model: Callable[..., Path], copied: Callable) -> None:
    folder = copied(tiny_model("mixtral"))
    tensors = {n: t + 1 for n, t in on_disk(folder).items()}
    save_file(tensors, folder / "other.safetensors", metadata={"format": "pt"})
    change_config(folder, transformers_weights="other.safetensors")
    assert set(Checkpoint(folder).files.values()) == {folder / "other.safetensors"}
    moefactor.compress(str(folder), "svd", 0.4, folder.parent / "out")
    assert torch.equal(load(folder.parent / "out").model.norm.weight, load(folder).model.norm.weight)


def test_dtype_is_the_weights_own_where_the_config_has_none(
    tiny_model: Callable[..., Path], copied: Callable, tmp_path: Path
) -> None:
    folder = copied(tiny_model("mixtral", torch.bfloat16))
    change_config(folder, dtype=None)
    assert moefactor.inspect(str(folder)).dtype == "bfloat16"
    out = moefactor.compress(str(folder), "svd", 0.4, tmp_path / "out")
    assert {t.dtype for t in on_disk(out).values()} == {torch.bfloat16}
    moefactor.export_dense(str(out), tmp_path / "dense")
    assert {t.dtype for t in on_disk(tmp_path / "dense").values()} == {torch.bfloat16}


def test_one_tensor_on_disk_for_several_in_the_model(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    known("sarvam_moe")
    source = tiny_model("sarvam_moe")
    targets = StreamedModel(str(source)).reader.targets
    fused = [name for name, found in targets.items() if len(found) == 3]
    assert len(fused) == 2
    out = moefactor.compress(str(source), "svd", 0.1, tmp_path / "out")
    moefactor.export_dense(str(out), tmp_path / "dense")
    stored, published = on_disk(tmp_path / "dense"), on_disk(source)
    assert stored.keys() == published.keys()
    assert all(same(stored[name], published[name]) and same(on_disk(out)[name], published[name]) for name in fused)
    assert torch.isfinite(logits(load(out))).all()


def test_a_number_for_every_layer(tiny_model: Callable[..., Path], copied: Callable, tmp_path: Path, text_file: Path):
    folder = copied(tiny_model("hunyuan"))
    change_config(folder, moe_topk=[2, 1], moe_intermediate_size=[24, 24], num_shared_expert=[1, 1])
    assert find_experts(load(folder), "m")[0].fewest_experts == 2
    out = compressed(folder, "reap", 0.5, tmp_path / "out", text_file)
    assert load(out).config.num_experts == 4


@pytest.mark.parametrize("stored", ["embedding", "head", "both", "two"])
def test_tied_weights_are_tied_as_transformers_ties_them(
    stored: str, tmp_path: Path, copied: Callable, text_file: Path
) -> None:
    """Either of them on disk, or both; what differs is not tied. The gradient that comes back tells which was used."""
    folder = build("qwen3_moe", tmp_path / "m", tie_word_embeddings=True)
    tensors, embedding, head = on_disk(folder), "model.embed_tokens.weight", "lm_head.weight"
    if stored == "head":
        tensors[head] = tensors.pop(embedding)
    elif stored != "embedding":
        tensors[head] = tensors[embedding].clone() * (2 if stored == "two" else 1)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    whole, streamed = load(folder), StreamedModel(str(folder))
    whole.requires_grad_(True)
    states = whole.model.layers[-1].register_forward_hook(lambda module, args, out: out.retain_grad())
    seen = []
    whole.model.layers[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    found = whole(input_ids=IDS, use_cache=False).logits[:, :-1]
    cross_entropy(found.transpose(1, 2), IDS[:, 1:], reduction="sum").backward()
    states.remove()
    activations = streamed.embed([IDS])
    for name in streamed.decoder_layers:
        with streamed.loaded(name):
            streamed.run(name, activations)
    torch.testing.assert_close(activations.states[0], seen[0], atol=1e-4, rtol=1e-4)
    (gradient,) = streamed.loss_gradients([IDS], activations)
    torch.testing.assert_close(gradient, seen[0].grad, atol=1e-4, rtol=1e-4)
    out = moefactor.compress(str(folder), "svd", 0.1, tmp_path / "out")
    assert on_disk(out).keys() & {embedding, head} == tensors.keys() & {embedding, head}
    assert torch.equal(load(out).lm_head.weight, whole.lm_head.weight)


# -- layers that hand on more than hidden states ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["glm_moe_dsa", "zaya", "gemma4_text"])
def test_what_layers_hand_on_goes_forward_and_gradients_come_back(kind: str, tiny_model: Callable[..., Path]) -> None:
    known(kind)
    streamed, whole = StreamedModel(str(tiny_model(kind))), load(tiny_model(kind))
    whole.requires_grad_(True)
    entering: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: object, args: tuple, kwargs: dict) -> None:
            entering[name] = args[0] if args else kwargs["hidden_states"]
            entering[name].retain_grad()

        return hook

    for name in streamed.decoder_layers:
        whole.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
    found = whole(input_ids=IDS, use_cache=False).logits[:, :-1]
    cross_entropy(found.transpose(1, 2), IDS[:, 1:], reduction="sum").backward()
    batches = [IDS[:1], IDS[1:]]
    activations, kept = streamed.embed(batches), []
    for name in streamed.decoder_layers:
        kept.append([t.clone() for t in activations.tensors()])
        torch.testing.assert_close(torch.cat(activations.states), entering[name], atol=1e-4, rtol=1e-4)
        with streamed.loaded(name):
            streamed.run(name, activations)
    flowing = streamed.loss_gradients(batches, activations)
    for name, tensors in reversed(list(zip(streamed.decoder_layers, kept, strict=True))):
        activations.enter(tensors)
        with streamed.loaded(name):
            streamed.backward(name, activations, flowing)
        expected = entering[name].grad
        torch.testing.assert_close(torch.cat(flowing), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def test_models_that_do_more_between_layers_are_refused(tmp_path: Path, text_file: Path) -> None:
    known("inkling2_text")
    source = build("inkling2_text", tmp_path / "m")
    with pytest.raises(UserError, match="between its decoder layers"):
        compressed(source, "whitened_svd", 0.1, tmp_path / "out", text_file)
    assert torch.isfinite(logits(load(moefactor.compress(str(source), "svd", 0.1, tmp_path / "out")))).all()


def test_output_gradients_are_those_before_the_norm() -> None:
    module, stats = (
        Experts(nn.RMSNorm(6)),
        LayerStats.zeros(ExpertLayer("experts", "layer", 3, 4, 6), {"output_gradient"}),
    )
    module.gradient_observer = stats
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ids, weights = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [0, 1]]), torch.rand(5, 2)
    upstream = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    _observed_forward(module, x, ids, weights).backward(upstream)
    expected = torch.zeros(3, 6, 6)
    for token in range(5):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            h = module._apply_gate(module.gate_up_proj[expert] @ x[token])
            y = (module.down_proj[expert] @ h).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(module.post_expert_norm(y), y, weight * upstream[token])
            expected[expert] += torch.outer(gradient, gradient)
    torch.testing.assert_close(stats.output_gradient, expected, rtol=1e-4, atol=1e-5)


# -- smaller models that load ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jamba", "hunyuan", "deepseek_v3"])
def test_a_width_that_others_take_too_is_not_narrowed_in_the_config(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    out = compressed(tiny_model(kind), "channels", 0.5, tmp_path / "out", text_file, widths="model")
    assert torch.isfinite(logits(load(out))).all()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "moefactor"


def test_what_has_as_many_entries_as_there_are_experts_is_no_router(
    tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    known("gemma4_text")
    source = tiny_model("gemma4_text")
    dense = load(source)
    assert dense.model.layers[0].self_attn.q_norm.weight.shape == (8,)
    out = compressed(source, "reap", 0.5, tmp_path / "out", text_file)
    found, published = on_disk(out), on_disk(source)
    changed = {n.partition(".layers.")[2][2:] for n in published if n in found and found[n].shape != published[n].shape}
    assert changed == {"experts.gate_up_proj", "experts.down_proj", "router.proj.weight", "router.per_expert_scale"}
    rest = [n for n in published if "experts." not in n and "router." not in n]
    assert all(same(found[name], published[name]) for name in rest)
    assert torch.isfinite(logits(load(out))).all()
    healed = trainable(load(compressed(source, "svd", 0.1, tmp_path / "svd", text_file)), IDS)
    assert {n.rpartition("layers.")[2][2:] for n in healed if "router" in n} >= {"router.proj.weight"}
    assert not [n for n in healed if "self_attn" in n]


@pytest.mark.parametrize("kind", ["inkling_text", "deepseek_v4"])
def test_experts_that_cant_be_dropped_are_refused_before_anything_runs(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    known(kind)
    with pytest.raises(UserError, match=r"its experts can't be dropped.*reap --intercept"):
        moefactor.compress(str(tiny_model(kind)), "reap", 0.5, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["svd", "reap"])
def test_names_that_begin_like_the_experts_are_kept(
    method: str, tiny_model: Callable[..., Path], copied: Callable, tmp_path: Path, text_file: Path
) -> None:
    """A tensor that transformers does not build, and one in the experts' own module."""
    folder = copied(tiny_model("qwen3_moe"))
    extra = {
        "model.layers.1.mlp.experts.scale": torch.randn(8, 3),
        "model.layers.1.mlp.experts_mask.weight": torch.arange(8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([1.0, float("inf")]),
    }
    save_file(on_disk(folder) | extra, folder / WEIGHTS, metadata={"format": "pt"})
    out = compressed(folder, method, 0.25, tmp_path / "out", text_file)
    folders = [out]
    if method == "svd":
        folders.append(moefactor.export_dense(str(out), tmp_path / "dense"))
    for written in folders:
        found = on_disk(written)
        assert all(same(found[name], tensor) for name, tensor in extra.items())


def test_every_way_to_the_stages_checks_that_experts_can_be_dropped(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """`compare` reaches them without compress's own look."""
    known("inkling_text")
    streamed = StreamedModel(str(tiny_model("inkling_text")))
    with pytest.raises(UserError, match="its experts can't be dropped"):
        Run(streamed, Recipe.of("reap", {}, ratio=0.5), RunFolder(tmp_path / "r")).all(tmp_path / "o")
    assert not list(tmp_path.iterdir())


# -- prediction layers -----------------------------------------------------------------------------------------------


def with_prediction(source: Path, folder: Path, prefix: str, **fields: object) -> tuple[Path, dict[str, Tensor]]:
    """A copy with a prediction layer made of the last decoder layer's names, other numbers in it."""
    shutil.copytree(source, folder)
    tensors = on_disk(folder)
    last = f"model.layers.{json.loads((folder / 'config.json').read_text())['num_hidden_layers'] - 1}."
    extra = {n.replace(last, prefix): t.flip(0).contiguous() for n, t in tensors.items() if n.startswith(last)}
    extra[prefix + "enorm.weight"] = torch.ones(32)
    save_file(tensors | extra, folder / WEIGHTS, metadata={"format": "pt"})
    change_config(folder, **fields)
    return folder, extra


@pytest.fixture(params=["numbered", "named"])
def predicting(request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path: Path) -> tuple:
    """folder, its prediction layer's tensors, prefix, the field that promises it, the field that counts experts."""
    if request.param == "numbered":
        field, count, prefix, kind = "num_nextn_predict_layers", "n_routed_experts", NUMBERED, "deepseek_v3"
    else:
        field, count, prefix, kind = "mtp_num_hidden_layers", "num_experts", NAMED, "qwen3_next"
    folder, extra = with_prediction(tiny_model(kind), tmp_path / "m", prefix, **{field: 1})
    return folder, extra, prefix, field, count


def test_prediction_layers_stay_where_experts_stay_as_many(predicting: tuple, tmp_path: Path) -> None:
    folder, extra, _, field, _ = predicting
    out = moefactor.compress(str(folder), "svd", 0.25, tmp_path / "out")
    moefactor.export_dense(str(out), tmp_path / "dense")
    for written in (out, tmp_path / "dense"):
        assert all(same(on_disk(written)[name], tensor) for name, tensor in extra.items())
        assert json.loads((written / "config.json").read_text())[field] == 1
    assert torch.isfinite(logits(load(out))).all()


def test_prediction_layers_lose_as_many_experts(predicting: tuple, tmp_path: Path, text_file: Path) -> None:
    """The largest ones by weights, their rows of the router with them."""
    folder, extra, prefix, field, count = predicting
    out = compressed(folder, "reap", 0.5, tmp_path / "out", text_file)
    config, found = json.loads((out / "config.json").read_text()), on_disk(out)
    assert config[field] == 1
    assert config[count] == 4
    experts = prefix + "mlp.experts."
    assert {n.removeprefix(experts).split(".")[0] for n in found if n.startswith(experts)} == set("0123")
    sizes = [
        extra[f"{experts}{e}.up_proj.weight"].norm() * extra[f"{experts}{e}.down_proj.weight"].norm() for e in range(8)
    ]
    groups = [range(4), range(4, 8)] if "n_group" in config and config["n_group"] == 2 else [range(8)]
    each = 4 // len(groups)
    kept = sorted(e for group in groups for e in sorted(group, key=lambda e: -sizes[e])[:each])
    for new, old in enumerate(kept):
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert same(found[f"{experts}{new}.{part}.weight"], extra[f"{experts}{old}.{part}.weight"])
    assert same(found[prefix + "mlp.gate.weight"], extra[prefix + "mlp.gate.weight"][kept])
    rest = [n for n in extra if ".mlp.experts." not in n and ".mlp.gate." not in n]
    assert all(same(found[name], extra[name]) for name in rest)
    assert torch.isfinite(logits(load(out))).all()


def test_prediction_layers_become_as_narrow(tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    folder, extra = with_prediction(tiny_model("qwen3_moe"), tmp_path / "m", NAMED, mtp_num_hidden_layers=1)
    out = compressed(folder, "channels", 0.5, tmp_path / "out", text_file, widths="model")
    found, width = on_disk(out), json.loads((out / "config.json").read_text())["moe_intermediate_size"]
    assert width == 12
    name = NAMED + "mlp.experts.5."
    up, down = extra[name + "up_proj.weight"], extra[name + "down_proj.weight"]
    channels = (up.norm(dim=1) * down.norm(dim=0)).topk(width).indices.sort().values
    assert same(found[name + "up_proj.weight"], up[channels])
    assert same(found[name + "gate_proj.weight"], extra[name + "gate_proj.weight"][channels])
    assert same(found[name + "down_proj.weight"], down[:, channels])
    assert torch.isfinite(logits(load(out))).all()


def test_prediction_layers_left_out(predicting: tuple, tmp_path: Path, text_file: Path) -> None:
    folder, extra, _, field, _ = predicting
    for method in ("svd", "reap"):
        out = compressed(folder, method, 0.25, tmp_path / method, text_file, drop_mtp=True)
        assert not on_disk(out).keys() & extra.keys()
        assert json.loads((out / "config.json").read_text())[field] == 0


def test_prediction_layers_that_cant_be_cut_are_refused_before_anything_runs(
    tiny_model: Callable[..., Path], copied: Callable, tmp_path: Path
) -> None:
    folder = copied(tiny_model("qwen3_moe"))
    extra = {"mtp.layers.0.ffn.experts.w13": torch.randn(8, 48, 32)}
    save_file(on_disk(folder) | extra, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"mtp\.layers\.0\.ffn\.experts\.w13.*--drop-mtp"):
        moefactor.compress(str(folder), "reap", 0.25, tmp_path / "out")
    assert not (tmp_path / "out.run").exists()


def test_there_must_be_something_to_drop(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no multi-token-prediction layers"):
        moefactor.compress(str(tiny_model("mixtral")), "svd", 0.25, tmp_path / "out", drop_mtp=True)


# -- wrappers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model, tiny, with its towers."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param) / "m"
    known(kind)
    config_class, text = CONFIG_MAPPING[kind], {**COMMON, **WRAPPERS[request.param]}
    towers = {"vision_config": VISION, "audio_config": AUDIO}
    own = {
        name: {k: v for k, v in towers[name].items() if hasattr(part, k) or k in part.__annotations__}
        for name, part in config_class.sub_configs.items()
        if name in towers
    }
    torch.manual_seed(0)
    config = config_class(text_config=text, **own)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim == 3 else parameter.nan_to_num_()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("method", "options"), [("svd", {}), ("reap", {}), ("channels", {"widths": "model"})])
def test_towers_come_along(method: str, options: dict, wrapper: Path, tmp_path: Path, text_file: Path) -> None:
    out = compressed(wrapper, method, 0.25, tmp_path / "out", text_file, **options)
    found, published = on_disk(out), on_disk(wrapper)
    towers = [name for name in published if "visual" in name or "tower" in name]
    assert towers
    assert all(same(found[name], published[name]) for name in towers)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, wrapper))
    assert config["model_type"] == before["model_type"]
    assert config["architectures"] == before["architectures"]
    model, told = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert type(model).__name__ == config["architectures"][0]
    assert torch.isfinite(logits(model.eval())).all()
    if AutoConfig.for_model(before["model_type"]).model_type == "qwen3_5_moe":
        torch.testing.assert_close(logits(load(out)), logits(model), atol=1e-4, rtol=1e-4)  # the text model alone
