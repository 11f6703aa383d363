"""What a revert depends on, and what follows from it: which way, which files. No I/O.

    LOAD      active, memory and disks in the qcow2 files: QEMU loads them, with a way back saved right before
    SWAP      active, disks alone: new overlays under the running devices, then a reset
    RESTART   memory from a file, or internal snapshots under a running guest that QEMU cannot load: a new QEMU by the
              domain's command, beside the old one, which stands still until the new one has everything
    OFFLINE   inactive, disks alone

Nothing that others are based on is changed. A frozen file gets a new overlay. An internal snapshot is applied to its
file only where nothing else needs what the file holds now; otherwise its state is copied into a file of its own, which
gets an overlay as a frozen file does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from snapshot.domain import DiskFacts, DomainFacts, StoredSnapshot, same_file
from snapshot.model import DiskMode, DiskSnapshot, DomainSnapshot, MemoryMode, RevertOptions
from snapshot.plan import Resolved


class Way(Enum):
    """How a domain goes back."""

    LOAD = "load"
    SWAP = "swap"
    RESTART = "restart"
    OFFLINE = "offline"


@dataclass(frozen=True)
class StateFacts:
    """The state of a disk in an internal snapshot, as a copy of it would have to hold it.

    Attributes:
        data: bytes of data.
        size: of the disk, in bytes.
        backing, backing_format: what its file is based on, and so the copy.
        free: bytes free where the copy goes.
        problem: why it cannot be copied.
    """

    data: int = 0
    size: int | None = None
    backing: str | None = None
    backing_format: str | None = None
    free: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class RevertRequest:
    """Everything that a revert depends on.

    Attributes:
        snapshot, facts, options: what, from where, how.
        described: path of each disk in the domain's description, by target.
        command: the domain's start command; empty when it is not known.
        folder: the directory in which it is run; None: the present one.
        socket: path of its QMP socket.
        layers: paths of the active layers as the journal has them.
        current: name of the current snapshot.
        token: for names.
        directory: of the catalog.
        dependents: for each of the snapshot's files, the files that are based on it.
        frozen: the files that snapshots of the catalog need as they are.
        stored: for each file with an internal snapshot of a disk, all internal snapshots in it.
        states: for each of these files that may have to be copied from, what there is to copy.
        missing: files of the snapshot that are not there.
        memory_files: files that the running guest's memory lies in, shared with whoever opens them.
        stems: for each of the snapshot's files, what new files above it are named after.
    """

    snapshot: DomainSnapshot
    facts: DomainFacts
    options: RevertOptions
    described: Mapping[str, str]
    command: Sequence[str]
    socket: str | None
    layers: Mapping[str, str]
    current: str | None
    token: str
    directory: str
    dependents: Mapping[str, Sequence[str]]
    frozen: Collection[str]
    stored: Mapping[str, Sequence[StoredSnapshot]]
    states: Mapping[str, StateFacts]
    missing: Sequence[str]
    stems: Mapping[str, str]
    folder: str | None = None
    memory_files: Sequence[str] = ()

    @property
    def chosen(self) -> list[DiskSnapshot]:
        """The disks to revert."""
        wanted = self.options.disks
        disks = [disk for disk in self.snapshot.disks if disk.mode is not DiskMode.NO]
        return disks if wanted is None else [disk for disk in disks if disk.target in wanted]

    @property
    def memory(self) -> MemoryMode:
        """The memory to revert; none when disks were chosen."""
        return self.snapshot.memory.mode if self.options.disks is None else MemoryMode.NO

    @property
    def way(self) -> Way:
        """How the domain goes back."""
        disk_only = self.memory is MemoryMode.NO
        if not self.facts.active:
            return Way.OFFLINE if disk_only else Way.RESTART
        if self.memory is MemoryMode.INTERNAL and all(self.in_place(d) and self.on_top(d) for d in self.chosen):
            return Way.LOAD
        return Way.SWAP if disk_only and not self.inside else Way.RESTART

    @property
    def boots(self) -> bool:
        """Whether a guest that runs begins anew, since the disks come without memory."""
        return self.facts.active and self.memory is MemoryMode.NO

    @property
    def running(self) -> bool:
        """Whether the guest runs afterwards."""
        if self.options.running is not None:
            return self.options.running
        return (self.facts.run_state if self.boots else self.snapshot.state.value) == "running"

    @property
    def inside(self) -> list[DiskSnapshot]:
        """The disks whose internal snapshot is applied to their file."""
        return [disk for disk in self.chosen if self.in_place(disk)]

    @property
    def parting(self) -> bool:
        """Whether a running QEMU has to let go of files that a new one goes on with."""
        chosen = {disk.target: disk for disk in self.chosen}
        return self.facts.active and any(
            not facts.disk.read_only
            and (
                facts.disk.target not in chosen or same_file(self.new_layer(chosen[facts.disk.target]), facts.disk.path)
            )
            for facts in self.facts.disks
        )

    def on_top(self, disk: DiskSnapshot) -> bool:
        """Whether a disk's snapshot is in the file that the disk has now."""
        facts = self.facts.by_target().get(disk.target)
        return facts is not None and same_file(facts.disk.path, disk.file)

    def in_place(self, disk: DiskSnapshot) -> bool:
        """Whether a disk's internal snapshot is applied to its file: nothing else needs what the file holds now.

        Another file than the disk's present one is left alone where QEMU can be given a copy but not be started.
        """
        if disk.mode is not DiskMode.INTERNAL or self.dependents.get(disk.file) or disk.file in self.frozen:
            return False
        return self.on_top(disk) or not self.facts.active or bool(self.command)

    def copied(self, disk: DiskSnapshot) -> bool:
        """Whether a disk's internal snapshot is copied into a file of its own."""
        return disk.mode is DiskMode.INTERNAL and not self.in_place(disk)

    def state(self, disk: DiskSnapshot) -> StateFacts:
        """What there is to copy of a disk."""
        return self.states.get(disk.file, StateFacts(problem=f"'{disk.file}' was not looked into"))

    def bottom(self, disk: DiskSnapshot) -> tuple[str, str]:
        """Path and format of the file that a disk's new overlay is put on: the frozen one, or the copy."""
        if disk.mode is DiskMode.INTERNAL:
            return f"{self._new_name(disk)}.state.qcow2", "qcow2"
        return disk.file, disk.format

    def new_layer(self, disk: DiskSnapshot) -> str:
        """The file that a disk goes on with."""
        return disk.file if self.in_place(disk) else f"{self._new_name(disk)}.qcow2"

    def internal_name(self, disk: DiskSnapshot) -> str:
        """The snapshot's name in a disk's file."""
        return disk.internal_name or self.snapshot.name

    def _new_name(self, disk: DiskSnapshot) -> str:
        return f"{self.stems[disk.file]}.{self.snapshot.name}-{self.token}"


