"""Raw images: guest offset = host offset, and slices of a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import NoReturn

from qcowlib.errors import ChainError, NoSuchSnapshot, OptionError, OutOfRange, StorageError
from qcowlib.extents import ExtentKind, ExtentTable
from qcowlib.format.bitmap_directory import BitmapEntry
from qcowlib.format.snapshot_table import SnapshotEntry
from qcowlib.image.create_target import lengthen
from qcowlib.image.reader import ReadableImage, zero_fill
from qcowlib.storage.protocol import Buffer, ReadStorage, Storage

SECTOR_SIZE = 512
_ROWS_PER_TABLE = 4096

_DATA, _ZERO = int(ExtentKind.DATA), int(ExtentKind.ZERO)


class StorageWindow:
    """A slice of a storage as a read-only storage of its own; closing it closes the storage below.

    Args:
        inner: the storage to look into.
        offset: first byte of the slice.
        size: bytes of the slice; None means up to the end.

    Raises:
        ChainError: the slice does not lie inside the file.
    """

    def __init__(self, inner: ReadStorage, offset: int, size: int | None) -> None:
        available = inner.size() - offset
        if available < 0 or (size is not None and size > available):
            raise ChainError(f"the slice at {offset} does not lie inside '{inner.name}'")
        self.inner = inner
        self._offset = offset
        self._size = available if size is None else size

    @property
    def name(self) -> str:
        """Name of the file below."""
        return self.inner.name

    @property
    def host_base(self) -> int:
        """Where the slice begins in the file below all windows, in bytes."""
        inner = self.inner.host_base if isinstance(self.inner, StorageWindow) else 0
        return inner + self._offset

    def size(self) -> int:
        """Bytes of the slice."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only where the slice ends."""
        length = min(length, max(0, self._size - offset))
        return self.inner.pread(length, self._in_file("read", offset)) if length else b""

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`, less only where the slice ends."""
        view = memoryview(buffer).cast("B")
        length = min(len(view), max(0, self._size - offset))
        return self.inner.pread_into(view[:length], self._in_file("read", offset)) if length else 0

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range as (start, length, is data) rows; behind the end of the slice is a hole."""
        inside = min(length, max(0, self._size - offset))
        if inside:
            for start, run, is_data in self.inner.data_ranges(self._offset + offset, inside):
                yield start - self._offset, run, is_data
        if inside < length:
            yield offset + inside, length - inside, False

    def close(self) -> None:
        """Close the storage below."""
        self.inner.close()

    def _in_file(self, action: str, offset: int) -> int:
        """An offset of the slice in the file below."""
        if offset < 0:  # it would be a place in front of the slice
            raise StorageError(self.name, action, OSError(errno.EINVAL, os.strerror(errno.EINVAL)))
        return self._offset + offset


class RawImage(ReadableImage):
    """A raw image.

    Its size is that of the file, rounded up to a sector as QEMU does; what lies behind the end of the file reads as
    zeroes.

    Args:
        storage: the file; closed with the image.
        format: name of the driver that shows the file so, which is "raw" or that of the file's own.
    """

    cluster_size = SECTOR_SIZE

    def __init__(self, storage: ReadStorage, format: str = "raw") -> None:
        super().__init__()
        self.storage = storage
        self.format = format
        self._size = -(-storage.size() // SECTOR_SIZE) * SECTOR_SIZE
        self._host_base = storage.host_base if isinstance(storage, StorageWindow) else 0

    @property
    def size(self) -> int:
        """Size of the virtual disk in bytes."""
        return self._size

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.storage.name

    @property
    def snapshots(self) -> list[SnapshotEntry]:
        """None: the format has no snapshots."""
        return []

    @property
    def bitmaps(self) -> list[BitmapEntry]:
        """None: the format has no bitmaps."""
        return []

    def open_snapshot(self, id_or_name: str) -> NoReturn:
        """Raise `NoSuchSnapshot`: the format has no snapshots."""
        raise NoSuchSnapshot(f"Can't find snapshot '{id_or_name}': a raw image has none")

    @property
    def data_storage(self) -> ReadStorage:
        """The file that the host offsets of the extents count in."""
        return self.storage

    def layer_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """Data and holes of the host file; the host offset counts in the file itself, also for a slice."""
        base = self._host_base
        rows = self.storage.data_ranges(offset, length)
        while batch := list(islice(rows, _ROWS_PER_TABLE)):
            yield ExtentTable.from_rows(
                (start, run, _DATA, base + start, run, 0) if is_data else (start, run, _ZERO, base + start, 0, 0)
                for start, run, is_data in batch
            )

    def read_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """One row of data: the host's own holes are read as fast as they are found."""
        yield ExtentTable.from_rows([(offset, length, _DATA, self._host_base + offset, length, 0)])

    def lookup(self, offset: int) -> tuple[int, int, int]:
        """All is data up to the end of the disk."""
        return _DATA, self._host_base + offset, self._size - offset

    def read_data(self, guest: int, host: int, view: memoryview) -> None:  # noqa: ARG002 - the guest offset says it
        """Fill `view`; zeroes behind the end of the file."""
        done = self.storage.pread_into(view, guest)
        if done < len(view):
            zero_fill(view[done:])

    def read_compressed(self, guest: int, host: int, host_length: int, view: memoryview) -> None:
        """Never needed: a raw image has no compressed rows."""
        raise OutOfRange(f"no compressed data at {guest} ({host}, {host_length}, {len(view)})")

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill the whole buffer from `offset`; returns its length."""
        view = memoryview(buffer).cast("B")
        self._require_inside(offset, len(view))
        self.read_data(offset, offset, view)
        return len(view)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`."""
        self._require_inside(offset, length)
        try:
            return self.storage.pread(length, offset).ljust(length, b"\0")
        except (MemoryError, OverflowError):
            raise OutOfRange(f"{length} bytes do not fit into memory") from None

    def close(self) -> None:
        """Close the file."""
        super().close()
        self.storage.close()


class WritableRawImage(RawImage):
    """A raw image that can be written.

    Args:
        storage: the file; closed with the image.
    """

    writable = True
    storage: Storage

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data).cast("B")
        self._require_inside(offset, len(view))
        self.storage.pwrite(view, offset)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes."""
        self._require_inside(offset, length)
        self.storage.write_zeroes(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Give the space of the range back; it then reads as zeroes where the host can do it."""
        self._require_inside(offset, length)
        self.storage.discard(offset, length)

    def resize(self, size: int, preallocation: str = "off") -> None:
        """Give the file another length; new bytes read as zeroes.

        Args:
            size: of the disk in bytes.
            preallocation: "off", or "falloc" or "full" to reserve space for new bytes.

        Raises:
            OptionError: a block device, or a mode that is not possible.
            StorageError: the host file failed; it has its old length.
        """
        if preallocation == "metadata":
            raise OptionError("Unsupported preallocation mode: metadata")
        old = self.storage.size()
        if getattr(self.storage, "is_block_device", False):
            if preallocation != "off":
                raise OptionError(f"Preallocation mode '{preallocation}' unsupported for this non-regular file")
            if size != old:
                raise OptionError("Cannot resize device files")
            return
        try:
            if size > old:
                lengthen(self.storage, old, size, preallocation)
            else:
                self.storage.truncate(size)
            self.storage.flush()
        except StorageError:
            with suppress(StorageError):
                if self.storage.size() > old:
                    self.storage.truncate(old)
            raise
        self._size = -(-size // SECTOR_SIZE) * SECTOR_SIZE

    def flush(self) -> None:
        """Barrier: everything written before is durable when it returns."""
        self.storage.flush()
