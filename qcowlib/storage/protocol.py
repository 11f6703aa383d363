"""The storage contract: bytes at offsets of one host file.

Positional access only, no shared cursor; all methods may be called from several threads at once. Offsets and lengths
are in bytes. Host failures leave as `StorageError`. `tests/contracts/test_storage.py` runs one suite over every
implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeAlias, runtime_checkable

Buffer: TypeAlias = bytes | bytearray | memoryview


@runtime_checkable
class ReadStorage(Protocol):
    """A host file that can be read."""

    @property
    def name(self) -> str:
        """Name for messages; the path of a local file."""
        ...

    def size(self) -> int:
        """Current length in bytes."""
        ...

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only where the file ends."""
        ...

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only where the file ends."""
        ...

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range as (start, length, is data) rows without gaps; holes read as zeroes.

        A storage that cannot know says that all is data. The part behind the end of the file is a hole.
        """
        ...

    def close(self) -> None:
        """Release the file and its locks; a second call does nothing."""
        ...


@runtime_checkable
class Storage(ReadStorage, Protocol):
    """A host file that can be read and written."""

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`; the file grows where needed."""
        ...

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes without giving up the space; the file grows where needed."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Give the space of the range back; it then reads as zeroes. Does nothing where the host cannot."""
        ...

    def allocate(self, offset: int, length: int) -> None:
        """Reserve host space for the range without changing what it reads as; the file grows where needed."""
        ...

    def truncate(self, size: int) -> None:
        """Set the length in bytes; new bytes read as zeroes."""
        ...

    def flush(self) -> None:
        """Barrier: all writes before this call are durable when it returns."""
        ...
