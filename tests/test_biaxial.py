"""biaxial: the latent form, gradients at the pre-activations, the plan over both axes, the refit of down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moefactor
from layers import random_stats, random_weights
from moefactor.errors import UserError
from moefactor.experts import CompressedExperts, ExpertLayer
from moefactor.forms import Latent, Ragged, Routing, form_from_json
from moefactor.methods import METHODS, biaxial
from moefactor.plan import LayerPlan
from moefactor.stats import LayerStats, SecondLook
from moefactor.streaming import _observed_forward

REFERENCE = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"


def latent(experts: int = 4, width: int = 6, hidden: int = 10, rank: int = 5, halves: int = 1) -> Latent:
    inner = Ragged(experts, halves * width, rank, widths=(6, 0, 3, 5), halves=halves)
    return Latent(experts, halves * width, hidden, rank=rank, inner=inner)


def random_factors(form: Latent) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in form.shapes().items()}


@pytest.mark.parametrize("halves", [1, 2])
def test_latent_is_its_dense_experts(halves: int) -> None:
    form = latent(halves=halves)
    factors = random_factors(form)
    ids, weights = torch.tensor([[0, 2], [3, 1], [2, 3]]), torch.rand(3, 2)
    routing = Routing(ids, weights, 4)
    tokens = torch.randn(3, form.hidden)
    rows = form.read(factors, tokens, routing)
    for row, token, expert in zip(rows, routing.token, routing.expert, strict=True):
        torch.testing.assert_close(row, form.dense(factors, int(expert)) @ tokens[token])
    assert form_from_json(form.to_json(), experts=4, width=form.width, hidden=10, where="here") == form
    if halves == 2:
        return
    h = torch.randn(6, form.width)
    h *= torch.tensor([[float(k < form.inner.widths[e]) for k in range(6)] for e in routing.expert.tolist()])
    pairs = torch.stack([x @ form.dense(factors, int(e)) for x, e in zip(h, routing.expert, strict=True)])
    torch.testing.assert_close(form.write(factors, h, routing), pairs)
    torch.testing.assert_close(form.write_combined(factors, h, routing), routing.combine(pairs))


class Experts(nn.Module):
    """As much of a fused experts module as the observed forward asks for."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4, generator=generator))

    def _apply_gate(self, first: torch.Tensor) -> torch.Tensor:
        gate, up = first.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def test_first_gradient_is_the_chain_rule_by_hand() -> None:
    """gate's: (∇ᵀd_k)·u_k·silu'(gate_k); up's: (∇ᵀd_k)·silu(gate_k), ∇ with the router weight in it."""
    module, layer = Experts(), ExpertLayer("experts", "layer", 3, 4, 6)
    stats = LayerStats.zeros(layer, {"first_gradient", "output_gradient"})
    module.gradient_observer = stats
    x = torch.randn(5, 6, requires_grad=True)
    ids, g = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [0, 1]]), torch.rand(5, 2)
    upstream = torch.randn(5, 6)
    _observed_forward(module, x, ids, g).backward(upstream)
    expected = torch.zeros(3, 8)
    for token in range(5):
        for expert, weight in zip(ids[token].tolist(), g[token], strict=True):
            gate, up = (module.gate_up_proj[expert] @ x[token]).chunk(2)
            through = (weight * upstream[token]) @ module.down_proj[expert]
            sigma = gate.sigmoid()
            slope = sigma * (1 + gate * (1 - sigma))
            expected[expert] += torch.cat((through * up * slope, through * nn.functional.silu(gate))).square()
    torch.testing.assert_close(stats.first_gradient, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def planned() -> tuple:
    weights = random_weights()
    stats = random_stats(weights)
    stats.first_gradient = torch.rand(weights.layer.experts, 2 * weights.layer.intermediate) * 10
    return weights, stats


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.9])
def test_the_plan_meets_the_budget_and_counts_what_it_stores(planned: tuple, keep: float) -> None:
    weights, stats = planned
    budget = int(keep * weights.layer.parameter_count)
    (plan,) = biaxial.planner([(weights, stats)], budget, multiple=1, seed=0, tick=lambda: None)
    assert plan.parameter_count() <= budget
    # One direction of gate and up costs at most this; less can't be left.
    assert (
        budget - plan.parameter_count() <= 2 * weights.layer.experts * weights.layer.intermediate + weights.layer.hidden
    )
    result = biaxial.factorise(weights, stats, plan, seed=0)
    assert result.parameter_count() == plan.parameter_count()
    assert all(torch.isfinite(t).all() for t in result.tensors.values())
    assert LayerPlan.from_json(plan.to_json(), weights.layer) == plan


