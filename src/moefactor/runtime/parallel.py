"""What one rank of a parallel engine holds of a layer.

Tensor parallel: of every expert a run of its channels, so private factors are cut along the intermediate axis, and
bases, which lie on the hidden axis, are on every rank. Expert parallel: some experts whole, and the bases they use.
Either way a rank's output is its part of a sum, and the engine's usual all-reduce behind the experts is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from torch import Tensor

from ..errors import UserError
from ..forms import (
    INT32,
    BasePlusDelta,
    BasisMixture,
    Dense,
    Form,
    Latent,
    Quantised,
    Ragged,
    SharedBasis,
    SharedPrivate,
    SparseResidual,
)
from ..forms.base import Factors
from ..plan import LayerPlan
from .kernels.residual_share import ResidualShare


@dataclass(frozen=True)
class Share:
    """One rank's part of a layer.

    Args:
        intermediate: I of the whole layer.
        experts: those that it holds, ascending.
        channels: start and stop, among the channels that it kept, for each of these experts.
        first: whether it is the rank that adds what must be added once.
    """

    intermediate: int
    experts: tuple[int, ...]
    channels: tuple[tuple[int, int], ...]
    first: bool = True

    @classmethod
    def of_channels(cls, plan: LayerPlan, rank: int, size: int) -> Share:
        """Tensor parallel: rank's channels of every expert, even where they can be; else in whole multiples of what all
        widths are multiples of, and experts of uneven widths take turns in who gets more."""
        layer = plan.remaining
        kept = {form.kept_widths for form in plan.forms.values()}
        widths = next((w for w in kept if w is not None), (layer.intermediate,) * layer.experts)
        unit = _unit(widths, size)
        if size > 1 and len(kept) > 1:
            raise UserError(f"{layer.name}: only some of its stacks are cut channel by channel; serve it on one GPU.")
        if None in kept and size > layer.intermediate:
            raise UserError(f"{layer.name}: {layer.intermediate} channels can't be cut into {size} parts.")

        def run(expert: int, width: int) -> tuple[int, int]:
            turn = rank if None in kept else (rank + expert) % size
            units = width // unit
            return units * turn // size * unit, units * (turn + 1) // size * unit

        experts = tuple(range(layer.experts))
        channels = tuple(run(e, width) for e, width in enumerate(widths))
        return cls(layer.intermediate, experts, channels, first=rank == 0)

    @classmethod
    def of_experts(cls, plan: LayerPlan, experts: Sequence[int], rank: int = 0, size: int = 1) -> Share:
        """Expert parallel: these experts, whole or, tensor parallel among the ranks that hold them, rank's channels."""
        every = cls.of_channels(plan, rank, size)
        return replace(every, experts=tuple(experts), channels=tuple(every.channels[e] for e in experts))

    @property
    def width(self) -> int:
        """I of the part: the most channels that it has of one expert."""
        return max(stop - start for start, stop in self.channels)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.channels)

    def rows(self, width: int) -> Tensor:
        """Rows of a stack of `width` (I, or 2I of gate and up) that the part has of every expert alike."""
        if len({*self.channels}) > 1:
            raise UserError("experts of uneven widths in a form that holds them all alike; serve it on one GPU.")
        start, stop = self.channels[0]
        halves = torch.arange(width).view(-1, self.intermediate)
        return halves[:, start:stop].flatten()

    def local_width(self, width: int) -> int:
        return width // self.intermediate * self.width


def _unit(widths: Sequence[int], size: int) -> int:
    """Channels that stay together: the even part of a common width, else the largest power of two up to 128 of which
    all widths are multiples, and which is no more than a rank's part of the mean."""
    if len(set(widths)) == 1 and widths[0] and widths[0] % size == 0:
        return widths[0] // size
    mean = sum(widths) / len(widths) / size
    return next(u for u in (128, 64, 32, 16, 8, 4, 2, 1) if u == 1 or (u <= mean and all(w % u == 0 for w in widths)))


