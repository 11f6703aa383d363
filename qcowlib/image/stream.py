"""A disk as a Python file object."""

from __future__ import annotations

import io
import os
from typing import Protocol

from qcowlib.errors import OptionError


class StreamSource(Protocol):
    """What a stream reads from."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`."""
        ...

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill the whole buffer from `offset`."""
        ...


class ImageStream(io.RawIOBase):
    """A seekable read-only file over a disk or a vm state.

    Reads are full up to the end, so that consumers which expect `read(n)` to return n bytes (zipfile, tarfile, pytsk)
    may use it without a buffer. The position belongs to the stream: use one stream for each thread.

    Args:
        source: the image; it stays open when the stream is closed.
        name: name for messages.
    """

    def __init__(self, source: StreamSource, name: str = "") -> None:
        super().__init__()
        self._source = source
        self._position = 0
        self.name = name
        self.mode = "rb"

    def readable(self) -> bool:
        """True: the stream can be read."""
        return True

    def seekable(self) -> bool:
        """True: the stream can be positioned."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        self._refuse_closed()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; behind the end is allowed and reads nothing there."""
        self._refuse_closed()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}.get(whence)
        if base is None:
            raise OptionError(f"unknown whence {whence}")
        if base + offset < 0:
            raise OptionError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes, fewer only at the end; all up to the end when negative or None."""
        self._refuse_closed()
        rest = max(0, self._source.size - self._position)
        length = rest if size is None or size < 0 else min(size, rest)
        if length == 0:
            return b""
        data = self._source.read(self._position, length)
        self._position += length
        return data

    def readall(self) -> bytes:
        """All bytes up to the end."""
        return self.read(-1)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override] # any writable buffer works
        """Fill the buffer, less only at the end; returns the number of bytes."""
        self._refuse_closed()
        view = memoryview(buffer).cast("B")
        length = min(len(view), max(0, self._source.size - self._position))
        if length:
            self._source.readinto(self._position, view[:length])
            self._position += length
        return length

    def write(self, data: object) -> int:  # noqa: ARG002 - every Python file object has this method
        """Raise `io.UnsupportedOperation`: the stream is read-only."""
        raise io.UnsupportedOperation("not writable")

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")  # what every Python file object raises
