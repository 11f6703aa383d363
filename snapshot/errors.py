"""The errors of domain snapshots; only these and `qcowlib.QcowError` leave the package.

DomainSnapshotError
 ├── NotPossible       a request that cannot be carried out; `reasons` names everything that is against it
 ├── NoSuchDomainSnapshot
 ├── QmpError          QEMU refused a command, or a job of its failed
 ├── QmpTimeout        QEMU did not answer in time; what it did is not known
 ├── QemuLost          the connection to QEMU ended: it has died or was shut down
 ├── SocketTaken       another client holds the QMP socket
 ├── DomainBusy        another domsnap works on the domain
 ├── Interrupted       a signal asked to stop; everything was undone
 ├── RecoverNeeded     an earlier operation was cut off; `domsnap recover` comes first
 ├── CatalogError      a catalog that cannot be read, or a snapshot that it cannot hold
 ├── SourceError       a description of a domain that cannot be read
 ├── MemoryFileError   a memory file or vm state that is not the migration stream it should be
 └── UndoFailed        an operation failed and could not be undone wholly; its journal is kept for `recover`
"""

from __future__ import annotations

from collections.abc import Sequence


class DomainSnapshotError(Exception):
    """Base of all errors about domains and their snapshots."""


class NotPossible(DomainSnapshotError):
    """Nothing was touched: the request cannot be carried out.

    Args:
        what: what was asked for ("create snapshot 's1'").
        reasons: all that is against it.
    """

    def __init__(self, what: str, reasons: Sequence[str]) -> None:
        self.what = what
        self.reasons = tuple(reasons)
        super().__init__(f"cannot {what}: " + "; ".join(self.reasons))


class NoSuchDomainSnapshot(DomainSnapshotError):
    """The catalog has no snapshot of that name."""


class QmpError(DomainSnapshotError):
    """QEMU refused a command, or a job that it started ended with an error.

    Args:
        command: the QMP command.
        text: QEMU's description.
        error_class: QEMU's error class; nearly always "GenericError".
    """

    def __init__(self, command: str, text: str, error_class: str = "GenericError") -> None:
        self.command = command
        self.text = text
        self.error_class = error_class
        super().__init__(f"QEMU refused {command}: {text}")


class QmpTimeout(DomainSnapshotError):
    """QEMU did not answer in time, so that it is not known what it did."""


class QemuLost(DomainSnapshotError):
    """The connection to QEMU ended."""


class SocketTaken(DomainSnapshotError):
    """Another client holds the QMP socket, which serves one at a time."""


class DomainBusy(DomainSnapshotError):
    """Another domsnap works on the same domain."""


class Interrupted(DomainSnapshotError):
    """A signal asked to stop."""


class RecoverNeeded(DomainSnapshotError):
    """An earlier operation was cut off and has to be undone or finished first."""


class CatalogError(DomainSnapshotError):
    """The catalog cannot be read, or cannot hold a snapshot."""


class SourceError(DomainSnapshotError):
    """A domain file, libvirt XML or xl.cfg that cannot be read, or does not say what is needed."""


class MemoryFileError(DomainSnapshotError):
    """A memory file or vm state is not the migration stream that it should be."""


class UndoFailed(DomainSnapshotError):
    """An operation failed, and part of it could not be undone.

    Args:
        cause: why the operation failed.
        failures: what could not be undone, and why.
    """

    def __init__(self, cause: BaseException, failures: Sequence[str]) -> None:
        self.failures = tuple(failures)
        super().__init__(
            f"{cause}; and this could not be undone: {'; '.join(self.failures)}. Its journal is kept: run recover"
        )
