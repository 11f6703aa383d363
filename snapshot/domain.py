"""A domain and what is true of it now: asked for, never assumed.

    description (file, XML, none) -> open_domain -> ActiveDomain | InactiveDomain -> facts() -> DomainFacts

A domain is active when its QMP socket answers. Without an answer it is inactive only when nobody holds the locks of its
disks: a running guest whose socket was not given must not be touched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import qcowlib
from snapshot.blockgraph import BlockGraph
from snapshot.errors import QemuLost, QmpError
from snapshot.model import Disk
from snapshot.qmp import CONNECT_DEADLINE, Qmp, listening


class Description(Protocol):
    """What a source (a domain file, libvirt's XML, xl.cfg) says about a domain."""

    @property
    def name(self) -> str:
        """Name of the domain."""
        ...

    @property
    def disks(self) -> tuple[Disk, ...]:
        """Its disks, as they are before any snapshot."""
        ...

    @property
    def qmp_socket(self) -> str | None:
        """Path of the QMP socket."""
        ...

    @property
    def command(self) -> Sequence[str]:
        """What starts it: arguments with the placeholders {incoming}, {qmp} and {disk:TARGET}."""
        ...

    @property
    def folder(self) -> str | None:
        """The directory in which the command is run; None: the present one."""
        ...

    @property
    def agent_socket(self) -> str | None:
        """Path of the guest agent's socket."""
        ...


@dataclass(frozen=True)
class StoredSnapshot:
    """An entry of a qcow2 file's snapshot table."""

    id: str
    name: str
    vm_state_size: int
    date_ns: int = 0


@dataclass(frozen=True)
class DiskFacts:
    """What is true of one disk now.

    Attributes:
        disk: the disk; its path is the active layer's.
        driver: format driver of the top node ("qcow2", "raw", or a filter's name).
        snapshots: those in the active layer's file.
        bitmaps: names of the dirty bitmaps of the active layer.
        refcount_bits: width of its refcounts; None for raw.
        chain_nodes: node names below the top, nearest first; empty for an inactive domain.
        data_file: the qcow2 file keeps its data in another file.
        encrypted: whether the data is.
        dirty: the file was not closed when it was used last (only some images can tell).
        in_use: who uses the image: a job of QEMU, or another process; None when nobody does.
        damaged: why the image cannot be used.
        place: where the guest finds the disk; None when not known.
    """

    disk: Disk
    driver: str
    snapshots: tuple[StoredSnapshot, ...] = ()
    bitmaps: tuple[str, ...] = ()
    refcount_bits: int | None = None
    chain_nodes: tuple[str, ...] = ()
    data_file: bool = False
    encrypted: bool = False
    dirty: bool = False
    in_use: str | None = None
    damaged: str | None = None
    place: str | None = None

    @property
    def node(self) -> str:
        """QEMU's name of the top node."""
        return self.disk.node_name or ""


@dataclass(frozen=True)
class DomainFacts:
    """What is true of a domain now.

    Attributes:
        name: of the domain.
        active: whether it is started.
        disks: in the order of the description, or of QEMU.
        run_state: QEMU's word ("running", "paused", "postmigrate", ...); "shutoff" when inactive.
        machine: the resolved machine type ("pc-i440fx-7.2").
        ram_size: bytes, hot-plugged memory included.
        version: of QEMU.
        migration: status of a migration that is under way.
        blockers: why QEMU cannot save the machine's memory.
        jobs: ids of the jobs that have not ended.
        max_bandwidth: QEMU's migration parameter, to be put back.
        capabilities: migration capabilities that are on.
        agent_socket: of the guest agent, if known.
        devices: those that were plugged into the machine, as "id (type)".
        stranger: none of its disks is one of the description's.
    """

    name: str
    active: bool
    disks: tuple[DiskFacts, ...]
    run_state: str = "shutoff"
    machine: str | None = None
    ram_size: int | None = None
    version: tuple[int, int, int] | None = None
    migration: str | None = None
    blockers: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    max_bandwidth: int | None = None
    capabilities: tuple[str, ...] = ()
    agent_socket: str | None = None
    devices: tuple[str, ...] = ()
    stranger: bool = False

    def by_target(self) -> dict[str, DiskFacts]:
        """The disks by target."""
        return {facts.disk.target: facts for facts in self.disks}


class Domain(Protocol):
    """What active and inactive domains have in common."""

    @property
    def name(self) -> str:
        """Name of the domain."""
        ...

    @property
    def description(self) -> Description | None:
        """What its source says about it."""
        ...

    def facts(self, layers: Mapping[str, str] | None = None) -> DomainFacts:
        """Ask for everything anew; `layers`: path of the active layer by target, where it is not the description's."""
        ...

    def close(self) -> None:
        """Let the domain go."""
        ...


class ActiveDomain:
    """A running QEMU.

    Args:
        qmp: the connection; closed with the domain.
        description: gives the disks their targets, and the socket of the guest agent.
    """

    def __init__(self, qmp: Qmp, description: Description | None = None) -> None:
        self.qmp = qmp
        self._description = description

    @property
    def description(self) -> Description | None:
        """What the domain's source says about it."""
        return self._description

    @property
    def name(self) -> str:
        """The description's name, else QEMU's, else that of the socket."""
        if self.description is not None:
            return self.description.name
        name = self.qmp.execute("query-name").get("name")
        return str(name or os.path.splitext(os.path.basename(self.qmp.path))[0])

    def facts(self, layers: Mapping[str, str] | None = None) -> DomainFacts:
        """Ask QEMU; `layers` helps to know a disk again whose described file is not part of it any more."""
        ask = self.qmp.execute
        graph = BlockGraph.query(self.qmp)
        jobs = [job for job in ask("query-jobs") if job["status"] not in ("concluded", "null")]
        busy = {node: job["device"] for job in ask("query-block-jobs") for node in graph.nodes_of_job(job["device"])}
        memory = ask("query-memory-size-summary")
        migrating = ask("query-migrate")
        migration = migrating.get("status")
        over = (None, "none", "completed", "failed", "cancelled")
        machine = str(ask("qom-get", {"path": "/machine", "property": "type"}))
        capabilities = ask("query-migrate-capabilities")
        disks = [
            self._disk_facts(graph, device, busy, layers or {})
            for device in ask("query-block")
            if "inserted" in device and device.get("qdev")
        ]
        return DomainFacts(
            name=self.name,
            active=True,
            disks=tuple(self._in_order(disks)),
            run_state=str(ask("query-status")["status"]),
            machine=machine.removesuffix("-machine"),
            ram_size=int(memory["base-memory"]) + int(memory.get("plugged-memory", 0)),
            version=self.qmp.version,
            migration=None if migration in over else migration,
            blockers=tuple(migrating.get("blocked-reasons", ())),
            jobs=tuple(job["id"] for job in jobs),
            max_bandwidth=ask("query-migrate-parameters").get("max-bandwidth"),
            capabilities=tuple(one["capability"] for one in capabilities if one["state"]),
            agent_socket=None if self.description is None else self.description.agent_socket,
            devices=_devices(self.qmp),
            stranger=bool(self._described())
            and not any(self._known_target((one.disk.path, *one.disk.backing_chain), layers or {}) for one in disks),
        )

    def close(self) -> None:
        """End the connection."""
        self.qmp.close()

    def _disk_facts(
        self, graph: BlockGraph, device: dict[str, Any], busy: Mapping[str, str], layers: Mapping[str, str]
    ) -> DiskFacts:
        inserted = device["inserted"]
        node = str(inserted["node-name"])
        chain = graph.chain(node)
        paths = [graph.path(name) for name in chain]
        image = graph.node(node).get("image", {})
        details = image.get("format-specific", {}).get("data", {})
        path = paths[0]
        disk = Disk(
            target=self._target(device, node, paths, layers),
            path=path,
            format=str(inserted["drv"]),
            read_only=bool(inserted["ro"]),
            node_name=node,
            backing_chain=tuple(paths[1:]),
            virtual_size=image.get("virtual-size"),
        )
        bitmaps = graph.node(node).get("dirty-bitmaps", [])
        job = busy.get(node)
        return DiskFacts(
            disk=disk,
            driver=str(inserted["drv"]),
            snapshots=tuple(
                StoredSnapshot(
                    str(one["id"]), one["name"], int(one["vm-state-size"]), one["date-sec"] * 10**9 + one["date-nsec"]
                )
                for one in image.get("snapshots", [])
            ),
            bitmaps=tuple(bitmap["name"] for bitmap in bitmaps if bitmap.get("name")),
            refcount_bits=details.get("refcount-bits"),
            chain_nodes=tuple(chain[1:]),
            data_file="data-file" in details,
            encrypted=bool(image.get("encrypted")),
            in_use=None if job is None else f"block job '{job}'",
            damaged="the image is marked corrupt" if details.get("corrupt") else None,
            place=device_place(self.qmp, str(device["qdev"])),
        )

    def _known_target(self, paths: Sequence[str], layers: Mapping[str, str]) -> str | None:
        """The described disk that goes on with one of these files, or began with it."""
        described = self._described()
        for target, file in (*layers.items(), *described.items()):
            if target in described and any(same_file(file, path) for path in paths):
                return target
        return None

    def _target(self, device: dict[str, Any], node: str, paths: list[str], layers: Mapping[str, str]) -> str:
        """The description's target, else QEMU's name of the drive, else the device's id, else the node's name."""
        known = self._known_target(paths, layers)
        if known is not None:
            return known
        if device.get("device"):
            return str(device["device"])
        parts = str(device["qdev"]).split("/")
        if "peripheral" in parts:
            return parts[parts.index("peripheral") + 1]
        return node if "/" in str(device["qdev"]) else str(device["qdev"])

    def _described(self) -> dict[str, str]:
        return {} if self.description is None else {disk.target: disk.path for disk in self.description.disks}

    def _in_order(self, disks: list[DiskFacts]) -> list[DiskFacts]:
        if self.description is None:
            return disks
        order = {disk.target: number for number, disk in enumerate(self.description.disks)}
        return sorted(disks, key=lambda facts: order.get(facts.disk.target, len(order)))


def device_place(qmp: Qmp, device: str) -> str | None:
    """Where the guest finds a device: its type and its address on its bus, which a device's name says nothing about.

    Args:
        qmp: the connection.
        device: id or path, as `query-block` has it.
    """
    path = device if device.startswith("/") else f"/machine/peripheral/{device}"
    path = path.removesuffix("/virtio-backend")
    try:
        have = {entry["name"] for entry in qmp.execute("qom-list", {"path": path})}
        names = [name for name in ("type", "addr", "channel", "scsi-id", "lun", "unit") if name in have]
        values = {name: qmp.execute("qom-get", {"path": path, "property": name}) for name in names}
    except QmpError:  # an old kind of device, of which QEMU says less
        return None
    return " ".join([str(values.pop("type", "device")), *(f"{name}={value}" for name, value in values.items())])


def _devices(qmp: Qmp) -> tuple[str, ...]:
    """Devices of the command line and those plugged in later; what a memory image has state of."""
    found = []
    for place in ("peripheral", "peripheral-anon"):
        for entry in qmp.execute("qom-list", {"path": f"/machine/{place}"}):
            if entry["type"].startswith("child<"):
                found.append(f"{entry['name']} ({entry['type'].removeprefix('child<').removesuffix('>')})")
    return tuple(sorted(found))


class InactiveDomain:
    """A domain that is not started: its disks are files that nobody uses.

    Args:
        source: what is known about it.
    """

    def __init__(self, source: Description) -> None:
        self._source = source

    @property
    def description(self) -> Description:
        """What the domain's source says about it."""
        return self._source

    @property
    def name(self) -> str:
        """The description's name."""
        return self.description.name

    def facts(self, layers: Mapping[str, str] | None = None) -> DomainFacts:
        """Look into the files."""
        disks = []
        for disk in self.description.disks:
            path = os.path.abspath((layers or {}).get(disk.target, disk.path))
            moved = path != os.path.abspath(disk.path)  # to an overlay, and these are always qcow2
            disks.append(image_facts(replace(disk, path=path, format="qcow2" if moved else disk.format)))
        return DomainFacts(self.name, False, tuple(disks), agent_socket=self.description.agent_socket)

    def close(self) -> None:
        """Nothing is held."""


def connect(socket: str, *, wait: float = CONNECT_DEADLINE, description: Description | None = None) -> ActiveDomain:
    """The active domain behind a QMP socket.

    Raises:
        SocketTaken, QemuLost: see `Qmp`.
    """
    return ActiveDomain(Qmp(socket, wait=wait), description)


def open_domain(description: Description, *, wait: float = CONNECT_DEADLINE) -> ActiveDomain | InactiveDomain:
    """A described domain, active or inactive as its socket says.

    That nobody else uses the disks of an inactive domain is found when its facts are asked for.

    Raises:
        SocketTaken: another client holds the socket.
    """
    socket = description.qmp_socket
    if socket is not None and listening(socket):
        try:
            return connect(socket, wait=wait, description=description)
        except QemuLost:
            if listening(socket):
                raise
    return InactiveDomain(description)


def image_facts(disk: Disk) -> DiskFacts:
    """What a disk's file says; an image in use or damaged is told, not raised."""
    try:
        with qcowlib.open_image(disk.path, format=disk.format, open_backing=False) as image:
            facts = DiskFacts(disk=replace(disk, virtual_size=image.size), driver=disk.format)
            header = getattr(image, "header", None)
            if header is None:
                return facts
            stored = tuple(
                StoredSnapshot(one.id, one.name, one.vm_state_size, one.date_sec * 10**9 + one.date_nsec)
                for one in image.snapshots
            )
            return replace(
                facts,
                disk=replace(facts.disk, backing_chain=tuple(backing_paths(disk.path))),
                snapshots=stored,
                bitmaps=tuple(bitmap.name for bitmap in image.bitmaps),
                refcount_bits=1 << header.refcount_order,
                data_file=header.has_data_file,
                encrypted=header.crypt_method != 0,
                dirty=header.dirty,
                damaged="the image is marked corrupt" if header.corrupt else None,
            )
    except qcowlib.ImageLocked:
        return DiskFacts(disk=disk, driver=disk.format, in_use="another process (a running guest?)")
    except qcowlib.QcowError as error:
        return DiskFacts(disk=disk, driver=disk.format, damaged=str(error))


def backing_paths(path: str) -> list[str]:
    """Absolute paths of the local files below a qcow2 file, nearest first, as far as they can be followed.

    Reads without locks: the names in the headers of a chain do not change under a guest's writes.
    """
    found: list[str] = []
    seen = {os.path.realpath(path)}
    below = backing_file(path)
    while below is not None and os.path.realpath(below.path) not in seen:
        found.append(below.path)
        seen.add(os.path.realpath(below.path))
        below = None if below.format == "raw" else backing_file(below.path)
    return found


def backing_file(path: str) -> qcowlib.BackingFile | None:
    """The backing file that a qcow2 file names; None when there is none, it is no whole file, or that cannot be told.

    Only for files that are known to be qcow2: what a raw disk holds is its guest's, whatever it looks like.
    """
    with contextlib.suppress(qcowlib.QcowError):
        return qcowlib.backing_file(path)
    return None


def below_path(path: str) -> str | None:
    """Absolute path of the backing file (see `backing_file`)."""
    below = backing_file(path)
    return None if below is None else below.path


def same_file(one: str, other: str) -> bool:
    """Whether two paths lead to one file."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.abspath(one) == os.path.abspath(other)


def alive(qmp: Qmp | None) -> bool:
    """Whether QEMU still answers."""
    if qmp is None:
        return False
    try:
        qmp.execute("query-status")
    except QemuLost:
        return False
    except QmpError:
        return True
    return True
