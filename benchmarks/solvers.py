"""Variable projection against the paper's Adam for MoBE, at equal parameters: loss reached against seconds.

    python benchmarks/solvers.py                        two stacks of the reference model, 10,000 steps of Adam

Each from its own start, Adam from the public code's. Prints when variable projection passed the loss that Adam ended
with, writes JSON and, where matplotlib is installed, a picture of both curves.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from moefactor.methods import METHODS
from moefactor.methods.mobe import STEPS
from moefactor.plan import LayerPlan
from moefactor.streaming import StreamedModel

MODEL = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"
BASES = 7  # what a ratio of 0.4 leaves for


def fit(model: StreamedModel, layer: int, projection: str, bases: int, solver: str, steps: int) -> dict:
    method = METHODS["mobe"]
    weights = model.expert_weights(model.experts[layer])
    options = method.complete({"projections": projection, "solver": solver, "steps": steps})
    plan: LayerPlan = method.build(method.price(weights, None, None, seed=0, **options), [bases])
    # The other stacks stay dense, so that the time is this stack's alone.
    started = time.perf_counter()
    compressed = method.factorise(weights, None, replace(plan), seed=0, **options)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "curve": compressed.curves[projection], "error": compressed.errors[projection]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", default="0:gate,2:down", help="LAYER:PROJECTION, ...")
    parser.add_argument("--adam-steps", type=int, default=STEPS["adam"])
    parser.add_argument("--varpro-steps", type=int, default=STEPS["varpro"])
    parser.add_argument("--bases", type=int, default=BASES)
    parser.add_argument("--output", type=Path, default=Path("results/solvers.json"))
    arguments = parser.parse_args()
    model = StreamedModel(str(MODEL))
    results = {}
    print(f"{'stack':14}{'solver':>8}{'steps':>8}{'seconds':>9}{'loss':>9}   reached Adam's loss after")
    for stack in arguments.stacks.split(","):
        layer, projection = stack.split(":")
        pair = {
            solver: fit(model, int(layer), projection, arguments.bases, solver, steps)
            for solver, steps in (("adam", arguments.adam_steps), ("varpro", arguments.varpro_steps))
        }
        results[stack] = pair
        for solver, run in pair.items():
            print(f"{stack:14}{solver:>8}{len(run['curve']) - 1:8}{run['seconds']:9.1f}{run['curve'][-1]:9.4f}", end="")
            print("" if solver == "adam" else "   " + passed(pair), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))
    draw(results, arguments.output.with_suffix(".png"))


def passed(pair: dict) -> str:
    """When variable projection had a loss as low as Adam's last."""
    goal, run = pair["adam"]["curve"][-1], pair["varpro"]
    step = next((i for i, loss in enumerate(run["curve"]) if loss <= goal), None)
    if step is None:
        return "not reached"
    seconds = run["seconds"] * step / len(run["curve"])
    return f"{step} steps, {seconds:.1f} s, {seconds / pair['adam']['seconds']:.3f} of Adam's time"


def draw(results: dict, path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for axis, (stack, pair) in zip(axes[0], results.items(), strict=True):
        for solver, run in pair.items():
            seconds = [run["seconds"] * i / len(run["curve"]) for i in range(1, len(run["curve"]) + 1)]
            axis.plot(seconds, run["curve"], label=solver)
        axis.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative squared error", title=stack)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
