"""A snapshot as a libvirt <domainsnapshot> document, and back.

    DomainSnapshot (+ the document it came from, + the domain's own XML) -> build -> bytes -> parse -> DomainSnapshot

libvirt's elements say what libvirt knows; what it has no words for (consistency, digests, machine type, ids in the
qcow2 files, nanoseconds) stands in one element of ours inside <domain><metadata>, the place that libvirt keeps for
others and its schema allows. A document without it, made by libvirt, is read as far as it goes.
"""

from __future__ import annotations

import copy
import re
import uuid
from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, register_namespace

from snapshot.libvirt_reading import libvirt_consistency, libvirt_disks, libvirt_memory
from snapshot.model import (
    Consistency,
    DiskMode,
    DiskSnapshot,
    DomainSnapshot,
    DomainState,
    MemoryMode,
    MemorySnapshot,
)
from snapshot.safe_xml import UnsafeXml, parse_xml, require_writable, set_child, text_of, write_xml

NAMESPACE = "urn:qcowlib:domsnap:1"
_OURS = f"{{{NAMESPACE}}}"
register_namespace("domsnap", NAMESPACE)

# Ids of domains that libvirt does not know are made from their names, the same each time.
_UUIDS = uuid.UUID("6c1d3f5e-0a53-5f0e-9a38-2f0f6c5b7a11")
_NANO = 1_000_000_000
_TARGET = re.compile(r"(ioemu:)?(fd|hd|sd|vd|xvd|ubd)[a-zA-Z0-9_]+")
_MAX_NAME = 1023  # of a snapshot in a qcow2 file


def name_problem(name: str) -> str | None:
    """Why no snapshot can have this name in the catalog; None when one can."""
    if not name:
        return "a snapshot needs a name"
    if name.startswith(".") or "/" in name:
        return f"the name {name!r} begins with a dot or has a slash, which libvirt refuses"
    if "\n" in name or "\t" in name:
        return f"the name {name!r} has a line break or tabulator"
    if len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME:
        return f"the name is longer than {_MAX_NAME} bytes"
    try:
        require_writable(name, "the name")
    except ValueError as error:
        return str(error)
    return None


# --- Building


