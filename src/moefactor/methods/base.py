"""What a method is, and the helper that makes one out of a function of a single stack."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args, get_origin

import torch
from torch import Tensor

from ..allocate import LayerOffers, Offer
from ..errors import UserError, unknown
from ..experts import CompressedExperts, ExpertLayer, ExpertWeights
from ..forms import Dense, Form
from ..forms.base import Factors
from ..linalg import weighted_error
from ..plan import LayerPlan
from ..stats import LayerStats


@dataclass(frozen=True)
class Method:
    """A compression method: pure mathematics on one layer at a time.

    Args:
        name: as on the command line.
        summary, paper, description: two lines and the file's docstring, for `moefactor methods`.
        offers: (weights, stats, *, seed, **options) -> LayerOffers.
        factorise: (weights, stats, layer_plan, *, seed, **options) -> CompressedExperts.
        options: every option with its default; the command line makes flags of them.
        plan_needs, factorise_needs: options -> the statistics that each stage reads (names of stats.STATISTICS).
        allocation: the rule of allocate.RULES that spends the budget unless the user names another.
        planner: for a method whose choices in one layer change the prices in it, instead of `offers`:
            (layers, budget, *, ratio, multiple, seed, tick, **options) -> LayerPlan of each, and the rise of the loss
            they are expected to cost, summed over the calibration tokens; `layers` yields (weights, stats or None).
        refit: (weights, stats, compressed, tokens, plan, *, seed, **options) -> CompressedExperts, a second look at
            the layer with the tokens themselves (refine.LayerTokens), where there are any.
        own_text: share of the calibration windows that the model writes itself unless the user says otherwise.
        standard: options -> what makes the result an ordinary, smaller MoE: fewer experts (`count`), narrower ones
            (`width`); empty where it is none.
    """

    name: str
    summary: str
    paper: str
    description: str
    offers: Callable[..., LayerOffers]
    factorise: Callable[..., CompressedExperts]
    options: dict[str, inspect.Parameter]
    plan_needs: Callable[[dict], set[str]]
    factorise_needs: Callable[[dict], set[str]]
    allocation: str = "uniform"
    planner: Callable[..., tuple[list[LayerPlan], float]] | None = None
    refit: Callable[..., CompressedExperts] | None = None
    own_text: float = 0.0
    standard: Callable[[dict], str] = lambda options: ""

    def needs_to_plan(self, options: dict, allocation: str | None) -> set[str]:
        """Statistics that planning reads; the rule `loss` ranks gains in the norm that factorising will use."""
        needs = self.plan_needs(options)
        return needs | self.factorise_needs(options) if allocation == "loss" else needs

    def complete(self, options: dict) -> dict:
        """The options with defaults filled in; raises UserError on an unknown name or a value of the wrong type."""
        for name in options:
            if name not in self.options:
                raise unknown(f"option of {self.name}", name, self.options)
        return {
            name: _checked(f"{self.name}: {name}", options.get(name, parameter.default), parameter)
            for name, parameter in self.options.items()
        }


@dataclass(frozen=True)
class Stack:
    """One stack of a layer with what calibration says of it.

    Args:
        name: `gate_up`, `gate`, `up` or `down`.
        weights: (E, width, H), seen from the hidden side.
        stats: of the layer, or None.
        flipped: seen from the other side instead, (E, H, width), for methods that share the private factor.
    """

    name: str
    weights: Tensor
    stats: LayerStats | None
    flipped: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.weights.shape)

    @property
    def writes(self) -> bool:
        """Whether what the matrices multiply lies on their rows: true for down, whose inputs are its width."""
        return (self.name == "down") != self.flipped

    @property
    def _moments(self) -> str:
        return "hidden_moment" if self.name == "down" else "input_moment"

    @cached_property
    def layer_moment(self) -> Tensor:
        """Second moment over all of the layer's tokens of what its matrices multiply, float64."""
        return self.stats.layer_moment(self._moments)

    def of(self, weights: Tensor) -> Stack:
        """Other weights under the same inputs: deltas, say."""
        return replace(self, weights=weights)

    def flip(self) -> Stack:
        return replace(self, weights=self.weights.transpose(1, 2), flipped=not self.flipped)

    def moment(self, expert: int) -> Tensor:
        """The same of one expert's own tokens: (H, H), or (width, width) for down."""
        return self.stats.mean_moment(self._moments, expert, self.layer_moment)


@dataclass(frozen=True)
class Fitted:
    """One stack's result: the form's tensors, the relative squared error, and a solver's loss after each step."""

    factors: Factors
    error: float
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class StackOffers:
    """What one stack can spend on, its fixed part, and the form a purchase means."""

    offers: list[Offer]
    form: Callable[[list[int]], Form]
    fixed: int = 0


