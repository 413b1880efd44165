"""Every form applied to tokens equals the loop over tokens and experts that it stands for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefactor.errors import UserError
from moefactor.forms import (
    FLOAT,
    FORMS,
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
    WindowResidual,
    form_from_json,
    low_rank,
)
from moefactor.forms.base import Factors
from moefactor.forms.basis_mixture import ACTIVATIONS, pack_bases
from moefactor.forms.packing import BITS, pack
from moefactor.routing import Routing
from moefactor.runtime.kernels import KERNELS, Kernel, Setting, choose, why_not
from moefactor.runtime.kernels.grouped import grouped_linear

QUICK = settings(max_examples=40, deadline=None)


@st.composite
def partitions(draw: st.DrawFn, experts: int) -> tuple[tuple[int, ...], ...]:
    """Anything from one group to a group for each expert, in any order."""
    ids = draw(st.lists(st.integers(0, experts - 1), min_size=experts, max_size=experts))
    order = draw(st.permutations(sorted(set(ids))))
    return tuple(tuple(e for e, g in enumerate(ids) if g == group) for group in order)


@st.composite
def shared_bases(draw: st.DrawFn, experts: int, width: int, hidden: int) -> SharedBasis:
    groups = draw(partitions(experts))
    ranks = tuple(draw(st.integers(1, min(len(g) * width, hidden))) for g in groups)
    return SharedBasis(experts, width, hidden, groups=groups, ranks=ranks)


@st.composite
def mixtures(draw: st.DrawFn, experts: int, width: int, hidden: int) -> BasisMixture:
    groups = draw(st.sampled_from([1, 2])) if experts % 2 == 0 else 1
    rank = draw(st.integers(1, min(width, hidden)))
    return BasisMixture(
        experts, width, hidden, bases=draw(st.integers(1, experts // groups)), rank=rank,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))), groups=groups, basis_rank=draw(st.integers(0, rank)),
    )  # fmt: skip


@st.composite
def bases_and_deltas(draw: st.DrawFn, experts: int, width: int, hidden: int) -> BasePlusDelta:
    writes = draw(st.booleans())
    columns = width if writes else hidden
    delta: Form = draw(shared_bases(experts, width, hidden))  # low rank among them
    if draw(st.booleans()):
        delta = SharedPrivate(experts, width, hidden, rank=draw(st.integers(1, min(width, experts * hidden))))
    kept = draw(st.just(columns) | st.integers(1, columns))
    return BasePlusDelta(experts, width, hidden, delta, kept, writes)


@st.composite
def ragged(draw: st.DrawFn, experts: int, channels: int, hidden: int) -> Ragged:
    halves = draw(st.sampled_from([1, 2]))
    widths = draw(st.lists(st.integers(0, channels), min_size=experts, max_size=experts))
    if draw(st.booleans()):
        widths = [widths[0]] * experts
    elif draw(st.booleans()):  # atoms
        atom = draw(st.sampled_from([16, 24]))
        channels, widths = channels + atom, [atom * (width % 3) for width in widths]
        channels = max(channels, *widths, 1)
    return Ragged(experts, halves * channels, hidden, widths=tuple(widths), halves=halves)


@st.composite
def ragged_mixtures(draw: st.DrawFn, experts: int, channels: int, hidden: int) -> BasisMixture:
    uneven = draw(ragged(experts, channels, hidden))
    whole = draw(mixtures(experts, uneven.width, hidden))
    return replace(whole, widths=uneven.widths, halves=uneven.halves)


@st.composite
def plain_forms(draw: st.DrawFn) -> Form:
    sizes = experts, width, hidden = tuple(draw(st.integers(1, most)) for most in (6, 20, 20))
    kinds = ["dense", "shared", "shared", "mixture", "ragged mixture", "base", "ragged", "private"]
    kind = draw(st.sampled_from(kinds))
    if kind == "mixture":
        return draw(mixtures(*sizes))
    if kind == "ragged mixture":
        return draw(ragged_mixtures(*sizes))
    if kind == "base":
        return draw(bases_and_deltas(*sizes))
    if kind == "ragged":
        return draw(ragged(*sizes))
    if kind == "private":
        return SharedPrivate(*sizes, rank=draw(st.integers(1, min(width, experts * hidden))))
    form: Form = Dense(*sizes) if kind == "dense" else draw(shared_bases(*sizes))
    return draw(residuals(form)) if draw(st.booleans()) else form


@st.composite
def residuals(draw: st.DrawFn, inner: Form) -> SparseResidual:
    groups = draw(partitions(inner.experts))
    lengths = tuple(draw(st.integers(1, len(g) * inner.width * inner.hidden)) for g in groups)
    seed, kind = draw(st.integers(0, 1 << 40)), SparseResidual
    if draw(st.booleans()):
        kind, lengths = WindowResidual, (inner.width * draw(st.integers(1, inner.hidden)),) * len(groups)
    return kind(inner.experts, inner.width, inner.hidden, inner=inner, groups=groups, sizes=lengths, seed=seed)


@st.composite
def latents(draw: st.DrawFn, inner: Form) -> Latent:
    """Around a form of any hidden size, its rank."""
    hidden = draw(st.integers(inner.hidden, inner.hidden + 9))
    return Latent(inner.experts, inner.width, hidden, rank=inner.hidden, inner=inner)


@st.composite
def in_few_bits(draw: st.DrawFn, inner: Form) -> Quantised:
    """Any of its numbers, and channels in several precisions where it has such rows."""
    floats = [name for name, spec in inner.tensors().items() if spec.dtype == FLOAT]
    bits = {name: draw(st.sampled_from(BITS)) for name in floats if draw(st.booleans())}
    channels: dict[int, list[int]] = {}
    if inner.kept_widths is not None and draw(st.booleans()):
        bits.pop(inner.channel_tensor, None)
        left = list(inner.kept_widths)
        for each in draw(st.lists(st.sampled_from(BITS), min_size=1, max_size=3, unique=True)):
            channels[each] = [draw(st.integers(0, width)) for width in left]
            left = [width - of_them for width, of_them in zip(left, channels[each], strict=True)]
        channels[each] = [a + b for a, b in zip(channels[each], left, strict=True)]
    return Quantised(
        inner.experts, inner.width, inner.hidden, inner=inner, group=draw(st.sampled_from([8, 16])),
        tensor_bits=tuple(sorted(bits.items())),
        channels=tuple(sorted(((each, tuple(widths)) for each, widths in channels.items()), reverse=True)),
    )  # fmt: skip


@st.composite
def forms(draw: st.DrawFn) -> Form:
    form = draw(plain_forms())
    return draw(in_few_bits(form)) if draw(st.integers(0, 3)) == 0 else form


@st.composite
def nested_forms(draw: st.DrawFn) -> Form:
    """Forms inside forms, up to three deep, where both may have a tensor of one name; in a few bits, or not."""
    form = draw(plain_forms())
    for _ in range(draw(st.integers(1, 2))):
        form = draw(latents(form) if draw(st.booleans()) else residuals(form))
    return draw(in_few_bits(form)) if draw(st.booleans()) else form


def random_factors(form: Form, dtype: torch.dtype = torch.float32) -> Factors:
    generator = torch.Generator().manual_seed(0)

    def distinct(rows: int, of: int, count: int) -> Tensor:
        drawn = [torch.randperm(of, generator=generator)[:count].sort().values for _ in range(rows)]
        return torch.stack(drawn).int()

    factors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in form.shapes().items()}
    for name in factors:
        if "_codes" in name:
            factors[name] = torch.randint(-(2**31), 2**31, factors[name].shape, generator=generator, dtype=torch.int32)
    innermost = form
    while isinstance(innermost, Latent | SparseResidual | Quantised):
        innermost = innermost.inner
    if isinstance(innermost, BasisMixture) and innermost.basis_rank:
        pivots = distinct(innermost.groups * innermost.bases, innermost.rank, innermost.basis_rank)
        factors["basis_pivots"] = pivots.view(innermost.groups, innermost.bases, innermost.basis_rank)
    if "base_columns" in factors:
        factors["base_columns"] = distinct(1, innermost.columns, innermost.kept)[0]
    whole = {name for name, spec in form.tensors().items() if spec.dtype == INT32}
    assert {name for name, tensor in factors.items() if tensor.dtype == torch.int32} == whole
    return factors


def kernel(form: Form, dtype: torch.dtype = torch.float32) -> Kernel:
    """What runs the form on a CPU."""
    return choose(form, Setting("cpu", dtype))


def reads(form: Form) -> bool:
    """Whether the form serves gate and up; a base lies on one side only."""
    inner = getattr(form, "inner", None)
    return reads(inner) if inner is not None else not (isinstance(form, BasePlusDelta) and form.writes)


def writes(form: Form) -> bool:
    """Whether it serves down."""
    if getattr(form, "inner", None) is not None:
        return writes(form.inner)
    return form.writes if isinstance(form, BasePlusDelta) else getattr(form, "halves", 1) == 1


def random_routing(form: Form, tokens: int, top_k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids up to E, which means "no expert", and weights; a token may have one expert twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, form.experts + 1, (tokens, top_k), generator=generator)
    return ids, torch.rand(tokens, top_k, generator=generator)


def floats(factors: Factors) -> Factors:
    return {name: t.float() if t.is_floating_point() else t for name, t in factors.items()}


def loop(form: Form, factors: Factors, tokens: Tensor, activations: Tensor, ids: Tensor, weights: Tensor) -> tuple:
    """(what read gives each (token, slot), what write gives each token), one pair at a time."""
    dense = [form.dense(floats(factors), e) for e in range(form.experts)]
    rows, out = {}, torch.zeros(len(tokens), form.hidden)
    for t, slot in ((t, s) for t in range(len(ids)) for s in range(ids.shape[1])):
        expert = int(ids[t, slot])
        if expert < form.experts:
            rows[t, slot] = dense[expert] @ tokens[t].float()
            out[t] += weights[t, slot] * activations[t, slot].float() @ dense[expert]
    return rows, out


def check_against_the_loop(form: Form, factors: Factors, tokens: Tensor, ids: Tensor, weights: Tensor, slack: float):
    routing, run = Routing(ids, weights, form.experts), kernel(form, tokens.dtype)
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(*ids.shape, form.width, generator=generator).to(tokens.dtype)
    rows, combined = loop(form, factors, tokens, activations, ids, weights)
    if reads(form):
        read = run.read(factors, tokens, routing)
        assert read.shape == (ids.numel(), form.width)
        for row, pair in zip(read, routing.order.tolist(), strict=True):
            expected = rows.get(divmod(pair, ids.shape[1]))
            if expected is not None:  # rows of skipped pairs hold whatever, their weight is nought
                torch.testing.assert_close(row.float(), expected, atol=slack * float(1 + expected.abs().max()), rtol=0)
    if writes(form):
        pairs = activations.flatten(0, 1)[routing.order]
        for out in (
            run.write_combined(factors, pairs, routing),
            routing.combine(run.write(factors, pairs, routing)),
        ):
            assert out.shape == (len(tokens), form.hidden)
            most = float(combined.abs().max()) if combined.numel() else 0
            torch.testing.assert_close(out.float(), combined, atol=slack * (1 + most), rtol=0)


@QUICK
@given(form=forms() | nested_forms(), tokens=st.integers(1, 9), top_k=st.integers(1, 3), seed=st.integers(0, 99))
def test_applying_equals_the_loop(form: Form, tokens: int, top_k: int, seed: int) -> None:
    x = torch.randn(tokens, form.hidden, generator=torch.Generator().manual_seed(seed))
    check_against_the_loop(form, random_factors(form), x, *random_routing(form, tokens, top_k, seed), 1e-5)


@QUICK
@given(form=forms(), tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_applying_in_bfloat16_is_near_the_loop(form: Form, tokens: int, seed: int) -> None:
    # Random codes stand for numbers of up to 127 scales, which cancel: what bfloat16 leaves of them says nothing.
    assume(not isinstance(form, Quantised))
    factors = random_factors(form, torch.bfloat16)
    x = torch.randn(tokens, form.hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()
    check_against_the_loop(form, factors, x, *random_routing(form, tokens, 2, seed), 0.05)


@QUICK
@given(form=forms(), seed=st.integers(0, 99))
def test_gradients_are_those_of_the_loop(form: Form, seed: int) -> None:
    """Of every factor and of what is multiplied: refining and healing train through read and write."""
    ids, weights = random_routing(form, 6, 2, seed)
    routing, generator = Routing(ids, weights, form.experts), torch.Generator().manual_seed(seed)
    run = kernel(form)
    tokens = torch.randn(6, form.hidden, generator=generator)
    pairs = torch.randn(12, form.width, generator=generator)
    coefficients = torch.randn(12, form.width, generator=generator), torch.randn(6, form.hidden, generator=generator)
    factors = random_factors(form)
    names = [name for name, tensor in factors.items() if tensor.is_floating_point()]

    def gradients(through: Callable[[Factors, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (*(factors[name] for name in names), tokens, pairs)]
        given = factors | dict(zip(names, leaves[:-2], strict=True))
        unused = sum(leaf.sum() * 0 for leaf in leaves)  # of experts that no token has
        return torch.autograd.grad(through(given, *leaves[-2:]) + unused, leaves)

    def applied(given: Factors, x: Tensor, h: Tensor) -> Tensor:
        total = torch.zeros(())
        if reads(form):  # rows of skipped pairs hold whatever; the loop leaves them out
            total = total + (run.read(given, x, routing) * coefficients[0])[routing.weight > 0].sum()
        if writes(form):
            total = total + (run.write_combined(given, h, routing) * coefficients[1]).sum()
        return total

    def by_loop(given: Factors, x: Tensor, h: Tensor) -> Tensor:
        total = torch.zeros(())
        for row, pair in enumerate(routing.order.tolist()):
            token, slot = divmod(pair, 2)
            if ids[token, slot] < form.experts:
                dense = form.dense(given, int(ids[token, slot]))
                if reads(form):
                    total = total + (dense @ x[token]) @ coefficients[0][row]
                if writes(form):
                    total = total + weights[token, slot] * (h[row] @ dense) @ coefficients[1][token]
        return total

    for found, expected in zip(gradients(applied), gradients(by_loop), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5 * (1 + float(expected.norm())), rtol=0)


@pytest.mark.parametrize(
    "form",
    [
        Dense(3, 4, 5),
        low_rank(3, 4, 5, (1, 2, 2)),
        SparseResidual(3, 4, 5, inner=low_rank(3, 4, 5, (2, 2, 2)), groups=((0, 2), (1,)), sizes=(7, 3), seed=1),
        WindowResidual(3, 4, 5, inner=low_rank(3, 4, 5, (2, 2, 2)), groups=((0, 2), (1,)), sizes=(8, 8), seed=1),
        BasisMixture(3, 4, 5, bases=2, rank=3),
        BasisMixture(3, 4, 5, bases=2, rank=3, basis_rank=2),
        BasisMixture(3, 4, 5, bases=2, rank=3, widths=(2, 0, 4)),
        BasisMixture(3, 4, 5, bases=2, rank=3, widths=(1, 0, 2), halves=2),
        BasisMixture(3, 4, 5, bases=2, rank=3, widths=(0, 0, 0)),
        BasePlusDelta(3, 4, 5, low_rank(3, 4, 5, (1, 2, 2)), 3, writes=False, dynamic=0.4),
        BasePlusDelta(3, 4, 5, low_rank(3, 4, 5, (1, 2, 2)), 3, writes=True, dynamic=0.4),
        SharedPrivate(3, 4, 5, rank=2),
        Ragged(3, 4, 5, widths=(2, 0, 4)),
        Ragged(3, 4, 5, widths=(2, 2, 2)),
        Ragged(3, 4, 5, widths=(0, 0, 0)),
    ],
)
@pytest.mark.parametrize("ids", [torch.zeros(0, 2, dtype=torch.long), torch.full((4, 2), 3)])
def test_no_tokens_and_tokens_for_no_expert(form: Form, ids: Tensor) -> None:
    routing, run = Routing(ids, torch.ones(ids.shape), form.experts), kernel(form)
    factors = random_factors(form)
    if reads(form):
        assert run.read(factors, torch.ones(len(ids), 5), routing).shape == (ids.numel(), 4)
    if writes(form):
        combined = run.write_combined(factors, torch.ones(ids.numel(), 4), routing)
        assert torch.equal(combined, torch.zeros(len(ids), 5))


@QUICK
@given(form=forms() | nested_forms())
def test_json_round_trip(form: Form) -> None:
    data = json.loads(json.dumps(form.to_json()))
    read = form_from_json(data, experts=form.experts, width=form.width, hidden=form.hidden, where="here")
    # A partition's groups may come numbered anew; what is stored and what it means must not change.
    assert read.shapes() == form.shapes()
    assert read.to_json() == form.to_json()
    factors = random_factors(form)
    for expert in range(form.experts):
        assert torch.equal(read.dense(factors, expert), form.dense(factors, expert))


@QUICK
@given(form=forms() | nested_forms())
def test_parameter_count_and_dense_shape(form: Form) -> None:
    factors = random_factors(form)
    numbers = form.rounded(factors) if isinstance(form, Quantised) else factors
    assert form.parameter_count() == sum(t.numel() for t in numbers.values())
    assert form.bits(16) == sum(t.numel() * (16 if t.is_floating_point() else 32) for t in factors.values())
    assert all(form.dense(factors, e).shape == (form.width, form.hidden) for e in range(form.experts))


def test_bits_count_words_and_scales() -> None:
    """A row of 40 numbers in 3 bits is ⌈80 / 32⌉ + ⌈40 / 32⌉ words, one in 8 bits 10; either has ⌈40 / 16⌉ scales."""
    ragged = Ragged(3, 8, 40, widths=(3, 0, 4), halves=2)
    form = Quantised(3, 8, 40, ragged, 16, channels=((8, (1, 0, 3)), (3, (2, 0, 1))))
    assert form.bits(16) == 2 * (4 * (10 * 32 + 3 * 16) + 3 * (5 * 32 + 3 * 16))
    assert form.bits(32) - form.bits(16) == 2 * 7 * 3 * 16
    assert form.parameter_count() == ragged.parameter_count()


def test_channels_of_several_precisions_lie_where_they_belong() -> None:
    """Every row a number of its own: of each expert's half the first in the most bits, expert by expert."""
    ragged = Ragged(3, 8, 8, widths=(3, 0, 4), halves=2)
    form = Quantised(3, 8, 8, ragged, 8, channels=((8, (1, 0, 3)), (2, (2, 0, 1))))
    levels = {8: 127.5, 2: 1.5}  # of the largest code
    factors, scales = {}, {8: [1, 4, 7, 8, 9, 11, 12, 13], 2: [2, 3, 5, 6, 10, 14]}
    for bits, rows in scales.items():
        factors[f"weight_codes_b{bits}"] = pack(torch.full((len(rows), 8), 2**bits - 1), bits)
        factors[f"weight_scale_b{bits}"] = torch.tensor(rows).unsqueeze(1) / levels[bits]
    assert {name: tuple(t.shape) for name, t in factors.items()} == form.shapes()
    expected = torch.arange(1.0, 15).unsqueeze(1).expand(14, 8)
    torch.testing.assert_close(form.rounded(factors)["weight"], expected)
    inner, whole = form.expanded(factors)
    for expert in range(3):
        torch.testing.assert_close(form.dense(factors, expert), inner.dense(whole, expert))
        torch.testing.assert_close(form.dense(factors, expert), ragged.dense({"weight": expected}, expert))


