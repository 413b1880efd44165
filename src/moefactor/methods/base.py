"""What a method is, and the helper that makes one out of a function of a single stack."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from ..allocate import LayerOffers, Offer, Planned, by_stacks, plan_offers
from ..errors import UserError, located, unknown
from ..experts import CompressedExperts, ExpertLayer, ExpertWeights
from ..fitting.stack import Stack
from ..forms import Dense, Form
from ..forms.base import Factors
from ..plan import LayerPlan
from ..stats import LayerStats


@dataclass(frozen=True)
class Method:
    """A compression method: pure mathematics. It prices each layer alone, plans all of them under one budget,
    factorises each alone, and may look at it again.

    Args:
        name: as on the command line.
        summary, paper, description: two lines and the file's docstring, for `moefactor methods`.
        price: (weights, stats, budget, *, seed, **options) -> what the layer's budget can be spent on, and what that is
            estimated to cost or to gain; a value with `to_json`.
        priced: (layer, JSON) -> the same value again, for a run that is resumed.
        plan: (priced layers, budget) -> Planned.
        build: (LayerOffers, units) -> LayerPlan, of methods whose price is a LayerOffers.
        factorise: (weights, stats, layer_plan, *, seed, **options) -> CompressedExperts.
        options: every option with its default; the command line makes flags of them.
        plan_needs, factorise_needs: options -> the statistics that each stage reads (names of stats.STATISTICS).
        rule: of allocate.RULES, which spends the budget unless the user names another; None for a method that plans in
            its own way and takes none.
        refit: (weights, stats, compressed, tokens, plan, *, seed, **options) -> CompressedExperts, a second look at
            the layer with the tokens themselves (fitting.refine.LayerTokens), where there are any.
        own_text: share of the calibration windows that the model writes itself unless the user says otherwise.
        standard: options -> what makes the result an ordinary, smaller MoE: fewer experts (`count`), narrower ones
            (`width`), what the model allows of either (`both`); empty where it is none.
        rounds: options -> whether it plans and fits for few bits itself, one number for all (`even`) or each channel's
            own too (`mixed`); empty where what it makes is rounded afterwards.

    A method that makes offers is made by `offering`, one that treats stacks apart by `lift`.
    """

    name: str
    summary: str
    paper: str
    description: str
    price: Callable[..., Any]
    priced: Callable[[ExpertLayer, dict], Any]
    plan: Callable[..., Planned]
    factorise: Callable[..., CompressedExperts]
    options: dict[str, inspect.Parameter]
    plan_needs: Callable[[dict], set[str]]
    factorise_needs: Callable[[dict], set[str]]
    rule: str | None = "uniform"
    build: Callable[..., LayerPlan] | None = None
    refit: Callable[..., CompressedExperts] | None = None
    own_text: float = 0.0
    standard: Callable[[dict], str] = lambda options: ""
    rounds: Callable[[dict], str] = lambda options: ""

    def needs_to_plan(self, options: dict, allocation: str | None) -> set[str]:
        """Statistics that planning reads; the rule `loss` ranks gains in the norm that factorising will use."""
        if allocation is not None and self.rule is None:
            raise UserError(f"{self.name} spends the budget in its own way and takes no --allocation; leave it out.")
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


def offering(
    name: str, summary: str, paper: str, offers: Callable[..., LayerOffers],
    factorise: Callable[..., CompressedExperts], *, rule: str, build: Callable[..., LayerPlan] = by_stacks,
    options: dict[str, inspect.Parameter] | None = None, **rest: Any,
) -> Method:  # fmt: skip
    """A method that says what a layer can buy and lets allocate.py spend.

    Args:
        offers: (weights, stats, *, seed, **options) -> LayerOffers.
        build: (LayerOffers, units) -> LayerPlan, where that is not stack by stack.
        rest: other fields of Method.
    """

    def price(weights: ExpertWeights, stats: LayerStats | None, budget: object, **given: Any) -> LayerOffers:
        return offers(weights, stats, **accepted(offers, given))

    def plan(priced: list[LayerOffers], budget: Any) -> Planned:
        return plan_offers(priced, budget, own_rule=rule, build=build)

    options = options_of(offers, factorise) if options is None else options
    needs: dict[str, Callable[[dict], set[str]]] = {
        "plan_needs": lambda options: set(), "factorise_needs": lambda options: set(),
    }  # fmt: skip
    return Method(
        name, summary, paper, price=price, priced=LayerOffers.from_json, plan=plan, factorise=factorise,
        options=options, rule=rule, build=build, **(needs | rest),
    )  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """One stack's result: the form's tensors, the relative squared error, and a solver's loss after each step."""

    factors: Factors
    error: float
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class StackOffers:
    """What one stack can spend on, its fixed part, and its form, into which what is bought is put (Form.with_units)."""

    offers: list[Offer]
    form: Form
    fixed: int = 0