def share_of_layer(plan: LayerPlan, tensors: Mapping[str, Tensor], share: Share) -> tuple[LayerPlan, dict[str, Tensor]]:
    """The part's plan, whose layer has the part's experts and width, and its tensors by the names of `tensors`.

    tensors: all of the layer's, named as in `plan.tensors()`. Raises UserError for a tensor of another shape than
    planned, and for a form that can't be cut so.
    """
    for name, spec in plan.tensors().items():
        if tuple(tensors[name].shape) != spec.shape:
            raise UserError(
                f"{plan.layer.name}.{name}: has shape {tuple(tensors[name].shape)} in the checkpoint, config.json says "
                f"{spec.shape}. Download it again."
            )
    if share == Share.of_channels(plan, 0, 1):
        return plan, dict(tensors)
    layer = replace(plan.remaining, experts=len(share.experts), intermediate=share.width)
    forms: dict[str, Form] = {}
    parts: dict[str, Tensor] = {}
    for stack, form in plan.forms.items():
        factors = {name: tensors[f"{stack}_{name}"] for name in form.tensors()}
        try:
            forms[stack], own = share_of(form, factors, share)
        except UserError as error:
            raise UserError(f"{plan.layer.name} {stack}: {error}") from None
        parts |= {f"{stack}_{name}": tensor.contiguous() for name, tensor in own.items()}
    experts = list(share.experts)
    if layer.biased:
        parts["first_bias"] = _share_of_bias(tensors["first_bias"], share)
        down = tensors["down_bias"][experts]
        parts["down_bias"] = down if share.first else torch.zeros_like(down)
    constant = [e for e in plan.intercept if e in share.experts] if share.first else []
    if constant:
        parts["intercept"] = tensors["intercept"][[plan.intercept.index(e) for e in constant]]
    local = LayerPlan(layer, forms, intercept=tuple(experts.index(e) for e in constant))
    return local, parts


def _share_of_bias(bias: Tensor, share: Share) -> Tensor:
    """(E, halves · I) -> (experts, halves · I of the part); zero behind an expert's own channels."""
    whole = bias.view(len(bias), -1, share.intermediate)
    part = bias.new_zeros(len(share.experts), whole.shape[1], share.width)
    for place, (expert, (start, stop)) in enumerate(zip(share.experts, share.channels, strict=True)):
        part[place, :, : stop - start] = whole[expert, :, start:stop]
    return part.flatten(1)


@singledispatch
def share_of(form: Form, factors: Factors, share: Share) -> tuple[Form, Factors]:
    """The part's form and its factors."""
    raise UserError(f"the form {form.name} can't be cut for several GPUs; serve it on one.")


@share_of.register
def _dense(form: Dense, factors: Factors, share: Share) -> tuple[Form, Factors]:
    local = Dense(len(share.experts), share.local_width(form.width), form.hidden)
    return local, {"weight": factors["weight"][list(share.experts)][:, share.rows(form.width)]}


@share_of.register
def _ragged(form: Ragged, factors: Factors, share: Share) -> tuple[Form, Factors]:
    every = form.expert_rows(factors["weight"])
    parts = []
    for expert, (start, stop) in zip(share.experts, share.channels, strict=True):
        halves = every[expert].unflatten(0, (form.halves, form.widths[expert]))
        parts.append(halves[:, start:stop].flatten(0, 1))
    local = replace(
        form, experts=len(share.experts), width=share.local_width(form.width), widths=share.widths
    )  # fmt: skip
    return local, {"weight": torch.cat(parts)}


@share_of.register
def _shared_basis(form: SharedBasis, factors: Factors, share: Share) -> tuple[Form, Factors]:
    place = {expert: index for index, expert in enumerate(share.experts)}
    groups, ranks = [], []
    for group, rank in zip(form.groups, form.ranks, strict=True):
        if own := tuple(place[e] for e in group if e in place):
            groups.append(own)
            ranks.append(rank)
    local = SharedBasis(
        len(share.experts), share.local_width(form.width), form.hidden, groups=tuple(groups), ranks=tuple(ranks)
    )
    rows, taken = share.rows(form.width), {}
    for bucket in local.buckets:
        old = [form.places[share.experts[e]] for e in bucket.experts]
        first_of_group = [sum(bucket.group_sizes[:g]) for g in range(bucket.groups)]
        taken[bucket.basis] = factors[bucket.basis][[old[i][2] for i in first_of_group]]
        taken[bucket.private] = _columns(factors[bucket.private][[o[1] for o in old]], rows, form.width)
    return local, taken


@share_of.register
def _shared_private(form: SharedPrivate, factors: Factors, share: Share) -> tuple[Form, Factors]:
    local = replace(form, experts=len(share.experts), width=share.local_width(form.width))
    return local, {
        "private": _columns(factors["private"], share.rows(form.width), form.width),
        "basis": factors["basis"][list(share.experts)],
    }


