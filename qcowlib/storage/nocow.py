"""The file attribute that turns copy-on-write off where the host's file system has it (btrfs)."""

from __future__ import annotations

import sys

# Linux's ioctl numbers and flag. The argument is an int although the numbers are encoded with the size of a long.
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000


def set_nocow(descriptor: int) -> bool:
    """Set the attribute on an empty file; False where the host or its file system does not know it.

    Args:
        descriptor: an open descriptor of the file.

    Source: ioctl_iflags(2); as in QEMU, a failure is not an error, for the file is only slower without it.
    """
    if sys.platform != "linux":
        return False
    else:
        import array
        import fcntl

        flags = array.array("i", [0])
        try:
            fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
            flags[0] |= _FS_NOCOW_FL
            fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags)
        except OSError:
            return False
        return True
