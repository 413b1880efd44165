"""mobe, slbf and their solvers against the papers' formulas, written out naively."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from layers import random_stats, random_weights
from moefactor.fitting import mixture
from moefactor.fitting.mixture import Problem, mixed, solve
from moefactor.fitting.stack import Stack
from moefactor.forms import BasisMixture
from moefactor.methods import METHODS, mobe, slbf

ACTIVATIONS = {"silu": lambda x: x / (1 + torch.exp(-x)), "tanh": torch.tanh, "identity": lambda x: x}
WEIGHTS = random_weights()  # 8 experts, I = 16, H = 24


def stack(name: str = "up") -> Stack:
    return Stack(name, WEIGHTS.stack(name), random_stats(WEIGHTS))


def form(**changes: object) -> BasisMixture:
    return BasisMixture(8, 16, 24, **{"bases": 4, "rank": 16, **changes})


def naive(activation: str, mix: Tensor, private: Tensor, bases: list[Tensor]) -> list[Tensor]:
    """Ŵ_e = A_e f(Σ_j α_ej B_j)."""
    out = []
    for e in range(len(mix)):
        total = torch.zeros_like(bases[0])
        for j in range(mix.shape[1]):
            total = total + mix[e, j] * bases[j]
        out.append(private[e] @ ACTIVATIONS[activation](total))
    return out


def relative(weights: Tensor, rebuilt: list[Tensor]) -> float:
    lost = sum(float((w - r).square().sum()) for w, r in zip(weights, rebuilt, strict=True))
    return lost / float(weights.square().sum())


# -- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["up", "down"])
def test_mobe_is_the_papers_formula(activation: str, groups: int, name: str) -> None:
    chosen = form(bases=4 // groups, activation=activation, groups=groups)
    fitted = mobe.factorise(stack(name), chosen, seed=0, steps=15)
    factors, rebuilt = fitted.factors, []
    assert (factors["mix"] > 0).all()
    torch.testing.assert_close(factors["mix"].sum(1), torch.ones(8))  # on the simplex
    for group in range(groups):
        some = slice(group * 8 // groups, (group + 1) * 8 // groups)
        private = factors["private"][some].transpose(1, 2)
        rebuilt += naive(activation, factors["mix"][some], private, list(factors["basis"][group]))
    for expert, matrix in enumerate(rebuilt):
        torch.testing.assert_close(chosen.dense(factors, expert), matrix, atol=1e-4, rtol=1e-4)
    error = relative(stack(name).weights, rebuilt)
    assert fitted.error == pytest.approx(error, rel=1e-3)
    # The loss of the weights over their standard deviation is the same fraction; groups average theirs.
    assert fitted.curve[-1] == pytest.approx(error, rel=1e-3 if groups == 1 else 0.1)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_slbf_is_the_papers_formula(activation: str) -> None:
    chosen = form(bases=8, basis_rank=5, activation=activation)
    fitted = slbf.factorise(stack(), chosen, seed=0, steps=15)
    factors = fitted.factors
    bases = []
    for j in range(8):
        left, others = torch.zeros(16, 5), iter(factors["basis_left"][0, j])
        pivots = factors["basis_pivots"][0, j].tolist()
        for row in range(16):
            left[row] = torch.eye(5)[pivots.index(row)] if row in pivots else next(others)
        bases.append(left @ factors["basis_right"][0, j])
    rebuilt = naive(activation, factors["mix"], factors["private"].transpose(1, 2), bases)
    for expert, matrix in enumerate(rebuilt):
        torch.testing.assert_close(chosen.dense(factors, expert), matrix, atol=1e-4, rtol=1e-4)
    assert fitted.curve[-1] == pytest.approx(relative(WEIGHTS.up, rebuilt), rel=1e-3)


@pytest.mark.parametrize("solver", ["varpro", "adam"])
def test_gauge_fixing_loses_nothing(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored gives the loss that the solver had with U and V whole."""
    seen: list[Tensor] = []

    def spy(left: Tensor, right: Tensor) -> dict[str, Tensor]:
        seen.append(left.double() @ right.double())
        return pack(left, right)

    pack = slbf.pack_bases
    monkeypatch.setattr(slbf, "pack_bases", spy)
    chosen = form(bases=8, basis_rank=5)
    factors = slbf.factorise(stack(), chosen, seed=0, solver=solver, steps=10).factors
    rebuilt = chosen.full_left(factors, 0).double() @ factors["basis_right"][0].double()
    torch.testing.assert_close(rebuilt, seen[0][0], atol=1e-5 * float(seen[0].abs().max()), rtol=0)
    assert chosen.parameter_count() == 8 * 16 * 16 + 8 * 8 + 8 * (5 + 5 * (16 - 5) + 5 * 24)


