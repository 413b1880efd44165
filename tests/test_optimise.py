"""Soap: Adam where nothing is rotated, and the same whatever basis the shorter side is written in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from moefactor.fitting.soap import EVERY, LONGEST, Soap, falling

RATE = 0.02


def minimise(start: Tensor, loss: Callable[[Tensor], Tensor], steps: int = 3 * EVERY, rate: float = RATE) -> Tensor:
    parameter = nn.Parameter(start.clone())
    optimiser = Soap([(parameter, rate)])
    for _ in range(steps):
        optimiser.zero_grad()
        loss(parameter).backward()
        optimiser.step()
    return parameter.detach()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=9)).Q


@pytest.mark.parametrize("shape", [(7,), (1, 7), ()])
def test_vectors_take_adam_after_a_first_step_that_only_looks(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moefactor.fitting.soap.FLOOR", 0.0)
    start, wanted = normal(*shape), normal(*shape, seed=1)

    def loss(p: Tensor) -> Tensor:
        return (p - wanted).pow(4).sum()

    reference = nn.Parameter(start.clone())
    adam = torch.optim.Adam([reference], lr=RATE * float(start.square().mean().sqrt()), betas=(0.9, 0.99))
    for step in range(12):
        adam.zero_grad()
        loss(reference).backward()
        adam.step()
        if step == 0:
            with torch.no_grad():
                reference.copy_(start)
    torch.testing.assert_close(minimise(start, loss, steps=12), reference.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (9, 6)])
def test_the_basis_of_the_shorter_side_does_not_matter(shape: tuple[int, int]) -> None:
    """Adam walks differently when the axes are turned; this must not."""
    start, metric = normal(*shape), normal(shape[1], shape[1], seed=2)
    wanted = normal(*shape, seed=1)
    left = shape[0] < shape[1]
    turn = orthogonal(min(shape))

    def loss(p: Tensor) -> Tensor:
        return ((p - wanted) @ metric).square().sum()

    def turned(p: Tensor) -> Tensor:
        return turn @ p if left else p @ turn

    def turned_back(p: Tensor) -> Tensor:
        return turn.T @ p if left else p @ turn.T

    straight = minimise(start, loss, steps=EVERY + 3)
    other = turned_back(minimise(turned(start), lambda p: loss(turned_back(p)), steps=EVERY + 3))
    assert (straight - start).norm() > 0.1 * start.norm()
    torch.testing.assert_close(other, straight, rtol=1e-2, atol=1e-3)


def test_directions_without_a_gradient_stay() -> None:
    """What rounding leaves of it there is not taken for one, however small the others are."""
    turn, direction = orthogonal(6), normal(10, 1, seed=1)
    seen, unseen = turn[:, :1], turn[:, 1:]
    start = normal(10, 6)
    moved = minimise(start, lambda p: 1e-6 * (direction * (p @ seen)).sum(), steps=20) - start
    assert (moved @ unseen).norm() < 0.02 * (moved @ seen).norm()


def regression(optimiser_of: Callable[[nn.Parameter], torch.optim.Optimizer]) -> float:
    """Excess loss of 300 falling steps of a linear regression with noise, its inputs' directions of unlike size."""
    turn = orthogonal(8)
    metric = turn * torch.logspace(0, -1.5, 8) @ turn.T
    parameter, wanted = nn.Parameter(normal(20, 8)), normal(20, 8, seed=1)
    optimiser = optimiser_of(parameter)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: falling(step, 300, 10))
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        x = torch.randn(16, 8, generator=generator) @ metric
        noise = 0.5 * torch.randn(20, 16, generator=generator)
        optimiser.zero_grad()
        ((parameter - wanted) @ x.T + noise).square().mean().backward()
        optimiser.step()
        schedule.step()
    return float(((parameter.detach() - wanted) @ metric).square().mean())


def test_bad_conditioning_costs_less_than_adam() -> None:
    size = float(normal(20, 8).square().mean().sqrt())
    soap = min(regression(lambda p, r=rate: Soap([(p, r)])) for rate in (0.03, 0.1))
    adam = min(
        regression(lambda p, r=rate: torch.optim.Adam([p], lr=r * size, betas=(0.9, 0.99))) for rate in (0.03, 0.1, 0.3)
    )
    assert soap < 0.5 * adam


def test_each_matrix_of_a_stack_is_alone() -> None:
    start, wanted = normal(3, 4, 6), normal(3, 4, 6, seed=1)
    scale = torch.tensor([1.0, 10.0, 0.1])

    def loss(p: Tensor, number: int) -> Tensor:
        return scale[number] * (p - wanted[number]).pow(4).sum()

    size = float(start.square().mean().sqrt())  # the stack's, which sets the rate of all three
    together = minimise(start, lambda p: sum(loss(p[n], n) for n in range(3)))
    for number, matrix in enumerate(start):
        own = minimise(matrix, lambda p, n=number: loss(p, n), rate=RATE * size / float(matrix.square().mean().sqrt()))
        torch.testing.assert_close(together[number], own, rtol=1e-3, atol=1e-4)


def test_a_step_is_a_fraction_of_the_tensors_size() -> None:
    """Whatever the scales of values and gradients, and for a tensor of zeros too."""
    for scale, slope in ((1.0, 1.0), (1e-4, 1e6), (1e3, 1e-4)):
        start, slopes = scale * normal(6, 4), slope * normal(6, 4, seed=1)
        moved = minimise(start, lambda p, s=slopes: (s * p).sum(), steps=2) - start
        expected = RATE * float(start.square().mean().sqrt())
        assert float(moved.square().mean().sqrt()) == pytest.approx(expected, rel=0.05)
    assert (minimise(torch.zeros(6, 4), lambda p: p.sum(), steps=2) != 0).all()


def test_what_got_no_gradient_and_what_is_empty_stays() -> None:
    idle, empty, used = nn.Parameter(normal(3, 3)), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(normal(3, 3))
    before = idle.detach().clone()
    optimiser = Soap([(idle, RATE), (empty, RATE), (used, RATE)])
    for _ in range(3):
        optimiser.zero_grad()
        used.square().sum().backward()
        optimiser.step()
    assert torch.equal(idle.detach(), before)
    assert not torch.equal(used.detach(), normal(3, 3))


def test_its_state_can_be_put_away() -> None:
    def run(stop: int | None) -> Tensor:
        parameter = nn.Parameter(normal(6, 4))
        optimiser = Soap([(parameter, RATE)])
        for step in range(25):
            if step == stop:
                kept = optimiser.state_dict()
                optimiser = Soap([(parameter, RATE)])
                optimiser.load_state_dict(kept)
            optimiser.zero_grad()
            (parameter - 1).pow(4).sum().backward()
            optimiser.step()
        return parameter.detach()

    assert torch.equal(run(None), run(13))


def test_long_sides_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefactor.fitting.soap.LONGEST", 3)
    assert LONGEST >= 4096  # hidden sizes that there are
    parameter = nn.Parameter(normal(5, 4))
    optimiser = Soap([(parameter, RATE)])
    parameter.square().sum().backward()
    optimiser.step()
    assert "basis" not in optimiser.state[parameter]


def test_the_rate_falls_to_nothing() -> None:
    rates = [falling(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[100] == 0
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert rates[60] - rates[70] == pytest.approx(0.1)
