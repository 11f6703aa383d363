"""Reading with a rule for the end of the file, over any `ReadStorage`."""

from __future__ import annotations

from qcowlib.errors import CorruptMetadata
from qcowlib.storage.protocol import ReadStorage

# No file reaches further, and no system call takes a larger offset: 64-bit fields of an image can say one.
_MAX_OFFSET = (1 << 63) - 1


def read_exact(storage: ReadStorage, offset: int, length: int, structure: str) -> bytes:
    """Exactly `length` bytes at `offset`.

    Args:
        storage: where to read.
        offset: host offset in bytes.
        length: bytes wanted; the caller has capped it.
        structure: name of the structure, for the error.

    Raises:
        CorruptMetadata: the file ends inside the range.
        StorageError: the host file could not be read.
    """
    data = storage.pread(length, offset) if offset + length <= _MAX_OFFSET else b""
    if len(data) != length:
        raise CorruptMetadata(structure, offset, "lies beyond the end of the file")
    return data


def read_padded(storage: ReadStorage, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`; bytes behind the end of the file are zeroes.

    QEMU reads guest data this way: the last cluster of an image file may be cut where only zeroes followed.
    """
    data = storage.pread(length, offset) if offset + length <= _MAX_OFFSET else b""
    missing = length - len(data)
    return data + bytes(missing) if missing else data
