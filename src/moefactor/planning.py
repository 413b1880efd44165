"""Stage 2: what every layer could spend, one budget over all of them, and the plan that comes of it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from .allocate import RULES, Budget
from .errors import UserError, located, unknown
from .files import digest_of
from .identity import FACTORS
from .methods import Method, accepted
from .plan import Plan
from .progress import Progress, Steps, silent
from .run_folder import RunFolder
from .streaming import StreamedModel

STAGE = "plan"


def make_plan(
    model: StreamedModel, method: Method, options: dict, ratio: float, *, run: RunFolder, allocation: str | None = None,
    rank_multiple: int | None = None, seed: int = 0, progress: Progress = silent,
) -> Plan:  # fmt: skip
    """Reads each layer's weights once (and its statistics, where the method plans by them) and spends the budget.

    What a layer can spend on is kept in the run folder until the plan is written, so that a killed run goes on with
    the next layer.

    Args:
        options: complete, see Method.complete.
        ratio: fraction of the routed experts' parameters to remove, above 0 and below 1.
        allocation: a rule of allocate.RULES, or None for the method's own.
        rank_multiple: ranks come in multiples of this; None for 8 on wide models and 1 on narrow ones.
    """
    budget = budget_of(model, ratio, allocation, rank_multiple)
    needs = method.needs_to_plan(options, allocation)
    with run.opened(model):
        calibration = run.calibrated_for(model, needs, method.name)
        made_for = {**run.stamp(model, *FACTORS), "calibration": calibration and digest_of(calibration)[:32]}
        about = digest_of({
            "method": method.name, "options": options, "seed": seed, "budget": vars(budget), "made_for": made_for,
        })  # fmt: skip
        steps = Steps(progress, STAGE, len(model.experts))
        priced = []
        for index, layer in enumerate(model.experts):
            steps.detail = layer.decoder_layer
            priced.append(_priced(model, run, method, index, about, options, budget, bool(needs), seed))
            steps.tick()
        planned = method.plan(priced, budget)
    expected = None
    if planned.loss is not None and needs and calibration is not None:
        expected = planned.loss / (calibration["samples"] * calibration["seqlen"])
    return Plan(model.name, method.name, ratio, seed, tuple(planned.layers), options, expected, made_for)


def _priced(
    model: StreamedModel, run: RunFolder, method: Method, index: int, about: str, options: dict, budget: Budget,
    reads: bool, seed: int,
) -> Any:  # fmt: skip
    """What a layer can spend on, as an earlier run left it; priced anew where it left nothing that can be read."""
    layer = model.experts[index]
    known = run.pricing(index, about)
    if known is not None:
        with suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):
            return method.priced(layer, known)
    stats = run.stats(index, model.device, layer) if reads else None
    weights = model.expert_weights(layer)
    with located(layer.name):
        found = method.price(weights, stats, budget, seed=seed + index, **accepted(method.price, options)).to_json()
    run.write_pricing(index, about, found)
    return method.priced(layer, found)


def budget_of(model: StreamedModel, ratio: float, allocation: str | None, rank_multiple: int | None) -> Budget:
    """The budget that a ratio leaves. Raises UserError for what is none."""
    check_ratio(ratio)
    if allocation is not None and allocation not in RULES:
        raise unknown("allocation", allocation, RULES)
    if rank_multiple is not None and rank_multiple < 1:
        raise UserError(f"--rank-multiple must be at least 1, found {rank_multiple}.")
    total = sum(layer.parameter_count for layer in model.experts)
    return Budget(int((1 - ratio) * total), ratio, allocation, rank_multiple)


def check_ratio(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise UserError(
            f"ratio must lie between 0 and 1, found {ratio}: it is the fraction of the routed experts' parameters to "
            "remove (0.4 keeps 60 %)."
        )
