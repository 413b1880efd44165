"""Stage 2: what every layer could spend, one budget over all of them, and the plan that comes of it."""

from __future__ import annotations

from .allocate import RULES, Budget
from .errors import UserError, located, unknown
from .files import digest_of
from .identity import FACTORS, maths_version
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
        rank_multiple: ranks and widths come in multiples of this; None for 8 on wide models and 1 on narrow ones.
    """
    budget = budget_of(model, ratio, allocation, rank_multiple)
    needs = method.needs_to_plan(options, allocation)
    with run.opened(model):
        calibration = run.calibration()
        if needs and (calibration is None or not needs <= {*calibration["statistics"], "routing"}):
            raise UserError(
                f"{run.folder}: {method.name} plans by {', '.join(sorted(needs))}, which is not calibrated there. "
                f"Run `moefactor calibrate {model.name} --run {run.folder} --method {method.name}` first."
            )
        about = digest_of({
            "calibration": calibration if needs else None, "method": method.name, "options": options, "seed": seed,
            "budget": vars(budget), "source": run.source.structure, "maths": maths_version(*FACTORS),
        })  # fmt: skip
        steps = Steps(progress, STAGE, len(model.experts))
        priced = []
        for index, layer in enumerate(model.experts):
            steps.detail = layer.decoder_layer
            known = run.pricing(index, about)
            if known is None:
                stats = run.stats(index, model.device) if needs else None
                weights = model.expert_weights(layer)
                with located(layer.name):
                    known = method.price(
                        weights, stats, budget, seed=seed + index, **accepted(method.price, options)
                    ).to_json()
                run.write_pricing(index, about, known)
            priced.append(method.priced(layer, known))
            steps.tick()
        planned = method.plan(priced, budget)
    expected = None
    if planned.loss is not None and needs and calibration is not None:
        expected = planned.loss / (calibration["samples"] * calibration["seqlen"])
    return Plan(model.name, method.name, ratio, seed, tuple(planned.layers), options, expected)


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
