"""Stage 2: what every layer could spend, one budget over all of them, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Set
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from .allocate import RULES, Budget, Planned, Storage, TooSmall
from .errors import UserError, located, required, unknown
from .files import digest_of
from .identity import FACTORS
from .methods import Method, accepted
from .plan import Plan
from .progress import Progress, Steps, silent
from .rest import rest_bytes
from .run_folder import RunFolder
from .size import Size
from .streaming import StreamedModel

STAGE = "plan"
# Bits a parameter from which on nothing that some text used need go; what is removed grows by an eighth for each below.
PLENTY = 5.0


def make_plan(
    model: StreamedModel, method: Method, options: dict, size: Size, *, run: RunFolder, allocation: str | None = None,
    rank_multiple: int | None = None, rest_bits: int = 16, without: Set[str] = frozenset(), seed: int = 0,
    progress: Progress = silent,
) -> Plan:  # fmt: skip
    """Reads each layer's weights once (and its statistics, where the method plans by them) and spends the budget.

    What a layer can spend on is kept in the run folder until the plan is written, so that a killed run goes on with
    the next layer.

    Args:
        options: complete, see Method.complete.
        size: how large the result may be.
        allocation: a rule of allocate.RULES, or None for the method's own.
        rank_multiple: ranks come in multiples of this; None for 8 on wide models and 1 on narrow ones.
    """
    budget = budget_of(model, size, allocation, rank_multiple, rest_bits, without)
    needs = method.needs_to_plan(options, allocation)
    with run.opened(model):
        calibration = run.calibrated_for(model, needs, method.name)
        made_for = {**run.stamp(model, *FACTORS), "calibration": calibration and digest_of(calibration)[:32]}
        about = digest_of({
            "method": method.name, "options": options, "seed": seed, "budget": asdict(budget), "made_for": made_for,
        })  # fmt: skip
        steps = Steps(progress, STAGE, len(model.experts))
        priced = []
        for index, layer in enumerate(model.experts):
            steps.detail = layer.decoder_layer
            priced.append(_priced(model, run, method, index, about, options, budget, bool(needs), seed))
            steps.tick()
        planned = _planned(method, options, priced, budget)
    expected = None
    if planned.loss is not None and needs and calibration is not None:
        expected = planned.loss / (calibration["samples"] * calibration["seqlen"])
    return Plan(
        model.name, method.name, size.ratio, seed, tuple(planned.layers), options, expected, made_for, budget.bits
    )


def _planned(method: Method, options: dict, priced: list[Any], budget: Budget) -> Planned:
    """The plan within the budget; what private factors are rounded to is added where the method leaves it to others."""
    if method.rounds(options):
        return method.plan(priced, budget)
    ordinary = bool(method.standard(options))
    if budget.bits is None:
        return _rounded(method.plan(priced, budget), budget, ordinary)
    # Such a method counts parameters: the most of them whose bits fit, all of them first.
    total = sum(p.layer.parameter_count for p in priced)
    low, high, best, share = 0.0, 1.0, None, 1.0
    for _ in range(25):
        tried = replace(budget, parameters=int(share * total), ratio=1 - share, bits=None)
        try:
            planned = _rounded(method.plan(priced, tried), budget, ordinary)
        except TooSmall:
            low = share
        else:
            if _bits(planned, budget.storage, ordinary) <= budget.bits:
                best, low = planned, share
            else:
                high = share
        if low == high:
            break
        share = (low + high) / 2
    if best is None:
        raise TooSmall(f"{method.name}: nothing it can make fits in {budget.bits / 8e9:.3g} GB of experts; allow more.")
    return best


def _stays(planned: Planned, ordinary: bool) -> bool:
    """Whether the result is an ordinary checkpoint, which is rounded when it is written."""
    return ordinary and all(entry.standard() for entry in planned.layers)


def _bits(planned: Planned, storage: Storage, ordinary: bool) -> float:
    """What a plan's experts will take."""
    if storage.rounding and _stays(planned, ordinary):
        each = storage.rounding.bits + storage.of_float / storage.rounding.group
        return sum(each * entry.parameter_count() for entry in planned.layers)
    return sum(entry.bits(storage.of_float) for entry in planned.layers)


def _rounded(planned: Planned, budget: Budget, ordinary: bool) -> Planned:
    """The same with every form rounded, save where the result is an ordinary checkpoint."""
    rounding = budget.storage.rounding
    if rounding is None or _stays(planned, ordinary):
        return planned
    layers = [
        replace(entry, forms={stack: rounding.of(form) for stack, form in entry.forms.items()})
        for entry in planned.layers
    ]
    return Planned(layers)  # what was foretold leaves rounding out


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


def budget_of(
    model: StreamedModel, size: Size, allocation: str | None, rank_multiple: int | None, rest_bits: int = 16,
    without: Set[str] = frozenset(),
) -> Budget:  # fmt: skip
    """The budget that a size leaves. Raises UserError for what is none.

    Args:
        rest_bits, without: see rest.rest_bytes.
    """
    if allocation is not None and allocation not in RULES:
        raise unknown("allocation", allocation, RULES)
    if rank_multiple is not None and rank_multiple < 1:
        raise UserError(f"--rank-multiple must be at least 1, found {rank_multiple}.")
    total = sum(layer.parameter_count for layer in model.experts)
    of_float = 8 * model.stored_dtype.itemsize
    if size.ratio is not None:
        storage = Storage(size.rounding, of_float=of_float)
        return Budget(int((1 - size.ratio) * total), size.ratio, allocation, rank_multiple, storage)
    if size.bpw is not None:
        bits = int(size.bpw * total)
    else:
        bits = _left_of(model, required(size.target_gb, "a size"), rest_bits, without)
    each = bits / total
    if size.bits is None:
        gone = max(0.0, 1 - each / of_float)
    elif size.bits:
        gone = max(0.0, 1 - each / (size.bits + of_float / size.group))
    else:
        gone = min(0.9, max(0.0, (PLENTY - each) / 8))
    storage = Storage(size.rounding, in_bits=True, of_float=of_float)
    return Budget(int((1 - gone) * total), gone, allocation, rank_multiple, storage, bits)


def _left_of(model: StreamedModel, target_gb: float, rest_bits: int, without: Set[str]) -> int:
    """Bits that are left for the experts of a checkpoint of so many gigabytes."""
    rest = rest_bytes(model, rest_bits, without)
    left = int(target_gb * 1e9) - rest
    if left <= 0:
        fewer = {16: ", or store the rest in fewer bits (--rest-bits 8, or 4)", 8: ", or try --rest-bits 4", 4: ""}
        raise TooSmall(
            f"{model.name}: all but the routed experts takes {rest / 1e9:.3g} GB, so the checkpoint can't be of "
            f"{target_gb:.3g} GB. Allow more{fewer[rest_bits]}."
        )
    return 8 * left
