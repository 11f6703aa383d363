"""The name of a file that is being filled: TARGET.qcow-incomplete until it is done.

    missing target    made under that name; renamed when it is done, removed when that fails
    existing file     locked, then given that name; its own again at the end, empty when that fails
    anything else     (a block device, a name that cannot be changed) filled in place

A process that is killed leaves no image under the target's name: a raw image that is only half there looks like a whole
one to whoever finds it.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from qcowlib.errors import StorageError
from qcowlib.storage.local import open_local

UNFINISHED = ".qcow-incomplete"
"""What is put behind the name of a file that is being filled."""

_LONGEST_NAME = 255


class UnfinishedFile:
    """A file to be made or replaced. `finish`, `restore` or `give_up` ends it.

    Args:
        path: the name that it will have.

    Attributes:
        name: where to make and to fill it.

    Raises:
        ImageLocked: somebody uses the target, or is filling one of this name.
        StorageError: an existing target cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._final = os.path.realpath(path) if os.path.islink(path) else path
        self._existed = os.path.lexists(self._final)
        self.name = path
        self._before = self._state()
        if self._set_aside():
            self.name = self._final + UNFINISHED

    @property
    def untouched(self) -> bool:
        """Whether what was there before still is."""
        return self._existed and self._state() == self._before

    def finish(self, *, durable: bool) -> None:
        """Give the file its name.

        Args:
            durable: the name survives a power cut.

        Raises:
            StorageError: the host does not allow it; the file stays where it is.
        """
        if self.name == self._path:
            return
        try:
            os.replace(self.name, self._final)
            if durable:
                _sync_directory(self._final)
        except OSError as error:
            raise StorageError(self._path, "create", error) from error

    def restore(self) -> None:
        """It could not be made: what was there before has its name again, and anything else is removed."""
        with suppress(OSError):
            if not self._existed:
                os.unlink(self.name)
            elif self.name != self._path:
                os.replace(self.name, self._final)

    def give_up(self, error: BaseException) -> None:
        """It could not be filled: remove it, or empty what existed before, and say so in the error."""
        told = "is incomplete" if self._existed else "was not made"
        if self._existed and self.name != self._path:
            with suppress(OSError):
                os.truncate(self.name, 0)
                told = "existed before and has lost its content"
        error.add_note(f"'{self._path}' {told}")
        self.restore()

    def _state(self) -> tuple[int, int] | None:
        with suppress(OSError, ValueError):
            status = os.stat(self.name)
            return status.st_size, status.st_mtime_ns
        return None

    def _set_aside(self) -> bool:
        """Make sure of the other name, and let an existing target have it; False: it is written in place."""
        name = self._final + UNFINISHED
        if len(os.fsencode(os.path.basename(name))) > _LONGEST_NAME or os.path.islink(name):
            return False
        try:
            if os.path.lexists(name):
                open_local(name, writable=True).close()  # left by a process that was killed, or being filled
            if not self._existed:
                return True
            if not stat.S_ISREG(os.stat(self._final).st_mode) or not os.path.samefile(self._path, self._final):
                return False
            with open_local(self._path, writable=True):
                os.rename(self._final, name)
        except (OSError, ValueError):
            return False
        return True


def _sync_directory(path: str) -> None:
    """Make the names in a file's directory durable."""
    if os.name != "posix":
        return
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