def test_everything_kept_is_exact(planned: tuple) -> None:
    """Whole channels behind a whole basis: the dense experts again, whatever the metrics."""
    weights, stats = planned
    layer = weights.layer
    whole = (layer.intermediate,) * layer.experts
    plan = LayerPlan(layer, biaxial._ragged(layer, whole, {"gate_up": layer.hidden, "down": layer.hidden}))
    rebuilt = biaxial.factorise(weights, stats, plan, seed=0).dense()
    torch.testing.assert_close(rebuilt.gate.float(), weights.gate.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(rebuilt.up.float(), weights.up.float(), atol=1e-4, rtol=0)
    # down is refitted with a ridge towards itself, which changes nothing when nothing is missing
    torch.testing.assert_close(rebuilt.down.float(), weights.down.float(), atol=1e-4, rtol=0)


def test_the_refit_lowers_what_it_minimises(planned: tuple) -> None:
    """Σ g²‖y − D h'‖² with and without the second look, for down behind no basis."""
    weights, stats = planned
    layer = weights.layer
    plan = LayerPlan(layer, biaxial._ragged(layer, (layer.intermediate - 4,) * layer.experts, {"gate_up": 12}))
    first = biaxial.factorise(weights, stats, plan, seed=0)
    seen, squares = SecondLook.zeros(layer), []
    generator = torch.Generator().manual_seed(1)
    for expert in range(layer.experts):
        h = torch.randn(40, layer.intermediate, generator=generator)
        h[:, layer.intermediate - 4 :] = 0  # channels that are gone
        y, g = torch.randn(40, layer.hidden, generator=generator), torch.rand(40, generator=generator)
        seen.add(expert, h, y, g)
        squares.append((h, y, g))

    def loss(result: CompressedExperts) -> float:
        down = result.dense().down
        return sum(
            float((g[:, None] * (y - h @ down[e].float().T)).square().sum()) for e, (h, y, g) in enumerate(squares)
        )

    again = biaxial.refit(weights, stats, first, seen, plan)
    assert loss(again) < loss(first)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose to measure on that calibration has not seen."""
    from moefactor.text import read_text

    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(read_text(None)[-60_000:])
    return path


def test_it_beats_plain_svd_on_the_reference_model(tmp_path: Path, text: Path) -> None:
    common = {"samples": 24, "seqlen": 128}
    found = {}
    for method in ("svd", "biaxial"):
        out = moefactor.compress(str(REFERENCE), method, 0.5, tmp_path / method, **common)
        found[method] = moefactor.evaluate(str(out), [str(text)], window=128, max_windows=24, dtype="float32")
    dense = moefactor.evaluate(str(REFERENCE), [str(text)], window=128, max_windows=24, dtype="float32")
    kept = found["biaxial"].expert_parameters / dense.expert_parameters
    assert 0.4975 <= kept <= 0.5
    assert found["biaxial"].mean_perplexity < 0.7 * found["svd"].mean_perplexity


@pytest.mark.parametrize("options", [{"shrinkage": 2.0}, {"channel_share": "many"}])
def test_bad_options_are_refused(tmp_path: Path, options: dict) -> None:
    with pytest.raises(UserError, match="biaxial"):
        moefactor.compress(
            str(REFERENCE),
            "biaxial",
            0.5,
            tmp_path / "out",
            samples=2,
            seqlen=32,
            **METHODS["biaxial"].complete(options),
        )
    assert not (tmp_path / "out").exists()
