"""What docs/adding-a-method.md promises: a method is one file and a line, and so is a form."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moefactor
from layers import factorised, random_stats, random_weights
from models import load, logits, rebuilt
from moefactor.allocate import Offer
from moefactor.fitting.stack import Stack, stack_error
from moefactor.forms import FORMS, Form, TensorSpec
from moefactor.forms.base import Factors
from moefactor.forms.fields import Fields
from moefactor.methods import METHODS
from moefactor.methods.base import Fitted, StackOffers, lift

DOCS = Path(__file__).parents[1] / "docs"


def test_the_example_of_a_method_works(tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch) -> None:
    """As it stands in the docs, in a file of its own."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", (DOCS / "adding-a-method.md").read_text(), re.S))
    path = tmp_path / "rows.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("moefactor.methods.rows", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "rows", module.METHOD)
    weights = random_weights()
    stats = random_stats(weights)
    errors = [factorised(METHODS["rows"], weights, stats, units=n)[1].errors["up"] for n in (2, 6, 12)]
    assert errors == sorted(errors, reverse=True)
    worse = factorised(METHODS["rows"], weights, stats, units=6, pivoting=False)[1].errors["up"]
    assert worse > errors[1] > factorised(METHODS["svd"], weights, stats, units=6)[1].errors["up"]
    source = tiny_model("mixtral")
    out = moefactor.compress(str(source), "rows", 0.4, tmp_path / "out")
    torch.testing.assert_close(logits(load(out)), logits(rebuilt(load(source), out)), atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class Halved(Form):
    """Every other row of each matrix, `rows` (E, ⌈width/2⌉, H); the others are their neighbours'."""

    name = "halved"

    def tensors(self) -> dict[str, TensorSpec]:
        return {"rows": TensorSpec((self.experts, -(-self.width // 2), self.hidden))}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return factors["rows"][expert].repeat_interleave(2, 0)[: self.width]

    def to_json(self) -> dict:
        return {"form": "halved"}

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> Halved:
        return cls(experts, width, hidden)


def halved_offers(stack: Stack) -> StackOffers:
    experts, width, hidden = stack.shape
    return StackOffers([], Halved(experts, width, hidden), fixed=experts * -(-width // 2) * hidden)


def halve(stack: Stack, form: Form, *, seed: int) -> Fitted:
    factors = {"rows": stack.weights[:, ::2].float()}
    return Fitted(factors, stack_error(stack, form, factors, weighted=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_form_needs_no_kernel_of_its_own(
    dtype: torch.dtype, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class and a line in FORMS: planned, counted, stored, loaded, run (by the reference) and exported."""
    monkeypatch.setitem(FORMS, "halved", Halved)
    method = lift("halved", "every other row", "nobody", halved_offers, halve, description="", joint=False)
    monkeypatch.setitem(METHODS, "halved", method)
    source = tiny_model("qwen3_moe", dtype)
    out = moefactor.compress(str(source), "halved", 0.4, tmp_path / "out")
    loaded = load(out)
    assert moefactor.evaluate(str(out), [None], window=16, max_windows=1).expert_parameters == 2 * 8 * 3 * 12 * 32
    slack = 1e-4 if dtype == torch.float32 else 0.1
    expected = logits(rebuilt(load(source), out))
    torch.testing.assert_close(logits(loaded), expected, atol=slack, rtol=slack)
    dense = moefactor.export_dense(str(out), tmp_path / "dense")
    torch.testing.assert_close(logits(load(dense)), expected, atol=slack, rtol=slack)


def test_an_offer_is_what_the_docs_say() -> None:
    """Every field of Offer has a row in the table."""
    text = (DOCS / "adding-a-method.md").read_text()
    missing = [name for name in Offer.__dataclass_fields__ if f"`{name}`" not in text]
    assert not missing
