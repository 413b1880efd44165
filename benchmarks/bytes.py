"""The best loss at any file size: factorising, few bits, and both, against plain quantising.

    python benchmarks/bytes.py                                   every row, calibrated on text like what is measured
    python benchmarks/bytes.py --rows planner "round to nearest" --calibrations like,unlike
    python benchmarks/bytes.py --model results/second-moe --output results/bytes-second.json
    python benchmarks/bytes.py --draw results/bytes.svg          what is in the JSON, with the Pareto front

A row is a way to make a model smaller, at one of several sizes. Bits are those of everything stored for the routed
experts, codes, scales, bases and mixing, over the dense experts' parameters; the rest of the model is as it was.
Perplexity over dense is the geometric mean of five texts, 96 windows each; KL divergence from the dense model and
how often the likeliest token is the same come from the same windows. Prints a table as it goes and writes JSON; rows
that are there are not run again.

`round to nearest` rounds the dense experts in groups of 32, a scale searched for each. Calibration has no part in it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import moefactor
from moefactor.fitting.rounding import Grid
from moefactor.streaming import StreamedModel
from quality import CALIBRATIONS, GIVEN, MODEL, ROOT, TEXTS, calibration_of

SIZES = (4.5, 3.6, 2.8, 2.3, 1.8)


def compressed(method: str, **options: object):
    """A row made by `compress`."""

    def make(model: Path, calibration: str | None, folder: Path) -> Path:
        return moefactor.compress(
            str(model), method, output=folder / "out", calibration=calibration, samples=256, seqlen=256,
            **GIVEN, **options,
        )  # fmt: skip

    return make


def nearest(bits: int, group: int = 32):
    """The dense model with its experts rounded to nearest, as numbers again."""

    def make(model: Path, calibration: str | None, folder: Path) -> Path:
        grid = Grid(bits, group)

        def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if ".experts." not in name or tensor.ndim < 2:
                return tensor
            return grid.rounded(tensor.float(), grid.scales(tensor)).contiguous()

        out = folder / "out"
        out.mkdir()
        for path in model.iterdir():
            if path.suffix == ".safetensors":
                tensors = {name: rounded(name, tensor) for name, tensor in load_file(path).items()}
                save_file(tensors, out / path.name, metadata={"format": "pt"})
            elif path.is_file():
                (out / path.name).write_bytes(path.read_bytes())
        return out

    make.bits = bits + 16 / group  # type: ignore[attr-defined]  # the folder does not show it
    return make


ROWS: dict[str, dict[str, object]] = {
    "round to nearest": {str(bits): nearest(bits) for bits in (8, 5, 4, 3, 2)},
    "refined, nothing removed": {str(bits): compressed("biaxial", bits=bits) for bits in (4, 3, 2)},
    "reap": {f"{r}, 4 bits": compressed("reap", ratio=r, bits=4) for r in (0.2, 0.4)},
    "channels": {f"{r}, 4 bits": compressed("channels", ratio=r, bits=4) for r in (0.2, 0.4, 0.6)},
    "standard": {f"{r}, 4 bits": compressed("biaxial", form="standard", ratio=r, bits=4) for r in (0.2, 0.4)},
    **{
        form: {
            f"{r}, {bits} bits": compressed("biaxial", form=form, ratio=r, bits=bits)
            for r, bits in ((0.2, 4), (0.4, 4), (0.4, 3), (0.6, 4))
        }
        for form in ("fast", "linear", "tight")
    },
    "16 bits": {f"fast {r}": compressed("biaxial", form="fast", ratio=r) for r in (0.2, 0.4, 0.6)},
    "planner": {f"--bpw {size}": compressed("biaxial", bpw=size) for size in SIZES},
}  # fmt: skip


def bits_of(folder: Path, dense: int) -> float:
    """Of what is stored for the experts, over the dense experts' parameters."""
    stored = sum(
        tensor.nbytes
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if ".experts." in name
    )
    return 8 * stored / dense


