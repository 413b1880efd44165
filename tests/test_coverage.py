"""How many tokens each expert saw, and what is said of those that saw none."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from moefactor.cli import coverage_table
from moefactor.coverage import coverage, unreached


def test_a_layer_in_numbers() -> None:
    first, second = coverage({"layers.0": torch.tensor([0.0, 7, 3, 0]), "layers.1": torch.tensor([5.0, 1, 2])})
    assert (first.least, first.median, first.most, first.unreached) == (0, 0, 7, [0, 3])
    assert (second.least, second.median, second.most, second.unreached, second.experts) == (1, 2, 5, [], 3)


def test_what_the_text_did_not_reach_is_named() -> None:
    assert unreached(coverage({"layers.0": torch.tensor([1.0, 2])})) is None
    said = unreached(coverage({"layers.0": torch.tensor([1.0, 0]), "layers.1": torch.zeros(9)}))
    assert "10 of 11 experts (layers.0: expert 1; layers.1: experts 0, 1, 2, 3, 4, 5 and 3 more)" in said
    many = unreached(coverage({f"layers.{n}": torch.zeros(1) for n in range(20)}))
    assert "layers.5: expert 0; and 14 more layers" in many


def test_the_table() -> None:
    out = io.StringIO()
    rows = coverage({"layers.0": torch.tensor([0.0, 1500, 30]), "layers.1": torch.tensor([5.0, 1, 2])})
    Console(file=out, width=120).print(coverage_table(rows))
    assert "1,500" in out.getvalue()
    assert "1 of 3" in out.getvalue()
