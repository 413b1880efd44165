"""Sums over tokens: what they are, how they merge, how experts with few tokens borrow."""

from __future__ import annotations

import pytest
import torch

from layers import LAYERS, UNUSED, random_stats, random_weights, routed_tokens
from moefactor.experts import ExpertLayer
from moefactor.stats import GRADIENTS, STATISTICS, LayerStats


def small(experts: int, intermediate: int, hidden: int) -> ExpertLayer:
    return ExpertLayer("model.layers.0.mlp.experts", "model.layers.0", experts, intermediate, hidden)


def test_sums_are_the_naive_ones() -> None:
    weights = random_weights()
    stats = random_stats(weights)
    for expert, x, h, y, g in routed_tokens(weights):
        assert stats.count[expert] == len(g)
        torch.testing.assert_close(stats.weight[expert], g.double().sum())
        torch.testing.assert_close(stats.weight_square[expert], g.double().square().sum())
        norms = sum(float(weight) * float(row.norm()) for weight, row in zip(g, y, strict=True))
        assert float(stats.output_norm[expert]) == pytest.approx(norms, rel=1e-5)
        for moment, rows in ((stats.input_moment, x), (stats.hidden_moment, h)):
            naive = sum(weight**2 * torch.outer(row, row) for weight, row in zip(g, rows, strict=True))
            torch.testing.assert_close(moment[expert], naive, rtol=1e-4, atol=1e-4 * float(naive.abs().max()))
        squares = sum(row.square() for row in h)
        torch.testing.assert_close(stats.hidden_square[expert], squares, rtol=1e-4, atol=1e-4 * float(squares.max()))
        sums = sum(weight**2 * row for weight, row in zip(g, h, strict=True))
        torch.testing.assert_close(stats.hidden_sum[expert], sums, rtol=1e-4, atol=1e-4 * float(sums.abs().max()))


def test_parts_merge_by_addition() -> None:
    weights = random_weights()
    whole = random_stats(weights)
    halves = [LayerStats.zeros(LAYERS["gated"], STATISTICS) for _ in range(2)]
    for expert, *parts in routed_tokens(weights):
        middle = len(parts[0]) // 2
        halves[0].add(expert, *(part[:middle] for part in parts))
        halves[1].add(expert, *(part[middle:] for part in parts))
    merged = halves[0] + halves[1]
    assert merged.tensors().keys() == whole.tensors().keys()
    for name in whole.tensors().keys() - GRADIENTS:  # which `add` does not fill
        tensor = whole.tensors()[name]
        other = merged.tensors()[name]
        torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))


def test_only_what_is_needed_is_collected() -> None:
    stats = LayerStats.zeros(LAYERS["gated"], {"routing", "hidden_moment"})
    assert stats.input_moment is None
    assert stats.hidden_moment.shape == (8, 16, 16)
    assert (stats + stats).input_moment is None
    assert "input_moment" not in stats.tensors()


def test_frequency_is_a_share_and_uniform_without_tokens() -> None:
    stats = random_stats(random_weights())
    assert float(stats.frequency().sum()) == pytest.approx(1)
    assert stats.frequency()[UNUSED] == 0
    torch.testing.assert_close(stats.frequency(), stats.count / 800)  # 400 tokens, two experts each
    empty = LayerStats.zeros(small(4, 2, 3), ())
    assert empty.frequency().tolist() == [0.25] * 4


@pytest.mark.parametrize("name", ["input_moment", "hidden_moment"])
def test_an_unseen_expert_has_the_layers_moment(name: str) -> None:
    stats = random_stats(random_weights())
    layer = stats.layer_moment(name)
    torch.testing.assert_close(stats.mean_moment(name, UNUSED, layer), layer, rtol=1e-5, atol=1e-5)


def test_borrowing_by_the_number_of_tokens() -> None:
    """One half with as many tokens as rows, next to nothing with very many."""
    own, layer = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([2.0, 2.0])).double()
    for tokens, share in ((2, 0.5), (6, 0.25), (2_000_000, 0.0)):
        stats = LayerStats.zeros(small(1, 2, 2), {"input_moment"})
        stats.count += tokens
        stats.weight_square += tokens  # g = 1 throughout
        stats.input_moment += tokens * own
        expected = (1 - share) * own.double() + share * layer
        torch.testing.assert_close(stats.mean_moment("input_moment", 0, layer), expected, rtol=1e-5, atol=1e-5)


def test_the_scale_of_router_weights_does_not_matter_to_a_mean() -> None:
    weights = random_weights()
    once, twice = (LayerStats.zeros(LAYERS["gated"], STATISTICS) for _ in range(2))
    for expert, x, h, y, g in routed_tokens(weights):
        once.add(expert, x, h, y, g)
        twice.add(expert, x, h, y, 2 * g)
    for expert in (0, UNUSED):
        first, second = (s.mean_moment("input_moment", expert, s.layer_moment("input_moment")) for s in (once, twice))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_without_tokens_the_moment_is_the_identity() -> None:
    stats = LayerStats.zeros(small(2, 2, 3), STATISTICS)
    torch.testing.assert_close(stats.layer_moment("input_moment"), torch.eye(3, dtype=torch.float64))


def test_moments_are_invertible_however_few_tokens() -> None:
    stats = random_stats(random_weights(), tokens=2)
    layer = stats.layer_moment("input_moment")
    for expert in range(8):
        values = torch.linalg.eigvalsh(stats.mean_moment("input_moment", expert, layer))
        assert values.min() > 1e-8 * values.max()
