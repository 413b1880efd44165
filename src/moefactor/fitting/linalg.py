"""The linear algebra that methods share. Float64 unless said otherwise: moments square the condition number."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NotFinite


def whitening(moment: Tensor) -> tuple[Tensor, Tensor]:
    """S and S⁻¹ with S Sᵀ = moment (n, n), S lower triangular.

    The ridge grows tenfold from 1e-10 of the mean diagonal until the Cholesky factorisation succeeds, which it does
    before the ridge is as large as the moment. Raises NotFinite.
    """
    if not moment.isfinite().all():
        raise NotFinite("a second moment")
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    level = float(moment.diagonal().abs().mean())
    ridge = 0.0
    while ridge <= 1e3 * level + 1.0:
        factor, info = torch.linalg.cholesky_ex(moment + ridge * eye)
        if info == 0:
            return factor, torch.linalg.solve_triangular(factor, eye, upper=False)
        ridge = max(10 * ridge, 1e-10 * level, 1e-30)
    raise NotFinite("the Cholesky factor of a second moment")


def effective_rank(singular_values: Tensor) -> float:
    """exp(−Σ p ln p), p = σ²/Σσ² (Roy & Vetterli 2007, in energies as RFID-MoE uses it). 0 for a zero matrix."""
    energy = singular_values.double().square()
    total = energy.sum()
    if total == 0:
        return 0.0
    p = energy / total
    return float(torch.exp(torch.special.entr(p).sum()))


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left (m, r), right (r, n)) of the best rank-r approximation; √σ on both sides, so neither factor is tiny."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """(rank, n): the leading eigenvectors of a symmetric matrix as rows, largest first."""
    _, vectors = torch.linalg.eigh(gram)
    return vectors.flip(-1)[:, :rank].T


def spectrum(gram: Tensor) -> Tensor:
    """Eigenvalues of a positive semi-definite matrix, largest first, rounding noise below zero cut off."""
    return torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)


def weighted_least_squares(target: Tensor, basis: Tensor, moment: Tensor, noise: float = 0.0) -> Tensor:
    """argmin_A tr (W − A B) C (W − A B)ᵀ = W C Bᵀ (B C Bᵀ)⁻¹.

    target W (m, n), basis B (r, n), moment C (n, n) -> (m, r). With `noise`, the least on average when rounding adds to
    every entry of A something of that share of its square.
    """
    metric = moment @ basis.T  # (n, r)
    normal = basis @ metric  # (r, r)
    # 1e-12 of the mean diagonal: below what float64 resolves for the conditions met (≤ 1e10), enough for exact zeros.
    normal.diagonal().mul_(1 + noise)
    normal.diagonal().add_(1e-12 * normal.diagonal().mean() + 1e-30)
    return torch.linalg.solve(normal, (target @ metric).T).T


def weighted_error(difference: Tensor, moment: Tensor) -> Tensor:
    """tr D C Dᵀ, the mean squared output error of a difference (m, n) under inputs of second moment C (n, n)."""
    return (difference @ moment * difference).sum()


def gram(rows: Tensor) -> Tensor:
    """rows (n, H) -> (H, H) float64, in blocks: a float64 copy of a wide stack would not fit beside it."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(65536):
        block = block.double()
        total.addmm_(block.T, block)
    return total
