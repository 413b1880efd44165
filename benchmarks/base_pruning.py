"""D²-MoE's semi-dynamic pruning of the base: what the static part saves in memory and the dynamic part in compute.

    python benchmarks/base_pruning.py

Compresses the reference model at 40 % with static pruning off and on and dynamic pruning off and on, then counts
floating-point operations of the experts in one forward pass and the bytes that are resident.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import moefactor
from moefactor.methods import METHODS
from moefactor.runtime.module import FactorisedExperts

MODEL = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"
ROWS = {
    "neither": {},
    "static 0.25": {"base_pruning": 0.25},
    "dynamic 0.5": {"dynamic": 0.5},
    "static 0.25, dynamic 0.5": {"base_pruning": 0.25, "dynamic": 0.5},
}


def base_work(model: torch.nn.Module, ids: torch.Tensor) -> tuple[int, float, float]:
    """Bytes of the bases; multiply-adds of the bases and of all products in one pass, per token."""
    totals = {"bytes": 0, "base": 0, "all": 0}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    totals["all"] = counter.get_total_flops() / 2
    for module in model.modules():
        if isinstance(module, FactorisedExperts):
            for name, form in module.forms.items():
                base = getattr(module, f"{name}_base")
                totals["bytes"] += 2 * base.numel()  # bfloat16
                used = form.kept - int(form.dynamic * form.kept)
                totals["base"] += ids.numel() * used * base.numel() // form.kept
    return totals["bytes"], totals["base"] / ids.numel(), totals["all"] / ids.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="to measure perplexity on", default=None)
    parser.add_argument("--rank-from", type=float, default=0.4, help="ratio of the plan without pruning")
    parser.add_argument("--output", type=Path, default=Path("results/base_pruning.json"))
    arguments = parser.parse_args()
    assert set().union(*ROWS.values()) <= set(METHODS["d2moe"].options)
    results = {}
    print(f"{'':28}{'experts':>12}{'base bytes':>12}{'base MAC':>11}{'model MAC':>11}{'perplexity':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for label, options in ROWS.items():
            out = moefactor.compress(
                str(MODEL), "d2moe", arguments.rank_from, Path(folder) / label, base="frequency", samples=64, **options
            )
            result = moefactor.evaluate(str(out), [arguments.text], window=256, max_windows=48, dtype="float32")
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
            base_bytes, base, total = base_work(model, torch.arange(2048).view(8, 256) % 4096)
            perplexity = result.mean_perplexity
            print(
                f"{label:28}{result.expert_parameters:12,}{base_bytes:12,}{base:11,.0f}{total:11,.0f}"
                f"{perplexity:12.2f}",
                flush=True,
            )
            results[label] = {
                "expert_parameters": result.expert_parameters, "base_bytes": base_bytes, "base_multiply_adds": base,
                "model_multiply_adds": total, "perplexity": perplexity,
            }  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
