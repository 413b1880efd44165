"""Linear algebra against closed forms and torch's own solvers."""

from __future__ import annotations

import pytest
import torch

from moefactor.fitting.linalg import (
    effective_rank,
    spectrum,
    top_eigenvectors,
    truncated_svd,
    weighted_error,
    weighted_least_squares,
    whitening,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_effective_rank_of_equal_singular_values_is_their_number(k: int, scale: float) -> None:
    assert effective_rank(scale * torch.cat((torch.ones(k), torch.zeros(3)))) == pytest.approx(k)


def test_effective_rank_of_nothing_is_nought() -> None:
    assert effective_rank(torch.zeros(4)) == 0


def test_effective_rank_of_two_energies() -> None:
    """exp(H) for p = (0.8, 0.2): singular values 2 and 1."""
    assert effective_rank(torch.tensor([2.0, 1.0])) == pytest.approx(0.8**-0.8 * 0.2**-0.2)


@pytest.mark.parametrize("rank", [8, 3, 0])
def test_whitening_of_full_singular_and_zero_moments(rank: int) -> None:
    root = normal(8, rank)
    moment = root @ root.T
    factor, inverse = whitening(moment)
    torch.testing.assert_close(factor @ factor.T, moment, atol=1e-7 * (float(moment.abs().max()) or 1), rtol=0)
    torch.testing.assert_close(factor.tril(), factor, atol=0, rtol=0)
    torch.testing.assert_close(inverse @ factor, torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=0)


def test_weighted_least_squares_is_lstsq_of_the_scaled_problem() -> None:
    """‖(W − A B) C^½‖: each row of A solves an ordinary problem with design (B C^½)ᵀ."""
    target, basis, factor = normal(5, 9), normal(3, 9, seed=1), normal(9, 20, seed=2)
    moment = factor @ factor.T
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt() @ vectors.T
    expected = torch.linalg.lstsq((basis @ root).T, (target @ root).T).solution.T
    torch.testing.assert_close(weighted_least_squares(target, basis, moment), expected, atol=1e-8, rtol=1e-8)


def test_weighted_least_squares_with_repeated_and_zero_rows_is_finite_and_as_good() -> None:
    target, basis = normal(5, 9), normal(2, 9, seed=1)
    moment = torch.eye(9, dtype=torch.float64)
    redundant = torch.cat((basis, basis[:1], torch.zeros(1, 9, dtype=torch.float64)))
    best = weighted_error(target - weighted_least_squares(target, basis, moment) @ basis, moment)
    found = weighted_error(target - weighted_least_squares(target, redundant, moment) @ redundant, moment)
    assert float(found) == pytest.approx(float(best), rel=1e-6)


def test_weighted_error_is_the_mean_output_error() -> None:
    difference, inputs = normal(4, 6), normal(50, 6, seed=1)
    expected = (inputs @ difference.T).square().sum(1).mean()
    assert float(weighted_error(difference, inputs.T @ inputs / 50)) == pytest.approx(float(expected))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_truncated_svd_leaves_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    singular = torch.linalg.svdvals(matrix)
    for rank in range(1, 7):
        left, right = truncated_svd(matrix, rank)
        assert left.shape == (shape[0], rank)
        assert right.shape == (rank, shape[1])
        error = (matrix - left @ right).square().sum()
        assert float(error) == pytest.approx(float(singular[rank:].square().sum()), abs=1e-12)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))  # √σ on both sides


def test_spectrum_and_eigenvectors_of_a_gram_matrix() -> None:
    rows = normal(12, 5)
    gram = rows.T @ rows
    torch.testing.assert_close(spectrum(gram), torch.linalg.svdvals(rows).square())
    vectors = top_eigenvectors(gram, 2)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close((vectors @ gram * vectors).sum(1), spectrum(gram)[:2])
    assert spectrum(torch.zeros(3, 3)).tolist() == [0, 0, 0]
