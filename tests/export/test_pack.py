"""Bit packing: round trips at every width, exact sizes, the documented bit order, refusal of what doesn't fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geta.errors import CheckpointError, ConfigError
from geta.export.pack import code_range, pack_bits, packed_bytes, unpack_bits

WIDTHS = range(2, 17)


@st.composite
def packable(draw):
    bits, signed = draw(st.integers(2, 16)), draw(st.booleans())
    low, high = code_range(bits, signed)
    return bits, signed, draw(st.lists(st.integers(low, high), max_size=40))


@settings(deadline=None, database=None, derandomize=True)
@given(packable())
def test_round_trip_and_exact_size(case):
    bits, signed, values = case
    codes = torch.tensor(values, dtype=torch.int32)
    packed = pack_bits(codes, bits, signed)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (len(values) * bits + 7) // 8
    assert torch.equal(unpack_bits(packed, bits, signed, (len(values),), torch.int32), codes)


@settings(deadline=None, database=None, derandomize=True)
@given(packable())
def test_bit_order_is_the_documented_one(case):
    bits, signed, values = case
    stream = 0
    for position, value in enumerate(values):
        stream |= (value % (1 << bits)) << (position * bits)
    expected = stream.to_bytes((len(values) * bits + 7) // 8, "little")
    assert bytes(pack_bits(torch.tensor(values, dtype=torch.int32), bits, signed).tolist()) == expected


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_of_a_width(bits, signed):
    low, high = code_range(bits, signed)
    codes = torch.arange(low, high + 1, dtype=torch.int32)
    packed = pack_bits(codes, bits, signed)
    assert packed.numel() == (1 << bits) * bits // 8 or bits == 2
    assert torch.equal(unpack_bits(packed, bits, signed, tuple(codes.shape), torch.int32), codes)


def test_four_bits_take_half_a_byte_per_element():
    codes = torch.randint(-7, 8, (16, 3, 3, 3), dtype=torch.int8)
    packed = pack_bits(codes, 4, True)
    assert packed.numel() * 2 == codes.numel()
    back = unpack_bits(packed, 4, True, (16, 3, 3, 3), torch.int8)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", [3, 8, 11])
def test_more_than_one_chunk(bits, monkeypatch):
    codes = torch.randint(*code_range(bits, True), (1003,), dtype=torch.int16)
    whole = pack_bits(codes, bits, True)
    monkeypatch.setattr("geta.export.pack._CHUNK", 64)
    assert torch.equal(pack_bits(codes, bits, True), whole)
    assert torch.equal(unpack_bits(whole, bits, True, (1003,), torch.int16), codes)


def test_non_contiguous_and_empty_tensors():
    codes = torch.arange(-8, 7).view(3, 5).t()
    assert torch.equal(unpack_bits(pack_bits(codes, 4, True), 4, True, (5, 3), torch.int64), codes)
    assert unpack_bits(pack_bits(torch.empty(0, 4, dtype=torch.int8), 5, True), 5, True, (0, 4), torch.int8).shape == (0, 4)


@pytest.mark.parametrize(("value", "bits", "signed"), [(8, 4, True), (-9, 4, True), (16, 4, False), (-1, 4, False)])
def test_a_code_that_does_not_fit_is_refused(value, bits, signed):
    with pytest.raises(ConfigError, match="hold"):
        pack_bits(torch.tensor([0, value], dtype=torch.int32), bits, signed)


@pytest.mark.parametrize("bits", [0, 1, 17, 4.0, True])
def test_a_bad_width_is_refused(bits):
    with pytest.raises(ConfigError, match="2 to 16"):
        pack_bits(torch.tensor([0]), bits, True)
    with pytest.raises(ConfigError, match="2 to 16"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), bits, True, (1,), torch.int8)


def test_float_codes_are_refused():
    with pytest.raises(ConfigError, match="integer tensor"):
        pack_bits(torch.tensor([0.5]), 4, True)


def test_a_dtype_that_is_too_narrow_is_refused():
    with pytest.raises(ConfigError, match="can't hold 8-bit unsigned"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 8, False, (1,), torch.int8)


def test_damaged_streams_are_refused():
    packed = pack_bits(torch.tensor([1, 2, 3]), 3, True)
    assert packed.numel() == packed_bytes(3, 3) == 2
    for damaged in (packed[:1], torch.cat([packed, packed]), packed.to(torch.int16), packed.view(1, 2)):
        with pytest.raises(CheckpointError, match="damaged"):
            unpack_bits(damaged, 3, True, (3,), torch.int8)
    spare = packed.clone()
    spare[-1] |= 0x80
    with pytest.raises(CheckpointError, match="spare bits"):
        unpack_bits(spare, 3, True, (3,), torch.int8)
