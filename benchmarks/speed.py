"""How fast each form runs beside the dense experts it replaces: one MoE layer, both in one run, several repeats.

    python benchmarks/speed.py
    python benchmarks/speed.py --hidden 2048 --intermediate 768 --experts 128 --dtype bfloat16 --device cuda

Random weights of the shapes that each method leaves at 40 % removed; uneven random routing. Prints seconds of the form
over seconds of dense, alternating, as median and spread, beside the share of the parameters that is left.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from moefactor.experts import ExpertLayer
from moefactor.forms import BasePlusDelta, BasisMixture, Dense, Form, Ragged, SharedBasis, SparseResidual, low_rank
from moefactor.methods.biaxial.planning import Candidate, forms_of
from moefactor.plan import LayerPlan
from moefactor.runtime.module import FactorisedExperts

KEPT = 0.6


def plans(layer: ExpertLayer) -> dict[str, LayerPlan]:
    """Row -> forms that keep about KEPT of the layer."""
    experts, width, hidden = layer.experts, layer.intermediate, layer.hidden

    def both(make: object) -> dict[str, Form]:
        return {"gate_up": make(2 * width), "down": make(width)}

    def grouped(groups: int) -> object:
        size = experts // groups
        members = tuple(tuple(range(g * size, (g + 1) * size)) for g in range(groups))

        def make(rows: int) -> Form:
            rank = int(KEPT * size * rows * hidden / (size * rows + hidden)) // 8 * 8
            return SharedBasis(experts, rows, hidden, groups=members, ranks=(rank,) * groups)

        return make

    def per_expert(rows: int) -> Form:
        rank = int(KEPT * rows * hidden / (rows + hidden)) // 8 * 8
        return low_rank(experts, rows, hidden, (rank,) * experts)

    def residual(rows: int) -> Form:
        inner = grouped(experts // 4)(rows)
        sizes = (round(0.03 * 4 * rows * hidden),) * (experts // 4)
        return SparseResidual(experts, rows, hidden, inner, inner.groups, sizes, seed=0)

    def mixture(rows: int) -> Form:
        rank = min(width, hidden)
        bases = max(1, int(experts * (KEPT * rows * hidden - rows * rank) / (rank * hidden)))
        return BasisMixture(experts, rows, hidden, bases=bases, rank=rank)

    def delta(rows: int) -> Form:
        rank = int((KEPT - 1 / experts) * rows * hidden / (rows + hidden)) // 8 * 8
        inner = low_rank(experts, rows, hidden, (rank,) * experts)
        columns = hidden if rows == 2 * width else width
        return BasePlusDelta(experts, rows, hidden, inner, kept=columns, writes=rows == width)

    def ragged(rows: int) -> Form:
        spread = [0.3 + 0.6 * e / (experts - 1) for e in range(experts)]
        widths = tuple(int(s * width) // 8 * 8 for s in spread)
        return Ragged(experts, rows, hidden, widths=widths, halves=rows // width)

    def narrow(rows: int) -> Form:
        return Ragged(
            experts, rows, hidden, widths=(int(KEPT * width) // 8 * 8,) * experts, halves=rows // width
        )  # fmt: skip

    rows = {
        "low rank, an expert each": per_expert,
        "shared basis, 1 group": grouped(1),
        "shared basis, 2 groups": grouped(2),
        "shared basis, groups of 4": grouped(experts // 4),
        "groups of 4 and residual": residual,
        "mixture of bases": mixture,
        "base and deltas": delta,
        "channels, ragged": ragged,
        "channels, one width": narrow,
    }

    def biaxial(bases: int, activation: str = "silu") -> dict[str, Form]:
        """A quarter of the channels out, down as it is otherwise, the rest of the budget for gate and up."""
        widths = tuple(width if e < 0.6 * experts else int(0.4 * width) // 8 * 8 for e in range(experts))
        kept, left = sum(widths), KEPT * 3 * experts * width * hidden - sum(widths) * hidden
        rank = int(left / (2 * kept + max(1, bases) * hidden)) // 8 * 8
        chosen = {"gate_up": Candidate(0.0, 0, min(rank, hidden, 2 * width), bases, activation)}
        return forms_of(layer, widths, chosen)

    made = {name: both(make) for name, make in rows.items()}
    made |= {
        "biaxial, fast": biaxial(0),
        "biaxial, linear": biaxial(4, "identity"),
        "biaxial, tight": biaxial(4),
    }
    return {name: LayerPlan(layer, forms) for name, forms in made.items()}


class Original(nn.Module):
    """What FactorisedExperts asks of the module it replaces."""

    has_post_expert_norm = False

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.marker = nn.Parameter(torch.empty(0, dtype=dtype))
        self.has_post_expert_norm = False

    def _apply_gate(self, first: torch.Tensor) -> torch.Tensor:
        gate, up = first.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def build(plan: LayerPlan, dtype: torch.dtype, device: str) -> FactorisedExperts:
    module = FactorisedExperts.replacing(Original(dtype), plan)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.05 * torch.randn(p.shape, generator=generator)).to(dtype) for name, p in module.named_parameters()
    }
    module.load_state_dict(tensors, assign=True)
    return module.to(device)


def seconds(module: FactorisedExperts, call: tuple, device: str) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        module(*call)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=192)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", default="1,64,2048")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", type=Path, default=Path("results/speed.json"))
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    layer = ExpertLayer("experts", "layer", arguments.experts, arguments.intermediate, arguments.hidden)
    shapes = {"gate_up": 2 * layer.intermediate, "down": layer.intermediate}
    dense = build(
        LayerPlan(layer, {n: Dense(layer.experts, w, layer.hidden) for n, w in shapes.items()}), dtype, arguments.device
    )
    counts = [int(n) for n in arguments.tokens.split(",")]
    print(f"{'':28}{'kept':>7}" + "".join(f"{f'{n} tokens':>24}" for n in counts))
    results = {}
    for name, plan in plans(layer).items():
        module = build(plan, dtype, arguments.device)
        kept = plan.parameter_count() / layer.parameter_count
        cells = {}
        for tokens in counts:
            generator = torch.Generator().manual_seed(1)
            popularity = torch.rand(layer.experts, generator=generator).square().expand(tokens, -1) + 0.02
            ids = torch.multinomial(popularity, arguments.top_k, generator=generator)
            x = torch.randn(tokens, layer.hidden, generator=generator)
            weights = torch.full((tokens, arguments.top_k), 1 / arguments.top_k)
            call = tuple(t.to(arguments.device) for t in (x.to(dtype), ids, weights.to(dtype)))
            for warm in (dense, module):
                seconds(warm, call, arguments.device)
            pairs = [
                (seconds(module, call, arguments.device), seconds(dense, call, arguments.device))
                for _ in range(arguments.repeats)
            ]
            ratios = sorted(a / b for a, b in pairs)
            cells[tokens] = {"median": statistics.median(ratios), "low": ratios[1], "high": ratios[-2]}
        shown = "".join(f"{c['median']:10.2f} ({c['low']:.2f}-{c['high']:.2f})".rjust(24) for c in cells.values())
        print(f"{name:28}{kept:7.3f}{shown}", flush=True)
        results[name] = {"kept": kept, "seconds_over_dense": cells}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