def measured(folder: Path, dense: Path, data: Path, baseline: Path) -> dict:
    texts = [str(data / file) for file in TEXTS.values()]
    found = moefactor.evaluate_against(
        str(folder), str(dense), texts, baseline=baseline, window=256, max_windows=96, dtype="float32"
    )
    rise = math.log(found.model.mean_perplexity) - math.log(found.dense.mean_perplexity)
    return {
        "perplexity": math.exp(rise),
        "texts": dict(zip(TEXTS, found.model.perplexity.values(), strict=True)),
        "planned": None if found.model.expected_loss is None else math.exp(found.model.expected_loss),
        **{name: list(vars(getattr(found.overall, name)).values()) for name in ("kl", "agreement")},
    }


def run_row(make, model: Path, calibration: str | None, data: Path, baseline: Path, experts: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        out = make(model, calibration, Path(folder))
        seconds = time.perf_counter() - started
        bits = getattr(make, "bits", None) or bits_of(out, experts)
        return {"bits": bits, "seconds": seconds, **measured(out, model, data, baseline)}


def front(results: dict, text: str) -> list[str]:
    """Names of the rows that no other beats in both bits and perplexity."""
    rows = sorted((r["bits"], r["perplexity"], key) for key, r in results.items() if key.endswith(text) and "bits" in r)
    best, found = math.inf, []
    for _, perplexity, key in rows:
        if perplexity < best:
            best = perplexity
            found.append(key)
    return found


def draw(results: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, text in zip(axes, ("like", "unlike"), strict=True):
        for label in dict.fromkeys(key.split("/")[0] for key in results):
            rows = [r for key, r in results.items() if key.startswith(f"{label}/") and key.endswith(f"/{text}")]
            points = sorted((r["bits"], r["perplexity"] - 1) for r in rows if "bits" in r)
            if points:
                wide = label == "planner"
                axis.plot(*zip(*points, strict=True), "o-", label=label, lw=2.5 if wide else 1, ms=5 if wide else 3)
        best = [results[key] for key in front(results, f"/{text}")]
        axis.plot([r["bits"] for r in best], [r["perplexity"] - 1 for r in best], "k:", lw=1, label="Pareto front")
        axis.set(xlabel="bits a parameter of the experts", title=f"calibrated on text {text} what is measured")
        axis.set_yscale("log")
        axis.set_xlim(1.5, 6)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity over dense, minus 1")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rows", nargs="+", help="default all; a row matches by its beginning: planner, 'fast/0.4'")
    parser.add_argument("--calibrations", default="like", help=f"comma-separated, of {', '.join(CALIBRATIONS)}")
    parser.add_argument("--output", type=Path, default=Path("results/bytes.json"))
    parser.add_argument("--draw", type=Path, help="only draw what is in --output")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if arguments.draw:
        draw(results, arguments.draw)
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    baseline = arguments.output.with_suffix(".baseline")
    experts = sum(layer.parameter_count for layer in StreamedModel(str(arguments.model), "cpu").experts)
    print(f"{'':26}{'':18}{'text':>8}{'bits':>7}{'× dense':>9}{'planned':>9}{'KL':>8}{'top-1':>8}{'seconds':>9}")
    for label, sizes in ROWS.items():
        for size, make in sizes.items():
            if arguments.rows and not f"{label}/{size}".startswith(tuple(arguments.rows)):
                continue
            for text in arguments.calibrations.split(","):
                key = f"{label}/{size}/{text}"
                if "bits" not in results.get(key, {}):
                    try:
                        calibration = calibration_of(text, arguments.data)
                        row = run_row(make, arguments.model, calibration, arguments.data, baseline, experts)
                    except moefactor.UserError as error:
                        row = {"error": str(error)}
                    done = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
                    results = {**done, key: row}  # another process may be at other rows
                    arguments.output.write_text(json.dumps(results, indent=1))
                print(line(label, size, text, results[key]), flush=True)


def line(label: str, size: str, text: str, row: dict) -> str:
    start = f"{label:26}{size:18}{text:>8}"
    if "error" in row:
        return f"{start}   infeasible: {row['error'][:80]}"
    planned = "" if row["planned"] is None else f"{row['planned']:.4f}"
    agreement = f"{row['agreement'][0]:.1%}"
    numbers = f"{row['bits']:7.2f}{row['perplexity']:9.4f}{planned:>9}{row['kl'][0]:8.4f}{agreement:>8}"
    return f"{start}{numbers}{row['seconds']:9.0f}"


if __name__ == "__main__":
    main()
