"""What the actions of one operation share: the connection, the files held, the way to be interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol, TypeVar

import qcowlib
from snapshot.domain import DomainFacts, alive
from snapshot.errors import Interrupted, QemuLost
from snapshot.journal import Journal
from snapshot.model import DomainSnapshot
from snapshot.qmp import Qmp

_Image = TypeVar("_Image", bound=qcowlib.BlockImage)

#: Called with what is being done, how much of it, and of how much.
Progress = Callable[[str, int, int], None]


class Store(Protocol):
    """The catalog as the engine uses it; every change is atomic."""

    @property
    def directory(self) -> str | os.PathLike[str]:
        """The domain's snapshot directory."""
        ...

    @property
    def current(self) -> str | None:
        """Name of the snapshot that the domain's present state comes from."""
        ...

    def load(self) -> list[DomainSnapshot]:
        """All snapshots."""
        ...

    def add(self, snapshot: DomainSnapshot, *, make_current: bool = True) -> None:
        """Enter a snapshot."""
        ...

    def remove(self, name: str) -> None:
        """Take a snapshot out."""
        ...

    def set_current(self, name: str | None) -> None:
        """Say which snapshot is current."""
        ...

    def replace(self, snapshot: DomainSnapshot) -> None:
        """Change a snapshot of the same name."""
        ...


class Interrupt:
    """SIGINT and SIGTERM as a request that is looked at between steps and while waiting."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.deaf = False

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come, unless what is done now has to be done to its end."""
        if self.signal is not None and not self.deaf:
            raise Interrupted(f"interrupted by {signal.Signals(self.signal).name}")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the two signals; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _frame: FrameType | None) -> None:
            self.signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Session:
    """One operation on one domain.

    Args:
        qmp: connection to QEMU; None for an inactive domain.
        store: the catalog.
        journal: of the domain.
        facts: of the domain before the operation; None when recovering.
        was_running: whether the guest ran before.
        agent_socket: of the guest agent.
        progress: called with each step and with the progress of jobs.
    """

    def __init__(
        self,
        qmp: Qmp | None,
        store: Store,
        journal: Journal,
        *,
        facts: DomainFacts | None = None,
        was_running: bool = False,
        agent_socket: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.qmp_or_none = qmp
        self.store = store
        self.journal = journal
        self.facts = facts
        self.was_running = was_running
        self.agent_socket = agent_socket
        self.progress = progress
        self.interrupt = Interrupt()
        self.draft: DomainSnapshot | None = None
        self.instant = 0  # when the disks were switched, nanoseconds since 1970
        self.continued = facts is None  # a live migration was told to go on; when recovering, it may have been
        self.held = contextlib.ExitStack()
        self.images: dict[str, qcowlib.BlockImage] = {}
        self.foreign: set[str] = set()  # files that stood where ours were to be made: never removed
        self.started: subprocess.Popen[bytes] | None = None
        self.previous_qmp: Qmp | None = None
        self.parted = False  # a running QEMU has let go of its disks, and they may hold what its guest does not know
        self._lost = False

    @property
    def qmp(self) -> Qmp:
        """The connection.

        Raises:
            QemuLost: the domain is not active.
        """
        if self.qmp_or_none is None:
            raise QemuLost("the domain is not active")
        return self.qmp_or_none

    def alive(self) -> bool:
        """Whether there is a QEMU that answers; a connection that broke is made anew, once QEMU is gone it stays so."""
        if self._lost or self.qmp_or_none is None:
            return False
        if alive(self.qmp_or_none):
            return True
        try:
            self.qmp_or_none = Qmp(self.qmp_or_none.path)
            self.held.callback(self.qmp_or_none.close)
        except QemuLost:
            self._lost = True
        return not self._lost

    def replace_qmp(self, qmp: Qmp) -> None:
        """Go on with another QEMU; the connection to the old one is kept."""
        self.previous_qmp, self.qmp_or_none = self.qmp_or_none, qmp
        self._lost = False

    def restore_qmp(self) -> None:
        """Go back to the QEMU before, if there was one."""
        if self.previous_qmp is not None:
            self.qmp_or_none, self.previous_qmp = self.previous_qmp, None

    def rename_qmp(self, path: str) -> None:
        """The socket of the present QEMU has got another name."""
        if self.qmp_or_none is not None:
            self.qmp_or_none.path = path

    def report(self, what: str, done: int, total: int) -> None:
        """Tell the caller how far it is."""
        if self.progress is not None:
            self.progress(what, done, total)

    def release(self) -> None:
        """Close the images that are held."""
        self.images.clear()
        self.held.close()


@contextlib.contextmanager
def unlocked(open_it: Callable[[], _Image], wait: float = 20.0) -> Iterator[_Image]:
    """An image whose last user is just going away: try until its locks are free."""
    end = time.monotonic() + wait
    while True:
        try:
            image = open_it()
            break
        except qcowlib.ImageLocked:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    with image:
        yield image
