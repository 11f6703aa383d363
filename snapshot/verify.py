"""Whether everything that a snapshot needs is still there.

    problems(snapshot)                 the files and the entries in them: quick
    problems(snapshot, thorough=True)  also chains, the structure of the frozen files, whole memory streams, digests
    digested(snapshot)                 the snapshot with the digests that a later thorough look compares

Files are read without locks: a running guest's image can be looked at, and nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import qcowlib
from snapshot.errors import DomainSnapshotError, MemoryFileError
from snapshot.memory import memory_file_facts, vmstate_facts
from snapshot.model import DiskMode, DiskSnapshot, DomainSnapshot, MemoryMode, MemorySnapshot

_CHUNK = 1 << 20


def problems(snapshot: DomainSnapshot, *, thorough: bool = False) -> list[str]:
    """What is missing or wrong, one text each; empty when the snapshot can be used.

    Args:
        snapshot: one of the catalog's, or one found in the files.
        thorough: also follow chains, check frozen files, read whole memory streams and compare digests.
    """
    found = [problem for disk in snapshot.disks for problem in _of_disk(disk, thorough)]
    return [*found, *_of_memory(snapshot, thorough)]


def digested(snapshot: DomainSnapshot) -> DomainSnapshot:
    """The snapshot with digests (xxh3-128) of the frozen files and of the memory file.

    What lies inside a qcow2 file that is in use has none: it moves when the file changes.
    Raises: DomainSnapshotError: a file cannot be read.
    """
    disks = tuple(
        replace(disk, digest=file_digest(disk.file)) if disk.mode is DiskMode.EXTERNAL else disk
        for disk in snapshot.disks
    )
    memory = snapshot.memory
    if memory.mode is MemoryMode.EXTERNAL and memory.file is not None:
        memory = replace(memory, digest=file_digest(memory.file))
    return replace(snapshot, disks=disks, memory=memory)


def file_digest(path: str) -> str:
    """xxh3-128 of all bytes of a file, as hexadecimal digits. Raises DomainSnapshotError."""
    from xxhash import xxh3_128

    digest = xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            while data := file.read(_CHUNK):
                digest.update(data)
    except OSError as error:
        raise DomainSnapshotError(f"{path}: {error.strerror}") from None
    return digest.hexdigest()


def _of_disk(disk: DiskSnapshot, thorough: bool) -> Iterator[str]:
    if disk.mode is DiskMode.NO:
        return
    if not os.path.exists(disk.file):
        yield f"{disk.target}: '{disk.file}' is missing"
        return
    try:
        yield from _internal(disk) if disk.mode is DiskMode.INTERNAL else _external(disk, thorough)
    except qcowlib.QcowError as error:
        yield f"{disk.target}: {error}"
    except DomainSnapshotError as error:
        yield f"{disk.target}: {error}"


def _internal(disk: DiskSnapshot) -> Iterator[str]:
    with _open_alone(disk) as image:
        entries = [entry for entry in image.snapshots if entry.name == disk.internal_name]
        if disk.internal_id is not None:
            entries = [entry for entry in entries if entry.id == disk.internal_id]
        if not entries:
            yield f"{disk.target}: '{disk.file}' has the snapshot '{disk.internal_name}' no more"
            return
        with image.open_snapshot(entries[0]) as view:  # its mapping can be read
            if disk.virtual_size is not None and view.size != disk.virtual_size:
                yield f"{disk.target}: the snapshot's disk has {view.size} bytes instead of {disk.virtual_size}"


def _external(disk: DiskSnapshot, thorough: bool) -> Iterator[str]:
    policy = qcowlib.LocalFiles()
    with qcowlib.open_image(disk.file, format=disk.format, policy=policy, force_share=True) as image:  # and its chain
        if disk.virtual_size is not None and image.size != disk.virtual_size:
            yield f"{disk.target}: '{disk.file}' has {image.size} bytes instead of {disk.virtual_size}"
    if not thorough:
        return
    if disk.format == "qcow2":
        with _open_alone(disk) as image:
            report = qcowlib.check(image)
            bad = [finding for finding in report.findings if finding.severity is not qcowlib.Severity.LEAK]
            if bad:
                yield f"{disk.target}: '{disk.file}' is damaged ({len(bad)} findings; qcow check shows them)"
    if disk.digest is not None and file_digest(disk.file) != disk.digest:
        yield f"{disk.target}: '{disk.file}' has changed since the snapshot was taken"


def _open_alone(disk: DiskSnapshot) -> qcowlib.Qcow2Image:
    image = qcowlib.open_image(disk.file, format="qcow2", open_backing=False, force_share=True)
    if not isinstance(image, qcowlib.Qcow2Image):
        raise DomainSnapshotError(f"'{disk.file}' is not a qcow2 file")
    return image


def _of_memory(snapshot: DomainSnapshot, thorough: bool) -> Iterator[str]:
    memory = snapshot.memory
    if memory.mode is MemoryMode.NO:
        return
    if memory.file is None or not os.path.exists(memory.file):
        yield f"memory: '{memory.file}' is missing"
        return
    try:
        yield from _memory_file(memory, thorough) if memory.mode is MemoryMode.EXTERNAL else _vmstate(snapshot, memory)
    except (qcowlib.QcowError, DomainSnapshotError) as error:
        yield f"memory: {error}"


def _memory_file(memory: MemorySnapshot, thorough: bool) -> Iterator[str]:
    assert memory.file is not None
    size = os.path.getsize(memory.file)
    if memory.size and size != memory.size:
        yield f"memory: '{memory.file}' has {size} bytes instead of {memory.size}"
        return
    facts = memory_file_facts(memory.file)
    if not facts.complete:
        yield f"memory: '{memory.file}' does not end as a whole migration stream does"
    if memory.machine is not None and facts.machine is not None and memory.machine != facts.machine:
        yield f"memory: '{memory.file}' is of a {facts.machine}, not of a {memory.machine}"
    if thorough and memory.digest is not None and file_digest(memory.file) != memory.digest:
        yield f"memory: '{memory.file}' has changed since the snapshot was taken"


def _vmstate(snapshot: DomainSnapshot, memory: MemorySnapshot) -> Iterator[str]:
    assert memory.file is not None
    names = [disk.internal_id for disk in snapshot.disks if disk.file == memory.file and disk.internal_id is not None]
    facts = vmstate_facts(memory.file, names[0] if names else snapshot.name)
    if memory.size and facts.size != memory.size:
        yield f"memory: the vm state in '{memory.file}' has {facts.size} bytes instead of {memory.size}"
    if not facts.complete:
        raise MemoryFileError(f"the vm state in '{memory.file}' does not end as a whole migration stream does")
