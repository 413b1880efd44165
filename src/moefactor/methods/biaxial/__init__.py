"""biaxial: the budget spent on both axes of an expert, in one currency, the estimated rise of the model's loss.

Along the *intermediate* axis, private to an expert, channels are taken out; along the *hidden* axis, which experts
share, bases are kept. What a channel or a direction costs is the loss's second-order rise (fitting/metrics.py); how
much to spend on which, over all layers, is a search over tables of candidates (planning.py). Four forms:

- `fast`: one linear basis a layer and projection. Nothing is rebuilt at run time. With `latent` gate and up's and
  down's have one rank, and the layer is a latent MoE: H -> r, experts of hidden size r, r -> H.
- `linear`: where it pays, a mixture of bases, Ŵ_e = A_e · Σ_j α_ej B_j. Each basis works on a token once; nothing is
  rebuilt either.
- `tight`: where it pays, a mixture of bases, Ŵ_e = A_e · silu(Σ_j α_ej B_j), gate and up behind one; α is free. The
  lowest loss; bases are rebuilt at run time.
- `standard`: channels and whole experts taken out, as many in every layer: an ordinary, smaller checkpoint that every
  engine runs. Its router is cut and trained with the experts.

Then, on the layer's own tokens: down against the true output of each expert from the compressed expert's activations
(closed form), and `refine_steps` steps of Adam on all of the layer's factors against the dense layer's output, in the
norm of the loss gradient there. Nothing else of the model moves, and held-out tokens decide what is kept. Of `standard`
the whole block is trained so, router and all.

`width_multiple`: what widths come in multiples of, chosen by the model's unless given. `experts_multiple`, of
`standard`: the ranks of an expert-parallel engine. A negative `doubt`, `channel_share` or `refine_steps` is chosen: by
the ratio, by a search, by the form. With `--no-sequential` or `data_free` nothing is refitted or trained.

`data_free` reads no text: relative errors of the weights stand for the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...allocate import Budget, Planned
from ...errors import UserError, located, required
from ...experts import CompressedExperts, ExpertLayer, ExpertWeights
from ...fitting.channels import kept_biases, width_of_atoms
from ...fitting.linalg import weighted_least_squares
from ...fitting.metrics import Cut, Metrics, relative_first_error, solve_down
from ...fitting.mixture import mixed
from ...fitting.refine import LayerTokens, refine, refine_rounded, rounded
from ...fitting.rounding import relative_noise
from ...forms import BasisMixture, Form, Latent, Quantised
from ...plan import LayerPlan
from ...stats import LayerStats
from ..base import Method, options_of
from .mixtures import fit_mixture, mixture_problem
from .planning import SHARES, FormName, Table, layer_table, plan_tables
from .precision import Precisions, plan_precisions, precisions
from .standard import STEPS as STANDARD_STEPS
from .standard import Shapes, cut_experts, plan_shapes, shapes, train

NEEDS = frozenset({"input_moment", "hidden_moment", "hidden_square", "output_gradient", "first_gradient"})
# Metrics.damping of the prices, from the ratio DOUBTFUL up; below, it falls with the square. What goes first is what no
# text uses, and doubt would keep it; what goes later is used by some other text.
DOUBT, DOUBTFUL = 0.1, 0.4
LEAST_DOUBT = 0.015  # where bits are spent: without any, what no text used would go as soon as anything must
# Without text, channels go at so much of the ratio, in every layer alike: relative errors can't tell what they are
# worth beside directions, and a search over them took out too many. Tried on one model, 0.07 to 0.3 at five ratios.
BLIND_CHANNELS = 1 / 3
# Of the noise that breaks ties in the short fits. One for all layers and runs: a plan does not depend on the seed.
PROBING_SEED = 0
REFINE_STEPS = 150


def price(
    weights: ExpertWeights, stats: LayerStats | None, budget: Budget, *, seed: int, form: FormName = "fast",
    shrinkage: float = 0.5, doubt: float = -1.0, channel_share: float = -1.0, data_free: bool = False,
    width_multiple: int | None = None, latent: bool = False, experts_multiple: int = 1,
) -> Table | Shapes | Precisions:  # fmt: skip
    """What the layer can become, and what each of it is estimated to cost.

    Args:
        doubt: weight of the unseen when the budget is spent (Metrics.damping); negative: DOUBT, by the ratio. See
            factorise for `shrinkage`.
        channel_share: share of every layer's channels to take out; negative: the best of a grid, layer by layer, or
            without text BLIND_CHANNELS.
        width_multiple: experts' widths are multiples of this, 0 among them; None for what kernels like
            (fitting.channels.width_of_atoms; of `standard`, whose one width has fewer choices, standard.multiple_of).
        latent: one rank for both bases of a layer, or none; of `fast` alone.
        experts_multiple: of `standard`, what their number comes in multiples of; expert-parallel engines want that of
            their ranks.
    """
    if latent and form != "fast":
        raise UserError(f"biaxial: --latent is of --form fast, whose bases are linear; found --form {form}.")
    if form != "standard" and experts_multiple != 1:
        raise UserError(f"biaxial: experts_multiple is of --form standard; {form} keeps every expert.")
    if form == "standard" and channel_share >= 0:
        raise UserError("biaxial: channel_share is of the other forms; --form standard has one width, by the budget.")
    multiple, hidden = budget.block(weights.layer.hidden), weights.layer.hidden
    if multiple > hidden:
        raise UserError(f"--rank-multiple must be at most the hidden size, {hidden}, found {multiple}.")
    storage = budget.storage
    by_channel = storage.rounding is not None and _by_channel(form, latent, channel_share)
    if doubt < 0:
        doubt = DOUBT * min(1.0, budget.ratio / DOUBTFUL) ** 2
        if storage.in_bits:
            doubt = max(LEAST_DOUBT, doubt)
    if data_free and channel_share < 0:
        channel_share = BLIND_CHANNELS * budget.ratio
    seen = None if data_free else stats
    with located(weights.layer.name):
        if form == "standard":
            believed = Metrics(weights, seen, _fraction("doubt", doubt))
            return shapes(believed, budget, width_multiple, experts_multiple)
        if by_channel:
            believed = Metrics(weights, seen, _fraction("doubt", doubt))
            block = width_of_atoms(width_multiple, weights.layer)
            return precisions(believed, block, storage.required.group, multiple)
        return layer_table(
            Metrics(weights, seen, _fraction("shrinkage", shrinkage)),
            Metrics(weights, seen, _fraction("doubt", doubt)),
            SHARES if channel_share < 0 else (channel_share,), form, multiple, PROBING_SEED,
            block=width_of_atoms(width_multiple, weights.layer), latent=latent, storage=storage,
        )  # fmt: skip


def plan_priced(priced: list[Table] | list[Shapes] | list[Precisions], budget: Budget) -> Planned:
    """One plan for every layer; which search it takes shows in how they were priced."""
    if isinstance(priced[0], Shapes):
        return plan_shapes(priced, budget)
    return plan_precisions(priced, budget) if isinstance(priced[0], Precisions) else plan_tables(priced, budget)


def read_priced(layer: ExpertLayer, data: dict) -> Table | Shapes | Precisions:
    if "precisions" in data:
        return Precisions.from_json(layer, data)
    return Table.from_json(layer, data) if "rows" in data else Shapes.from_json(layer, data)


def factorise(
    weights: ExpertWeights, stats: LayerStats | None, plan: LayerPlan, *, seed: int, shrinkage: float = 0.5,
    steps: int = 600, data_free: bool = False, form: FormName = "fast",
) -> CompressedExperts:  # fmt: skip
    """The layer from its statistics alone, not yet rounded where the plan says that it will be.

    Args:
        shrinkage: weight of the unseen in the fits, 0 to 1 (Metrics.damping). Text unlike what the model will read
            wants more.
        steps: of the solver of mixtures.
    """
    layer, seen = weights.layer, None if data_free else stats
    if form == "standard":
        return cut_experts(weights, Metrics(weights, seen, _fraction("shrinkage", shrinkage)), plan)
    cut = _cut(weights, seen, plan, shrinkage)
    name = layer.first_stack
    noises, plan = _noises(cut, plan), plan.unrounded
    first = plan.forms[name]
    rows, tensors, curves = cut.first_rows(), {}, {}
    rebuilt = rows
    if isinstance(first, Latent):
        basis = cut.first_directions()[1][: first.rank]
        rows = [weighted_least_squares(w, basis, cut.metrics.input(e)) for e, w in enumerate(rows)]
        rebuilt = [a @ basis for a in rows]
        tensors[f"{name}_basis"] = basis
    elif isinstance(first, BasisMixture):
        solution, experts = fit_mixture(
            mixture_problem(cut, "first", first.activation, noises[name]), first.bases, first.rank, steps, seed
        )
        tensors[f"{name}_basis"], tensors[f"{name}_mix"] = solution.parameters[0].unsqueeze(0), solution.parameters[1]
        rebuilt = [experts[e][: len(w)].double() for e, w in enumerate(rows)]
        rows = [solution.private[e][: len(w)] for e, w in enumerate(rows)]
        curves[name] = solution.curve
    tensors[_private(first, name)] = torch.cat(rows)
    down_form = plan.forms["down"]
    if isinstance(down_form, BasisMixture):
        problem = mixture_problem(cut, "down", down_form.activation, noises["down"])
        solution, _ = fit_mixture(problem, down_form.bases, down_form.rank, steps, seed)
        tensors["down_basis"], tensors["down_mix"] = solution.parameters[0].unsqueeze(0), solution.parameters[1]
        curves["down"] = solution.curve
    tensors |= _down_tensors(cut, plan, tensors, noises["down"])
    if layer.biased:
        biases = [kept_biases(weights, e, k, layer.intermediate) for e, k in enumerate(cut.kept)]
        tensors |= {"first_bias": torch.stack(biases), "down_bias": required(weights.down_bias, "down_bias")}
    errors = {name: relative_first_error(cut, rebuilt)}
    return CompressedExperts(layer, dict(plan.forms), tensors, errors, curves)


def refit(
    weights: ExpertWeights, stats: LayerStats, compressed: CompressedExperts, tokens: LayerTokens, plan: LayerPlan, *,
    seed: int, shrinkage: float = 0.5, refine_steps: int = -1, rounded_steps: int = 150, form: FormName = "fast",
) -> CompressedExperts:  # fmt: skip
    """Down again, from what the compressed experts make of the layer's tokens, then `refine_steps` of refine.py, and
    where the plan rounds `rounded_steps` more while values are rounded.

    Args:
        refine_steps: negative: 150, and of `standard`, which trains the router with its experts, 300.
    """
    if form == "standard":
        gradient = Metrics(weights, stats, _fraction("shrinkage", shrinkage)).pooled_output()
        return train(
            compressed, tokens, gradient, steps=STANDARD_STEPS if refine_steps < 0 else refine_steps, seed=seed
        )
    refine_steps = REFINE_STEPS if refine_steps < 0 else refine_steps
    cut = _cut(weights, stats, plan, shrinkage)
    first = compressed.stack(cut.metrics.first.name)
    for expert, (moment, cross) in enumerate(tokens.down_moments(first, compressed.tensors.get("first_bias"))):
        k = len(cut.kept[expert])
        if k and stats.count[expert] > 0:
            original = cut.metrics.down.weights[expert][cut.kept[expert]].double()
            cut.down[expert] = solve_down(moment[:k, :k], cross[:k], original, float(stats.count[expert]))
    forms = plan.unrounded.forms
    tensors = compressed.tensors | _down_tensors(cut, plan.unrounded, compressed.tensors, _noises(cut, plan)["down"])
    compressed = CompressedExperts(weights.layer, dict(forms), tensors, compressed.errors, compressed.curves)
    gradient = cut.metrics.pooled_output()
    if refine_steps:
        compressed = refine(compressed, tokens, gradient, steps=refine_steps, seed=seed)
    if forms == plan.forms:
        return compressed
    if not rounded_steps:
        return rounded(compressed, plan.forms)
    return refine_rounded(compressed, plan.forms, tokens, gradient, steps=rounded_steps, seed=seed)


def _cut(weights: ExpertWeights, stats: LayerStats | None, plan: LayerPlan, shrinkage: float) -> Cut:
    metrics = Metrics(weights, stats, _fraction("shrinkage", shrinkage))
    down = plan.forms["down"]
    # Channels of most bits come first.
    order = metrics.channel_energies(down.group) if isinstance(down, Quantised) and down.channels else None
    return Cut.of(metrics, metrics.prices(), list(down.rows().widths), order)


def _noises(cut: Cut, plan: LayerPlan) -> dict[str, float]:
    """Stack -> what rounding adds to its private factors, over their squares."""
    found = dict.fromkeys(plan.forms, 0.0)
    for stack, form in plan.forms.items():
        bits = form.precision(form.channel_tensor) if isinstance(form, Quantised) else 0
        if isinstance(form, Quantised) and bits:
            weights = cut.metrics.down.weights if stack == "down" else cut.metrics.first.weights
            found[stack] = relative_noise(weights, form.group)[bits]
    return found


def _private(form: Form, stack: str) -> str:
    """The tensor that has a row for every channel left."""
    return f"{stack}_private" if form.mixes_bases else f"{stack}_weight"


def _down_tensors(cut: Cut, plan: LayerPlan, tensors: dict[str, Tensor], noise: float) -> dict[str, Tensor]:
    """What down's form stores for the cut's rows; of a mixture `tensors` has the bases already, and its private factors
    are fitted for the noise that rounding adds."""
    form, rows = plan.forms["down"], cut.down
    if isinstance(form, Latent):
        _, basis, inward = cut.down_directions()
        return {"down_basis": basis[: form.rank], "down_weight": torch.cat([d @ inward[:, : form.rank] for d in rows])}
    if isinstance(form, BasisMixture):
        bases = mixed(tensors["down_mix"], tensors["down_basis"][0], form.activation).double()
        rows = [
            weighted_least_squares(d, bases[e], cut.metrics.output(e), noise) if len(d) else d.new_zeros(0, form.rank)
            for e, d in enumerate(rows)
        ]
        rows = [row.to(tensors["down_basis"].dtype) for row in rows]
    return {_private(form, "down"): torch.cat(rows)}


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"biaxial: {name} must be from 0 to 1, found {value}.")
    return value


def _by_channel(form: FormName, latent: bool, channel_share: float) -> bool:
    """Whether bits are given channel by channel, where a plan gives any."""
    return form == "fast" and not latent and channel_share < 0


def _rounds(options: dict) -> str:
    if options["form"] == "standard":
        return ""
    return "mixed" if _by_channel(options["form"], options["latent"], options["channel_share"]) else "even"


METHOD = Method(
    "biaxial",
    "channels taken out and bases shared, priced in the model's loss; refined layer by layer",
    "moefactor's own",
    __doc__,
    price=price,
    priced=read_priced,
    plan=plan_priced,
    factorise=factorise,
    options=options_of(price, factorise, refit),
    plan_needs=lambda options: set() if options["data_free"] else set(NEEDS),
    factorise_needs=lambda options: set() if options["data_free"] else set(NEEDS),
    rule=None,
    refit=refit,
    own_text=0.5,
    rounds=_rounds,
    standard=lambda options: "both" if options["form"] == "standard" else "",
)
