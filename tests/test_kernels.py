"""Every way to run a form, whatever device it is made for, against experts rebuilt; and what engines ask of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moefactor.forms import (
    BasePlusDelta,
    BasisMixture,
    Dense,
    Form,
    Latent,
    Quantised,
    Ragged,
    SharedBasis,
    WindowResidual,
    low_rank,
)
from moefactor.routing import Routing
from moefactor.runtime.kernels import KERNELS, Kernel, Setting, Way, choose, dequantise, why_not
from moefactor.runtime.kernels.atoms import AtomsKernel
from moefactor.runtime.kernels.mixture_in_cache import MixtureInCache
from moefactor.runtime.kernels.quantised import QuantisedRowsKernel, RowsByPair
from moefactor.runtime.kernels.reference import Rebuilt

E, W, H = 6, 48, 40
WIDTHS = (48, 0, 16, 32, 48, 16)
PAIRS = ((0, 5), (2, 3), (1, 4))
FORMS: dict[str, Form] = {
    "dense": Dense(E, W, H),
    "one width": Ragged(E, 2 * W, H, widths=(16,) * E, halves=2),
    "atoms": Ragged(E, W, H, widths=WIDTHS),
    "atoms of gate and up": Ragged(E, 2 * W, H, widths=WIDTHS, halves=2),
    "uneven": Ragged(E, W, H, widths=(48, 0, 7, 31, 9, 16)),
    "low rank": low_rank(E, W, H, (8,) * E),
    "many ranks": low_rank(E, W, H, (8, 16, 24, 9, 8, 32)),
    "groups": SharedBasis(E, W, H, groups=PAIRS, ranks=(8, 16, 8)),
    "latent": Latent(E, 2 * W, H, 16, Ragged(E, 2 * W, 16, widths=WIDTHS, halves=2)),
    "linear": BasisMixture(E, W, H, bases=2, rank=16, activation="identity"),
    "tight": BasisMixture(E, W, H, bases=2, rank=21, widths=WIDTHS),
    "mobe": BasisMixture(E, W, H, bases=3, rank=24, activation="tanh", groups=2),
    "slbf": BasisMixture(E, W, H, bases=3, rank=24, basis_rank=5),
    "residual": WindowResidual(E, W, H, low_rank(E, W, H, (8,) * E), PAIRS, (W * 8,) * 3, seed=3),
    "residual of long windows": WindowResidual(E, 2, H, Dense(E, 2, H), PAIRS, (6,) * 3, seed=3),
    "base": BasePlusDelta(E, W, H, low_rank(E, W, H, (8,) * E), kept=H, writes=False),
}
FIRST = (20, 0, 16, 0, 5, 8)  # channels of each expert that have the most bits
PRECISIONS = ((4, FIRST), (2, tuple(width - first for width, first in zip(WIDTHS, FIRST, strict=True))))
FORMS |= {
    "few bits": Quantised(E, 2 * W, H, FORMS["atoms of gate and up"], 16, channels=PRECISIONS),
    "few bits, dense": Quantised(E, W, H, FORMS["dense"], 24, (("weight", 3),)),
    "few bits, one width": Quantised(E, 2 * W, H, FORMS["one width"], 8, (("weight", 8),)),
    "few bits, uneven": Quantised(E, W, H, FORMS["uneven"], 40, (("weight", 5),)),
    "few bits, low rank": Quantised(E, W, H, FORMS["low rank"], 16, (("basis_r8", 6), ("private_r8", 4))),
    "few bits, latent": Quantised(E, 2 * W, H, FORMS["latent"], 16, (("basis", 8),), PRECISIONS),
    "few bits, tight": Quantised(E, W, H, FORMS["tight"], 8, (("basis", 4),), PRECISIONS),
    "few bits, slbf": Quantised(E, W, H, FORMS["slbf"], 8, (("basis_left", 4), ("basis_right", 3), ("mix", 8))),
}
CPU = Setting("cpu", torch.float32)
ROUTINGS: dict[str, list[list[int]]] = {
    "one token": [[3, 0]],
    "one expert twice": [[4, 4]],
    "some unvisited": [[0, 2], [2, 5], [0, 5], [3, 0], [5, 2]],
    "some skipped": [[0, E], [E, E], [3, 5], [E, 2], [E + 3, 1]],
    "many": [[n % E, (5 * n + 1) % E] for n in range(40)],
    "no token": [],
}


def random(form: Form, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    factors = {name: 0.5 * torch.randn(s.shape, generator=generator) for name, s in form.tensors().items()}
    for name, spec in form.tensors().items():
        if "_codes" in name:
            factors[name] = torch.randint(-(2**31), 2**31, spec.shape, generator=generator, dtype=torch.int32)
        elif spec.dtype == "int32":
            factors[name] = torch.arange(spec.shape[-1], dtype=torch.int32).mul(2).expand(spec.shape).contiguous()
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in factors.items()}


def routed(name: str) -> Routing:
    ids = torch.tensor(ROUTINGS[name], dtype=torch.long).view(-1, 2)
    return Routing(ids, torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)), E)


def results(kernel: Kernel, factors: dict[str, Tensor], routing: Routing) -> list[Tensor]:
    """read, write and write_combined, rows of skipped pairs left out."""
    generator = torch.Generator().manual_seed(2)
    dtype = next(t.dtype for t in factors.values() if t.is_floating_point())
    tokens = torch.randn(routing.tokens, kernel.form.hidden, generator=generator).to(dtype)
    pairs = torch.randn(len(routing.expert), kernel.form.width, generator=generator).to(dtype)
    real = routing.weight > 0
    found = [kernel.read(factors, tokens, routing)[real]]
    if not isinstance(kernel.form, BasePlusDelta) and kernel.form.width <= W:  # not gate and up together
        combined = kernel.write_combined(factors, pairs, routing)
        found += [kernel.write(factors, pairs, routing)[real], combined]
    return found


def close(found: Tensor, expected: Tensor, slack: float) -> None:
    assert found.shape == expected.shape
    most = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.float(), expected.float(), atol=slack * (1 + most), rtol=0)


def of_the_table(form: Form, setting: Setting) -> list[Way]:
    """Those of other devices too, which run anywhere, but for those that want Triton."""
    ways = [way for way in KERNELS[form.name][:-1] if way.hindrance(form, setting) is None]
    return [way for way in ways if "Triton" not in way.name]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_way_is_the_reference(form: Form, dtype: torch.dtype, routing: str) -> None:
    setting, factors = Setting("cpu", dtype), random(form, dtype)
    exact = {name: t.float() if t.is_floating_point() else t for name, t in factors.items()}
    ways = of_the_table(form, setting)
    assert ways
    with torch.no_grad():
        expected = results(Rebuilt(form, CPU), exact, routed(routing))
        for way in ways:
            for found, right in zip(results(way.build(form, setting), factors, routed(routing)), expected, strict=True):
                assert found.dtype == dtype
                close(found, right, 1e-5 if dtype == torch.float32 else 0.03)


def test_the_table_has_what_is_meant_to_be_tested() -> None:
    names = {form: [way.name for way in of_the_table(FORMS[form], CPU)] for form in FORMS}
    assert names["atoms"] == ["atoms of one width", "a loop over experts"]
    assert names["uneven"] == ["a loop over experts"]
    assert names["tight"][0] == "formed in cache"
    assert names["few bits"] == [f"dequantised {how}" for how in ("expert by expert", "pair by pair or whole", "whole")]
    assert names["few bits, low rank"] == ["dequantised whole"]


@pytest.mark.parametrize("kind", ["atoms", "tight", "mobe", "slbf", "residual", "few bits", "few bits, tight"])
def test_gradients_are_the_references(kind: str) -> None:
    form, routing = FORMS[kind], routed("some unvisited")

    def gradients(kernel: Kernel) -> list[Tensor]:
        factors = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in random(form).items()}
        sum(out.square().sum() for out in results(kernel, factors, routing)).backward()
        return [t.grad for t in factors.values() if t.requires_grad]

    expected = gradients(Rebuilt(form, CPU))
    for way in of_the_table(form, CPU):
        for found, right in zip(gradients(way.build(form, CPU)), expected, strict=True):
            close(found, right, 1e-5)


@pytest.mark.parametrize("kind", ["dense", "one width", "latent", "linear", "low rank", "residual", "base"])
def test_what_needs_no_host_is_one_graph(kind: str) -> None:
    """What torch.compile(fullgraph=True) takes has no shape that depends on data and waits for nothing. In bfloat16,
    the only type whose grouped GEMM it traces."""
    form = FORMS[kind]
    kernel = choose(form, Setting("cpu", torch.bfloat16))
    if isinstance(form, Latent):
        kernel.inner = AtomsKernel(form.inner, kernel.setting)  # what a GPU would have
    check_one_graph(kernel)


@pytest.mark.parametrize("by_pair", [True, False])
@pytest.mark.parametrize("kind", ["few bits, dense", "few bits, one width", "few bits", "few bits, latent"])
def test_few_bits_on_a_gpu_are_one_graph(kind: str, by_pair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowsByPair, "serves", lambda rows, pairs: by_pair)
    way = {way.name: way for way in KERNELS["quantised"]}["dequantised pair by pair or whole"]
    kernel = way.build(FORMS[kind], Setting("cpu", torch.bfloat16))
    if isinstance(kernel.inner.form, Latent):
        kernel.inner.inner = AtomsKernel(kernel.inner.form.inner, kernel.setting)
    elif kernel.inner.form == FORMS["atoms of gate and up"]:
        kernel.inner = AtomsKernel(kernel.inner.form, kernel.setting)
    check_one_graph(kernel)


def check_one_graph(kernel: Kernel) -> None:
    form, dtype = kernel.form, torch.bfloat16
    factors, x = random(form, dtype), torch.randn(5, H).to(dtype)

    def call(ids: Tensor, weights: Tensor) -> Tensor:
        routing = Routing(ids, weights, E)
        out = kernel.read(factors, x, routing)
        writes = form.width == W and not isinstance(form, BasePlusDelta)
        return kernel.write_combined(factors, out, routing) if writes else out

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ids, weights = torch.tensor(ROUTINGS["some unvisited"]), torch.rand(5, 2)
    with torch.no_grad():
        close(compiled(ids, weights), call(ids, weights), 0.02)
    torch.compiler.reset()


def test_a_mixture_is_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    form, factors = FORMS["mobe"], random(FORMS["mobe"])
    monkeypatch.setattr(BasisMixture, "expert_bases", lambda *_: pytest.fail("rebuilt"))
    with torch.no_grad():
        results(choose(form, CPU), factors, routed("many"))
    assert isinstance(choose(form, CPU), MixtureInCache)


@pytest.mark.parametrize("kind", ["few bits", "few bits, latent", "few bits, tight"])
def test_rows_in_a_few_bits_are_never_numbers_all_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, asked = FORMS[kind], []
    tensor = Quantised.tensor
    monkeypatch.setattr(Quantised, "tensor", lambda form, name, *more: asked.append(name) or tensor(form, name, *more))
    monkeypatch.setattr(dequantise, "NUMBERS", 3 * H)  # three rows
    with torch.no_grad():
        found = results(choose(form, CPU), random(form), routed("some unvisited"))
        assert form.channel_tensor not in asked
        for one, right in zip(found, results(Rebuilt(form, CPU), random(form), routed("some unvisited")), strict=True):
            close(one, right, 1e-5)


@pytest.mark.parametrize("kind", ["few bits", "few bits, dense", "few bits, latent", "few bits, tight"])
def test_rows_are_gathered_for_every_pair(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[kind]
    monkeypatch.setattr(RowsByPair, "serves", lambda rows, pairs: True)
    kernel = QuantisedRowsKernel(form, CPU, choose(form.inner, CPU), RowsByPair)
    with torch.no_grad():
        for routing in ROUTINGS:
            expected = results(Rebuilt(form, CPU), random(form), routed(routing))
            for one, right in zip(results(kernel, random(form), routed(routing)), expected, strict=True):
                close(one, right, 1e-5)
    monkeypatch.undo()
    assert kernel.rows.serves(1)  # less work than all rows
    assert not kernel.rows.serves(E)


@pytest.mark.parametrize(
    ("widths", "reason"),
    [
        ((48, 0, 16, 32, 48, 16), None),
        ((48, 0, 7, 31, 9, 16), "widths are multiples of no more than 1, and atoms want multiples of 16"),
        ((24, 0, 8, 8, 8, 8), "multiples of no more than 8"),
    ],
)
def test_widths_that_make_no_atoms_are_named(widths: tuple[int, ...], reason: str | None) -> None:
    form = Ragged(E, W, H, widths=widths)
    cuda = Setting("cuda", torch.bfloat16, (9, 0))
    reasons = dict(why_not(form, cuda))
    assert (reasons.get("atoms of one width") is None) if reason is None else (reason in reasons["atoms of one width"])
    assert "atoms of one width" not in dict(why_not(form, CPU))  # there a loop is the faster way


def test_what_a_form_inside_would_want_is_said_where_its_own_way_runs_it() -> None:
    assert why_not(FORMS["few bits, uneven"], CPU) == []
    cuda = dict(why_not(FORMS["few bits, uneven"], Setting("cuda", torch.bfloat16, (9, 0))))
    assert "uneven widths" in cuda["grouped GEMM"]


def test_what_triton_can_not_form_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Setting("cuda", torch.bfloat16, (9, 0))
    found: Callable[[str], object] = lambda name: SimpleNamespace() if name == "triton" else None  # noqa: E731
    monkeypatch.setattr("moefactor.runtime.kernels.find_spec", found)
    assert "bases of low rank" in dict(why_not(FORMS["slbf"], cuda))["formed by Triton"]
    assert why_not(FORMS["mobe"], cuda) == []
    monkeypatch.setattr("moefactor.runtime.kernels.find_spec", lambda name: None)
    assert "Triton is not installed" in dict(why_not(FORMS["mobe"], cuda))["formed by Triton"]


@pytest.mark.parametrize("routing", ["one token", "some skipped", "many", "no token"])
@pytest.mark.parametrize("kind", ["tight", "mobe", "linear", "dense", "atoms", "many ranks", "residual"])
def test_tritons_tiles_in_its_interpreter(kind: str, routing: str) -> None:
    """Without a GPU the interpreter runs the same program, where Triton is installed and TRITON_INTERPRET=1 was set."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1")
    from moefactor.runtime.kernels.mixture_triton import TritonMixture, tiled_linear

    form, factors = FORMS[kind], random(FORMS[kind])
    if isinstance(form, BasisMixture):
        kernel: Kernel = TritonMixture(form, CPU, tiled_linear)
    else:
        kernel = AtomsKernel(form, CPU, tiled_linear) if isinstance(form, Ragged) else choose(form, CPU)
        for part in (kernel, getattr(kernel, "inner", kernel)):
            part.linear = tiled_linear
    with torch.no_grad():
        expected = results(Rebuilt(form, CPU), factors, routed(routing))
        for found, right in zip(results(kernel, factors, routed(routing)), expected, strict=True):
            close(found, right, 1e-5)