@QUICK
@given(form=forms().filter(lambda form: isinstance(form, SharedBasis)))
def test_pack_is_what_dense_reads(form: SharedBasis) -> None:
    bases = [torch.randn(rank, form.hidden) for rank in form.ranks]
    group_of = {e: g for g, members in enumerate(form.groups) for e in members}
    privates = {e: torch.randn(form.ranks[g], form.width) for e, g in group_of.items()}
    factors = form.pack(bases, privates)
    assert {name: tuple(t.shape) for name, t in factors.items()} == form.shapes()
    for expert, group in group_of.items():
        assert torch.equal(form.dense(factors, expert), privates[expert].T @ bases[group])


@QUICK
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6), sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), transposed=st.booleans(), offset=st.integers(0, 3),
)  # fmt: skip
def test_grouped_linear_equals_a_loop(
    counts: list[int], sizes: tuple[int, int], dtype: torch.dtype, transposed: bool, offset: int
) -> None:
    """Empty groups, sizes that no kernel is aligned to, memory that starts anywhere."""
    inner, outer = sizes
    flat = torch.randn(offset + len(counts) * inner * outer).to(dtype)[offset:]
    matrices = flat.view(len(counts), outer, inner).transpose(1, 2) if transposed else flat.view(-1, inner, outer)
    rows = torch.randn(sum(counts), inner).to(dtype)
    offsets = torch.tensor(counts).cumsum(0).int()
    parts = [r.float() @ m.float() for r, m in zip(rows.split(counts), matrices, strict=True)]
    slack = 1e-5 if dtype == torch.float32 else 0.05
    found = grouped_linear(rows, matrices, offsets)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), torch.cat(parts), atol=slack * 5, rtol=slack)