@share_of.register
def _basis_mixture(form: BasisMixture, factors: Factors, share: Share) -> tuple[Form, Factors]:
    size = form.experts // form.groups
    groups = sorted({expert // size for expert in share.experts})
    if len(share.experts) != form.experts and len(groups) > 1 and len(share.experts) != len(groups) * size:
        raise UserError(
            f"{len(share.experts)} experts a GPU cut through groups of {size} that share bases; choose an "
            "expert-parallel size that keeps groups together, or tensor parallel."
        )
    taken = {"mix": factors["mix"][list(share.experts)]}
    taken |= {name: tensor[groups] for name, tensor in factors.items() if name.startswith("basis")}
    local = replace(
        form, experts=len(share.experts), width=share.local_width(form.width), groups=len(groups),
        widths=share.widths if form.ragged else (),
    )  # fmt: skip
    if form.ragged:
        _, rows = _ragged(form.ragged, {"weight": factors["private"]}, share)
        return local, {"private": rows["weight"], **taken}
    private = _columns(factors["private"][list(share.experts)], share.rows(form.width), form.width)
    return local, {"private": private, **taken}


@share_of.register
def _base_plus_delta(form: BasePlusDelta, factors: Factors, share: Share) -> tuple[Form, Factors]:
    delta, delta_factors = share_of(form.delta, form.delta_factors(factors), share)
    width, base, kept = share.local_width(form.width), factors["base"], form.kept
    taken = {}
    if not form.writes:
        base = base[share.rows(form.width)]
        if kept < form.columns:
            taken["base_columns"] = factors["base_columns"]
    else:
        start, stop = share.channels[0]
        columns = factors["base_columns"].long() if kept < form.columns else torch.arange(form.columns)
        own = ((columns >= start) & (columns < stop)).nonzero().flatten()
        base, kept = base[own], len(own)
        if form.dynamic and (kept < form.kept or len(share.experts) < form.experts):
            raise UserError(
                "base columns are left out call by call, by a ranking over all of them (--dynamic), which one "
                "GPU of several does not see; serve it on one."
            )
        if kept == 0:
            raise UserError("no column of the base is left for one of the GPUs; serve it on fewer.")
        if kept < width:
            taken["base_columns"] = (columns[own] - start).int()
    local = replace(form, experts=len(share.experts), width=width, kept=kept, delta=delta)
    return local, {"base": base, **taken, **{f"delta_{name}": t for name, t in delta_factors.items()}}


@share_of.register
def _latent(form: Latent, factors: Factors, share: Share) -> tuple[Form, Factors]:
    inner, own = share_of(form.inner, form.inner_factors(factors), share)
    local = Latent(len(share.experts), share.local_width(form.width), form.hidden, rank=form.rank, inner=inner)
    outer = dict(zip(inner.tensors(), list(local.tensors())[1:], strict=True))
    return local, {"basis": factors["basis"], **{outer[name]: tensor for name, tensor in own.items()}}


@share_of.register
def _residual(form: SparseResidual, factors: Factors, share: Share) -> tuple[Form, Factors]:
    if len(share.experts) != form.experts:
        raise UserError("a residual's vector belongs to all experts of its group; serve it tensor parallel.")
    inner, own = share_of(form.inner, form.inner_factors(factors), share)
    local = ResidualShare.of(form, inner, share.rows(form.width))
    return local, local.factors(own, factors["residual"])


@share_of.register
def _quantised(form: Quantised, factors: Factors, share: Share) -> tuple[Form, Factors]:
    """Codes and scales have the axes of what they stand for, but for the last, and are cut like it along the others."""
    specs = form.inner.tensors()
    standing = {  # for numbers; what they are does not matter to how they are cut
        name: factors[name] if spec.dtype == INT32 else torch.empty(spec.shape, device="meta")
        for name, spec in specs.items()
    }
    inner, cut = share_of(form.inner, standing, share)
    for name, bits in form.tensor_bits:
        if name in cut and cut[name].shape[-1] != specs[name].shape[-1]:
            raise UserError(
                f"{name} is in {bits} bits, in groups along the channels, which can't be cut; serve it on one GPU."
            )
    precisions = {name: bits for name, bits in form.tensor_bits if name in cut}
    taken: Factors = {}
    for kind in ("codes", "scale"):
        stored = {name: factors.get(f"{name}_{kind}", factors.get(name, whole)) for name, whole in standing.items()}
        _, parts = share_of(form.inner, stored, share)
        taken |= {f"{name}_{kind}" if name in precisions else name: part for name, part in parts.items()}
    channels = []
    if form.channels:
        taken.pop(form.channel_tensor)
        before = [0] * form.experts  # channels in more bits
        for bits, widths in form.channels:
            runs = tuple(
                (min(max(start - before[e], 0), widths[e]), min(max(stop - before[e], 0), widths[e]))
                for e, (start, stop) in zip(share.experts, share.channels, strict=True)
            )
            before = [a + b for a, b in zip(before, widths, strict=True)]
            own = replace(share, channels=runs)
            channels.append((bits, own.widths))
            for kind in ("codes", "scale"):
                name = f"{form.channel_tensor}_{kind}_b{bits}"
                _, part = _ragged(replace(form.rows(), widths=widths), {"weight": factors[name]}, own)
                taken[name] = part["weight"]
    local = replace(
        form, experts=inner.experts, width=inner.width, inner=inner, tensor_bits=tuple(precisions.items()),
        channels=tuple(channels),
    )  # fmt: skip
    return local, taken


def _columns(private: Tensor, rows: Tensor, width: int) -> Tensor:
    """A private factor's (…, width) own columns; as it is where all are, which need not be numbers then."""
    return private if len(rows) == width else private[..., rows]
