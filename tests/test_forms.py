"""Every form applied to tokens equals the loop over tokens and experts that it stands for."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefactor.forms import Dense, Form, Routing, SharedBasis, SparseResidual, form_from_json, grouped_linear, low_rank
from moefactor.forms.base import Factors

QUICK = settings(max_examples=40, deadline=None)


@st.composite
def partitions(draw: st.DrawFn, experts: int) -> tuple[tuple[int, ...], ...]:
    """Anything from one group to a group for each expert, in any order."""
    ids = draw(st.lists(st.integers(0, experts - 1), min_size=experts, max_size=experts))
    order = draw(st.permutations(sorted(set(ids))))
    return tuple(tuple(e for e, g in enumerate(ids) if g == group) for group in order)


@st.composite
def forms(draw: st.DrawFn) -> Form:
    experts, width, hidden = (draw(st.integers(1, most)) for most in (6, 20, 20))
    form: Form = Dense(experts, width, hidden)
    if draw(st.integers(0, 3)):
        groups = draw(partitions(experts))
        ranks = tuple(draw(st.integers(1, min(len(g) * width, hidden))) for g in groups)
        form = SharedBasis(experts, width, hidden, groups=groups, ranks=ranks)
    if draw(st.booleans()):
        groups = draw(partitions(experts))
        sizes = tuple(draw(st.integers(1, len(g) * width * hidden)) for g in groups)
        form = SparseResidual(experts, width, hidden, inner=form, groups=groups, sizes=sizes, seed=draw(st.integers(0)))
    return form


def random_factors(form: Form, dtype: torch.dtype = torch.float32) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in form.shapes().items()}


def random_routing(form: Form, tokens: int, top_k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids up to E, which means "no expert", and weights; a token may have one expert twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, form.experts + 1, (tokens, top_k), generator=generator)
    return ids, torch.rand(tokens, top_k, generator=generator)


def loop(form: Form, factors: Factors, tokens: Tensor, ids: Tensor, weights: Tensor, between: Tensor) -> tuple:
    """(rows of read by (token, slot), tokens combined) one pair at a time; the activations are read's · `between`."""
    dense = [form.dense({k: v.float() for k, v in factors.items()}, e) for e in range(form.experts)]
    rows, out = {}, torch.zeros(len(tokens), form.hidden)
    for t, slot in ((t, s) for t in range(len(ids)) for s in range(ids.shape[1])):
        expert = int(ids[t, slot])
        if expert < form.experts:
            rows[t, slot] = dense[expert] @ tokens[t].float()
            out[t] += weights[t, slot] * (rows[t, slot] * between) @ dense[expert]
    return rows, out


def check_against_the_loop(form: Form, factors: Factors, tokens: Tensor, ids: Tensor, weights: Tensor, slack: float):
    routing = Routing(ids, weights, form.experts)
    between = torch.linspace(-1, 1, form.width)
    rows, combined = loop(form, factors, tokens, ids, weights, between)
    read = form.read(factors, tokens, routing)
    assert read.shape == (ids.numel(), form.width)
    for row, pair in zip(read, routing.order.tolist(), strict=True):
        expected = rows.get(divmod(pair, ids.shape[1]))
        if expected is not None:  # rows of skipped pairs hold whatever, their weight is nought
            torch.testing.assert_close(row.float(), expected, atol=slack * float(1 + expected.abs().max()), rtol=0)
    activations = read * between.to(read.dtype)
    for out in (
        form.write_combined(factors, activations, routing),
        routing.combine(form.write(factors, activations, routing)),
    ):
        assert out.shape == (len(tokens), form.hidden)
        most = float(combined.abs().max()) if combined.numel() else 0
        torch.testing.assert_close(out.float(), combined, atol=slack * (1 + most), rtol=0)


@QUICK
@given(form=forms(), tokens=st.integers(1, 9), top_k=st.integers(1, 3), seed=st.integers(0, 99))
def test_applying_equals_the_loop(form: Form, tokens: int, top_k: int, seed: int) -> None:
    x = torch.randn(tokens, form.hidden, generator=torch.Generator().manual_seed(seed))
    check_against_the_loop(form, random_factors(form), x, *random_routing(form, tokens, top_k, seed), 1e-5)


@QUICK
@given(form=forms(), tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_applying_in_bfloat16_is_near_the_loop(form: Form, tokens: int, seed: int) -> None:
    factors = random_factors(form, torch.bfloat16)
    x = torch.randn(tokens, form.hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()
    check_against_the_loop(form, factors, x, *random_routing(form, tokens, 2, seed), 0.05)


@pytest.mark.parametrize(
    "form",
    [
        Dense(3, 4, 5),
        low_rank(3, 4, 5, (1, 2, 2)),
        SparseResidual(3, 4, 5, inner=low_rank(3, 4, 5, (2, 2, 2)), groups=((0, 2), (1,)), sizes=(7, 3), seed=1),
    ],
)
@pytest.mark.parametrize("ids", [torch.zeros(0, 2, dtype=torch.long), torch.full((4, 2), 3)])
def test_no_tokens_and_tokens_for_no_expert(form: Form, ids: Tensor) -> None:
    routing = Routing(ids, torch.ones(ids.shape), form.experts)
    factors = random_factors(form)
    rows = form.read(factors, torch.ones(len(ids), 5), routing)
    assert rows.shape == (ids.numel(), 4)
    assert torch.equal(form.write_combined(factors, rows, routing), torch.zeros(len(ids), 5))


@QUICK
@given(form=forms())
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
@given(form=forms())
def test_parameter_count_and_dense_shape(form: Form) -> None:
    factors = random_factors(form)
    assert form.parameter_count() == sum(t.numel() for t in factors.values())
    assert all(form.dense(factors, e).shape == (form.width, form.hidden) for e in range(form.experts))


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
