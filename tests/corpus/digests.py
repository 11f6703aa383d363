"""The two digests of a disk's guest content that the manifest has."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

CHUNK = 64 << 10
#: Bytes of one read when the whole content is hashed.
STEP = 4 << 20


class Digests(NamedTuple):
    """Content of a disk: its size, SHA-256 of all bytes (None where that is too long), nz64k_sha256."""

    virtual_size: int
    sha256: str | None
    nz64k_sha256: str


class Readable(Protocol):
    """Anything with a size and bytes."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int, /) -> bytes: ...


def digest(disk: Readable, data: Iterable[tuple[int, int]], *, whole: bool) -> Digests:
    """Digests of a disk.

    Args:
        disk: what is read.
        data: (offset, length) in bytes of all ranges that may be other than zero, sorted.
        whole: also hash all bytes, those outside `data` included: then two independent ways read the disk.
    """
    chunks = hashlib.sha256()
    for start, length in _aligned(data, disk.size):
        for at in range(start, start + length, STEP):
            piece = memoryview(disk.read(at, min(STEP, start + length - at)))
            for inner in range(0, len(piece), CHUNK):
                chunk = piece[inner : inner + CHUNK]
                if any(chunk[:512]) or chunk != bytes(len(chunk)):
                    chunks.update((at + inner).to_bytes(8, "big"))
                    chunks.update(chunk)
    chunks.update(disk.size.to_bytes(8, "big"))
    total = None
    if whole:
        everything = hashlib.sha256()
        for at in range(0, disk.size, STEP):
            everything.update(disk.read(at, min(STEP, disk.size - at)))
        total = everything.hexdigest()
    return Digests(disk.size, total, chunks.hexdigest())


def _aligned(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Ranges widened to whole chunks (the last chunk of the disk may be short), without overlap."""
    done = 0
    for offset, length in ranges:
        start = max(done, offset // CHUNK * CHUNK)
        done = min(size, -(-(offset + length) // CHUNK) * CHUNK)
        if start < done:
            yield start, done - start
