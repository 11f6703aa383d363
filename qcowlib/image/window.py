"""A slice of a file that can be written: the raw driver's offset and size."""

from __future__ import annotations

import errno
import os

from qcowlib.errors import OptionError, StorageError
from qcowlib.image.raw import StorageWindow
from qcowlib.storage.protocol import Buffer, Storage


class WritableStorageWindow(StorageWindow):
    """A slice of a storage; offsets count from its beginning. One that reaches to the end of the file can grow.

    Args:
        inner: the file; closed with the slice.
        offset: where the slice begins, in bytes.
        size: bytes of the slice; None means up to the end.

    Raises:
        ChainError: the slice does not lie inside the file.
    """

    def __init__(self, inner: Storage, offset: int, size: int | None) -> None:
        super().__init__(inner, offset, size)
        self._file = inner
        self._grows = size is None

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`."""
        length = memoryview(data).nbytes
        self._file.pwrite(data, self._place("write", offset, length))
        self._reach(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes without giving up the space."""
        self._file.write_zeroes(self._place("write", offset, length), length)
        self._reach(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Give the space of the range back, as far as it lies in the slice."""
        inside = min(length, max(0, self._size - offset))
        if inside:
            self._file.discard(self._place("discard", offset, inside), inside)

    def allocate(self, offset: int, length: int) -> None:
        """Reserve host space for the range."""
        self._file.allocate(self._place("allocate", offset, length), length)
        self._reach(offset, length)

    def truncate(self, size: int) -> None:
        """Set the length in bytes."""
        if not self._grows:
            raise OptionError("Cannot resize fixed-size raw disks")
        self._file.truncate(self._place("truncate", size, 0))
        self._size = size

    def flush(self) -> None:
        """Barrier: all writes before this call are durable when it returns."""
        self._file.flush()

    def _place(self, action: str, offset: int, length: int) -> int:
        """Where a range that may be written begins in the file."""
        place = self._in_file(action, offset)
        if offset + length > self._size and not self._grows:
            raise StorageError(self.name, action, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return place

    def _reach(self, offset: int, length: int) -> None:
        """The slice is as long as what was written needs."""
        if length:
            self._size = max(self._size, offset + length)
