"""Ordinary checkpoints quantised in compressed-tensors' format: what is stored, and what transformers reads of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moefactor
from moefactor.checkpoint import Checkpoint, CheckpointWriter
from moefactor.compressed_tensors import SCHEMES, Rounded, pack, scheme_of, unpack
from moefactor.errors import UserError

pytest.importorskip("compressed_tensors", reason="pip install 'moefactor[quant]'")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

from decompressed import described, group_of, on_disk, rebuilt

WIDE = {
    "hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(24).view(1, -1)).logits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_are_the_librarys_presets(scheme: str) -> None:
    """Names promise what llm-compressor means by them."""
    ours = QuantizationScheme.model_validate(SCHEMES[scheme].described(["Linear"]))
    preset = preset_name_to_scheme(scheme, ["Linear"])
    for part in ("weights", "input_activations"):
        first, second = getattr(ours, part), getattr(preset, part)
        assert (first is None) == (second is None)
        for field in ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"):
            assert first is None or getattr(first, field) == getattr(second, field), field
    compressor = BaseCompressor.get_value_from_registry(SCHEMES[scheme].format)
    assert compressor.can_compress(torch.nn.Linear, ours)


@pytest.mark.parametrize(
    ("scheme", "error", "bits"),
    [
        ("W4A16", 0.103, 4 + 16 / 128), ("W4A16_ASYM", 0.097, 4 + 20 / 128), ("W8A16", 0.0067, 8 + 16 / 128),
        ("FP8_DYNAMIC", 0.027, 8 + 16 / 256), ("FP8_BLOCK", 0.027, 8 + 16 / 128**2), ("NVFP4A16", 0.088, 4 + 8 / 16),
        ("MXFP4A16", 0.113, 4 + 8 / 32),
    ],
)  # fmt: skip
def test_error_and_bits_of_normal_weights(scheme: str, error: float, bits: float) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    stored = pack(weight, SCHEMES[scheme], torch.bfloat16, weight.abs().max().item())
    read = unpack(stored, SCHEMES[scheme])
    assert (read - weight).norm() < error * weight.norm()
    once = {"weight_shape", "weight_global_scale"}
    assert sum(t.nbytes * 8 for name, t in stored.items() if name not in once) == bits * weight.numel()


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_that_are_given_are_stored(symmetric: bool) -> None:
    chosen = scheme_of("int4" if symmetric else "w4a16_asym").fitted([(48, 64)], "", 32)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (48, 64), generator=generator)
    scale = torch.rand(48, 2, generator=generator).bfloat16() + 0.01
    zero = None if symmetric else torch.randint(-8, 8, (48, 2), generator=generator)
    stored = pack(Rounded(codes, scale, zero), chosen, torch.bfloat16, 1.0)
    assert stored["weight_packed"].shape == (48, 64 * 4 // 32)
    moved = codes if zero is None else codes - zero.repeat_interleave(32, 1)
    assert torch.equal(unpack(stored, chosen), moved * scale.float().repeat_interleave(32, 1))


def test_clipping_is_never_farther_away() -> None:
    """The largest weight alone would set the scale."""
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    chosen = scheme_of("W4A16")
    ours = (unpack(pack(weight, chosen, torch.float32, 0.0), chosen) - weight).square().view(256, -1).sum(1)
    scale = weight.abs().amax(1, keepdim=True) / 7.5
    plain = ((weight / scale).round().clamp(-8, 7) * scale - weight).square().sum(1)
    assert (ours <= plain * (1 + 1e-5)).all()
    assert ours.sum() < 0.85 * plain.sum()


@pytest.mark.parametrize(
    ("kind", "scheme", "rest"),
    [
        ("qwen3_moe", "W4A16", 16), ("qwen3_moe", "W4A16", 4), ("qwen3_moe", "W8A16", 8), ("qwen3_moe", "W4A16", 8),
        ("qwen3_moe", "FP8_DYNAMIC", 16), ("qwen3_moe", "MXFP4A16", 16), ("mixtral", "W4A16", 16),
        ("qwen2_moe", "W4A16", 4), ("deepseek_v3", "W4A16", 8), ("olmoe", "W8A16", 16), ("glm4_moe", "W4A16", 4),
    ],
)  # fmt: skip
def test_transformers_reads_what_is_written(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str, scheme: str, rest: int
) -> None:  # fmt: skip
    """By plain from_pretrained, nothing of ours in the way: the logits of the decompressed weights."""
    wide = {k: v for k, v in WIDE.items() if kind in ("qwen3_moe", "qwen2_moe", "glm4_moe") or k != "head_dim"}
    if kind in ("mixtral", "olmoe"):
        wide.pop("moe_intermediate_size")
    if kind == "deepseek_v3":
        wide = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
    source = tiny_model(kind, **wide)
    out = moefactor.export_quantised(str(source), tmp_path / "out", scheme, rest_bits=rest)
    expected = logits(rebuilt(out, tmp_path / "rebuilt"))
    # Experts of floating codes become bfloat16 in transformers, FP8's before 5.23, whatever the model is.
    assert (logits(out) - expected).abs().max() < (1e-2 if SCHEMES[scheme].kind == "float" else 1e-4)
    assert not torch.allclose(expected, logits(source), atol=1e-4)


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "FP8_BLOCK", "NVFP4A16"])
def test_the_library_reads_what_transformers_does_not(
    tiny_model: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:  # fmt: skip
    # The library takes a column of blocks for one of rows.
    wide = {**WIDE, "hidden_size": 256, "moe_intermediate_size": 256} if scheme == "FP8_BLOCK" else WIDE
    source = tiny_model("qwen3_moe", **wide)
    out = moefactor.export_quantised(str(source), tmp_path / "out", scheme)
    dense, read = on_disk(source), on_disk(rebuilt(out, tmp_path / "rebuilt"))
    assert dense.keys() == read.keys()
    for name, tensor in dense.items():
        off = (read[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert (0.005 < off < 0.13) if ".experts." in name else off == 0
    with pytest.raises(UserError, match="transformers does not read"):
        moefactor.evaluate(str(out), [None])


def test_only_experts_are_quantised_and_the_rest_is_kept(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("deepseek_v3", hidden_size=64, moe_intermediate_size=64, intermediate_size=64)
    out = moefactor.export_quantised(str(source), tmp_path / "out", "int4", group_size=32)
    dense, stored = on_disk(source), on_disk(out)
    packed = {name.removesuffix("_packed") for name in stored if name.endswith(".weight_packed")}
    assert packed == {name for name in dense if ".mlp.experts." in name}
    for name in dense.keys() - packed:
        assert torch.equal(stored[name], dense[name])
    config = described(out)
    assert config["config_groups"]["experts"]["weights"]["group_size"] == 32
    assert [group_of(name.removesuffix(".weight"), config) is not None for name in dense] == [
        n in packed for n in dense
    ]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_rounding_of_ones_own(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source, asked = tiny_model("qwen3_moe", **WIDE), []

    def halves(name: str, weight: Tensor) -> Tensor | Rounded:
        asked.append(name)
        if "down_proj" in name:
            return weight / 2
        scale = weight.view(len(weight), -1, 32).abs().amax(2) / 7
        return Rounded((weight / scale.repeat_interleave(32, 1)).round(), scale)

    scheme = replace(SCHEMES["W4A16"], group_size=32)
    out = moefactor.export_quantised(str(source), tmp_path / "out", scheme, rounding=halves)
    dense, read = on_disk(source), on_disk(rebuilt(out, tmp_path / "rebuilt"))
    assert sorted(asked) == sorted(name for name in dense if ".experts." in name)
    name = "model.layers.1.mlp.experts.3.{}_proj.weight"
    assert (read[name.format("down")] - dense[name.format("down")] / 2).norm() < 0.1 * dense[name.format("down")].norm()
    scale = (dense[name.format("up")].view(64, 2, 32).abs().amax(2) / 7).repeat_interleave(32, 1)
    assert torch.allclose(read[name.format("up")], (dense[name.format("up")] / scale).round() * scale)


def test_a_smaller_ordinary_model(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", **WIDE)
    small = moefactor.compress(
        str(source), "channels", 0.5, tmp_path / "small", calibration=str(text_file), samples=4, seqlen=16,
        widths="model", width_multiple=32,
    )  # fmt: skip
    out = moefactor.export_quantised(str(small), tmp_path / "out", "int4")
    assert described(out)["config_groups"]["experts"]["weights"]["group_size"] == 32
    assert (logits(out) - logits(rebuilt(out, tmp_path / "rebuilt"))).abs().max() < 1e-4


def test_prediction_layers_are_left_alone(tiny_model: Callable[..., Path], copied: Callable, tmp_path: Path) -> None:
    """Their names are like those of other layers; config.json says that they are not quantised."""
    folder = copied(tiny_model("deepseek_v3", hidden_size=64, moe_intermediate_size=64, intermediate_size=64))
    stored = on_disk(folder)
    last = {n: t for n, t in stored.items() if n.startswith("model.layers.2.")}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    with CheckpointWriter(tmp_path / "with") as writer:
        writer.add(stored | {n.replace("layers.2.", "layers.3."): t.clone() for n, t in last.items()})
        writer.companions(folder)
        writer.text("config.json", (folder / "config.json").read_text())
    out = moefactor.export_quantised(str(tmp_path / "with"), tmp_path / "out", "int4", rest_bits=4)
    config = described(out)
    assert group_of("model.layers.2.mlp.experts.0.up_proj", config)
    assert group_of("model.layers.3.mlp.experts.0.up_proj", config) is None
    assert "model.layers.3.mlp.experts.0.up_proj.weight" in Checkpoint(out).files


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("qwen3_moe", {"scheme": "int5"}, "Unknown quantisation scheme 'int5'.*Available"),
        ("qwen3_moe", {"scheme": "int4", "rest_bits": 5}, "--rest-bits 5"),
        ("qwen3_moe", {"scheme": "int4", "group_size": 64}, "don't divide .*--width-multiple"),
        ("qwen3_moe", {"scheme": "int4", "group_size": 48}, "--group-size 48: one of 128, 64"),
        ("qwen3_moe", {"scheme": "nvfp4", "group_size": 64}, "leave it out"),
        ("qwen3_moe", {"scheme": "FP8_BLOCK"}, "blocks of"),
        ("granitemoe", {"scheme": "fp8"}, "not the matrix of one expert"),
    ],
)
def test_what_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str, arguments: dict, said: str
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=said):
        moefactor.export_quantised(str(tiny_model(kind)), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_the_command(
    tiny_model: Callable[..., Path], compressed: Callable[..., Path], command: Callable, tmp_path: Path
) -> None:  # fmt: skip
    source, out = tiny_model("qwen3_moe", **WIDE), tmp_path / "out"
    code, said, _ = command("export", source, "--quantised", "Int4", "-o", out, "--group-size", 32, "--rest-bits", 8)
    assert code == 0
    assert "Wrote" in said
    assert described(out)["config_groups"]["rest"]["weights"]["num_bits"] == 8
    for arguments, error in (
        ((compressed("qwen3_moe"), "--quantised", "int4", "-o", tmp_path / "no"), "Compress with --bits"),
        ((out, "--quantised", "int4", "-o", tmp_path / "no"), "quantised with compressed-tensors"),
        ((source, "--quantised", "int4"), "--quantised takes -o"),
        ((source, "--dense", "-o", tmp_path / "no", "--group-size", 32), "--group-size goes with --quantised"),
    ):
        code, _, err = command("export", *arguments)
        assert code == 2
        assert error in " ".join(err.split())
