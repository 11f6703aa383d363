"""Copies that the host does by itself: from file to file without passing through this process.

On file systems that share blocks (btrfs, XFS) nothing is copied at all. Where data does not lie as it is in both files,
or the host refuses (two file systems, an old kernel), the answer is no, and the caller copies.

Source: Linux's copy_file_range.
"""

from __future__ import annotations

import errno
import os
import sys

from qcowlib.errors import StorageError
from qcowlib.image.raw import StorageWindow, WritableRawImage
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.copy_source import CopySource, HostRow
from qcowlib.storage.local import LocalFile
from qcowlib.storage.protocol import ReadStorage, Storage

_IMPOSSIBLE = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ETXTBSY, errno.EPERM})


class HostCopy:
    """Copies into one target.

    Args:
        target: a raw image, or a qcow2 image whose clusters are not encrypted.
    """

    def __init__(self, target: WritableQcow2Image | WritableRawImage) -> None:
        self._target = target
        storage: Storage | None = None
        if isinstance(target, WritableRawImage):
            storage = target.storage
        elif target.cipher is None:
            storage = target.transaction.data_storage
        self._file = storage if isinstance(storage, LocalFile) else None

    def copy(self, source: CopySource, start: int, end: int, offset: int) -> bool:
        """Copy a range of the source to an offset of the target.

        Returns: whether it was done; if not, a part of the target's range may have been copied.

        Raises:
            QcowError: a file could not be read or written.
        """
        if self._file is None or sys.platform != "linux":
            return False
        rows = source.host_rows(start, end)
        if rows is None or not all(row.storage is None or host_file(row.storage) is not None for row in rows):
            return False
        places: list[tuple[int, int, int]] | None = [(offset, offset, end - start)]
        if isinstance(self._target, WritableQcow2Image):
            places = self._target.place(offset, end - start)
        if places is None:
            return False
        done = all(
            self._copy_row(row, row.start - start + offset, guest, host, length)
            for guest, host, length in places
            for row in rows
        )
        if not done and isinstance(self._target, WritableQcow2Image):
            for _, host, length in places:  # they are the image's now, and what was there before is nobody's
                self._file.write_zeroes(host, length)
        return done

    def _copy_row(self, row: HostRow, at: int, guest: int, host: int, length: int) -> bool:
        """Copy the part of a row, which belongs to guest offset `at`, that lies in one run of the target's clusters."""
        low, high = max(at, guest), min(at + row.length, guest + length)
        if low >= high:
            return True
        assert self._file is not None
        to, left = host + low - guest, high - low
        file = None if row.storage is None else host_file(row.storage)
        if file is not None:
            done = _copy_range(file, self._file, row.host + low - at, to, left)
            if done is None:
                return False
            to, left = to + done, left - done
        self._file.write_zeroes(to, left)  # what reads as zeroes, and what lies behind the end of the source's file
        return True


def host_file(storage: ReadStorage) -> LocalFile | None:
    """The file in which host offsets count; None when it is no local one."""
    while isinstance(storage, StorageWindow):
        storage = storage.inner
    return storage if isinstance(storage, LocalFile) else None


def _copy_range(source: LocalFile, target: LocalFile, start: int, to: int, length: int) -> int | None:
    """Bytes copied, fewer where the source's file ends; None where the host cannot copy."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), length - done, start + done, to + done)
        except OSError as error:
            if error.errno in _IMPOSSIBLE:
                return None
            raise StorageError(target.name, "write", error) from error
        if not count:
            break
        done += count
    return done
