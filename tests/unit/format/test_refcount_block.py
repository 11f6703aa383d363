"""Refcount blocks: the bit order of each width, by hand and beside qemu-img."""

from pathlib import Path

import numpy as np
import pytest

from qcowlib.format.header import parse_header
from qcowlib.format.refcount_block import decode_refcounts, encode_refcounts, refcount_dtype
from tests.oracle import qemu_img

# Order, bytes of a block, refcounts.
BY_HAND = [
    (0, b"\x01\x80", [1, *[0] * 14, 1]),
    (1, b"\xe4", [0, 1, 2, 3]),
    (2, b"\x21\xf0", [1, 2, 0, 15]),
    (3, b"\x00\x7f\xff", [0, 127, 255]),
    (4, b"\x00\x01\xff\xfe", [1, 65534]),
    (5, b"\x00\x00\x00\x01\xff\xff\xff\xff", [1, 2**32 - 1]),
    (6, b"\x00" * 7 + b"\x02" + b"\xff" * 8, [2, 2**64 - 1]),
]


@pytest.mark.parametrize(("order", "block", "counts"), BY_HAND)
def test_by_hand(order: int, block: bytes, counts: list[int]) -> None:
    found = decode_refcounts(block, order)
    assert found.tolist() == counts
    assert found.dtype == refcount_dtype(order)
    assert found.dtype.isnative
    assert encode_refcounts(found, order) == block
    assert encode_refcounts(np.array(counts, dtype=np.uint64), order) == block


@pytest.mark.parametrize("order", range(7))
def test_the_result_is_a_writable_copy(order: int) -> None:
    block = bytearray(8)
    counts = decode_refcounts(np.frombuffer(block, dtype=np.uint8), order)
    counts[0] = 1
    assert block == bytes(8)
    block[:] = b"\xff" * 8
    assert counts[1:].max(initial=0) == 0


@pytest.mark.parametrize("order", range(7))
def test_beside_qemu_img(order: int, tmp_path: Path) -> None:
    """Every cluster of a new image is used once, up to the file's end."""
    path = tmp_path / "image.qcow2"
    options = f"refcount_bits={1 << order},cluster_size=512,preallocation=metadata"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "256k")
    data = path.read_bytes()
    header = parse_header(data)
    table = np.frombuffer(data, dtype=">u8", count=64, offset=header.refcount_table_offset)
    blocks = [data[entry : entry + 512] for entry in table.tolist() if entry]
    counts = decode_refcounts(b"".join(blocks), order)
    used = len(data) // 512
    assert counts[:used].tolist() == [1] * used
    assert not counts[used:].any()
    assert encode_refcounts(counts, order) == b"".join(blocks)
