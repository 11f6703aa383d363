"""What a source says about a domain, whatever its format."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from snapshot.errors import SourceError
from snapshot.model import Disk

_PLACEHOLDER = re.compile(r"\{((?:disk|format):[^{}]*)\}")


@dataclass(frozen=True)
class DomainDescription:
    """What a source says about a domain.

    Attributes:
        name: of the domain.
        disks: in the order of the source, with absolute paths.
        qmp_socket: absolute path of the QMP socket; None when the source names none.
        command: what starts the domain: arguments with the placeholders {qmp}, {incoming}, {disk:TARGET} and
            {format:TARGET}; empty when the source names none.
        agent_socket: absolute path of the guest agent's socket.
        path: absolute path of the source.
        xml: libvirt's XML of the domain, when that is the source.
    """

    name: str
    disks: tuple[Disk, ...]
    qmp_socket: str | None = None
    command: tuple[str, ...] = ()
    agent_socket: str | None = None
    path: str | None = None
    xml: bytes | None = None

    @property
    def folder(self) -> str | None:
        """The directory that relative names in the command are relative to."""
        return None if self.path is None else os.path.dirname(self.path)


def checked(description: DomainDescription) -> DomainDescription:
    """The description itself; SourceError when it cannot be of a domain."""
    if not description.name:
        raise SourceError("the domain has no name")
    if not description.disks and description.qmp_socket is None:
        raise SourceError("the domain has neither disks nor a QMP socket")
    targets: set[str] = set()
    paths: dict[str, str] = {}
    for disk in description.disks:
        if disk.target in targets:
            raise SourceError(f"two disks are called {disk.target}")
        targets.add(disk.target)
        if "\0" in disk.path or not os.path.isabs(disk.path):
            raise SourceError(f"disk {disk.target}: '{disk.path}' is not an absolute path")
        if disk.path in paths:
            raise SourceError(f"disks {paths[disk.path]} and {disk.target} are one file, {disk.path}")
        paths[disk.path] = disk.target
    for word in description.command:
        for placeholder in _PLACEHOLDER.findall(word):
            if placeholder.partition(":")[2] not in targets:
                raise SourceError(f"command: {{{placeholder}}} names no disk of the domain")
    return description