def test_combine_weighs_and_sums_a_tokens_experts() -> None:
    ids, weights = torch.tensor([[1, 0], [0, 2]]), torch.tensor([[0.5, 2.0], [3.0, 9.0]])
    routing = Routing(ids, weights, 2)  # expert 2 does not exist
    values = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])  # by (token, slot)
    assert routing.combine(values[routing.order]).tolist() == [[0.5 * 1 + 2 * 10], [3 * 100]]


@QUICK
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)), data=st.data(),
    awkward=st.booleans(),
)  # fmt: skip
def test_packed_bases_are_the_products(sizes: tuple[int, ...], data: st.DataObject, awkward: bool) -> None:
    """Gauge-fixing keeps U V, and the rows that it leaves out are those of the identity."""
    groups, bases, rank, hidden = sizes
    k = data.draw(st.integers(1, min(rank, hidden)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    left = torch.randn(groups, bases, rank, k, generator=generator, dtype=torch.float64)
    if awkward:
        left[:, :, 0] *= 1e-6  # a first row that no one should divide by
    right = torch.randn(groups, bases, k, hidden, generator=generator, dtype=torch.float64)
    packed = pack_bases(left, right)
    form = BasisMixture(groups * bases, rank, hidden, bases, rank, groups=groups, basis_rank=k)
    assert {n: tuple(t.shape) for n, t in packed.items()} == {
        n: s for n, s in form.shapes().items() if n.startswith("basis")
    }
    for group in range(groups):
        whole = form.full_left(packed, group)
        for j in range(bases):
            assert torch.equal(whole[j][packed["basis_pivots"][group, j].long()], torch.eye(k, dtype=torch.float64))
            product = left[group, j] @ right[group, j]
            rebuilt = whole[j] @ packed["basis_right"][group, j]
            torch.testing.assert_close(rebuilt, product, atol=1e-9 * float(1 + product.abs().max()), rtol=0)


def private_by_hand(form: BasisMixture, private: Tensor, expert: int) -> Tensor:
    """(width, r) A_e; of ragged experts the rows stored, gate's at the head of the first half, up's of the second."""
    if not form.widths:
        return private[expert].T
    kept, full = form.widths[expert], torch.zeros(form.width, form.rank)
    start = form.halves * sum(form.widths[:expert])
    for half in range(form.halves):
        for channel in range(kept):
            full[half * (form.width // form.halves) + channel] = private[start + half * kept + channel]
    return full


@QUICK
@given(form=forms().filter(lambda form: isinstance(form, BasisMixture)))
def test_a_mixture_is_the_papers_formula(form: BasisMixture) -> None:
    """W_e = A_e f(Σ_j α_ej B_j), a loop over experts and bases; B_j = U_j V_j with the identity written in by hand."""
    factors = random_factors(form)
    size = form.experts // form.groups
    for expert in range(form.experts):
        group, mixed = expert // size, torch.zeros(form.rank, form.hidden)
        for j in range(form.bases):
            if form.basis_rank:
                pivots, left = factors["basis_pivots"][group, j].tolist(), torch.zeros(form.rank, form.basis_rank)
                others = iter(factors["basis_left"][group, j])
                for row in range(form.rank):
                    left[row] = torch.eye(form.basis_rank)[pivots.index(row)] if row in pivots else next(others)
                basis = left @ factors["basis_right"][group, j]
            else:
                basis = factors["basis"][group, j]
            mixed += factors["mix"][expert, j] * basis
        expected = private_by_hand(form, factors["private"], expert) @ ACTIVATIONS[form.activation](mixed)
        torch.testing.assert_close(form.dense(factors, expert), expected, atol=1e-4, rtol=1e-4)


@QUICK
@given(data=st.data(), fraction=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_dynamic_leaves_the_least_columns_out(data: st.DataObject, fraction: float, seed: int) -> None:
    """The base with the columns of least ‖column‖·‖input‖ set to nought; the deltas stay whole."""
    sizes = tuple(data.draw(st.integers(1, most)) for most in (4, 12, 12))
    whole = data.draw(bases_and_deltas(*sizes))
    factors = random_factors(whole)
    form = BasePlusDelta(*sizes, whole.delta, whole.kept, whole.writes, dynamic=fraction)
    ids, weights = random_routing(form, 5, 2, seed)
    routing, run = Routing(ids, weights, form.experts), kernel(form)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(5, form.hidden, generator=generator)
    pairs = torch.randn(10, form.width, generator=generator)

    def cut(rows: Tensor) -> Factors:
        axis = 0 if form.writes else 1
        seen = rows[:, factors["base_columns"].long()] if form.kept < form.columns else rows
        score = factors["base"].norm(dim=1 - axis) * seen.norm(dim=0)
        least = score.argsort()[: int(fraction * form.kept)]
        return factors | {"base": factors["base"].index_fill(axis, least, 0)}

    close = {"atol": 1e-4, "rtol": 1e-4}
    if form.writes:
        expected = kernel(whole).write(cut(pairs), pairs, routing)
        torch.testing.assert_close(run.write(factors, pairs, routing), expected, **close)
        expected = kernel(whole).write_combined(cut(routing.combine(pairs)), pairs, routing)
        torch.testing.assert_close(run.write_combined(factors, pairs, routing), expected, **close)
    else:
        expected = kernel(whole).read(cut(tokens), tokens, routing)
        torch.testing.assert_close(run.read(factors, tokens, routing), expected, **close)


FEW_BITS = {"form": "quantised", "group": 8, "bits": {"weight": 4}, "inner": {"form": "ragged", "widths": [1, 2, 4]}}
MIXED = FEW_BITS | {"bits": {}, "channels": {"4": [1, 1, 0], "2": [0, 1, 4]}}
MIXTURE = {"form": "basis_mixture", "bases": 1, "rank": 2, "activation": "silu", "groups": 1, "basis_rank": 0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"form": "ragged", "widths": [1, 2]}, "2 widths for 3 experts"),
        ({"form": "ragged", "widths": [1, 2, 9]}, "width 9 of expert 2 must be from 0 to 4"),
        ({"form": "ragged", "widths": [1, 2, -1]}, "width -1 of expert 2"),
        ({"form": "ragged", "widths": 3}, "missing or of the wrong type"),
        ({"form": "ragged", "widths": [1, 1, 1], "halves": 0}, "halves 0"),
        ({"form": "ragged", "widths": [1, 1, 1], "halves": 3}, "halves 3"),
        ({"form": "shared_private", "rank": 0}, "rank 0 does not fit"),
        ({"form": "shared_private"}, "'rank' is missing"),
        (MIXTURE | {"bases": 4}, "bases 4"),
        (MIXTURE | {"groups": 2}, "2 equal"),
        (MIXTURE | {"activation": "relu"}, "relu"),
        (MIXTURE | {"basis_rank": 3}, "basis_rank 3"),
        (MIXTURE | {"widths": [1, 2]}, "2 widths for 3 experts"),
        (MIXTURE | {"widths": [1, 2, 5]}, "width 5 of expert 2 must be from 0 to 4"),
        (MIXTURE | {"widths": [1, 2, 3], "halves": 2}, "width 3 of expert 2 must be from 0 to 2"),
        (MIXTURE | {"widths": [1, 2, 0.5]}, "width 0.5 of expert 2"),
        (MIXTURE | {"widths": 2}, "missing or of the wrong type"),
        (MIXTURE | {"widths": [1, 1, 1], "halves": 0}, "halves 0"),
        ({"form": "base_plus_delta", "delta": {"form": "dense"}, "kept": 9, "writes": True, "dynamic": 0}, "kept 9"),
        ({"form": "base_plus_delta", "delta": {"form": "dense"}, "kept": 2, "writes": True, "dynamic": 1}, "'dynamic'"),
        (FEW_BITS | {"bits": {"nothing": 4}}, "'bits' names 'nothing', which is none of the numbers"),
        (FEW_BITS | {"bits": {"weight": 7}}, "weight: bits must be one of 2, 3, 4, 5, 6, 8, found 7"),
        (FEW_BITS | {"bits": {"weight": True}}, "weight: bits must be one of"),
        (FEW_BITS | {"bits": 4}, "'bits' is missing or of the wrong type"),
        (FEW_BITS | {"group": 4}, "group 4 does not fit"),
        (FEW_BITS | {"group": 20}, "'group' must be a multiple of 8, found 20"),
        (FEW_BITS | {"group": None}, "'group' is missing"),
        (FEW_BITS | {"inner": FEW_BITS}, "a quantised form is the outermost one"),
        (FEW_BITS | {"inner": {"form": "latent", "rank": 2, "inner": FEW_BITS}}, "a quantised form is the outermost"),
        (FEW_BITS | {"inner": None}, "'inner' is missing"),
        (MIXED | {"channels": [4, 2]}, "'channels' is missing or of the wrong type"),
        (MIXED | {"channels": {"7": [1, 2, 4]}}, "'channels': bits must be one of 2, 3, 4, 5, 6, 8, found '7'"),
        (MIXED | {"channels": {"04": [1, 2, 4]}}, "'channels': bits must be one of"),
        (MIXED | {"channels": {"4": [1, 2]}}, "'channels' of 4 bits must have a number of channels for each expert"),
        (MIXED | {"channels": {"4": [1, -2, 4]}}, "'channels' of 4 bits must have"),
        (MIXED | {"channels": {"4": [1, 2, 3]}}, "'channels' of all precisions must add up to the experts' widths"),
        (MIXED | {"bits": {"weight": 4}}, "'channels' is for forms that are cut channel by channel"),
        (MIXED | {"inner": {"form": "dense"}}, "'channels' is for forms that are cut channel by channel"),
    ],
)  # fmt: skip
def test_a_form_that_can_not_be_is_refused(data: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{message}"):
        form_from_json(data, experts=3, width=4, hidden=5, where="here")


@pytest.mark.parametrize("widths", [(), (2, 0, 4, 3, 1, 4)], ids=["whole", "ragged"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_linear_mixture_of_few_bases_is_never_rebuilt(
    groups: int, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bases as experts a token, or fewer: the bases work on tokens, whatever their number."""
    form = BasisMixture(6, 4, 5, bases=2 // groups, rank=3, activation="identity", groups=groups, widths=widths)
    generator = torch.Generator().manual_seed(0)
    factors, run = random_factors(form), kernel(form)
    experts = [form.dense(factors, expert) for expert in range(6)]
    monkeypatch.setattr(BasisMixture, "expert_bases", lambda *_: pytest.fail("rebuilt"))
    for count in (1, 3, 64):
        ids = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(count)])
        routing = Routing(ids, torch.rand(count, 2, generator=generator), 6)
        tokens = torch.randn(count, 5, generator=generator)
        rows = torch.stack([experts[e] @ tokens[t] for e, t in zip(routing.expert, routing.token, strict=True)])
        torch.testing.assert_close(run.read(factors, tokens, routing), rows)
        outs = torch.stack([row @ experts[e] for e, row in zip(routing.expert, rows, strict=True)])
        torch.testing.assert_close(run.write_combined(factors, rows, routing), routing.combine(outs))


# -- descriptions and kernels ------------------------------------------------------------------------------------------


@QUICK
@given(form=forms() | nested_forms())
def test_a_form_is_a_description(form: Form) -> None:
    """Compared and pickled by what it says; what was bought can be put in again."""
    assert pickle.loads(pickle.dumps(form)) == form
    assert all(value not in form.summary() for value in ("tensor", "object at"))
    if form.units():
        assert form.with_units(form.units()) == form


def near(found: Tensor, expected: Tensor) -> None:
    """To rounding in float32, of products whose terms may be much larger than their sum."""
    most = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, atol=1e-4 * (1 + most), rtol=1e-4)


@QUICK
@given(form=forms() | nested_forms(), seed=st.integers(0, 99))
def test_every_way_to_run_a_form_gives_the_same(form: Form, seed: int) -> None:
    """Of the table, those that nothing hinders on a CPU; the reference is the last of each."""
    setting, factors = Setting("cpu", torch.float32), random_factors(form)
    ids, weights = random_routing(form, 5, 2, seed)
    routing, generator = Routing(ids, weights, form.experts), torch.Generator().manual_seed(seed)
    tokens = torch.randn(5, form.hidden, generator=generator)
    pairs = torch.randn(10, form.width, generator=generator)
    real = routing.weight > 0  # rows of skipped pairs hold whatever
    usable = [w for w in KERNELS[form.name] if "Triton" not in w.name and w.hindrance(form, setting) is None]
    *fast, last = [w.build(form, setting) for w in usable]
    for run in fast:
        if reads(form):
            near(*(k.read(factors, tokens, routing)[real] for k in (run, last)))
        if writes(form):
            near(*(k.write_combined(factors, pairs, routing) for k in (run, last)))


def test_every_form_has_kernels_and_a_reference() -> None:
    own = {"residual_share", "zero"}  # a rank's own, in no file
    assert {form.name for form in FORMS.values()} == {*KERNELS} - own
    assert all(ways[-1].name == "experts rebuilt" for name, ways in KERNELS.items() if name != "zero")


@pytest.mark.parametrize(
    ("setting", "ranks", "reason"),
    [
        (Setting("cuda", torch.bfloat16, (9, 0)), (8, 16), None),
        (Setting("cuda", torch.float16, (9, 0)), (8, 16), "bfloat16 alone on CUDA, not float16"),
        (Setting("cuda", torch.float32, (9, 0)), (8, 16), "bfloat16 alone on CUDA, not float32"),
        (Setting("cuda", torch.bfloat16, (7, 5)), (8, 16), "this card has 7.5"),
        (Setting("cpu", torch.float64), (8, 16), "does not take float64"),
        (Setting("mps", torch.float16), (8, 16), "no grouped GEMM on mps"),
    ],
)
def test_a_kernel_that_does_not_apply_says_why(setting: Setting, ranks: tuple[int, int], reason: str | None) -> None:
    form = SharedBasis(4, 16, 32, groups=((0, 1), (2, 3)), ranks=ranks)
    reasons = [why for _, why in why_not(Latent(4, 16, 40, rank=32, inner=form), setting)]
    assert (reasons == []) if reason is None else (reason in reasons[0])


def test_a_width_that_no_kernel_is_aligned_to_is_named() -> None:
    ((way, why),) = why_not(Dense(4, 16, 30), Setting("cpu", torch.bfloat16))
    assert way == "grouped GEMM"
    assert "rows of 30 numbers are 60 bytes" in why


def test_laying_out_keeps_names_shapes_and_values() -> None:
    """safetensors maps files at addresses that a grouped GEMM does not take."""
    form = Dense(2, 8, 8)
    weight = torch.randn(1 + 2 * 8 * 8)[1:].view(2, 8, 8)
    assert weight.data_ptr() % 16
    laid = kernel(form).laid_out({"weight": weight})["weight"]
    assert laid.data_ptr() % 16 == 0
    assert torch.equal(laid, weight)
