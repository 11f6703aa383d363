"""The host's positional and space calls under one name on every platform.

Linux has all of them. macOS lacks fallocate, Windows lacks positional I/O and holes: what is missing there is
replaced where reading needs it, and reported as "not supported" where only writing does.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable

_MAX_OFFSET = (1 << 63) - 1
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# The file system, the device or the kernel does not know the call for this range. EINVAL: an unaligned range of a
# block device.
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY})

if sys.platform == "win32":
    _cursor = threading.Lock()

    def pread(fd: int, length: int, offset: int, /) -> bytes:
        """Positional read through the one cursor that Windows has."""
        with _cursor:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.read(fd, length)

    def pwrite(fd: int, data: bytes | memoryview, offset: int, /) -> int:
        """Positional write through the one cursor that Windows has."""
        with _cursor:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, data)
else:
    pread = os.pread
    pwrite = os.pwrite

if sys.platform != "win32" and hasattr(os, "preadv"):

    def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
        """Positional read into a buffer, without a copy."""
        if offset < 0:  # preadv2, which Python calls, takes -1 as the current position
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.preadv(fd, [buffer], offset)
else:

    def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
        """Positional read into a buffer, through a copy."""
        data = pread(fd, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)


def opened_for_writing(fd: int) -> bool:
    """Whether a descriptor can be written; True where the platform does not say."""
    if sys.platform == "win32":
        return True
    else:
        import fcntl

        return fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR) != 0


def next_data(fd: int, position: int, end: int) -> tuple[int, int]:
    """The next data range at or behind `position` as (start, end), both clipped to `end`; all is data if unknown."""
    if sys.platform == "win32":
        return position, end
    else:
        try:
            data = min(os.lseek(fd, position, os.SEEK_DATA), end)
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end) if data < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                return end, end
            if error.errno in _UNSUPPORTED:
                return position, end
            raise
        return data, hole


def zero_range(fd: int, offset: int, length: int) -> bool:
    """Zero a range and keep its space; False where the host cannot."""
    return _fallocate(fd, FALLOC_FL_ZERO_RANGE, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the space of a range back; False where the host cannot."""
    return _fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve space; raises OSError where the host cannot."""
    if not hasattr(os, "posix_fallocate"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    os.posix_fallocate(fd, offset, length)


def sync(fd: int) -> None:
    """Wait until all data written so far is on stable storage."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


_libc_fallocate: Callable[[int, int, int, int], int] | None = None


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Linux's fallocate; False where the host does not support it, OSError on other failures."""
    if sys.platform == "linux":
        import ctypes

        if offset + length > _MAX_OFFSET:  # ctypes would cut it off without a word
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        call = _libc_fallocate or _load_fallocate()
        while call(fd, mode, offset, length) != 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code in _UNSUPPORTED:
                return False
            raise OSError(code, os.strerror(code))
        return True
    else:
        return False


def _load_fallocate() -> Callable[[int, int, int, int], int]:
    """The C library's function: Python's os module has only the call without flags."""
    import ctypes

    global _libc_fallocate  # noqa: PLW0603 - ctypes costs start-up time, so it is loaded at the first use
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or library.fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int
    _libc_fallocate = function
    return _libc_fallocate
