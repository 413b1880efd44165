"""How fast each form runs beside the dense experts it replaces: one MoE layer, both in one run, alternating.

    python benchmarks/speed.py                                    # Qwen3-30B-A3B's layer, float32 and bfloat16
    python benchmarks/speed.py --model deepseek-v3                # of DeepSeek-V3's size, 16 of its 256 experts
    python benchmarks/speed.py --rows biaxial rfid --tokens 1,2048 --device cuda --dtypes bfloat16

Random weights in the shapes that each method leaves at 40 % removed, uneven random routing. The dense side is
transformers' own experts module under `grouped_mm`, its fastest on a CPU (`eager` is a row of the table; `batched_mm`
copies every expert that a token visits). For every form: the share of the parameters that is left, seconds over dense's
(median, and the least and the most but one) at each number of tokens, and the floor, what a call must read and multiply
over what dense must (values of an activation on weights, which a mixture needs besides, are in the file). On a CPU
seconds are the process's own, which other processes disturb less; run it on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from floor import Call, Work, work
from moefactor.experts import ExpertLayer
from moefactor.forms import (
    BasePlusDelta,
    BasisMixture,
    Dense,
    Form,
    Latent,
    Quantised,
    Ragged,
    SharedBasis,
    WindowResidual,
    low_rank,
)
from moefactor.methods.biaxial.planning import Candidate, forms_of
from moefactor.plan import LayerPlan
from moefactor.runtime.module import FactorisedExperts

KEPT = 0.6
MIXED = {6: 0.1, 5: 0.25, 4: 0.35, 3: 0.3}  # bits -> channels that have them, much as 4 bits a channel are spent
MODELS = {  # hidden, intermediate, experts, top k
    "qwen3-30b": (2048, 768, 128, 8),
    "deepseek-v3": (7168, 2048, 16, 8),  # of 256 experts, which one machine's memory would not hold
}


def plans(layer: ExpertLayer) -> dict[str, Callable[[], LayerPlan]]:
    """Row -> forms that keep about KEPT of the layer, as the method named leaves them."""
    experts, width, hidden = layer.experts, layer.intermediate, layer.hidden
    alone, joint = {"gate": width, "up": width, "down": width}, {"gate_up": 2 * width, "down": width}

    def each(make: Callable[[int], Form], stacks: dict[str, int]) -> LayerPlan:
        return LayerPlan(layer, {name: make(rows) for name, rows in stacks.items()})

    def grouped(groups: int, kept: float = KEPT) -> Callable[[int], SharedBasis]:
        size = experts // groups
        members = tuple(tuple(range(g * size, (g + 1) * size)) for g in range(groups))

        def make(rows: int) -> SharedBasis:
            rank = int(kept * size * rows * hidden / (size * rows + hidden)) // 8 * 8
            return SharedBasis(experts, rows, hidden, groups=members, ranks=(min(rank, hidden),) * groups)

        return make

    def per_expert(rows: int) -> Form:
        rank = int(KEPT * rows * hidden / (rows + hidden)) // 8 * 8
        return low_rank(experts, rows, hidden, (rank,) * experts)

    def many_ranks(rows: int) -> Form:
        """As a spectrum would have it: from half the mean to half as much again."""
        mean = KEPT * rows * hidden / (rows + hidden)
        ranks = tuple(int(mean * (0.5 + e / (experts - 1))) // 8 * 8 for e in range(experts))
        return low_rank(experts, rows, hidden, ranks)

    def rfid() -> LayerPlan:
        """gate and up alone; they give what down, left as it is, keeps."""
        step = round(0.03 * 4 * hidden / 8) * 8
        inner = grouped(experts // 4, 1.5 * KEPT - 0.5 - 0.03)(width)
        sizes = (step * width,) * (experts // 4)
        caught = WindowResidual(experts, width, hidden, inner, inner.groups, sizes, seed=0)
        return LayerPlan(layer, {"gate": caught, "up": caught, "down": Dense(experts, width, hidden)})

    def mobe(rows: int) -> Form:
        bases = max(1, int(experts * (KEPT * rows * hidden - rows * width) / (width * hidden)))
        return BasisMixture(experts, rows, hidden, bases=bases, rank=width)

    def slbf(rows: int) -> Form:
        rank = int((KEPT * rows * hidden - rows * width) / (width + hidden)) // 8 * 8
        return BasisMixture(experts, rows, hidden, bases=experts, rank=width, basis_rank=rank)

    def d2moe(rows: int) -> Form:
        rank = int((KEPT - 1 / experts) * rows * hidden / (rows + hidden)) // 8 * 8
        delta = low_rank(experts, rows, hidden, (rank,) * experts)
        writes = rows == width
        return BasePlusDelta(experts, rows, hidden, delta, kept=width if writes else hidden, writes=writes)

    def ragged(multiple: int) -> Callable[[int], Ragged]:
        spread = [0.3 + 0.6 * e / (experts - 1) for e in range(experts)]
        widths = tuple(round(s * width / multiple) * multiple for s in spread)
        return lambda rows: Ragged(experts, rows, hidden, widths=widths, halves=rows // width)

    def in_bits(form: Ragged, shares: dict[int, float]) -> Form:
        """Rounded, in groups of 64. shares: bits -> share of every expert's channels that have them, in eights."""
        if len(shares) == 1:
            return Quantised(experts, form.width, hidden, form, 64, (("weight", *shares),))
        left, channels = form.widths, {}
        for bits, share in shares.items():
            own = tuple(min(r, round(share * w / 8) * 8) for r, w in zip(left, form.widths, strict=True))
            channels[bits], left = own, tuple(r - o for r, o in zip(left, own, strict=True))
        channels[bits] = tuple(o + r for o, r in zip(own, left, strict=True))
        return Quantised(experts, form.width, hidden, form, 64, channels=tuple(channels.items()))

    def whole(rows: int) -> Ragged:
        return Ragged(experts, rows, hidden, widths=(width,) * experts, halves=rows // width)

    def narrow(rows: int) -> Form:
        widths = (int(KEPT * width) // 8 * 8,) * experts
        return Ragged(experts, rows, hidden, widths=widths, halves=rows // width)

    def biaxial(bases: int, activation: str = "silu") -> LayerPlan:
        """A quarter of the channels out, down as it is otherwise, the rest of the budget for gate and up."""
        widths = tuple(width if e < 0.6 * experts else round(0.4 * width / 64) * 64 for e in range(experts))
        kept, left = sum(widths), KEPT * 3 * experts * width * hidden - sum(widths) * hidden
        rank = min(int(left / (2 * kept + max(1, bases) * hidden)) // 8 * 8, hidden, 2 * width)
        chosen = {"gate_up": Candidate(0.0, 0, rank, bases, activation)}
        return LayerPlan(layer, forms_of(layer, widths, chosen))

    def latent() -> LayerPlan:
        """fast, whose down is behind a basis too: a latent MoE."""
        rank = int(KEPT * hidden) // 8 * 8
        return each(lambda rows: Latent(experts, rows, hidden, rank, Dense(experts, rows, rank)), joint)

    return {
        "channels, one width": lambda: each(narrow, joint),
        "channels, ragged by 64": lambda: each(ragged(64), joint),
        "channels, ragged by 1": lambda: each(ragged(1), joint),
        "4 bits": lambda: each(lambda rows: in_bits(whole(rows), {4: 1.0}), joint),
        "8 bits": lambda: each(lambda rows: in_bits(whole(rows), {8: 1.0}), joint),
        "3 bits": lambda: each(lambda rows: in_bits(whole(rows), {3: 1.0}), joint),
        "channels, 4 bits": lambda: each(lambda rows: in_bits(ragged(64)(rows), {4: 1.0}), joint),
        "channels, mixed bits": lambda: each(lambda rows: in_bits(ragged(64)(rows), MIXED), joint),
        "biaxial, fast": lambda: biaxial(0),
        "biaxial, fast, latent": latent,
        "biaxial, linear": lambda: biaxial(4, "identity"),
        "biaxial, tight": lambda: biaxial(4),
        "svd": lambda: each(per_expert, joint),
        "svd, many ranks": lambda: each(many_ranks, joint),
        "shared basis, 1 group": lambda: each(grouped(1), joint),
        "shared basis, groups of 4": lambda: each(grouped(experts // 4), joint),
        "rfid": rfid,
        "d2moe": lambda: each(d2moe, joint),
        "mobe": lambda: each(mobe, alone),
        "slbf": lambda: each(slbf, alone),
    }


def dense_plan(layer: ExpertLayer) -> LayerPlan:
    shapes = {"gate_up": 2 * layer.intermediate, "down": layer.intermediate}
    return LayerPlan(layer, {name: Dense(layer.experts, rows, layer.hidden) for name, rows in shapes.items()})


def filled(module: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """Small random numbers, the same few over and over: what they are does not matter, and there are billions."""
    block = (0.05 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).to(dtype)
    for name, parameter in list(module.named_parameters(recurse=False)):
        count = parameter.numel()
        if parameter.is_floating_point():
            values = block.repeat(-(-count // len(block)))[:count].view(parameter.shape)
        else:  # pivots: the first rows of every basis
            values = torch.arange(parameter.shape[-1], dtype=torch.int32).expand(parameter.shape).contiguous()
        setattr(module, name, nn.Parameter(values.to(device), requires_grad=False))
    return module


def transformers_experts(layer: ExpertLayer, implementation: str) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        num_experts=layer.experts, hidden_size=layer.hidden, moe_intermediate_size=layer.intermediate
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def routed(layer: ExpertLayer, tokens: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    popularity = torch.rand(layer.experts, generator=generator).square().expand(tokens, -1) + 0.02
    ids = torch.multinomial(popularity, top_k, generator=generator)
    x = torch.randn(tokens, layer.hidden, generator=generator)
    return x, ids, torch.full((tokens, top_k), 1 / top_k)


@dataclass
class Timer:
    dense: nn.Module
    dtype: torch.dtype
    device: str
    repeats: int

    def seconds(self, module: nn.Module, call: tuple[Tensor, ...]) -> float:
        now = time.process_time if self.device == "cpu" else time.perf_counter
        started = now()
        with torch.no_grad():
            module(*call)
        if self.device != "cpu":
            torch.cuda.synchronize()
        return now() - started

    def ratios(self, module: nn.Module, call: tuple[Tensor, ...]) -> dict[str, float]:
        """Fewer repeats for what takes seconds."""
        x, ids, weights = call
        call = (x.to(self.device, self.dtype), ids.to(self.device), weights.to(self.device, self.dtype))
        self.seconds(self.dense, call)
        slow = self.seconds(module, call)
        repeats = self.repeats if slow < 1 else min(3, self.repeats)
        pairs = [(self.seconds(module, call), self.seconds(self.dense, call)) for _ in range(repeats)]
        found = sorted(a / b for a, b in pairs)
        inner = found[1:-1] or found
        return {
            "median": statistics.median(found), "low": inner[0], "high": inner[-1],
            "dense_milliseconds": 1e3 * statistics.median(b for _, b in pairs),
        }  # fmt: skip


def floors(plan: LayerPlan, ids: Tensor) -> dict[str, float]:
    call = Call.of(ids)
    own = sum((work(form, call) for form in plan.forms.values()), Work())
    dense = sum((work(form, call) for form in dense_plan(plan.layer).forms.values()), Work())
    return {
        "numbers": own.numbers / dense.numbers, "products": own.products / dense.products,
        "evaluations": own.evaluations,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b")
    parser.add_argument("--tokens", default="1,8,64,2048")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", nargs="+", help="default all; a row matches by its beginning")
    parser.add_argument("--output", type=Path, default=Path("results/speed.json"))
    arguments = parser.parse_args()
    hidden, intermediate, experts, top_k = MODELS[arguments.model]
    layer = ExpertLayer("experts", "layer", experts, intermediate, hidden)
    counts = [int(n) for n in arguments.tokens.split(",")]
    calls = {n: routed(layer, n, top_k) for n in counts}
    results: dict = {"shape": layer.__dict__ | {"top_k": top_k}, "rows": {}}
    print(f"{arguments.model}: H {hidden}, I {intermediate}, {experts} experts, top {top_k}, on {arguments.device}")
    for dtype_name in arguments.dtypes.split(","):
        dtype = getattr(torch, dtype_name)
        dense = filled(transformers_experts(layer, "grouped_mm"), dtype, arguments.device)
        timer = Timer(dense, dtype, arguments.device, arguments.repeats)
        rows = results["rows"][dtype_name] = {}
        title = f"{dtype_name}: seconds over dense's"
        print(f"\n{title:32}{'kept':>6}" + "".join(f"{n:>10} tokens    " for n in counts) + "floor: reads, products")

        def report(
            name: str, module: nn.Module, plan: LayerPlan | None, timer: Timer = timer, into: dict = rows
        ) -> None:
            kept = plan.parameter_count() / layer.parameter_count if plan else 1.0
            cells = {n: timer.ratios(module, call) for n, call in calls.items()}
            floor = {n: floors(plan, calls[n][1]) for n in counts} if plan else {}
            shown = "".join(f"{c['median']:7.2f} ({c['low']:.2f}-{c['high']:.2f})".rjust(21) for c in cells.values())
            shown += "  " + " | ".join(f"{f['numbers']:.2f} {f['products']:.2f}" for f in floor.values())
            print(f"{name:32}{kept:6.3f}{shown}", flush=True)
            into[name] = {
                "kept": kept, "seconds_over_dense": cells, "floor": floor
            }  # fmt: skip

        def wanted(name: str) -> bool:
            return not arguments.rows or any(name.startswith(row) for row in arguments.rows)

        if wanted("dense, eager"):
            same = transformers_experts(layer, "eager")
            same.gate_up_proj, same.down_proj = dense.gate_up_proj, dense.down_proj
            report("dense, eager", same, None)
        for name, make in plans(layer).items():
            if wanted(name):
                plan = make()
                module = FactorisedExperts.replacing(transformers_experts(layer, "grouped_mm").to(dtype), plan)
                report(name, filled(module, dtype, arguments.device), plan)
        del dense, timer
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
