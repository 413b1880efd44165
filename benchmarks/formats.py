"""What the formats of `export --quantised` cost: perplexity over dense, and bytes. To nearest, nothing calibrated.

    python benchmarks/formats.py                    the reference model, every format
    python benchmarks/formats.py --rows W4A16

The reference model's experts are 48 channels wide, which groups of 16 alone divide. For the other formats they get
further channels of zeros, up to 128, which change nothing but the scales of down: there a group is 48 weights at most.
Bits are those of an expert's parameter, scales and all; bytes those of the model with experts in as many, zeros left
out. Texts and windows as in quality.py. Prints a table as it goes and writes JSON (default results/formats.json); rows
already there are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

import moefactor
from moefactor.checkpoint import Checkpoint, CheckpointWriter
from moefactor.compressed_tensors import SCHEMES, unpack
from quality import MODEL, ROOT, TEXTS, measure

WIDE = 128  # channels of the padded experts
# Row -> scheme, group size, bits of the rest, and whether experts are padded.
ROWS: dict[str, tuple[str, int | None, int, bool]] = {
    "W4A16, groups of 16": ("W4A16", 16, 16, False),
    "W4A16, groups of 32": ("W4A16", 32, 16, True),
    "W4A16, groups of 64": ("W4A16", 64, 16, True),
    "W4A16, groups of 128": ("W4A16", 128, 16, True),
    "W4A16_ASYM, groups of 32": ("W4A16_ASYM", 32, 16, True),
    "W4A16_ASYM, groups of 128": ("W4A16_ASYM", 128, 16, True),
    "W8A16, groups of 32": ("W8A16", 32, 16, True),
    "W8A16, groups of 128": ("W8A16", 128, 16, True),
    "FP8_DYNAMIC": ("FP8_DYNAMIC", None, 16, False),
    "FP8_BLOCK": ("FP8_BLOCK", None, 16, True),
    "NVFP4A16": ("NVFP4A16", None, 16, False),
    "MXFP4A16": ("MXFP4A16", None, 16, True),
    "W4A16, groups of 32, rest in 8": ("W4A16", 32, 8, True),
    "W4A16, groups of 32, rest in 4": ("W4A16", 32, 4, True),
}


def padded(model: Path, out: Path) -> Path:
    """The same function, its experts WIDE channels wide."""
    config = json.loads((model / "config.json").read_text())
    narrow = config["moe_intermediate_size"]
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            missing = WIDE - narrow
            tensors[name] = pad(tensor, (0, missing) if "down_proj" in name else (0, 0, 0, missing))
    with CheckpointWriter(out) as writer:
        writer.add(tensors)
        writer.companions(model)
        writer.text("config.json", json.dumps({**config, "moe_intermediate_size": WIDE}))
    return out


def stored(folder: Path, model: Path) -> tuple[float, float]:
    """Bits of an expert's parameter; bytes of `model` with its experts in as many, over its own."""

    def tensors(of: Path) -> tuple[list[Tensor], list[Tensor]]:
        found = Checkpoint(of)
        every = found.read([name for name in found.files if not name.endswith("_shape")])
        return [t for n, t in every.items() if ".experts." in n], [t for n, t in every.items() if ".experts." not in n]

    (experts, others), (own, rest) = tensors(folder), tensors(model)
    config = json.loads((folder / "config.json").read_text())
    narrow = json.loads((model / "config.json").read_text())["moe_intermediate_size"]
    parameters = sum(t.numel() for t in own)
    bits = 8 * sum(t.nbytes for t in experts) / (parameters * config["moe_intermediate_size"] / narrow)
    size = sum(t.nbytes for t in others) + bits / 8 * parameters
    return bits, size / sum(t.nbytes for t in own + rest)


def decompressed(folder: Path, scheme: str, group_size: int | None, out: Path) -> Path:
    """An ordinary checkpoint again, of what transformers does not read."""
    checkpoint = Checkpoint(folder)
    stored = checkpoint.read(list(checkpoint.files))
    chosen = replace(SCHEMES[scheme], group_size=group_size or SCHEMES[scheme].group_size)
    plain = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    for scale in [name for name in stored if name.endswith("weight_scale")]:
        module = scale.removesuffix("weight_scale")
        parts = {name.removeprefix(module): t for name, t in stored.items() if name.startswith(module)}
        plain[f"{module}weight"] = unpack(parts, chosen)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    with CheckpointWriter(out) as writer:
        writer.add(plain)
        writer.companions(folder)
        writer.text("config.json", json.dumps(config))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rows", nargs="+", default=[""], help="how they begin; default all")
    parser.add_argument("--windows", type=int, default=96, help="of each text, to measure on")
    parser.add_argument("--output", type=Path, default=Path("results/formats.json"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    results.setdefault("dense", measure(arguments.model, arguments.data, arguments.windows))
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(work)
        wide = padded(arguments.model, place / "padded")
        print(f"{'':32} bits  bytes over dense  {'  '.join(f'{text:>9}' for text in TEXTS)}     mean")
        for number, (row, (scheme, group_size, rest, wider)) in enumerate(ROWS.items()):
            if not row.startswith(tuple(arguments.rows)):
                continue
            if row not in results:
                source = wide if wider else arguments.model
                out = moefactor.export_quantised(
                    str(source), place / f"{number}", scheme, group_size=group_size, rest_bits=rest
                )
                readable = scheme not in ("W4A16_ASYM", "FP8_BLOCK", "NVFP4A16")
                loaded = out if readable else decompressed(out, scheme, group_size, place / f"{number} again")
                bits, size = stored(out, arguments.model)
                results[row] = {
                    "bits": bits,
                    "size": size,
                    **measure(loaded, arguments.data, arguments.windows),
                }
                arguments.output.write_text(json.dumps(results, indent=1) + "\n")
            found, dense = results[row], results["dense"]
            ratios = "  ".join(f"{found['perplexity'][text] / dense['perplexity'][text]:9.4f}" for text in TEXTS)
            mean = found["mean"] / dense["mean"]
            print(f"{row:32} {found['bits']:4.2f}  {found['size']:16.3f}  {ratios}  {mean:7.4f}", flush=True)


if __name__ == "__main__":
    main()
