"""Local files and block devices: positional I/O on a descriptor, under QEMU's image locks.

    open_local(path) -> open without blocking -> regular file or block device? -> lock -> LocalFile

Source: the observed behaviour of QEMU 7.2's "file" and "host_device" drivers.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from qcowlib.errors import StorageError
from qcowlib.storage import hostcalls
from qcowlib.storage.locking import ImageLock, Use
from qcowlib.storage.protocol import Buffer

PathName = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# O_NONBLOCK: opening a FIFO must return at once, so that it can be refused. It has no effect on files and disks.
_OPEN_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_pread = hostcalls.pread  # one look-up less on the path of random reads
_ZERO_CHUNK = 1 << 20
# A length above this is clipped to the file before a buffer of that length is allocated.
_LARGE_READ = 1 << 24


class LocalFile:
    """A regular file or block device as a `Storage`; made by `open_local` and `from_descriptor`.

    Threads may share it, but `close` must come after the last call of the others.

    Attributes:
        writable: whether it was opened for writing.
        name: path of the file, for messages.
        durable: `flush` waits for the disk; False where nothing needs to survive a crash of the host.
        is_block_device: whether its length is fixed by a device.
    """

    def __init__(self, descriptor: int, name: str, *, writable: bool) -> None:
        self.writable = writable
        self.name = name
        self.durable = True
        self._fd = descriptor
        self.is_block_device = stat.S_ISBLK(os.fstat(descriptor).st_mode)
        self._flush_error: OSError | None = None
        self._lock: ImageLock | None = None

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor; -1 after `close`."""
        return self._fd

    def size(self) -> int:
        """Current length in bytes."""
        try:
            if self.is_block_device:
                return os.lseek(self._fd, 0, os.SEEK_END)
            return os.fstat(self._fd).st_size
        except OSError as error:
            raise StorageError(self.name, "get the size of", error) from error

    def allocated_size(self) -> int:
        """Bytes that the file occupies on the host (`st_blocks`); its size where the host does not say."""
        try:
            blocks: int = getattr(os.fstat(self._fd), "st_blocks", -1)
        except OSError as error:
            raise StorageError(self.name, "get the size of", error) from error
        return blocks * 512 if blocks >= 0 and not self.is_block_device else self.size()

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only where the file ends."""
        if length > _LARGE_READ:
            length = min(length, max(0, self.size() - offset))
        try:
            data = _pread(self._fd, length, offset)
            if len(data) == length:
                return data
            return self._read_rest(data, length, offset)
        except (OSError, OverflowError) as error:
            raise StorageError(self.name, "read", _as_oserror(error)) from error

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only where the file ends."""
        view = memoryview(buffer).cast("B")
        done = 0
        try:
            while done < len(view):
                count = hostcalls.pread_into(self._fd, view[done:], offset + done)
                if count == 0:
                    break
                done += count
        except (OSError, OverflowError) as error:
            raise StorageError(self.name, "read", _as_oserror(error)) from error
        return done

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range as (start, length, is data) rows, from the host's SEEK_DATA and SEEK_HOLE where it has them."""
        end = offset + length
        file_end = min(end, max(offset, self.size()))
        position = offset
        while position < file_end:
            data, hole = self._next_data(position, file_end)
            if data > position:
                yield position, data - position, False
            if hole > data:
                yield data, hole - data, True
            position = hole
        if file_end < end:
            yield file_end, end - file_end, False

    def lock(self, use: Use) -> None:
        """Take QEMU's image locks for a use; raises `ImageLocked`. `close` gives them back."""
        self._lock = ImageLock.take(self._fd, self.name, use)

    def close(self) -> None:
        """Release the locks and close the descriptor."""
        descriptor, self._fd = self._fd, -1
        if descriptor < 0:
            return
        if self._lock is not None:  # a duplicate of the descriptor may live on, and would keep the locks
            self._lock.release()
        try:
            os.close(descriptor)
        except OSError as error:
            raise StorageError(self.name, "close", error) from error

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`; the file grows where needed."""
        view = memoryview(data).cast("B")
        try:
            done = 0
            while done < len(view):
                count = hostcalls.pwrite(self._fd, view[done:] if done else view, offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "the host wrote nothing")
                done += count
        except (OSError, OverflowError) as error:
            raise StorageError(self.name, "write", _as_oserror(error)) from error

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes, its space kept: FALLOC_FL_ZERO_RANGE, else zero blocks in chunks of 1 MiB."""
        if length <= 0:
            return
        try:
            if hostcalls.zero_range(self._fd, offset, length):
                return
        except (OSError, OverflowError) as error:
            raise StorageError(self.name, "write", _as_oserror(error)) from error
        zeroes = bytes(min(length, _ZERO_CHUNK))
        for done in range(0, length, _ZERO_CHUNK):
            self.pwrite(memoryview(zeroes)[: length - done], offset + done)

    def discard(self, offset: int, length: int) -> None:
        """Give the space of the range back (FALLOC_FL_PUNCH_HOLE); does nothing where the host cannot."""
        if length <= 0:
            return
        try:
            hostcalls.punch_hole(self._fd, offset, length)
        except (OSError, OverflowError) as error:
            raise StorageError(self.name, "discard", _as_oserror(error)) from error

    def allocate(self, offset: int, length: int) -> None:
        """Reserve host space (posix_fallocate); the file grows where needed, what it reads as stays."""
        if length <= 0:
            return
        try:
            hostcalls.allocate(self._fd, offset, length)
        except (OSError, OverflowError) as error:
            raise StorageError(self.name, "allocate", _as_oserror(error)) from error

    def truncate(self, size: int) -> None:
        """Set the length in bytes; a block device keeps its own, any other length raises `StorageError`."""
        if self.is_block_device:
            if size != self.size():
                raise StorageError(self.name, "resize", OSError(errno.EINVAL, "a block device has a fixed size"))
            return
        try:
            os.ftruncate(self._fd, size)
        except (OSError, OverflowError) as error:
            raise StorageError(self.name, "resize", _as_oserror(error)) from error

    def flush(self) -> None:
        """Barrier (fdatasync). Once it failed it fails for good: the host may have dropped what it could not write."""
        try:
            if self._flush_error is None:
                if not self.durable:
                    return
                hostcalls.sync(self._fd)
                return
        except OSError as error:
            self._flush_error = error
        raise StorageError(self.name, "flush", self._flush_error) from self._flush_error

    def _read_rest(self, data: bytes, length: int, offset: int) -> bytes:
        """The host may return less than asked before the end: after a signal, or above 2 GiB."""
        parts = [data]
        done = len(data)
        while done < length:
            part = hostcalls.pread(self._fd, length - done, offset + done)
            if not part:
                break
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def _next_data(self, position: int, end: int) -> tuple[int, int]:
        """The next data range at or behind `position` as (start, end), clipped to `end`; all is data if unknown."""
        if self.is_block_device:
            return position, end
        try:
            data, hole = hostcalls.next_data(self._fd, position, end)
        except (OSError, OverflowError) as error:
            raise StorageError(self.name, "read the map of", _as_oserror(error)) from error
        # A file that shrinks or grows meanwhile must not stop the walk.
        return (data, hole) if position <= data <= hole and hole > position else (position, end)


def open_local(
    path: PathName,
    *,
    writable: bool = False,
    create: bool = False,
    force_share: bool = False,
    lock: bool = True,
) -> LocalFile:
    """Open a regular file or block device under QEMU's image locks.

    Args:
        path: name of the file.
        writable: open for reading and writing.
        create: make the file if it is missing, and empty it once the lock is held if it exists; implies `writable`.
        force_share: read although somebody writes (QEMU's `-U`); what is read may be torn.
        lock: False takes no locks at all; for a file that is no image, or locked otherwise.

    Raises:
        StorageError: it cannot be opened, or is a directory, FIFO, socket or character device.
        ImageLocked: another process (or another open in this one) excludes this use.
    """
    name = os.fsdecode(path)
    writable = writable or create
    flags = _OPEN_FLAGS | (os.O_RDWR if writable else os.O_RDONLY) | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        raise StorageError(name, "open", error) from error
    except ValueError as error:  # a NUL byte or a lone surrogate in the name
        raise StorageError(name, "open", OSError(errno.EINVAL, str(error))) from error
    try:
        file = _admit(descriptor, name, writable=writable)
        if lock:
            file.lock(Use.WRITE if writable else Use.FORCE_SHARE if force_share else Use.READ)
        if create and not file.is_block_device:
            file.truncate(0)
    except BaseException:
        os.close(descriptor)
        raise
    return file


def from_descriptor(
    descriptor: int, *, writable: bool = False, force_share: bool = False, lock: bool = True
) -> LocalFile:
    """A `LocalFile` over a duplicate of an open descriptor, which stays the caller's.

    The locks belong to both, and `close` takes them away from both; the position of the descriptor may change.
    Arguments and errors are those of `open_local`.
    """
    name = f"<descriptor {descriptor}>"
    try:
        duplicate = os.dup(descriptor)
    except (OSError, OverflowError) as error:
        raise StorageError(name, "open", _as_oserror(error)) from error
    try:
        if writable and not hostcalls.opened_for_writing(duplicate):
            raise StorageError(name, "write", OSError(errno.EBADF, "the descriptor is open for reading only"))
        file = _admit(duplicate, name, writable=writable)
        if lock:
            file.lock(Use.WRITE if writable else Use.FORCE_SHARE if force_share else Use.READ)
        return file
    except BaseException:
        os.close(duplicate)
        raise


def _admit(descriptor: int, name: str, *, writable: bool) -> LocalFile:
    """Refuse what is neither a file nor a disk."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError as error:
        raise StorageError(name, "open", error) from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise StorageError(name, "open", OSError(code, f"'file' driver requires '{name}' to be a regular file"))
    return LocalFile(descriptor, name, writable=writable)


def _as_oserror(error: OSError | OverflowError) -> OSError:
    """An offset that does not fit the host's file offsets is an invalid argument of the call."""
    return error if isinstance(error, OSError) else OSError(errno.EINVAL, os.strerror(errno.EINVAL))