def build(snapshot: DomainSnapshot, *, domain_xml: bytes | None = None, earlier: bytes | None = None) -> bytes:
    """The document of a snapshot.

    Args:
        snapshot: what to record.
        domain_xml: libvirt's XML of the domain, stored with the snapshot; without it a short <domain> is made up.
        earlier: the document that this one replaces: what we do not know in it is kept.

    Returns: the bytes of the document.
    Raises: ValueError: a text that XML cannot hold, or an `earlier` that is no <domainsnapshot>.
    """
    root = Element("domainsnapshot") if earlier is None else _root(earlier)
    set_child(root, "name", require_writable(snapshot.name, "the name"))
    description = snapshot.description.replace("\r\n", "\n")
    set_child(root, "description", require_writable(description, "the description") or None)
    set_child(root, "state", snapshot.state.value)
    set_child(root, "creationTime", str(snapshot.creation_time // _NANO))
    _set_parent(root, snapshot.parent)
    names = libvirt_targets([disk.target for disk in snapshot.disks])
    _replace(root, _memory_element(snapshot.memory))
    _replace(root, _disks_element(root.find("disks"), snapshot.disks, names))
    domain = root.find("domain")
    if domain is None:
        domain = _domain_element(snapshot, names) if domain_xml is None else parse_domain(domain_xml)
        root.append(domain)
    _set_metadata(domain, _own_element(snapshot, names))
    return write_xml(root)


def libvirt_targets(targets: Sequence[str]) -> dict[str, str]:
    """A disk name that libvirt accepts for each target: itself where it is one, else a free "vd<letters>"."""
    names = {target: target for target in targets if _TARGET.fullmatch(target)}
    taken = set(names.values())
    number = 0
    for target in targets:
        while target not in names:
            candidate = "vd" + _letters(number)
            number += 1
            if candidate not in taken:
                names[target] = candidate
                taken.add(candidate)
    return names


def parse_domain(data: bytes) -> Element:
    """libvirt's XML of a domain; ValueError when it is none."""
    try:
        root = parse_xml(data)
    except UnsafeXml as error:
        raise ValueError(str(error)) from None
    if root.tag == "domstatus":  # the form in which libvirtd itself keeps a running domain
        inner = root.find("domain")
        root = root if inner is None else inner
    if root.tag != "domain":
        raise ValueError(f"<{root.tag}> is not a <domain>")
    return root


def _letters(number: int) -> str:
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        text = chr(ord("a") + digit) + text
    return text


def _memory_element(memory: MemorySnapshot) -> Element:
    element = Element("memory", snapshot=memory.mode.value)
    if memory.mode is MemoryMode.EXTERNAL and memory.file is not None:
        element.set("file", require_writable(memory.file, "the memory file"))
    return element


def _disks_element(earlier: Element | None, disks: Sequence[DiskSnapshot], names: dict[str, str]) -> Element:
    """One <disk> for each; what libvirt had written into those of the same name and kind is kept."""
    known = {} if earlier is None else {disk.get("name"): disk for disk in earlier.findall("disk")}
    element = Element("disks")
    for disk in disks:
        name = names[disk.target]
        old = known.get(name)
        if old is not None and old.get("snapshot") == disk.mode.value:
            entry = copy.deepcopy(old)
            element.append(entry)
        else:
            entry = SubElement(element, "disk", name=name, snapshot=disk.mode.value)
        if disk.mode is DiskMode.EXTERNAL and disk.overlay is not None and entry.get("type", "file") == "file":
            entry.set("type", "file")
            if entry.find("driver") is None:
                SubElement(entry, "driver", type="qcow2")
            source = entry.find("source")
            source = SubElement(entry, "source") if source is None else source
            source.set("file", require_writable(disk.overlay, "the overlay"))
    return element


def _domain_element(snapshot: DomainSnapshot, names: dict[str, str]) -> Element:
    """As much of a <domain> as libvirt asks for; what QEMU did not tell us is not in it, but for the memory's size."""
    domain = Element("domain", type="qemu")
    SubElement(domain, "name").text = require_writable(snapshot.domain, "the domain's name")
    SubElement(domain, "uuid").text = str(uuid.uuid5(_UUIDS, snapshot.domain))
    SubElement(domain, "memory", unit="b").text = str(snapshot.memory.ram_size or 1 << 20)
    system = SubElement(domain, "os")
    kind = SubElement(system, "type", arch="x86_64")
    kind.text = "hvm"
    if snapshot.memory.machine is not None:
        kind.set("machine", require_writable(snapshot.memory.machine, "the machine type"))
    devices = SubElement(domain, "devices")
    for disk in snapshot.disks:
        element = SubElement(devices, "disk", type="file", device="disk")
        SubElement(element, "driver", name="qemu", type=disk.format)
        if disk.file:
            SubElement(element, "source", file=require_writable(disk.file, "the disk"))
        SubElement(element, "target", dev=names[disk.target], bus=_bus(names[disk.target]))
    return domain


def _bus(target: str) -> str:
    buses = {"hd": "ide", "sd": "scsi", "fd": "fdc", "xvd": "xen", "ubd": "uml"}
    return next((bus for prefix, bus in buses.items() if target.startswith(prefix)), "virtio")


def _own_element(snapshot: DomainSnapshot, names: dict[str, str]) -> Element:
    own = Element(_OURS + "snapshot", consistency=snapshot.consistency.value)
    own.set("creationTime", str(snapshot.creation_time))
    memory = snapshot.memory
    if memory.mode is not MemoryMode.NO:
        element = SubElement(own, _OURS + "memory", mode=memory.mode.value, size=str(memory.size))
        _set(element, file=memory.file, machine=memory.machine, ramSize=memory.ram_size, digest=memory.digest)
        for device in memory.devices:
            SubElement(element, _OURS + "device").text = require_writable(device, "the device")
    for disk in snapshot.disks:
        element = SubElement(own, _OURS + "disk", name=names[disk.target], mode=disk.mode.value)
        _set(element, target=disk.target, file=disk.file, format=disk.format, overlay=disk.overlay)
        _set(element, internalId=disk.internal_id, internalName=disk.internal_name)
        _set(element, digest=disk.digest, virtualSize=disk.virtual_size, place=disk.place)
    return own


def _set(element: Element, **values: str | int | None) -> None:
    for name, value in values.items():
        if value is not None:
            element.set(name, require_writable(str(value), name))


def _set_parent(root: Element, parent: str | None) -> None:
    element = root.find("parent")
    if parent is None:
        if element is not None:
            root.remove(element)
        return
    if element is None:
        element = SubElement(root, "parent")
    set_child(element, "name", require_writable(parent, "the parent"))


def _set_metadata(domain: Element, own: Element) -> None:
    metadata = domain.find("metadata")
    if metadata is None:
        metadata = SubElement(domain, "metadata")
    for earlier in metadata.findall(own.tag):
        metadata.remove(earlier)
    metadata.append(own)


def _replace(root: Element, element: Element) -> None:
    earlier = root.find(element.tag)
    if earlier is None:
        root.append(element)
    else:
        root[list(root).index(earlier)] = element


# --- Parsing


def parse(data: bytes) -> DomainSnapshot:
    """The snapshot that a document tells of, ours or libvirt's.

    Args:
        data: the document.

    Raises: ValueError: no XML, not a <domainsnapshot>, no name, or a value that is none of its kind.
    """
    root = _root(data)
    name = text_of(root, "name")
    if not name:
        raise ValueError("the snapshot has no name")
    domain = root.find("domain")
    own = None if domain is None else domain.find(f"metadata/{_OURS}snapshot")
    state = _state(text_of(root, "state"))
    seconds = _natural(text_of(root, "creationTime") or "0")
    if own is None:
        memory, disks, time = libvirt_memory(root), libvirt_disks(root, domain), seconds * _NANO
        consistency = libvirt_consistency(state, memory)
    else:
        memory, disks = _own_memory(own), tuple(_own_disk(disk) for disk in own.findall(_OURS + "disk"))
        consistency, time = (
            Consistency(own.get("consistency", "")),
            _natural(own.get("creationTime", str(seconds * _NANO))),
        )
    return DomainSnapshot(
        name=name,
        domain=(None if domain is None else text_of(domain, "name")) or "",
        creation_time=time,
        state=state,
        consistency=consistency,
        memory=memory,
        disks=disks,
        parent=text_of(root, "parent/name"),
        description=text_of(root, "description") or "",
    )


def _root(data: bytes) -> Element:
    try:
        root = parse_xml(data)
    except UnsafeXml as error:
        raise ValueError(str(error)) from None
    if root.tag != "domainsnapshot":
        raise ValueError(f"<{root.tag}> is not a <domainsnapshot>")
    return root


def _state(text: str | None) -> DomainState:
    # libvirt's other words (blocked, shutdown, crashed, pmsuspended) are states in which the guest does not run.
    known = {state.value: state for state in DomainState}
    return known.get(text or "shutoff", DomainState.PAUSED)


def _own_memory(own: Element) -> MemorySnapshot:
    element = own.find(_OURS + "memory")
    if element is None:
        return MemorySnapshot(MemoryMode.NO)
    return MemorySnapshot(
        mode=MemoryMode(element.get("mode", "")),
        file=element.get("file"),
        size=_natural(element.get("size", "0")),
        machine=element.get("machine"),
        ram_size=_number(element.get("ramSize")),
        devices=tuple(device.text or "" for device in element.findall(_OURS + "device")),
        digest=element.get("digest"),
    )


def _own_disk(element: Element) -> DiskSnapshot:
    target = element.get("target")
    if target is None:
        raise ValueError("a disk has no target")
    return DiskSnapshot(
        target=target,
        mode=DiskMode(element.get("mode", "")),
        file=element.get("file", ""),
        format=element.get("format", ""),
        overlay=element.get("overlay"),
        internal_id=element.get("internalId"),
        internal_name=element.get("internalName"),
        digest=element.get("digest"),
        virtual_size=_number(element.get("virtualSize")),
        place=element.get("place"),
    )


def _number(text: str | None) -> int | None:
    return None if text is None else _natural(text)


def _natural(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 63:
        raise ValueError(f"{text} is out of range")
    return number
