"""The host files that a creation fills: made or emptied under a lock, and taken away again when it fails.

missing file    made; removed again on failure
existing file   locked, then room for the new content is made sure of while the old content is whole, then emptied
block device    locked and written in place
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from qcowlib.errors import OptionError, QcowError, StorageError
from qcowlib.storage.local import LocalFile, open_local
from qcowlib.storage.nocow import set_nocow
from qcowlib.storage.protocol import Storage

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_CHUNK = 1 << 20
# QEMU writes the first block of an empty file that it lengthens, which helps others to find the file's alignment.
_FIRST_BLOCK = 4096


@contextmanager
def fresh_file(path: str, *, space: int, nocow: bool = False) -> Iterator[LocalFile]:
    """An empty, locked file to write into and to flush; removed if the body fails and it is ours.

    Args:
        path: its name.
        space: host bytes that will be written; an existing file is only emptied if they will find room.
        nocow: turn copy-on-write of the host's file system off.

    Raises:
        StorageError: it cannot be made, opened or emptied.
        ImageLocked: somebody else uses it.
    """
    made = _make(path)
    emptied = False
    try:
        with _open(path) as storage:
            if not made:
                _make_sure_of_space(storage, space)
            if not storage.is_block_device:
                storage.truncate(0)
                emptied = not made
            if nocow:
                set_nocow(storage.fileno())
            yield storage
    except BaseException as error:
        if made is not None:
            _remove(made)
        elif emptied and isinstance(error, QcowError):
            error.add_note(f"'{path}' existed before and has lost its content")
        raise


def lengthen(storage: Storage, start: int, end: int, preallocation: str) -> None:
    """Make the file at least `end` bytes long; its bytes from `start` on are new and read as zeroes.

    Args:
        storage: a file whose present end is at or before `start`, or a block device.
        start: where the preallocated range starts.
        end: where it ends; the new length.
        preallocation: "off" leaves a hole, "falloc" reserves space, "full" writes zeroes.
    """
    if getattr(storage, "is_block_device", False):
        fit_device(storage, end, preallocation)
        return
    first = storage.size() == 0 and end > 0
    if preallocation == "falloc":
        storage.allocate(start, end - start)
    else:
        storage.truncate(end)
    if preallocation == "full":
        zeroes = bytes(_FULL_CHUNK)
        for position in range(start, end, _FULL_CHUNK):
            storage.pwrite(memoryview(zeroes)[: end - position], position)
    elif first:
        storage.pwrite(bytes(_FIRST_BLOCK if end >= _FIRST_BLOCK else 512), 0)


def fit_device(storage: Storage, end: int, preallocation: str) -> None:
    """See that `end` bytes fit on a block device, whose length is fixed and whose space is all there.

    Raises:
        OptionError: they do not, or space was to be reserved.
    """
    if preallocation not in ("off", "metadata"):
        raise OptionError(f"Preallocation mode '{preallocation}' unsupported for this non-regular file")
    if end > storage.size():
        raise OptionError(
            f"Cannot grow device files ({end} bytes are needed, '{storage.name}' has {storage.size()})",
            stock="Cannot grow device files",
        )


def same_file(first: str, second: str) -> bool:
    """Whether two names stand for one file, existing or not."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)


def _make(path: str) -> str | None:
    """Make the file, exclusively; returns its real path, None when something is there already."""
    try:
        target = os.path.realpath(path)
        os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644))
    except FileExistsError:
        return None
    except OSError as error:
        raise StorageError(path, "create", error) from error
    except ValueError as error:  # a NUL byte or a lone surrogate in the name
        raise StorageError(path, "create", OSError(errno.EINVAL, str(error))) from error
    return target


def _open(path: str) -> LocalFile:
    try:
        return open_local(path, writable=True)
    except StorageError as error:
        raise StorageError(path, "create", error.cause) from error


def _make_sure_of_space(storage: LocalFile, space: int) -> None:
    """Fail while the old content is whole if the new one would not fit beside what emptying gives back."""
    if storage.is_block_device:
        return
    size = storage.size()
    lacking = space - storage.allocated_size()
    if lacking <= 0:
        return
    try:
        storage.allocate(size, lacking)
    except StorageError as error:
        storage.truncate(size)
        if error.cause.errno in _NO_SPACE:
            raise


def _remove(path: str) -> None:
    """Take away a file that we made, as far as it is still one."""
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):
            os.unlink(path)
    except OSError:
        pass  # the error that led here says more
