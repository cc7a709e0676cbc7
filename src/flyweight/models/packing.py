"""k-bit integers and masks as bytes. Bit order is little-endian: value i takes bits i*k .. i*k + k - 1 of the stream,
its lowest bit first, and bit j of the stream is bit j % 8 of byte j // 8. Unused bits of the last byte are 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack_bits", "pack_mask", "packed_bytes", "unpack_bits", "unpack_mask"]

Bytes = NDArray[np.uint8]
CHUNK = 1 << 20  # values unpacked at a time (a multiple of 8): one bit takes one byte while it is being moved


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack_bits(values: Bytes, bits: int) -> Bytes:
    """[n] uint8, each below 2^bits -> [ceil(n * bits / 8)] uint8. `bits` is 1..8."""
    _check_bits(bits)
    values = np.ascontiguousarray(values, np.uint8).reshape(-1)
    if values.size and int(values.max()) >> bits:
        raise ValueError(f"a value of {int(values.max())} does not fit into {bits} bits")
    if bits == 8:
        return values.copy()
    packed = [
        np.packbits(
            np.unpackbits(values[i : i + CHUNK, None], axis=1, count=bits, bitorder="little").reshape(-1),
            bitorder="little",
        )
        for i in range(0, values.size, CHUNK)
    ]
    return np.concatenate(packed) if packed else np.zeros(0, np.uint8)


def unpack_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    """[ceil(count * bits / 8)] uint8 -> [count] uint8. Raises ValueError when the length does not fit."""
    _check_bits(bits)
    packed = np.ascontiguousarray(packed, np.uint8).reshape(-1)
    if packed.size != packed_bytes(count, bits):
        raise ValueError(
            f"expected {packed_bytes(count, bits)} bytes for {count} values of {bits} bits, got {packed.size}"
        )
    if bits == 8:
        return packed.copy()
    values = np.empty(count, np.uint8)
    for i in range(0, count, CHUNK):
        n = min(CHUNK, count - i)
        piece = packed[i * bits // 8 : i * bits // 8 + packed_bytes(n, bits)]
        streams = np.unpackbits(piece, count=n * bits, bitorder="little").reshape(n, bits)
        values[i : i + n] = np.packbits(streams, axis=1, bitorder="little")[:, 0]
    return values


def pack_mask(mask: NDArray[Any]) -> Bytes:
    """Any shape, zero or not -> [ceil(n / 8)] uint8, row by row."""
    return np.packbits(np.ascontiguousarray(mask).reshape(-1) != 0, bitorder="little")


def unpack_mask(packed: Bytes, count: int) -> NDArray[np.bool_]:
    """[ceil(count / 8)] uint8 -> [count] bool."""
    return unpack_bits(packed, 1, count).astype(np.bool_)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"expected 1 to 8 bits, got {bits}")