def test_adam_is_the_published_loop() -> None:
    """train.py of inclusionAI/MoBE, written out: its start, Adam over A, B and α together at a rate that stays."""
    stacked, steps, rate = stack(), 25, 0.07
    fitted = mobe.factorise(stacked, form(), seed=3, solver="adam", steps=steps)
    target = stacked.weights / stacked.weights.std()
    private, basis, logits = torch.empty(8, 16, 16), torch.empty(4, 16, 24), torch.zeros(8, 4)
    for j in range(4):  # four bases from runs of two experts
        u, s, vt = torch.linalg.svd(stacked.weights[2 * j : 2 * j + 2].reshape(32, 24), full_matrices=False)
        start = u[:, :16] @ torch.diag(s[:16])
        private[2 * j], private[2 * j + 1], basis[j] = start[:16], start[16:], vt[:16]
        logits[2 * j : 2 * j + 2, j] = 1
    published = mobe.published_start(stacked.weights, 4, 16)
    for ours, theirs in zip(published, (private, basis, logits), strict=True):
        torch.testing.assert_close(ours, theirs)
    parameters = [basis.requires_grad_(), logits.requires_grad_(), private.requires_grad_()]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    best, curve = float("inf"), []
    for _ in range(steps + 1):
        rebuilt = naive("silu", logits.softmax(1), private, list(basis))
        loss = sum((w - r).square().sum() for w, r in zip(target, rebuilt, strict=True)) / target.square().sum()
        best = min(best, loss.item())
        curve.append(best)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert curve == pytest.approx(list(fitted.curve), rel=1e-2)


# -- the exact solution of A ---------------------------------------------------------------------------------------


def problem(*, right: bool = False, left: bool = False) -> tuple[Problem, Tensor]:
    """float64, and some bases (E, r, H) for it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def moments(size: int) -> Tensor:
        rows = normal(3, size, size)
        return rows @ rows.transpose(1, 2)

    metrics = ({"right": moments(7)} if right else {}) | ({"left": moments(5)} if left else {})
    return Problem(normal(3, 5, 7), "silu", **metrics), normal(3, 4, 7)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("triangles", [False, True])
def test_private_is_least_squares(right: bool, left: bool, triangles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """argmin ‖L^½ (W − A B) C^½‖: lstsq in the metric of C; L does not matter to it."""
    monkeypatch.setattr(mixture, "RIDGE", 0.0)
    given, bases = problem(right=right, left=left)
    given.triangles = triangles
    found = given.private(bases)
    for e in range(3):
        root = torch.linalg.cholesky(given.right[e]) if right else torch.eye(7, dtype=torch.float64)
        expected = torch.linalg.lstsq((bases[e] @ root).T, (given.weights[e] @ root).T).solution.T
        torch.testing.assert_close(found[e], expected)


def test_the_ridge_is_next_to_nothing() -> None:
    given, bases = problem()
    expected = torch.linalg.lstsq(bases.transpose(1, 2), given.weights.transpose(1, 2)).solution.transpose(1, 2)
    torch.testing.assert_close(given.private(bases), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("right", [False, True])
def test_variable_projection_is_the_gradient_through_the_solution(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the optimal A, holding it fixed loses nothing (Golub & Pereyra 1973)."""
    monkeypatch.setattr(mixture, "RIDGE", 0.0)
    given, basis = problem(right=right)
    basis = basis[:2].clone().requires_grad_()  # two bases for three experts
    logits = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2).requires_grad_()

    def gradients(*, held: bool) -> tuple[Tensor, ...]:
        current = mixed(logits.softmax(1), basis, "silu")
        private = given.private(current)
        return torch.autograd.grad(given.loss(private.detach() if held else private, current), (basis, logits))

    for fixed, through in zip(gradients(held=True), gradients(held=False), strict=True):
        assert float(through.abs().max()) > 1e-4
        torch.testing.assert_close(fixed, through, atol=1e-10, rtol=1e-8)


# -- solvers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mobe", "slbf"])
def test_varpro_is_not_worse_than_adam(method: str) -> None:
    chosen = form() if method == "mobe" else form(bases=8, basis_rank=5)
    module = {"mobe": mobe, "slbf": slbf}[method]
    curves = {s: module.factorise(stack(), chosen, seed=0, solver=s, steps=60).curve for s in ("varpro", "adam")}
    for curve in curves.values():
        assert len(curve) == 61
        assert all(b <= a for a, b in itertools.pairwise(curve))
        assert curve[-1] < 0.95 * curve[0]
    assert curves["varpro"][-1] <= curves["adam"][-1]


@pytest.mark.parametrize("method", ["mobe", "slbf"])
@pytest.mark.parametrize("solver", ["varpro", "adam"])
def test_same_seed_same_bytes(method: str, solver: str) -> None:
    chosen = form() if method == "mobe" else form(bases=8, basis_rank=5)
    module = {"mobe": mobe, "slbf": slbf}[method]
    runs = [module.factorise(stack(), chosen, seed=seed, solver=solver, steps=5).factors for seed in (4, 4, 5)]
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())
    # The public code of MoBE starts without chance.
    assert all(torch.equal(t, runs[2][name]) for name, t in runs[0].items()) == ((method, solver) == ("mobe", "adam"))


