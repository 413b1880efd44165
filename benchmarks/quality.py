"""What each method costs in perplexity at equal, measured parameter counts.

    python benchmarks/quality.py                            every method, 20 to 60 %, three calibration texts
    python benchmarks/quality.py --ratios 0.4 --rows rfid svd
    python benchmarks/quality.py --rows "biaxial, tight" --calibrations unnamed,own     no text given
    python benchmarks/quality.py --table ablation           the parts of RFID, each off in turn
    python benchmarks/quality.py --table options            options of the peers
    python benchmarks/quality.py --table parts              the parts of biaxial, each off in turn
    python benchmarks/quality.py --model results/second-moe --output results/second.json

Perplexities on the first 96 windows of 256 tokens of each text, and their geometric mean as a multiple of the dense
model's; beside it what the plan expected, where the method foretells it. Prints a table as it goes and writes JSON
(default results/quality.json); rows already there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import moefactor
from moefactor.stages import Recipe
from moefactor.text import OWN

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "reference-moe"
TEXTS = {
    "wikitext2": "wikitext2/test.txt",
    "ptb": "ptb/test.txt",
    "prose": "heldout/prose.txt",
    "code": "heldout/code.txt",
    "reviews": "heldout/reviews.txt",
}
CALIBRATIONS = {
    "like": "calibration-proportional.txt",
    "unlike": "calibration-mix.txt",
    "wikitext2": "wikitext2/valid.txt",
    "own": OWN,  # written by the model
    "unnamed": None,  # what a method reads where no text is given
    "eight": "calibration-proportional.txt",  # its first FEW characters: eight windows
}
FEW = 6_900
THREE = {"projections": "gate,up,down"}
# biaxial mixes text that the model writes itself into what it is given; here every method sees the same text, where
# one is given.
GIVEN = {"own_text": 0}

# Row -> method and options.
METHODS = {
    "svd": ("svd", {}),
    "whitened_svd": ("whitened_svd", {}),
    "shared_basis, plain": ("shared_basis", {"whitened": False}),
    "shared_basis": ("shared_basis", {}),
    "rfid": ("rfid", {}),
    "rfid, three projections, no residual": ("rfid", {**THREE, "residual": 0}),
    "mobe, gate and up": ("mobe", {}),
    "mobe, three projections": ("mobe", THREE),
    "slbf": ("slbf", {}),
    "d2moe, Fisher base": ("d2moe", {}),
    "d2moe, frequency base": ("d2moe", {"base": "frequency"}),
    "reap": ("reap", {}),
    "channels": ("channels", {}),
    "biaxial, fast": ("biaxial", {"form": "fast", **GIVEN}),
    "biaxial, linear": ("biaxial", {"form": "linear", **GIVEN}),
    "biaxial, tight": ("biaxial", {"form": "tight", **GIVEN}),
    "biaxial, half of the text its own": ("biaxial", {"form": "tight"}),
    "standard": ("biaxial", {"form": "standard"}),  # half of the text its own, as it is shipped
    "biaxial, tight, data-free": ("biaxial", {"form": "tight", "data_free": True}),
}
# Measured once: no calibration text has a part in them.
DATA_FREE = (
    "svd",
    "shared_basis, plain",
    "mobe, gate and up",
    "mobe, three projections",
    "slbf",
    "biaxial, tight, data-free",
)
ABLATION = {
    "rfid, as in the paper": ("rfid", {}),
    "no residual": ("rfid", {"residual": 0}),
    "consecutive groups": ("rfid", {"grouping": "consecutive"}),
    "frequency alone": ("rfid", {"score": "frequency"}),
    "effective rank alone": ("rfid", {"score": "effective_rank"}),
    "uniform ranks": ("rfid", {"score": "uniform"}),
    "no residual, uniform ranks": ("rfid", {"residual": 0, "score": "uniform"}),
    "no residual, uniform, consecutive": ("rfid", {"residual": 0, "score": "uniform", "grouping": "consecutive"}),
    "refined by 500 steps of Adam": ("rfid", {"refine_steps": 500}),
    "gate and up jointly": ("rfid", {"joint": True}),
    "three projections": ("rfid", THREE),
    "three projections, no residual": ("rfid", {**THREE, "residual": 0}),
}
OPTIONS = {
    "channels": ("channels", {}),
    "channels, intercept": ("channels", {"intercept": True}),
    "channels, down not refitted": ("channels", {"refit": False}),
    "channels, one width": ("channels", {"widths": "model"}),
    "channels, ranked by the mean": ("channels", {"ranking": "mean"}),
    "channels, as in the paper": ("channels", {"ranking": "mean", "refit": False}),
    "reap, intercept": ("reap", {"intercept": True}),
    "d2moe, mean base": ("d2moe", {"base": "mean"}),
    "d2moe, shared v": ("d2moe", {"base": "frequency", "shared": "v"}),
    "d2moe, shared u": ("d2moe", {"base": "frequency", "shared": "u"}),
    "d2moe, a quarter of the base pruned": ("d2moe", {"base": "frequency", "base_pruning": 0.25}),
}
PARTS = {
    "tight": ("biaxial", {"form": "tight", **GIVEN}),
    "not refined": ("biaxial", {"form": "tight", "refine_steps": 0, **GIVEN}),
    "no shrinkage": ("biaxial", {"form": "tight", "shrinkage": 0, **GIVEN}),
    "no doubt": ("biaxial", {"form": "tight", "doubt": 0, **GIVEN}),
    "no channels out": ("biaxial", {"form": "tight", "channel_share": 0, **GIVEN}),
    "linear": ("biaxial", {"form": "linear", **GIVEN}),
    "fast": ("biaxial", {"form": "fast", **GIVEN}),
    "fast, not refined": ("biaxial", {"form": "fast", "refine_steps": 0, **GIVEN}),
}
TABLES = {"methods": METHODS, "ablation": ABLATION, "options": OPTIONS, "parts": PARTS}


def measure(model: Path | str, data: Path, windows: int = 96) -> dict:
    result = moefactor.evaluate(
        str(model), [str(data / file) for file in TEXTS.values()], window=256, max_windows=windows, dtype="float32"
    )
    values = list(result.perplexity.values())
    perplexity = dict(zip(TEXTS, values, strict=True))
    return {**asdict(result), "model": None, "perplexity": perplexity, "mean": result.mean_perplexity}


def calibration_of(text: str, data: Path) -> str | None:
    source = CALIBRATIONS[text]
    if source in (None, OWN):
        return source
    if text != "eight":
        return str(data / source)
    short = Path(tempfile.gettempdir()) / "moefactor-eight-windows.txt"
    short.write_text((data / source).read_text()[:FEW])
    return str(short)


def run_row(
    model: Path, method: str, options: dict, ratio: float, calibration: str | None, samples: int, data: Path
) -> dict:  # fmt: skip
    if calibration in (None, OWN):
        options = {name: value for name, value in options.items() if name not in GIVEN}
    reads = Recipe.of(method, {n: v for n, v in options.items() if n not in GIVEN}).reads_text
    text = {"calibration": calibration, "samples": samples, "seqlen": 256} if reads else {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        out = moefactor.compress(str(model), method, ratio, Path(folder) / "out", **text, **options)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, **measure(out, data)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--table", choices=TABLES, default="methods")
    parser.add_argument("--rows", nargs="+", help="default all; a row matches by its beginning")
    parser.add_argument("--ratios", default="0.2,0.3,0.4,0.5,0.6")
    parser.add_argument("--calibrations", default="like,unlike,wikitext2")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("results/quality.json"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if "dense" not in results:
        results["dense"] = measure(arguments.model, arguments.data)
    dense = results["dense"]
    rows = TABLES[arguments.table]
    if arguments.rows:
        rows = {n: r for n, r in rows.items() if n.startswith(tuple(arguments.rows))}
    first = arguments.calibrations.split(",")[0]
    header = f"{'':38}{'ratio':>6}{'text':>10}{'kept':>9}" + "".join(f"{t:>10}" for t in TEXTS)
    print(header + f"{'× dense':>9}{'planned':>9}{'seconds':>9}")
    print(f"{'dense':38}{'':25}" + "".join(f"{p:10.2f}" for p in dense["perplexity"].values()) + f"{1:9.3f}")
    for label, (method, options) in rows.items():
        for ratio in map(float, arguments.ratios.split(",")):
            for text in arguments.calibrations.split(","):
                if label in DATA_FREE and text != first:
                    continue
                shown = "none" if label in DATA_FREE else text
                key = f"{arguments.table}/{label}/{ratio}/{shown}"
                if key not in results:
                    try:
                        calibration = None if label in DATA_FREE else calibration_of(text, arguments.data)
                        results[key] = run_row(
                            arguments.model, method, options, ratio, calibration, arguments.samples, arguments.data
                        )
                    except moefactor.UserError as error:
                        results[key] = {"error": str(error)}
                    arguments.output.write_text(json.dumps(results, indent=1))
                print(line(label, ratio, shown, results[key], dense), flush=True)


def line(label: str, ratio: float, text: str, row: dict, dense: dict) -> str:
    start = f"{label:38}{ratio:6}{text:>10}"
    if "error" in row:
        return f"{start}   infeasible: {row['error'][:80]}"
    kept = row["expert_parameters"] / dense["expert_parameters"]
    values = "".join(f"{p:10.2f}" for p in row["perplexity"].values())
    multiple = math.exp(math.log(row["mean"]) - math.log(dense["mean"]))
    planned = "" if row.get("expected_loss") is None else f"{math.exp(row['expected_loss']):.3f}"
    return f"{start}{kept:9.4f}{values}{multiple:9.3f}{planned:>9}{row['seconds']:9.1f}"


if __name__ == "__main__":
    main()
