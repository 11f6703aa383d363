"""Refcount blocks: reference counts of 1 to 64 bits as arrays.

Source: qcow2.txt, "Refcount block entry": widths of a byte and more are big-endian; of narrower ones the first
cluster's count is in the least significant bits of the first byte.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

RefcountArray: TypeAlias = npt.NDArray[Any]
"""Refcounts in native order: uint8 up to order 3, uint16, uint32 or uint64 above."""

_NATIVE = (np.uint8, np.uint8, np.uint8, np.uint8, np.uint16, np.uint32, np.uint64)


def refcount_dtype(order: int) -> np.dtype[Any]:
    """The native dtype that holds refcounts of 2^order bits."""
    return np.dtype(_NATIVE[order])


def decode_refcounts(block: bytes | bytearray | memoryview | npt.NDArray[Any], order: int) -> RefcountArray:
    """The refcounts in `block`: one-dimensional, native byte order, a writable copy.

    Args:
        block: bytes of one or more refcount blocks.
        order: log2 of the refcount width in bits, 0 to 6.
    """
    raw = np.frombuffer(block, dtype=np.uint8)
    if order >= 3:
        native = refcount_dtype(order)
        return raw.view(native.newbyteorder(">")).astype(native)
    if order == 0:
        return np.unpackbits(raw, bitorder="little")
    width = 1 << order
    per_byte = 8 // width
    counts = np.empty((len(raw), per_byte), dtype=np.uint8)
    for place in range(per_byte):
        counts[:, place] = raw >> (place * width) & ((1 << width) - 1)
    return counts.reshape(-1)


def encode_refcounts(counts: RefcountArray, order: int) -> bytes:
    """The bytes of refcounts, the inverse of `decode_refcounts`.

    Args:
        counts: any unsigned integer dtype; every value fits into 2^order bits, and they fill whole bytes.
        order: log2 of the refcount width in bits, 0 to 6.
    """
    if order >= 3:
        return counts.astype(refcount_dtype(order).newbyteorder(">")).tobytes()
    if order == 0:
        return np.packbits(counts.astype(np.uint8), bitorder="little").tobytes()
    width = 1 << order
    per_byte = 8 // width
    places = counts.astype(np.uint8).reshape(-1, per_byte)
    packed = np.zeros(len(places), dtype=np.uint8)
    for place in range(per_byte):
        packed |= places[:, place] << (place * width)
    return packed.tobytes()
