"""One layer at a time gives what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from models import IDS, load
from moefactor.calibrate import Calibration, calibrate
from moefactor.experts import CompressedExperts
from moefactor.factorise import factorise
from moefactor.methods import METHODS
from moefactor.planning import make_plan
from moefactor.run_folder import RunFolder
from moefactor.size import Size
from moefactor.stats import GRADIENTS, STATISTICS, LayerStats
from moefactor.streaming import OBSERVED, StreamedModel, _multiply
from tiny import TINY

FORWARD = set(STATISTICS) - GRADIENTS  # what a forward pass collects


@torch.no_grad()
def hidden_states(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """What comes out of each decoder layer of a whole model."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: object, args: object, out: object) -> None:
            seen[name] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", TINY)
def test_streamed_states_are_the_whole_models(kind: str, tiny_model: Callable[..., Path]) -> None:
    streamed = StreamedModel(str(tiny_model(kind)))
    expected = hidden_states(load(tiny_model(kind)), streamed.decoder_layers)
    activations = streamed.embed([IDS[:1], IDS[1:]])  # two batches, whose masks are kept once
    for name in streamed.decoder_layers:
        with streamed.loaded(name):
            streamed.run(name, activations)
        torch.testing.assert_close(torch.cat(activations.states), expected[name], atol=1e-4, rtol=1e-4)
        assert {p.device.type for p in streamed.model.parameters()} == {"meta"}


def test_layers_are_released_after_an_error_too(tiny_model: Callable[..., Path]) -> None:
    streamed = StreamedModel(str(tiny_model("mixtral")))
    with pytest.raises(KeyError), streamed.loaded("model.layers.0") as layer:  # noqa: PT012
        assert {p.device.type for p in layer.parameters()} == {"cpu"}
        raise KeyError
    assert {p.device.type for p in streamed.model.parameters()} == {"meta"}


def test_masks_and_positions_are_kept_once(tiny_model: Callable[..., Path]) -> None:
    activations = StreamedModel(str(tiny_model("gpt_oss"))).embed([IDS[:1], IDS[1:]])

    def tensors(value: object) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return [t for part in parts for t in tensors(part)]

    first, second = (tensors(arguments) for arguments in activations.arguments)
    assert first
    assert all(a is b for a, b in zip(first, second, strict=True))


def collected(model: torch.nn.Module, name: str, layer: object) -> LayerStats:
    """Statistics of one experts module while a whole model runs."""
    stats = LayerStats.zeros(layer, FORWARD)
    model.set_experts_implementation(OBSERVED)
    model.get_submodule(name).observer = stats.add
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return stats


def assert_same(found: LayerStats, expected: LayerStats) -> None:
    assert expected.count.sum() > 0
    for name in found.tensors().keys() & expected.tensors().keys():
        tensor = expected.tensors()[name]
        scale = float(tensor.abs().max())
        torch.testing.assert_close(found.tensors()[name], tensor, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_calibration_sees_what_the_whole_model_shows(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    streamed, run = StreamedModel(str(tiny_model(kind))), RunFolder(tmp_path)
    calibrate(streamed, run, Calibration([IDS], {"source": "ids"}), FORWARD)
    dense = load(tiny_model(kind))
    for index, layer in enumerate(streamed.experts):
        assert_same(run.stats(index), collected(dense, layer.name, layer))


def test_sequential_statistics_are_those_behind_factorised_layers(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Layer 1 is observed on what the compressed layer 0 gives: a model whose layer 0 is rebuilt."""
    source, method = tiny_model("mixtral"), METHODS["whitened_svd"]
    streamed, run = StreamedModel(str(source)), RunFolder(tmp_path)
    seen: list[LayerStats] = []

    def spy(weights, stats, layer_plan, **options):
        seen.append(stats)
        return method.factorise(weights, stats, layer_plan, **options)

    options = method.complete({})
    plan = make_plan(streamed, method, options, Size.of(0.4), run=run)
    factorise(streamed, plan, replace(method, factorise=spy), run, calibration=Calibration([IDS], {"source": "ids"}))
    half = load(source)
    first, second = streamed.experts
    tensors = {k.removeprefix(first.name + "."): v for k, v in run.layer(0).items()}
    dense = CompressedExperts(first, plan.layers[0].forms, tensors).dense().to_model_layout()
    assert_same(seen[0], collected(load(source), first.name, first))
    for name, tensor in dense.items():
        getattr(half.get_submodule(first.name), name).data.copy_(tensor)
    assert_same(seen[1], collected(half, second.name, second))
    plain = collected(load(source), second.name, second)
    assert float((seen[1].input_moment - plain.input_moment).norm() / plain.input_moment.norm()) > 1e-2


@pytest.mark.parametrize("transposed", [False, True])
def test_sixteen_bit_products_come_in_few_shapes(transposed: bool) -> None:
    """On a CPU each shape is compiled and kept; what comes out is the product of the rows that went in."""
    shapes = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: object = None):
            if function is torch.Tensor.matmul:
                shapes.add(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator).bfloat16()
    for n in (0, 1, 63, 64, 65, 200):
        x = torch.randn(n, 24, generator=generator).bfloat16()
        with Watch():
            out = _multiply(x, weight if transposed else weight.T, transposed)
        torch.testing.assert_close(out.float(), x.float() @ weight.float(), rtol=2e-2, atol=2e-2)
    assert shapes == {(0, 24), (64, 24), (128, 24), (256, 24)}
