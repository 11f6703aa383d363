"""QEMU's image locks, so that a guest and this library keep out of each other's images.

A user of an image says by byte-range locks what it does (byte 100 + p: "I use permission p") and what it cannot bear
others to do (byte 200 + p: "nobody else may use p"). All locks are read locks of one byte on the open file
description, so any number of users can place them; conflicts are found by testing the opposite byte.

    use           uses                          does not share
    WRITE         consistent read, write,       write, resize
                  resize
    READ          consistent read               write, resize
    FORCE_SHARE   consistent read               nothing

READ is also what QEMU holds on every backing file of a chain, WRITE what it holds on a guest's qcow2 disk.

Source: QEMU 7.2, observed with /proc/locks; the bytes are the interface between QEMU processes.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from enum import Enum, IntEnum

from qcowlib.errors import ImageLocked, StorageError

if sys.platform == "linux":
    import fcntl

USED_BASE = 100
UNSHARED_BASE = 200

# struct flock with 64-bit offsets: type, whence, start, length, pid, padded to its alignment.
_FLOCK = struct.Struct("hhqqi0q")


class Permission(IntEnum):
    """What a user of an image may do; the number is the offset from the two base bytes."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3

    @property
    def label(self) -> str:
        """QEMU's name of the permission, as its messages have it."""
        return self.name.lower().replace("_", " ")


class Use(Enum):
    """How an image is used: the permissions used, and those not shared with others."""

    READ = ((Permission.CONSISTENT_READ,), (Permission.WRITE, Permission.RESIZE))
    WRITE = (
        (Permission.CONSISTENT_READ, Permission.WRITE, Permission.RESIZE),
        (Permission.WRITE, Permission.RESIZE),
    )
    FORCE_SHARE = ((Permission.CONSISTENT_READ,), ())

    def __init__(self, used: tuple[Permission, ...], unshared: tuple[Permission, ...]) -> None:
        self.used = used
        self.unshared = unshared

    @property
    def lock_bytes(self) -> tuple[int, ...]:
        """Offsets of the bytes that say so."""
        return (*(USED_BASE + p for p in self.used), *(UNSHARED_BASE + p for p in self.unshared))


class ImageLock:
    """The lock bytes that one open file description holds; made by `take`."""

    def __init__(self, descriptor: int, held: tuple[int, ...]) -> None:
        self._descriptor = descriptor
        self._held = held

    @classmethod
    def take(cls, descriptor: int, name: str, use: Use) -> ImageLock:
        """Lock an image for a use, or raise with nothing held.

        The bytes are placed first and the opposite bytes tested afterwards: of two that come at the same time at
        least one sees the other.

        Args:
            descriptor: open for reading at least.
            name: name of the file, for messages.
            use: what is going to be done.

        Raises:
            ImageLocked: somebody else's use excludes this one.
            StorageError: the host cannot lock. Where the platform has no such locks at all, only writing is refused.
        """
        if not _supported(descriptor):
            if use is Use.WRITE:
                raise StorageError(name, "lock", OSError(errno.ENOTSUP, "no open-file-description locks here"))
            return cls(descriptor, ())
        lock = cls(descriptor, use.lock_bytes)
        try:
            for byte in lock._held:
                _place(descriptor, name, byte)
            _test(descriptor, name, use)
        except BaseException:
            lock.release()
            raise
        return lock

    def release(self) -> None:
        """Give the bytes back. Closing the last descriptor of the file description does so too."""
        held, self._held = self._held, ()
        for byte in held:
            try:
                _set_lock(self._descriptor, byte, shared=False)
            except OSError:
                # Only a vanished descriptor or a network file system can refuse; closing releases then.
                continue


def _place(descriptor: int, name: str, byte: int) -> None:
    try:
        _set_lock(descriptor, byte, shared=True)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # a write lock, which no QEMU takes
            raise ImageLocked(name, f"byte {byte}") from error
        raise StorageError(name, "lock", error) from error


def _test(descriptor: int, name: str, use: Use) -> None:
    """Raise when another holder does not share what we use, or uses what we do not share."""
    try:
        for permission in use.used:
            if _held_by_others(descriptor, UNSHARED_BASE + permission):
                raise ImageLocked(name, f'"{permission.label}"')
        for permission in use.unshared:
            if _held_by_others(descriptor, USED_BASE + permission):
                raise ImageLocked(name, f'shared "{permission.label}"')
    except OSError as error:
        raise StorageError(name, "lock", error) from error


def _supported(descriptor: int) -> bool:
    """Whether this is Linux with open-file-description locks (3.15; some emulations lack them)."""
    try:
        _held_by_others(descriptor, USED_BASE)
    except OSError as error:
        return error.errno != errno.EINVAL
    return sys.platform == "linux"


def _set_lock(descriptor: int, byte: int, *, shared: bool) -> None:
    if sys.platform == "linux":
        kind = fcntl.F_RDLCK if shared else fcntl.F_UNLCK
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_others(descriptor: int, byte: int) -> bool:
    if sys.platform == "linux":
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK
    else:
        return False
