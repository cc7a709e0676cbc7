"""Packing against a slow loop over single bits, for every width and odd sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.models import packing
from flyweight.models.packing import pack_bits, pack_mask, packed_bytes, unpack_bits, unpack_mask


def slow_pack(values: list[int], bits: int) -> list[int]:
    stream = [value >> bit & 1 for value in values for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(stream[i + j] << j for j in range(8)) for i in range(0, len(stream), 8)]


@st.composite
def values_of_some_width(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=200))


@settings(max_examples=200, deadline=None)
@given(values_of_some_width())
def test_pack_equals_a_loop_over_bits_and_comes_back(case: tuple[int, list[int]]) -> None:
    bits, values = case
    packed = pack_bits(np.array(values, np.uint8), bits)
    assert packed.tolist() == slow_pack(values, bits)
    assert len(packed) == packed_bytes(len(values), bits) == -(-len(values) * bits // 8)
    assert unpack_bits(packed, bits, len(values)).tolist() == values


def test_three_bits_by_hand() -> None:
    # 5 = 101, 3 = 011, 7 = 111; lowest bit first: 1 0 1 1 1 0 1 1 | 1
    assert pack_bits(np.array([5, 3, 7], np.uint8), 3).tolist() == [0b11011101, 0b1]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 129, 1000])
def test_chunks_meet_without_a_seam(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, count).astype(np.uint8)
    whole = pack_bits(values, bits)
    monkeypatch.setattr(packing, "CHUNK", 64)
    assert pack_bits(values, bits).tobytes() == whole.tobytes()
    assert (unpack_bits(whole, bits, count) == values).all()


@given(st.lists(st.booleans(), max_size=100))
@settings(deadline=None)
def test_masks(mask: list[bool]) -> None:
    packed = pack_mask(np.array(mask, bool))
    assert packed.tolist() == slow_pack([int(bit) for bit in mask], 1)
    assert unpack_mask(packed, len(mask)).tolist() == mask


def test_masks_of_floats_keep_what_is_not_zero() -> None:
    assert pack_mask(np.array([[0.0, -1e-30], [2.0, -0.0]], np.float32)).tolist() == [0b0110]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="a value of 8 does not fit into 3 bits"):
        pack_bits(np.array([8], np.uint8), 3)
    with pytest.raises(ValueError, match="expected 2 bytes for 3 values of 3 bits, got 1"):
        unpack_bits(np.zeros(1, np.uint8), 3, 3)
    for bits in (0, 9):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            pack_bits(np.zeros(1, np.uint8), bits)
