"""Codes in words: the layout, against compressed-tensors' and by hand, and what codes stand for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefactor.forms.packing import BITS, groups, pack, planes, unpack, values, words

QUICK = settings(max_examples=60, deadline=None)


def codes_of(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@QUICK
@given(
    bits=st.sampled_from(BITS), count=st.integers(1, 100), outer=st.lists(st.integers(0, 3), max_size=2),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_unpacking_undoes_packing(bits: int, count: int, outer: list[int], seed: int) -> None:
    codes = codes_of((*outer, count), bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (*outer, words(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_rows_that_lie_apart(bits: int) -> None:
    """Slices of a larger tensor, as experts are."""
    codes = codes_of((5, 2, 37), bits)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed[1:4, 1], bits, 37), codes[1:4, 1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 70])
def test_words_are_the_planes_bit_by_bit(bits: int, count: int) -> None:
    """Written out with Python's whole numbers, as docs/format.md has it."""
    codes = codes_of((count,), bits)
    expected, low = [], 0
    for p in planes(bits):
        plane = [(c >> low) & (2**p - 1) for c in codes.tolist()]
        per_word = 32 // p
        for start in range(0, count, per_word):
            word = sum(c << (p * n) for n, c in enumerate(plane[start : start + per_word]))
            expected.append(word - (1 << 32) if word >> 31 else word)
        low += p
    assert sum(planes(bits)) == bits
    assert pack(codes, bits).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
def test_the_reader_of_the_docs_reads_them(bits: int) -> None:
    docs = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    reader: dict = {"np": np}
    exec(re.search(r"^def unpacked.*?(?=^def )", docs, re.MULTILINE | re.DOTALL)[0], reader)
    scale, packed = torch.rand(3, 2, 3), pack(codes_of((3, 2, 37), bits), bits)
    found = reader["unpacked"](packed.numpy(), scale.numpy(), bits, 16, 37)
    torch.testing.assert_close(torch.tensor(found), values(packed, scale, bits, 37, 16), check_dtype=False)


def test_the_docs_examples() -> None:
    assert pack(torch.arange(1, 10), 4).tolist() == [0x87654321 - 2**32, 9]
    assert pack(torch.arange(8), 3).tolist() == [0xE4E4, 0xF0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [64, 40, 33])
def test_the_layout_is_compressed_tensors(bits: int, count: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import pack_to_int32

    codes = codes_of((3, count), bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)  # which it packs with 2^(b−1) added
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))


@QUICK
@given(
    bits=st.sampled_from(BITS), count=st.integers(1, 70), group=st.sampled_from([8, 16, 32]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_values_are_the_codes_around_zero_times_their_groups_scale(
    bits: int, count: int, group: int, seed: int, dtype: torch.dtype
) -> None:
    codes = codes_of((2, count), bits, seed)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(2, groups(count, group), generator=generator).to(dtype)
    found = values(pack(codes, bits), scale, bits, count, group)
    assert found.dtype == dtype
    for row in range(2):
        for at, code in enumerate(codes[row].tolist()):
            exact = (code - (2**bits - 1) / 2) * float(scale[row, at // group])
            assert float(found[row, at]) == float(torch.tensor(exact).to(dtype))


@pytest.mark.parametrize("bits", BITS)
def test_levels_lie_evenly_around_zero(bits: int) -> None:
    codes = torch.arange(2**bits).to(torch.uint8)
    levels = values(pack(codes, bits), torch.ones(1), bits, 2**bits, 1024)
    assert torch.equal(levels, -levels.flip(0))
    assert torch.equal(levels.diff(), torch.ones(2**bits - 1))


def test_scales_have_a_gradient_and_codes_none() -> None:
    codes, scale = codes_of((3, 20), 4), torch.rand(3, 3).requires_grad_()
    values(pack(codes, 4), scale, 4, 20, 8).sum().backward()
    padded = torch.nn.functional.pad(codes - 7.5, (0, 4)).unflatten(1, (3, 8)).sum(2)
    torch.testing.assert_close(scale.grad, padded)
