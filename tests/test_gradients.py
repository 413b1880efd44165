"""Statistics of the streamed backward pass against plain autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from models import IDS, load
from moefactor.calibrate import Calibration, calibrate
from moefactor.experts import ExpertLayer
from moefactor.fitting.stack import Stack
from moefactor.methods.d2moe import merged_base
from moefactor.run_folder import RunFolder
from moefactor.stats import STATISTICS, LayerStats
from moefactor.streaming import StreamedModel

# Experts alone; shared experts and a dense first layer besides.
KINDS = ["qwen3_moe", "deepseek_v3"]


@dataclass
class Pair:
    """One expert's tokens of one sequence, with what autograd keeps of them."""

    expert: int
    h: Tensor
    y: Tensor
    g: Tensor


def plain_experts(module: nn.Module, pairs: list[Pair]) -> Callable:
    """An experts module's forward, expert by expert, nothing of ours in it."""

    def forward(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = x.view(-1, x.shape[-1])
        out = torch.zeros_like(x)
        for e in range(len(module.down_proj)):
            token, slot = (top_k_index == e).nonzero(as_tuple=True)
            if len(token):
                gate, up = (x[token] @ module.gate_up_proj[e].T).chunk(2, dim=1)
                h = silu(gate) * up
                y = h @ module.down_proj[e].T
                y.retain_grad()
                g = top_k_weights[token, slot]
                pairs.append(Pair(e, h.detach(), y, g.detach()))
                out = out.index_add(0, token, y * g.unsqueeze(1))
        return out

    return forward


def by_autograd(folder: Path, layers: list[ExpertLayer]) -> list[LayerStats]:
    """Each sequence's loss on its own, the gradients squared and summed, in a loop over everything."""
    model = load(folder)
    found = [LayerStats.zeros(layer, STATISTICS) for layer in layers]
    pairs: list[list[Pair]] = [[] for _ in layers]
    for layer, kept in zip(layers, pairs, strict=True):
        module = model.get_submodule(layer.name)
        module.forward = plain_experts(module, kept)
    for ids in IDS:
        model.zero_grad()
        for kept in pairs:
            kept.clear()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
        for layer, stats, kept in zip(layers, found, pairs, strict=True):
            module = model.get_submodule(layer.name)
            down = module.down_proj.grad.transpose(1, 2)
            stats.fisher += torch.cat((module.gate_up_proj.grad, down), dim=1).square()  # gate, up, downᵀ
            for pair in kept:
                stats.count[pair.expert] += len(pair.g)
                stats.hidden_square[pair.expert] += (pair.h**2).sum(0)
                stats.hidden_sum[pair.expert] += (pair.g[:, None] ** 2 * pair.h).sum(0)
                for row in pair.y.grad:
                    stats.output_gradient[pair.expert] += torch.outer(row, row)
    return found


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def streamed(kind: str, tiny_model: Callable[..., Path]) -> StreamedModel:
    return StreamedModel(str(tiny_model(kind)))


@pytest.fixture(scope="module")
def expected(kind: str, streamed: StreamedModel, tiny_model: Callable[..., Path]) -> list[LayerStats]:
    return by_autograd(tiny_model(kind), streamed.experts)


def through_layers(
    streamed: StreamedModel, folder: Path, needs: set[str], *, batches: list[Tensor]
) -> list[LayerStats]:
    run = RunFolder(folder)
    calibrate(streamed, run, Calibration(batches, {"source": "ids"}), needs)
    assert not (folder / "activations").exists()
    return [run.stats(index) for index in range(len(streamed.experts))]


@pytest.fixture(scope="module")
def found(streamed: StreamedModel, tmp_path_factory: pytest.TempPathFactory) -> list[LayerStats]:
    return through_layers(streamed, tmp_path_factory.mktemp("run"), set(STATISTICS), batches=[IDS])


@pytest.mark.parametrize("name", ["fisher", "output_gradient", "hidden_square", "hidden_sum", "count"])
def test_streamed_is_autograd(name: str, found: list[LayerStats], expected: list[LayerStats]) -> None:
    for ours, plain in zip(found, expected, strict=True):
        tensor, reference = getattr(ours, name), getattr(plain, name)
        assert float(reference.abs().max()) > 0
        scale = float(reference.abs().max())
        torch.testing.assert_close(tensor, reference, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("batches", [[IDS], [IDS[:1], IDS[1:]]], ids=["together", "apart"])
def test_output_gradients_do_not_depend_on_batches(
    batches: list[Tensor], streamed: StreamedModel, expected: list[LayerStats], tmp_path: Path
) -> None:
    """Without Fisher several sequences run at a time: the loss is their sum."""
    found = through_layers(streamed, tmp_path, {"output_gradient"}, batches=batches)
    for ours, plain in zip(found, expected, strict=True):
        assert ours.fisher is None
        scale = float(plain.output_gradient.abs().max())
        torch.testing.assert_close(ours.output_gradient, plain.output_gradient, atol=1e-4 * scale, rtol=1e-3)


def test_nothing_is_left_behind(found: list[LayerStats], streamed: StreamedModel) -> None:
    """No weights, no gradients, no observers; a second run starts clean."""
    for module in streamed.model.modules():
        assert not {"observer", "gradient_observer"} & vars(module).keys()
    for parameter in streamed.model.parameters():
        assert parameter.device.type == "meta"
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_the_base_is_the_papers(
    kind: str, found: list[LayerStats], expected: list[LayerStats], streamed: StreamedModel,
    tiny_model: Callable[..., Path],
) -> None:  # fmt: skip
    """W̄ = Σ F ⊙ W / Σ F with F from plain autograd, entry by entry; frequency; mean."""
    state = load(tiny_model(kind)).state_dict()
    for index, layer in enumerate(streamed.experts):
        gate, up = state[layer.name + ".gate_up_proj"].chunk(2, dim=1)
        down = state[layer.name + ".down_proj"].transpose(1, 2)
        parts = dict(zip(("gate", "up", "down"), expected[index].fisher.chunk(3, dim=1), strict=True))
        stacks = {"gate": gate, "up": up, "down": down, "gate_up": torch.cat((gate, up), dim=1)}
        parts["gate_up"] = torch.cat((parts["gate"], parts["up"]), dim=1)
        share = expected[index].count / expected[index].count.sum()
        assert float(share.max()) > 1.2 / len(share)
        for name, weights in stacks.items():
            stack = Stack(name, weights, found[index])
            fisher = parts[name].double()
            by_hand = (fisher * weights).sum(0) / fisher.sum(0)
            base = merged_base(stack, "fisher")
            # Quotients of squares: entries with next to no gradient carry float32's rounding of it.
            seen = fisher.sum(0) > 1e-4 * fisher.sum(0).mean()
            assert seen.double().mean() > 0.9
            torch.testing.assert_close(base[seen], by_hand[seen], atol=2e-3, rtol=2e-3)
            lowest, highest = weights.amin(0).double(), weights.amax(0).double()
            assert ((base >= lowest - 1e-6) & (base <= highest + 1e-6)).all()
            by_frequency = sum(s * w.double() for s, w in zip(share, weights, strict=True))
            torch.testing.assert_close(merged_base(stack, "frequency"), by_frequency)
            torch.testing.assert_close(merged_base(stack, "mean"), weights.double().mean(0))


def test_a_base_without_any_gradient_is_the_mean() -> None:
    layer = ExpertLayer("model.layers.0.mlp.experts", "model.layers.0", 3, 2, 4)
    stats = LayerStats.zeros(layer, STATISTICS)
    weights = torch.randn(3, 2, 4)
    stats.fisher[1, 2] = 1.0  # up's first row of expert 1, and nothing else
    base = merged_base(Stack("up", weights, stats), "fisher")
    torch.testing.assert_close(base[0], weights[1, 0].double())
    torch.testing.assert_close(base[1], weights[:, 1].double().mean(0))
