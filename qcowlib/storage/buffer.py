"""A host file that lives in memory."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

from qcowlib.errors import StorageError
from qcowlib.storage.protocol import Buffer


class BytesStorage:
    """Bytes in memory as a `Storage`; knows no holes.

    Args:
        data: the content; copied when `writable`, so that the caller's object never changes.
        writable: whether the write methods work; else they raise `StorageError`, as on a file opened for reading.
        name: name for messages.
    """

    def __init__(self, data: Buffer = b"", *, writable: bool = True, name: str = "<bytes>") -> None:
        self.writable = writable
        self._name = name
        self._data: bytes | bytearray = bytearray(data) if writable else bytes(data)
        self._closed = False
        # A bytearray cannot grow while another thread copies out of it through a view.
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Name for messages."""
        return self._name

    def getvalue(self) -> bytes:
        """A copy of the whole content; also after `close`."""
        return bytes(self._data)

    def size(self) -> int:
        """Current length in bytes."""
        return len(self._data)

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only at the end."""
        self._require("read", offset, length)
        return bytes(self._data[offset : offset + length])

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read."""
        view = memoryview(buffer).cast("B")
        data = self.pread(len(view), offset)
        view[: len(data)] = data
        return len(data)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """All bytes are data; behind the end is a hole."""
        self._require("read", offset, length)
        data = max(0, min(length, len(self._data) - offset))
        if data:
            yield offset, data, True
        if data < length:
            yield offset + data, length - data, False

    def close(self) -> None:
        """Refuse further use; `getvalue` still works."""
        self._closed = True

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`, growing where needed."""
        view = memoryview(data).cast("B")
        content = self._require_writable("write", offset, len(view))
        if len(view):
            with self._lock:
                self._grow(content, offset)
                content[offset : offset + len(view)] = view

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero the range, growing where needed."""
        content = self._require_writable("write", offset, length)
        with self._lock:
            self._zero(content, offset, min(offset + length, len(content)))
            if length:
                self._grow(content, offset + length)

    def discard(self, offset: int, length: int) -> None:
        """Zero the part of the range that lies in the file."""
        content = self._require_writable("discard", offset, length)
        with self._lock:
            self._zero(content, offset, min(offset + length, len(content)))

    def allocate(self, offset: int, length: int) -> None:
        """Grow to cover the range."""
        content = self._require_writable("allocate", offset, length)
        if length:
            with self._lock:
                self._grow(content, offset + length)

    def truncate(self, size: int) -> None:
        """Set the length in bytes."""
        content = self._require_writable("resize", size, 0)
        with self._lock:
            del content[size:]
            self._grow(content, size)

    def flush(self) -> None:
        """Nothing to do: memory is as durable as it gets."""
        self._require_writable("flush", 0, 0)

    def _require(self, action: str, offset: int, length: int) -> None:
        if self._closed:
            raise StorageError(self._name, action, OSError(errno.EBADF, os.strerror(errno.EBADF)))
        if offset < 0 or length < 0:  # a slice would count them from the end
            raise StorageError(self._name, action, OSError(errno.EINVAL, os.strerror(errno.EINVAL)))

    def _require_writable(self, action: str, offset: int, length: int) -> bytearray:
        self._require(action, offset, length)
        if not isinstance(self._data, bytearray):
            raise StorageError(self._name, action, OSError(errno.EBADF, os.strerror(errno.EBADF)))
        return self._data

    def _grow(self, content: bytearray, size: int) -> None:
        if size > len(content):
            try:
                content.extend(bytes(size - len(content)))
            except (MemoryError, OverflowError):
                raise StorageError(self._name, "write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from None

    @staticmethod
    def _zero(content: bytearray, start: int, end: int) -> None:
        if end > start:
            content[start:end] = bytes(end - start)