def lift(
    name: str,
    summary: str,
    paper: str,
    offers: Callable[..., StackOffers],
    factorise: Callable[..., Fitted],
    *,
    description: str,
    joint: bool,
    plan_needs: Callable[[dict], set[str]] = lambda options: set(),
    factorise_needs: Callable[[dict], set[str]] = lambda options: set(),
    projections: tuple[str, ...] = ("gate", "up", "down"),
    allocation: str = "uniform",
) -> Method:
    """A method that treats stacks apart, made of two functions of one stack.

    Args:
        offers: (stack, **options) -> StackOffers; `seed` too, if it takes one.
        factorise: (stack, form, *, seed, **options) -> Fitted.
        joint: whether gate and up share factors unless the user says otherwise (`--joint`).
        projections: those compressed unless the user says otherwise (`--projections`).
    """
    common = {
        "projections": _parameter("projections", tuple[str, ...], projections),
        "joint": _parameter("joint", bool, joint),
    }

    def layer_offers(
        weights: ExpertWeights, stats: LayerStats | None, *, seed: int,
        projections: tuple[str, ...], joint: bool, **options,
    ) -> LayerOffers:  # fmt: skip
        layer = weights.layer
        _check_projections(layer, projections)
        stacks = layer.stacks(projections, joint=joint)
        parts: dict[str, StackOffers | Dense] = {}
        for stack, members in stacks.items():
            if set(members) & set(projections):
                taken = accepted(offers, options | {"seed": seed})
                parts[stack] = offers(Stack(stack, weights.stack(stack), stats), **taken)
            else:
                parts[stack] = Dense(layer.experts, layer.stack_width(stack), layer.hidden)
        fixed = layer.bias_count + sum(
            part.parameter_count() if isinstance(part, Dense) else part.fixed for part in parts.values()
        )
        every = [o for part in parts.values() if isinstance(part, StackOffers) for o in part.offers]

        def plan(units: list[int]) -> LayerPlan:
            bought, chosen = list(units), {}
            for stack, part in parts.items():
                if isinstance(part, Dense):
                    chosen[stack] = part
                else:
                    chosen[stack] = part.form(bought[: len(part.offers)])
                    del bought[: len(part.offers)]
            return LayerPlan(layer, chosen)

        return LayerOffers(layer, fixed, tuple(every), plan)

    def layer_factorise(
        weights: ExpertWeights, stats: LayerStats | None, plan: LayerPlan, *, seed: int,
        projections: tuple[str, ...] = (), joint: bool = True, **options,
    ) -> CompressedExperts:  # fmt: skip
        tensors, errors, curves = dict(weights.biases()), {}, {}
        for stack, form in plan.forms.items():
            matrix = weights.stack(stack)
            if isinstance(form, Dense):
                factors = {"weight": matrix}
            else:
                fitted = factorise(Stack(stack, matrix, stats), form, seed=seed, **accepted(factorise, options))
                factors, errors[stack] = fitted.factors, fitted.error
                if fitted.curve:
                    curves[stack] = list(fitted.curve)
            tensors |= {f"{stack}_{key}": value for key, value in factors.items()}
        return CompressedExperts(weights.layer, dict(plan.forms), tensors, errors, curves)

    return Method(
        name, summary, paper, description, layer_offers, layer_factorise,
        options_of(offers, factorise) | common, plan_needs, factorise_needs,
        allocation,
    )  # fmt: skip


def relative_error(original: Tensor, rebuilt: Callable[[int], Tensor], moment: Callable[[int], Tensor] | None) -> float:
    """Σ_e ‖W_e − Ŵ_e‖² / Σ_e ‖W_e‖²; with moments (of the right-hand side) in their norm, tr D C Dᵀ."""
    lost = total = 0.0
    for expert, weight in enumerate(original):
        difference = weight.double() - rebuilt(expert).double()
        if moment is None:
            lost, total = lost + difference.square().sum(), total + weight.double().square().sum()
        else:
            c = moment(expert)
            lost = lost + weighted_error(difference, c)
            total = total + weighted_error(weight.double(), c)
    return float(lost / total) if total > 0 else 0.0


def stack_error(stack: Stack, form: Form, factors: Factors, *, weighted: bool) -> float:
    """`relative_error` of a stack, in the metric of its own inputs where `weighted`."""
    if not weighted:
        return relative_error(stack.weights, lambda e: form.dense(factors, e), None)
    if stack.writes:
        flipped = stack.weights.transpose(1, 2)
        return relative_error(flipped, lambda e: form.dense(factors, e).T, stack.moment)
    return relative_error(stack.weights, lambda e: form.dense(factors, e), stack.moment)


def options_of(*functions: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments with defaults of a method's functions, but for the seed: its options."""
    keywords = ((n, p) for f in functions for n, p in _keywords(f).items())
    return {n: p for n, p in keywords if n != "seed" and p.default is not p.empty}


def _check_projections(layer: ExpertLayer, projections: tuple[str, ...]) -> None:
    for name in projections:
        if name not in ("gate", "up", "down"):
            raise unknown("projection", name, ("gate", "up", "down"))
    if not set(projections) & set(layer.projections):
        raise UserError(f"{layer.name}: none of {projections} is a projection of this model ({layer.projections}).")


def _keywords(function: Callable) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(function, eval_str=True)
    return {n: p for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}


def accepted(function: Callable, options: dict) -> dict:
    """Those of a method's options that one of its functions takes."""
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in _keywords(function)}


def _parameter(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _checked(where: str, value: object, parameter: inspect.Parameter) -> object:
    """The value in the parameter's type; text from the command line is read, anything unfit raises UserError."""
    kind = parameter.annotation
    try:
        if get_origin(kind) is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(get_args(kind)[0](part) for part in parts)
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
        choices = get_args(kind)  # Literal[...]
        if choices:
            if value not in choices:
                raise unknown(where, str(value), choices)
            return value
        return kind(value)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        expected = getattr(kind, "__name__", str(kind))
        raise UserError(f"{where} must be {expected}, found {value!r}.") from None


def gram(rows: Tensor) -> Tensor:
    """rows (n, H) -> (H, H) float64, in blocks: a float64 copy of a wide stack would not fit beside it."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(65536):
        block = block.double()
        total.addmm_(block.T, block)
    return total
