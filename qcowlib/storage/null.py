"""A disk of zeroes that no file is behind: QEMU's null-co and null-aio."""

from __future__ import annotations

from collections.abc import Iterator


class NullStorage:
    """Zeroes to read.

    Args:
        size: how many, in bytes.
        name: name for messages.
    """

    def __init__(self, size: int, name: str = "null-co://") -> None:
        self._size = size
        self._name = name

    @property
    def name(self) -> str:
        """Name for messages."""
        return self._name

    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` zeroes; fewer only behind the end."""
        return bytes(max(0, min(length, self._size - offset)))

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` with zeroes, less only behind the end."""
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size - offset))
        view[:length] = bytes(length)
        return length

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """All of it is a hole."""
        if length:
            yield offset, length, False

    def close(self) -> None:
        """Nothing to release."""
