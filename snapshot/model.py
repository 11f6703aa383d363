"""The values that domain snapshots are made of; no I/O.

The words are those of DESIGN.md: a domain is active (started) or inactive; a domain snapshot holds memory and disks at
one instant, a disk-only snapshot the disks alone; every disk is snapshotted internally, externally, or left out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum


class DiskMode(Enum):
    """How one disk takes part in a snapshot."""

    INTERNAL = "internal"  # in its qcow2 file
    EXTERNAL = "external"  # the file is frozen, changes go to an overlay
    NO = "no"  # left out


class MemoryMode(Enum):
    """Where the memory of the guest is kept."""

    NO = "no"
    INTERNAL = "internal"  # vm state in the qcow2 file of one disk
    EXTERNAL = "external"  # a file of its own


class Liveness(Enum):
    """What the guest does while its memory is written to a file."""

    PAUSED = "paused"  # stopped for the whole time
    LIVE = "live"  # runs; paused before the switchover
    BACKGROUND = "background"  # runs; pages are copied before the guest changes them


class Consistency(Enum):
    """What the disks of a snapshot are worth; recorded when it is taken, never guessed."""

    CHECKPOINT = "checkpoint"  # memory and disks of one instant
    CRASH_CONSISTENT = "crash-consistent"  # as after a power cut
    QUIESCED = "quiesced"  # file systems were frozen by the guest agent
    CLEAN = "clean"  # the domain was off


class DomainState(Enum):
    """State of the domain when the snapshot was taken, in libvirt's words."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shutoff"
    DISK_SNAPSHOT = "disk-snapshot"


@dataclass(frozen=True)
class Disk:
    """One disk of a domain.

    Attributes:
        target: its name in the domain ("vda"); unique.
        path: absolute path of the file that is written now (the active layer).
        format: "qcow2" or "raw".
        read_only: whether the guest can write it; read-only disks take part in no snapshot.
        node_name: QEMU's name of the top block node; None for an inactive domain.
        backing_chain: absolute paths below `path`, nearest first, as far as known.
        virtual_size: bytes of the disk; None when not known.
    """

    target: str
    path: str
    format: str
    read_only: bool = False
    node_name: str | None = None
    backing_chain: tuple[str, ...] = ()
    virtual_size: int | None = None


def name_from_time(prefix: str) -> str:
    """A name for a snapshot that is given none: local time, as lists show it."""
    return time.strftime(f"{prefix}-%Y%m%d-%H%M%S")


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, or where it is taken the first of NAME-2, NAME-3, ... that is not."""
    return next(one for one in itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2))) if one not in taken)


@dataclass(frozen=True)
class DiskRequest:
    """What is asked for one disk: how, and for an external one the overlay's path (None: the default name)."""

    mode: DiskMode
    file: str | None = None


@dataclass(frozen=True)
class SnapshotRequest:
    """A snapshot that is asked for.

    Attributes:
        name: name of the snapshot.
        numbered: the name was made, not given: where it is taken (two in one second), it gets a number.
        disk_only: without memory.
        default_mode: for disks that `disks` does not name; None: internal where the disk can, else external.
        disks: by target.
        memory_file: where an external memory file goes; None: the default name, if one is needed.
        liveness: what the guest does meanwhile.
        quiesce: freeze the guest's file systems by the guest agent.
        description: free text.
    """

    name: str
    disk_only: bool = False
    default_mode: DiskMode | None = None
    disks: dict[str, DiskRequest] = field(default_factory=dict)
    memory_file: str | None = None
    liveness: Liveness = Liveness.PAUSED
    quiesce: bool = False
    description: str = ""
    numbered: bool = False


@dataclass(frozen=True)
class RevertOptions:
    """How to go back to a snapshot.

    Attributes:
        running: whether the guest runs afterwards; None: as it was in the snapshot.
        disks: targets of the disks to revert, without the memory; None: everything that the snapshot has.
        discard_current: give the present state up; otherwise it is kept in a safety snapshot first.
        safety_name: name of that one; None: made from the time.
    """

    running: bool | None = None
    disks: tuple[str, ...] | None = None
    discard_current: bool = False
    safety_name: str | None = None


@dataclass(frozen=True)
class DeleteOptions:
    """How to delete a snapshot.

    Attributes:
        children: all snapshots that come from it as well.
        metadata_only: take it out of the catalog and leave the files alone.
        into: where external snapshots are merged: "base" (the frozen file takes what came later) or "overlay"; None:
            the way that moves fewer bytes.
    """

    children: bool = False
    metadata_only: bool = False
    into: str | None = None


@dataclass(frozen=True)
class DiskSnapshot:
    """What a snapshot has of one disk.

    Attributes:
        target: name of the disk.
        mode: how.
        file: absolute path of the file that holds the snapshot: the qcow2 file (internal), the frozen file (external).
        format: format of `file`.
        overlay: absolute path of the overlay that was put on it (external).
        internal_id, internal_name: id and name in the qcow2 file's snapshot table (internal).
        digest: xxh3-128 of the frozen file's metadata and data, if it was taken (`info --check`).
        virtual_size: bytes of the disk at that instant.
        place: where the guest found the disk ("virtio-blk-pci addr=03.0"); None when not known.
    """

    target: str
    mode: DiskMode
    file: str
    format: str
    overlay: str | None = None
    internal_id: str | None = None
    internal_name: str | None = None
    digest: str | None = None
    virtual_size: int | None = None
    place: str | None = None


@dataclass(frozen=True)
class MemorySnapshot:
    """The guest's memory in a snapshot.

    Attributes:
        mode: where it is kept.
        file: absolute path of the memory file (external) or of the qcow2 file with the vm state (internal).
        size: bytes of the migration stream.
        machine: the resolved machine type ("pc-i440fx-7.2").
        ram_size: bytes of RAM.
        devices: QEMU's device paths or ids that the stream needs, for messages.
        digest: xxh3-128 of the stream.
    """

    mode: MemoryMode
    file: str | None = None
    size: int = 0
    machine: str | None = None
    ram_size: int | None = None
    devices: tuple[str, ...] = ()
    digest: str | None = None


@dataclass(frozen=True)
class DomainSnapshot:
    """One snapshot of a domain, as the catalog keeps it.

    Attributes:
        name: unique within the domain.
        domain: name of the domain.
        creation_time: nanoseconds since 1970.
        state: of the domain when it was taken.
        consistency: what it is worth.
        memory: the guest's memory.
        disks: all disks of the domain, those left out included.
        parent: name of the snapshot that was current before; None for a root.
        description: free text.
        foreign: found in the files, made by QEMU or qemu-img; not in the catalog.
    """

    name: str
    domain: str
    creation_time: int
    state: DomainState
    consistency: Consistency
    memory: MemorySnapshot
    disks: tuple[DiskSnapshot, ...]
    parent: str | None = None
    description: str = ""
    foreign: bool = False