@pytest.mark.parametrize(
    ("method", "solver", "steps"),
    [("mobe", "varpro", 1500), ("mobe", "adam", 10_000), ("slbf", "varpro", 1000), ("slbf", "adam", 8_000)],
)
def test_steps_are_those_that_help_names(method: str, solver: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def short(*arguments: object, steps: int, **options: object) -> mixture.Solution:
        seen.append(steps)
        return solve(*arguments, steps=1, **options)

    module = {"mobe": mobe, "slbf": slbf}[method]
    monkeypatch.setattr(module, "solve", short)
    module.factorise(stack(), form() if method == "mobe" else form(bases=8, basis_rank=5), seed=0, solver=solver)
    assert seen == [steps]
    assert f"{steps:,} at {module.RATES[solver]} for {solver}" in module.factorise.__doc__


def test_the_rate_is_held_and_then_falls() -> None:
    assert [mobe.held(progress) for progress in (0, 0.5, 0.7, 0.85, 1)] == pytest.approx([1, 1, 1, 0.5, 0])
    rates: list[float] = []

    class Watched(torch.optim.Adam):
        def step(self) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step()

    given, bases = problem()
    for falling, last in ((None, 0.02), (mobe.held, 0.0)):
        rates.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim, "Adam", Watched)
            solve(given, lambda p: p[0], [bases], solver="varpro", steps=10, rates=[0.3], falling=falling)
        assert rates[0] == pytest.approx(0.3)
        assert rates[-1] == pytest.approx(0.3 * last)


def test_what_is_returned_is_the_best_state() -> None:
    """At a rate far too high the last state is not the best; what comes back has the loss that the curve ends at."""
    given, bases = problem()
    given = Problem(given.weights.float(), "silu")
    for solver in ("varpro", "adam"):
        found = solve(given, lambda p: p[0], [bases.float()], solver=solver, steps=40, rates=[3.0], private_rate=3.0)
        assert float(given.loss(found.private, found.parameters[0])) == pytest.approx(found.curve[-1], rel=1e-4)


def test_it_stops_when_nothing_is_gained() -> None:
    long = mobe.factorise(stack(), form(), seed=0, steps=120)
    short = mobe.factorise(stack(), form(), seed=0, steps=120, tolerance=3.0)
    assert len(long.curve) == 121
    assert 50 < len(short.curve) < 121
    assert short.curve == long.curve[: len(short.curve)]
    assert short.curve[-50] - short.curve[-1] < 3.0 * short.curve[-1]
    assert short.error == pytest.approx(short.curve[-1], rel=1e-3)


# -- the start -----------------------------------------------------------------------------------------------------


def stacked_svd_error(weights: Tensor, runs: int, rank: int) -> float:
    lost = 0.0
    for run in weights.double().tensor_split(runs):
        lost += float(torch.linalg.svdvals(run.flatten(0, 1))[rank:].square().sum())
    return lost / float(weights.double().square().sum())


def test_the_start_is_the_stacked_svd() -> None:
    """With f the identity the first loss is that of the SVD; uniform mixing, as published, would throw it away."""
    chosen = form(activation="identity")
    first = mobe.factorise(stack(), chosen, seed=0, steps=1).curve[0]
    ideal = stacked_svd_error(WEIGHTS.up, 4, 16)
    assert first == pytest.approx(ideal, rel=0.05)
    assert first < 0.5 * uniform_start("identity")


def test_the_start_survives_silu() -> None:
    first = mobe.factorise(stack(), form(), seed=0, steps=1).curve[0]
    assert first < 0.8 * uniform_start("silu")


def uniform_start(activation: str) -> float:
    """The loss before the first step with the same bases and every α = 1/m."""
    given = Problem(WEIGHTS.up / WEIGHTS.up.std(), activation)
    bases = mixed(torch.full((8, 4), 0.25), mixture.group_starts(given, 4, 16), activation)
    return float(given.loss(given.private(bases), bases))


@pytest.mark.parametrize("name", ["up", "down"])
def test_weighted_minimises_the_output_error(name: str) -> None:
    plain, weighted = (
        mobe.factorise(stack(name), form(), seed=0, steps=100, weighted=flag).factors for flag in (False, True)
    )
    seen = stack(name)
    share = (seen.stats.weight_square / seen.stats.weight_square.mean()).clamp(min=1e-2)

    def output_error(factors: dict[str, Tensor]) -> float:
        total = 0.0
        for e in range(8):
            lost = seen.weights[e].double() - form().dense(factors, e).double()
            lost = lost.T if seen.writes else lost
            total += float(share[e] * ((lost @ seen.moment(e)) * lost).sum())
        return total

    assert output_error(weighted) < 0.9 * output_error(plain)


def test_mobe_leaves_down_alone_unless_asked() -> None:
    for projections, stacks in ((None, {"gate", "up"}), (("gate", "up", "down"), {"gate", "up", "down"})):
        options = METHODS["mobe"].complete({"projections": projections} if projections else {})
        offers = METHODS["mobe"].price(WEIGHTS, None, None, seed=0, **options)
        forms = METHODS["mobe"].build(offers, [o.minimum for o in offers.offers]).forms
        assert {name for name, f in forms.items() if isinstance(f, BasisMixture)} == stacks
