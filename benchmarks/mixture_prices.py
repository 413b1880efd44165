"""What biaxial foretells of a mixture of bases, from short fits, against a long fit of that very mixture.

    python benchmarks/mixture_prices.py                              reference model, first and last layer, with a text
    python benchmarks/mixture_prices.py --data-free
    python benchmarks/mixture_prices.py --model results/second-moe --form linear

Logs of the loss relative to the stack's own: the short fit alone, what is foretold, the long fit (600 steps). The last
column is what UNFINISHED (methods/biaxial/mixtures.py) would have to be for the short fit to foretell the long one.
Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

from moefactor.calibrate import Calibration, calibrate
from moefactor.fitting.metrics import Cut, Metrics
from moefactor.methods import METHODS
from moefactor.methods.biaxial import DOUBT, NEEDS
from moefactor.methods.biaxial.mixtures import FEW, MANY, RANKS, Probe, mixture_prices
from moefactor.methods.biaxial.mixtures import STEPS as SHORT
from moefactor.methods.biaxial.planning import MIXING, PROBED, widths_at
from moefactor.run_folder import RunFolder
from moefactor.streaming import StreamedModel
from quality import MODEL, ROOT, calibration_of

OPTIONS = METHODS["biaxial"].complete({})
LONG = OPTIONS["steps"]


def rows_of(fitted: Metrics, believed: Metrics, side: str, form: str, shares: list[float]) -> list[dict]:
    removal = fitted.prices()

    def cut_at(share: float) -> Cut:
        return Cut.of(fitted, removal, widths_at(removal, share))

    prices = mixture_prices(believed, cut_at, PROBED, side, MIXING[form], 0)
    found = []
    for share in shares:
        probe = Probe(believed, cut_at(share), side, MIXING[form], 0)
        for bases in (FEW, MANY):
            for part in RANKS[side]:
                rank = max(1, min(round(part * probe.highest), probe.problem.weights.shape[1]))
                short, long = (probe.fitted(rank, bases, steps) for steps in (SHORT, LONG))
                found.append({
                    "side": side, "share": share, "bases": bases, "rank": rank, "short": short,
                    "foretold": prices.log_loss(rank / probe.highest, bases, share), "long": long,
                    "unfinished": (short - long) / (math.sqrt(bases) * (rank / probe.hidden) ** 2),
                })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--form", choices=MIXING, default="tight")
    parser.add_argument("--data-free", action="store_true")
    parser.add_argument("--layers", default="0,-1", help="of the model's layers of experts")
    parser.add_argument("--shares", default="0.25,0.1,0.4", help="of the channels gone; short fits are made at some")
    parser.add_argument("--output", type=Path, default=Path("results/mixture-prices.json"))
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model, run = StreamedModel(str(arguments.model)), RunFolder(folder)
        if not arguments.data_free:
            text = Calibration.read(model, calibration_of("like", arguments.data), samples=256, seqlen=256, seed=0)
            calibrate(model, run, text, set(NEEDS))
        print(f"{'layer':>5} {'stack':6}{'gone':>6}{'bases':>6}{'rank':>6}", end="")
        print(f"{'short':>8}{'foretold':>9}{'long':>8}{'wanted':>8}")
        shares = [float(share) for share in arguments.shares.split(",")]
        for number in map(int, arguments.layers.split(",")):
            index = range(len(model.experts))[number]
            weights = model.expert_weights(model.experts[index])
            stats = None if arguments.data_free else run.stats(index)
            fitted, believed = Metrics(weights, stats, OPTIONS["shrinkage"]), Metrics(weights, stats, DOUBT)
            for side in ("first", "down"):
                for row in rows_of(fitted, believed, side, arguments.form, shares):
                    results.append({"layer": index, **row})
                    print(
                        f"{index:5} {side:6}{row['share']:6.2f}{row['bases']:6}{row['rank']:6}{row['short']:8.3f}"
                        f"{row['foretold']:9.3f}{row['long']:8.3f}{row['unfinished']:8.2f}",
                        flush=True,
                    )  # fmt: skip
    off = [row["foretold"] - row["long"] for row in results]
    alone = [row["short"] - row["long"] for row in results]
    print(
        f"root mean square of foretold less long: {_rms(off):.3f}, of short less long: {_rms(alone):.3f}; "
        f"mean {sum(off) / len(off):+.3f}"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


if __name__ == "__main__":
    main()