def after_keeping(request: RevertRequest, resolved: Resolved, token: str) -> RevertRequest:
    """The same revert from the state in which its safety snapshot leaves the domain.

    Args:
        request: as the domain is now.
        resolved, token: of the safety snapshot.
    """
    external = [plan.facts.disk.target for plan in resolved.of(DiskMode.EXTERNAL)]
    disks: list[DiskFacts] = []
    for plan in resolved.disks:
        facts, disk = plan.facts, plan.facts.disk
        if plan.mode is DiskMode.EXTERNAL and plan.overlay is not None:
            node = f"ds-{token}-{external.index(disk.target)}" if request.facts.active else None
            chain = (disk.path, *disk.backing_chain)
            disk = replace(disk, path=plan.overlay, format="qcow2", node_name=node, backing_chain=chain)
            facts = DiskFacts(disk=disk, driver="qcow2", chain_nodes=(facts.node, *facts.chain_nodes))
        elif plan.mode is DiskMode.INTERNAL:
            stored = StoredSnapshot("", resolved.request.name, 0)
            facts = replace(facts, snapshots=(*facts.snapshots, stored))
        disks.append(facts)
    layers = {plan.facts.disk.target: plan.overlay for plan in resolved.disks if plan.overlay is not None}
    return replace(
        request,
        facts=replace(request.facts, disks=tuple(disks)),
        layers={**request.layers, **layers},
        current=resolved.request.name,
    )
