"""What widths and ranks in multiples cost in perplexity, and one rank for both stacks of a layer.

    python benchmarks/multiples.py                           fast and channels, 20, 40 and 60 %, two calibration texts
    python benchmarks/multiples.py --rows tight --ratios 0.4
    python benchmarks/multiples.py --unrefined                  quick: layers from their statistics alone, not refined

The reference model's experts are 48 channels wide: 4, 8 and 16 of them are to it what 64, 128 and 256 are to the 768 of
Qwen3-30B, whose default is 128. Columns as in quality.py; every row of a text has the same calibration. Prints a table
as it goes and writes JSON (default results/multiples.json); rows already there are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import moefactor
from moefactor.run_folder import RunFolder
from moefactor.stages import Recipe, Run
from moefactor.streaming import StreamedModel
from quality import CALIBRATIONS, MODEL, ROOT, TEXTS, line, measure

WIDTHS, RANKS = (1, 4, 8, 16), (8, 16)
METHODS = {
    "fast": ("biaxial", {"form": "fast"}),
    "channels": ("channels", {}),
    "linear": ("biaxial", {"form": "linear"}),
    "tight": ("biaxial", {"form": "tight"}),
}


def rows_of(name: str) -> dict[str, dict]:
    """Row -> the options that it adds."""
    rows = {f"{name}, widths of {width}": {"width_multiple": width} for width in WIDTHS}
    if name != "channels":
        rows |= {f"{name}, ranks of {rank}": {"rank_multiple": rank} for rank in RANKS}
        rows[f"{name}, widths of 8, ranks of 8"] = {"width_multiple": 8, "rank_multiple": 8}
    if name == "fast":
        rows["fast, latent"] = {"latent": True}
        rows["fast, latent, widths of 4"] = {"latent": True, "width_multiple": 4}
        rows["fast, latent, widths of 8, ranks of 8"] = {"latent": True, "width_multiple": 8, "rank_multiple": 8}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rows", nargs="+", default=["fast", "channels"], help="or how rows begin")
    parser.add_argument("--ratios", default="0.2,0.4,0.6")
    parser.add_argument("--calibrations", default="like,unlike")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--windows", type=int, default=96, help="of each text, to measure on")
    parser.add_argument("--unrefined", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/multiples.json"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    how = f"{arguments.samples} samples, {arguments.windows} windows"
    if f"dense, {how}" not in results:
        results[f"dense, {how}"] = measure(arguments.model, arguments.data, arguments.windows)
    dense = results[f"dense, {how}"]
    header = f"{'':38}{'ratio':>6}{'text':>10}{'kept':>9}" + "".join(f"{t:>10}" for t in TEXTS)
    print(header + f"{'× dense':>9}{'planned':>9}{'seconds':>9}")
    every = {label: (*METHODS[name], added) for name in METHODS for label, added in rows_of(name).items()}
    exact, beginnings = set(arguments.rows) & set(every), tuple(set(arguments.rows) - set(every))
    with tempfile.TemporaryDirectory() as folder:
        for text in arguments.calibrations.split(","):
            for label, (method, options, added) in every.items():
                if label not in exact and not label.startswith(beginnings):
                    continue
                for ratio in map(float, arguments.ratios.split(",")):
                    key = f"{label}/{ratio}/{text}/{how}" + ("/unrefined" if arguments.unrefined else "")
                    if key not in results:
                        calibrated = calibrated_once(Path(folder) / f"{method}-{text}", method, text, arguments)
                        results[key] = run_row(calibrated, method, options | added, ratio, text, arguments)
                        arguments.output.write_text(json.dumps(results, indent=1))
                    print(line(label, ratio, text, results[key], dense), flush=True)


def source_of(text: str, arguments: argparse.Namespace) -> dict:
    return {
        "calibration": str(arguments.data / CALIBRATIONS[text]), "samples": arguments.samples, "seqlen": 256,
        "own_text": 0.0,
    }  # fmt: skip


def calibrated_once(folder: Path, method: str, text: str, arguments: argparse.Namespace) -> Path:
    """A run folder with everything that the method reads of a text."""
    if not folder.exists():
        recipe = Recipe.of(method, {}, **source_of(text, arguments))
        Run(StreamedModel(str(arguments.model), "cpu"), recipe, RunFolder(folder)).calibrate(recipe.all_statistics)
    return folder


def run_row(
    calibrated: Path, method: str, options: dict, ratio: float, text: str, arguments: argparse.Namespace
) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "out"
        shutil.copytree(calibrated, run)
        started = time.perf_counter()
        moefactor.compress(
            str(arguments.model), method, ratio, out, run=run, sequential=not arguments.unrefined,
            **source_of(text, arguments), **options,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        plan = json.loads((out / "plan.json").read_text())
        return {"seconds": seconds, "layers": plan["layers"], **measure(out, arguments.data, arguments.windows)}


if __name__ == "__main__":
    main()
