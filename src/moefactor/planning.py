"""Stage 2: what every layer could spend, one budget over all of them, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Iterator

from .allocate import RULES, LayerOffers, spend
from .errors import UserError, unknown
from .experts import ExpertWeights
from .methods import Method
from .methods.base import accepted
from .plan import Plan
from .progress import Progress, Steps, silent
from .run_folder import RunFolder
from .stats import LayerStats
from .streaming import StreamedModel

# Grouped GEMM wants ranks in multiples of 8; below this hidden size that would be too coarse a step, and the
# runtime pads activations instead.
WIDE = 512


def make_plan(
    model: StreamedModel, method: Method, options: dict, ratio: float, *, run: RunFolder, allocation: str | None = None,
    rank_multiple: int | None = None, seed: int = 0, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """Reads each layer's weights once (and its statistics, where the method plans by them) and spends the budget.

    Args:
        options: complete, see Method.complete.
        ratio: fraction of the routed experts' parameters to remove, above 0 and below 1.
        allocation: a rule of allocate.RULES, or None for the method's own.
        rank_multiple: ranks come in multiples of this; None for 8 on wide models and 1 on narrow ones.
    """
    check_ratio(ratio)
    rule = allocation or method.allocation
    if rule not in RULES:
        raise unknown("allocation", rule, RULES)
    if rank_multiple is None:
        rank_multiple = 8 if model.experts[0].hidden >= WIDE else 1
    if rank_multiple < 1:
        raise UserError(f"--rank-multiple must be at least 1, found {rank_multiple}.")
    needs = method.needs_to_plan(options, rule)
    if needs and run.calibration() is None:
        raise UserError(
            f"{run.folder}: {method.name} plans by {', '.join(sorted(needs))}, and nothing is calibrated there. "
            f"Run `moefactor calibrate {model.name} --run {run.folder} --method {method.name}` first."
        )
    total = sum(layer.parameter_count for layer in model.experts)
    budget = int((1 - ratio) * total)
    if method.planner is not None:
        layers = _Layers(model, run)
        steps = Steps(progress, "plan", len(model.experts))
        taken = accepted(method.planner, options)
        plans, loss = method.planner(
            layers, budget, ratio=ratio, multiple=rank_multiple, seed=seed, tick=steps.tick, **taken
        )
        seen = run.calibration() if needs else None
        expected = loss / (seen["samples"] * seen["seqlen"]) if seen else None
        return Plan(model.name, method.name, ratio, seed, tuple(plans), options, expected)
    steps = Steps(progress, "plan", len(model.experts))
    offers: list[LayerOffers] = []
    for index, layer in enumerate(model.experts):
        stats = run.stats(index, model.device) if needs else None
        steps.detail = layer.decoder_layer
        offers.append(
            method.offers(model.expert_weights(layer), stats, seed=seed + index, **accepted(method.offers, options))
        )
        steps.tick()
    bought = spend(offers, budget, rule, multiple=rank_multiple)
    layers = tuple(offer.plan(units) for offer, units in zip(offers, bought, strict=True))
    return Plan(model.name, method.name, ratio, seed, layers, options)


class _Layers:
    """Every layer's weights and statistics, read anew each time they are gone through."""

    def __init__(self, model: StreamedModel, run: RunFolder):
        self.model, self.run = model, run

    def __iter__(self) -> Iterator[tuple[ExpertWeights, LayerStats]]:
        for index, layer in enumerate(self.model.experts):
            yield self.model.expert_weights(layer), self.run.stats(index, self.model.device)


def check_ratio(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise UserError(
            f"ratio must lie between 0 and 1, found {ratio}: it is the fraction of the routed experts' parameters to "
            "remove (0.4 keeps 60 %)."
        )