def lift(
    name: str,
    summary: str,
    paper: str,
    offers: Callable[..., StackOffers],
    factorise: Callable[..., Fitted],
    *,
    joint: bool,
    projections: tuple[str, ...] = ("gate", "up", "down"),
    rule: str = "uniform",
    **rest: Any,
) -> Method:
    """A method that treats stacks apart, made of two functions of one stack.

    Args:
        offers: (stack, **options) -> StackOffers; `seed` too, if it takes one.
        factorise: (stack, form, *, seed, **options) -> Fitted.
        joint: whether gate and up share factors unless the user says otherwise (`--joint`).
        projections: those compressed unless the user says otherwise (`--projections`).
        rest: other fields of Method.
    """
    common = {
        "projections": _parameter("projections", tuple[str, ...], projections),
        "joint": _parameter("joint", bool, joint),
    }
    return offering(
        name, summary, paper, partial(_layer_offers, offers), partial(_layer_factorise, factorise), rule=rule,
        options=options_of(offers, factorise) | common, **rest,
    )  # fmt: skip


def _layer_offers(
    of_stack: Callable[..., StackOffers], weights: ExpertWeights, stats: LayerStats | None, *, seed: int,
    projections: tuple[str, ...], joint: bool, **options: Any,
) -> LayerOffers:  # fmt: skip
    layer = weights.layer
    _check_projections(layer, projections)
    forms: dict[str, Form] = {}
    every: list[Offer] = []
    fixed = layer.bias_count
    for stack, members in layer.stacks(projections, joint=joint).items():
        if set(members) & set(projections):
            taken = accepted(of_stack, options | {"seed": seed})
            with located(f"{layer.name} {stack}"):
                part = of_stack(Stack(stack, weights.stack(stack), stats), **taken)
            forms[stack], fixed = part.form, fixed + part.fixed
            every += part.offers
        else:
            forms[stack] = Dense(layer.experts, layer.stack_width(stack), layer.hidden)
            fixed += forms[stack].parameter_count()
    return LayerOffers(layer, fixed, tuple(every), forms)


def _layer_factorise(
    of_stack: Callable[..., Fitted], weights: ExpertWeights, stats: LayerStats | None, plan: LayerPlan, *, seed: int,
    projections: tuple[str, ...] = (), joint: bool = True, **options: Any,
) -> CompressedExperts:  # fmt: skip
    tensors, errors, curves = dict(weights.biases()), {}, {}
    for stack, form in plan.forms.items():
        matrix = weights.stack(stack)
        if isinstance(form, Dense):
            factors = {"weight": matrix}
        else:
            with located(f"{weights.layer.name} {stack}"):
                fitted = of_stack(Stack(stack, matrix, stats), form, seed=seed, **accepted(of_stack, options))
            factors, errors[stack] = fitted.factors, fitted.error
            if fitted.curve:
                curves[stack] = list(fitted.curve)
        tensors |= {f"{stack}_{key}": value for key, value in factors.items()}
    return CompressedExperts(weights.layer, dict(plan.forms), tensors, errors, curves)


def options_of(*functions: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments with defaults of a method's functions, but for the seed: its options."""
    keywords = ((n, p) for f in functions for n, p in _keywords(f).items())
    return {n: p for n, p in keywords if n != "seed" and p.default is not p.empty}


def kind_of(parameter: inspect.Parameter) -> Any:
    """The type of an option's values; `int | None` is an int that may be left to the method."""
    kind = parameter.annotation
    if isinstance(kind, UnionType):
        (kind,) = (member for member in get_args(kind) if member is not NoneType)
    return kind


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


def _checked(where: str, value: Any, parameter: inspect.Parameter) -> Any:
    """The value in the parameter's type; text from the command line is read, anything unfit raises UserError."""
    kind = kind_of(parameter)
    if value is None and parameter.default is None:
        return None
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
