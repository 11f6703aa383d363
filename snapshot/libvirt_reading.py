"""What libvirt's own <domainsnapshot> documents say about memory and disks, as far as they go."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from snapshot.model import Consistency, DiskMode, DiskSnapshot, DomainState, MemoryMode, MemorySnapshot
from snapshot.safe_xml import attribute_of, text_of


def libvirt_memory(root: Element) -> MemorySnapshot:
    """Where the memory is; its size and machine are not in the document."""
    file = attribute_of(root, "memory", "file")
    mode = attribute_of(root, "memory", "snapshot") or ("external" if file is not None else "no")
    return MemorySnapshot(MemoryMode(mode), file=file)


def libvirt_disks(root: Element, domain: Element | None) -> tuple[DiskSnapshot, ...]:
    """The disks of a snapshot.

    libvirt's <source> names the overlay; the frozen file is the one that the domain had at that time.

    Args:
        root: the <domainsnapshot>.
        domain: its <domain>, if it has one.

    Raises: ValueError: a kind of snapshot that is none.
    """
    name = text_of(root, "name")
    at_the_time = (
        {} if domain is None else {attribute_of(d, "target", "dev"): d for d in domain.findall("devices/disk")}
    )
    disks = []
    for element in root.findall("disks/disk"):
        target = element.get("name", "")
        overlay = attribute_of(element, "source", "file") or attribute_of(element, "source", "dev")
        has_source = element.find("source") is not None
        mode = _mode(element.get("snapshot") or ("external" if has_source else "no"))
        device = at_the_time.get(target)
        disks.append(
            DiskSnapshot(
                target=target,
                mode=mode,
                file="" if device is None else _source_file(device),
                format=("" if device is None else attribute_of(device, "driver", "type")) or "",
                overlay=overlay if mode is DiskMode.EXTERNAL else None,
                internal_name=name if mode is DiskMode.INTERNAL else None,
            )
        )
    return tuple(disks)


def _mode(text: str) -> DiskMode:
    return DiskMode.NO if text == "manual" else DiskMode(text)  # manual: somebody else's business


def _source_file(device: Element) -> str:
    return attribute_of(device, "source", "file") or attribute_of(device, "source", "dev") or ""


def libvirt_consistency(state: DomainState, memory: MemorySnapshot) -> Consistency:
    """What the snapshot is worth at least."""
    if memory.mode is not MemoryMode.NO:
        return Consistency.CHECKPOINT
    # libvirt does not record whether the file systems were frozen: of the two, the weaker is certain.
    return Consistency.CLEAN if state is DomainState.SHUTOFF else Consistency.CRASH_CONSISTENT
