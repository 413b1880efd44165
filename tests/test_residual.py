"""The sparse projections of residuals, against the explicit matrix P and as formats that must not change."""

from __future__ import annotations

import pytest
import torch

from moefactor.forms import Dense, SparseResidual, WindowResidual
from moefactor.forms.residual import projection_columns

CPU = torch.device("cpu")
FROZEN = {0: [0, 891, 38, 433, 596, 305, 493, 585], 42: [40635, 95564, 86304, 76328, 37880, 48669, 83455, 73475]}

ORDERS = [[1, 5, 3, 0, 4, 2], [5, 2, 3, 0, 4, 1]]  # of seed 4, six hidden units
RANKS = [3, 5, 1, 2, 4, 0]  # where the second has each unit


def made(*, seed: int = 4, sizes: tuple[int, ...] = (9, 5)) -> SparseResidual:
    return SparseResidual(5, 3, 4, inner=Dense(5, 3, 4), groups=((0, 3, 4), (1, 2)), sizes=sizes, seed=seed)


def windows(*, seed: int = 4, step: int = 3) -> WindowResidual:
    sizes = (3 * step, 3 * step)
    return WindowResidual(5, 3, 4, inner=Dense(5, 3, 4), groups=((0, 3, 4), (1, 2)), sizes=sizes, seed=seed)


BOTH = pytest.mark.parametrize("form", [made(), windows()], ids=["hashed", "windows"])


def explicit(form: SparseResidual) -> torch.Tensor:
    """P (E·width·H, Σ sizes): one non-zero a row, columns scaled to length one."""
    columns = torch.cat([form.columns(e, CPU) for e in range(form.experts)])
    matrix = torch.nn.functional.one_hot(columns, sum(form.sizes)).double()
    return matrix / matrix.sum(0).clamp(min=1).sqrt()


@BOTH
def test_the_projection_is_an_isometry_on_the_columns_hit(form: SparseResidual) -> None:
    matrix = explicit(form)
    hit = matrix.sum(0) > 0
    assert hit.sum() > 10  # of 14: the test says something
    torch.testing.assert_close(matrix.T @ matrix, torch.diag(hit.double()))


@BOTH
def test_groups_have_their_own_columns(form: SparseResidual) -> None:
    for expert in range(5):
        columns = form.columns(expert, CPU)
        first, end = (0, 9) if expert in (0, 3, 4) else (9, sum(form.sizes))
        assert first <= int(columns.min())
        assert int(columns.max()) < end


@BOTH
def test_catch_and_throw_back_are_projection_and_its_transpose(form: SparseResidual) -> None:
    residuals = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = explicit(form)
    expected = (matrix @ (matrix.T @ residuals.flatten())).view(5, 3, 4)
    factors = {"residual": form.project(residuals)}
    found = torch.stack([form.back_projected(factors, e) for e in range(5)])
    torch.testing.assert_close(found, expected)
    # Least squares: what is left is orthogonal to everything that P can say.
    torch.testing.assert_close(
        matrix.T @ (residuals - found).flatten(), torch.zeros(sum(form.sizes), dtype=torch.float64)
    )


@pytest.mark.parametrize("kind", [SparseResidual, WindowResidual])
@pytest.mark.parametrize("share", [0.03, 0.25])
def test_white_noise_is_caught_in_proportion(share: float, kind: type[SparseResidual]) -> None:
    """Of N independent entries a vector of n recovers n/N of the energy, whatever the seed."""
    total = 4 * 32 * 64
    size = 32 * round(share * total / 32)
    form = kind(4, 32, 64, inner=Dense(4, 32, 64), groups=((0, 1, 2, 3),), sizes=(size,), seed=7)
    noise = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factors = {"residual": form.project(noise)}
    caught = sum(float(form.back_projected(factors, e).square().sum()) for e in range(4)) / float(noise.square().sum())
    assert 0.7 * share < caught < 1.3 * share


def test_a_group_that_fits_is_nearly_kept_and_one_entry_is_the_mean() -> None:
    residuals = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    form = made(sizes=(1, 1))
    expected = torch.stack([residuals[[0, 3, 4]].mean(), residuals[[1, 2]].mean()])
    torch.testing.assert_close(form.project(residuals), expected)


def python_columns(seed: int, rows: range, columns: int) -> list[int]:
    """The hash as docs would give it to somebody who writes another reader, in plain integers."""
    mask, out = 0xFFFFFFFF, []
    for row in rows:
        value = (row & mask) ^ (seed * 0x9E3779B9 & mask) ^ ((row >> 32) * 0x85EBCA6B & mask)
        for multiplier in (0x85EBCA6B, 0xC2B2AE35):
            value = (value ^ value >> 16) * multiplier & mask
            value = (value ^ value >> 13) * 0x27D4EB2F & mask
        out.append((value ^ value >> 16) * columns >> 32)
    return out


@pytest.mark.parametrize(
    ("seed", "start", "columns"), [(0, 0, 10), (5, 1000, 123_457), (2**31, 7, 3), (1, 2**32 - 3, 1 << 20)]
)
def test_columns_are_the_documented_hash(seed: int, start: int, columns: int) -> None:
    found = projection_columns(seed, start, 8, columns, CPU)
    assert found.tolist() == python_columns(seed, range(start, start + 8), columns)


def test_frozen_columns() -> None:
    """Checkpoints in the world depend on these numbers; if this fails, format_version has to rise."""
    assert projection_columns(0, 0, 8, 1000, CPU).tolist() == FROZEN[0]
    assert projection_columns(42, 123_456, 8, 100_000, CPU).tolist() == FROZEN[42]


def test_columns_are_spread_evenly() -> None:
    hits = torch.bincount(projection_columns(3, 0, 100_000, 100, CPU), minlength=100)
    # Binomial, 1000 ± 32: six deviations.
    assert int(hits.min()) > 800
    assert int(hits.max()) < 1200


def test_frozen_windows() -> None:
    """As the hash: checkpoints depend on them."""
    form = WindowResidual(4, 2, 6, inner=Dense(4, 2, 6), groups=((0, 2), (1, 3)), sizes=(10, 10), seed=4)
    assert [form.order(place, CPU).tolist() for place in (0, 1)] == ORDERS
    for place, order in enumerate(ORDERS):
        hashed = python_columns(4, range(6 * place, 6 * place + 6), 1 << 31)
        assert sorted(range(6), key=hashed.__getitem__) == order
    assert form.columns(2, CPU).tolist() == [(row + rank) % 10 for row in (0, 5) for rank in RANKS]
    assert torch.equal(form.columns(3, CPU), form.columns(2, CPU) + 10)


def test_windows_share_every_entry_evenly() -> None:
    """Each of n experts hits each entry H / s times, to within one."""
    form = WindowResidual(4, 16, 24, inner=Dense(4, 16, 24), groups=((0, 1, 2), (3,)), sizes=(80, 80), seed=7)
    for expert in range(4):
        hits = torch.bincount(form.columns(expert, CPU) - 80 * (expert == 3), minlength=80)
        assert {*hits.tolist()} == {4, 5}  # of 24 / 5
    rows = form.back_projected({"residual": torch.arange(160.0)}, 0)
    assert not torch.equal(rows[1, 1:] - rows[1, :-1], torch.ones(23))  # the order is not the hidden side's own
