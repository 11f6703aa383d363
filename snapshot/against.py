"""What is against a snapshot: all reasons at once, before anything is touched. No I/O.

Resolved (snapshot.plan) + PathFacts of the named files + names in the catalog -> reasons
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping

from snapshot.domain import DomainFacts
from snapshot.model import DiskMode, Liveness, MemoryMode
from snapshot.plan import DiskPlan, PathFacts, Resolved

_OVERLAY_SPACE = 1 << 20  # a fresh overlay, and what an internal snapshot of the disk alone adds
_MEMORY_MARGIN = 16 << 20  # devices, and pages that are sent twice
_MAX_NAME = 200  # it becomes part of file names
_MAX_FILE_NAME = 255
#: States in which QEMU can take a snapshot.
_USABLE_STATES = ("running", "paused", "prelaunch")
_FORMATS = ("qcow2", "raw")
#: What to do about nodes that stand over an image, or are something else.
_ADVICE = {
    "throttle": ": limits set with block_set_io_throttle, or with throttling options of -drive, need no such node",
    "copy-on-read": ": start the domain without copy-on-read",
    "luks": ": LUKS in a qcow2 file (encrypt.format=luks) can have snapshots inside",
}


def reasons(resolved: Resolved, host: Mapping[str, PathFacts], taken: Collection[str]) -> list[str]:
    """Everything that is against a snapshot; empty when it can be taken.

    Args:
        resolved: what is to be done.
        host: facts of all `resolved.paths()`.
        taken: names in the catalog.
    """
    return [
        *_against_name(resolved, taken),
        *_against_domain(resolved),
        *(reason for plan in resolved.disks for reason in _against_disk(resolved, plan)),
        *_against_files(resolved, host),
        *_against_space(resolved, host),
    ]


def name_reasons(name: str) -> Iterator[str]:
    """What is against a name in itself."""
    if not name:
        yield "the name is empty"
    if len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME:
        yield f"the name is longer than {_MAX_NAME} bytes"
    if "/" in name or name.startswith(".") or any(ord(char) < 32 for char in name):
        yield f"the name {name!r} cannot be part of a file name (no '/', no control characters, no leading '.')"
    if name.strip().isdigit():
        yield f"the name '{name}' reads as a number, so that it could be taken for a snapshot's id"


def _against_name(resolved: Resolved, taken: Collection[str]) -> Iterator[str]:
    name = resolved.request.name
    yield from name_reasons(name)
    if name in taken:
        yield f"the catalog has a snapshot '{name}' already"
    for plan in resolved.disks:
        if any(name in (stored.name, stored.id) for stored in plan.facts.snapshots):
            yield f"disk {plan.facts.disk.target} has an internal snapshot '{name}' already"


def _against_domain(resolved: Resolved) -> Iterator[str]:
    request, facts = resolved.request, resolved.facts
    for target in resolved.unknown:
        yield f"the domain has no disk '{target}'"
    if all(plan.mode is DiskMode.NO for plan in resolved.disks):
        yield "no disk takes part"
    if request.disk_only and request.memory_file is not None:
        yield "a disk-only snapshot has no memory file"
    if request.disk_only and request.liveness is not Liveness.PAUSED:
        yield "a disk-only snapshot never stops the guest: live and background are about memory"
    if not facts.active:
        yield from _against_inactive(resolved)
        return
    yield from against_state(facts)
    if request.quiesce:
        if not request.disk_only:
            yield "quiesce is for disk-only snapshots: with memory the file systems' state is in the memory"
        if facts.agent_socket is None:
            yield "quiesce needs the guest agent, and its socket is not known"
        if facts.run_state != "running":
            yield "quiesce needs a running guest"
    if (resolved.memory is MemoryMode.INTERNAL or resolved.standing) and (facts.version or (0,)) < (6,):
        what = "memory of a guest that stands needs" if resolved.standing else "internal memory snapshots need"
        yield f"{what} QEMU 6.0 (snapshot-save)"
    if resolved.memory_disk is not None and resolved.memory_disk.encrypted:
        yield "QEMU cannot write memory into an encrypted image (7.2 dies of it): put it into a file (--memory FILE)"
    if not request.disk_only:
        yield from (f"QEMU cannot save this machine: {blocker}" for blocker in facts.blockers)


def against_state(facts: DomainFacts) -> Iterator[str]:
    """What QEMU's own state has against any change."""
    if facts.stranger:
        yield "QEMU has none of the disks open that the domain's description names: is this another domain's socket?"
    if facts.run_state == "postmigrate":
        yield "the guest stands after a finished migration (postmigrate): resume it first"
    elif facts.run_state not in _USABLE_STATES:
        yield f"the guest is in state {facts.run_state}"
    if facts.migration is not None:
        yield f"a migration is under way ({facts.migration})"
    for job in facts.jobs:
        yield f"the job '{job}' is under way"


def _against_inactive(resolved: Resolved) -> Iterator[str]:
    if not resolved.request.disk_only:
        yield "the domain is not started, so it has no memory: only a disk-only snapshot can be taken"
    if resolved.request.quiesce:
        yield "the domain is not started: there is nothing to quiesce"


def _against_disk(resolved: Resolved, plan: DiskPlan) -> Iterator[str]:
    facts, disk = plan.facts, plan.facts.disk
    label = f"disk {disk.target}"
    if plan.mode is DiskMode.NO:
        if not resolved.request.disk_only and not disk.read_only:
            yield f"{label} can be written and is left out: after a revert it would not fit the memory"
        return
    if disk.read_only:
        yield f"{label} is read-only"
    if facts.damaged is not None:
        yield f"{label}: {facts.damaged}"
    if facts.in_use is not None:
        where = "" if resolved.facts.active else "; give its QMP socket, or shut the domain down"
        yield f"{label} is in use by {facts.in_use}{where}"
    if facts.driver not in _FORMATS:
        advice = _ADVICE.get(facts.driver, "")
        yield f"{label}: its top node is a '{facts.driver}', no image that can be snapshotted{advice}"
    if not os.path.isabs(disk.path):
        yield f"{label} was opened by the relative name '{disk.path}', which would break the backing chain"
    if plan.mode is DiskMode.INTERNAL:
        yield from _against_internal(plan, label)
    elif facts.encrypted:
        yield (
            f"{label} is encrypted: a plain overlay would hold what the guest writes from now on in the clear, and "
            "every layer of an encrypted chain would need its key in each start command; take it inside its file "
            f"(--disk {disk.target}:internal)"
        )


def _against_internal(plan: DiskPlan, label: str) -> Iterator[str]:
    facts = plan.facts
    if facts.disk.format != "qcow2":
        yield f"{label} is {facts.disk.format}: internal snapshots need qcow2"
    if facts.data_file:
        yield f"{label} has an external data file: internal snapshots are not possible"
    for bitmap in facts.bitmaps:
        yield f"{label} has the dirty bitmap '{bitmap}': an internal snapshot could not be reverted to"
    if facts.refcount_bits is not None and (1 << facts.refcount_bits) - 1 < len(facts.snapshots) + 2:
        yield (
            f"{label}: refcounts of {facts.refcount_bits} bits cannot count {len(facts.snapshots) + 1} snapshots "
            "and the active layer"
        )


def _against_files(resolved: Resolved, host: Mapping[str, PathFacts]) -> Iterator[str]:
    for plan in resolved.disks:
        path = plan.facts.disk.path
        if plan.mode is not DiskMode.NO and os.path.isabs(path) and not host[path].exists:
            yield f"disk {plan.facts.disk.target}: there is no '{path}' here (another mount name space, or removed)"
    seen: set[str] = set()
    for path in resolved.new_files():
        if not os.path.isabs(path):
            yield f"'{path}' is a relative name; give an absolute one"
            continue
        if os.path.normpath(path) in seen:
            yield f"'{path}' is to be made twice"
        seen.add(os.path.normpath(path))
        if len(os.path.basename(path).encode("utf-8", "surrogateescape")) > _MAX_FILE_NAME:
            yield f"the file name of '{path}' is longer than {_MAX_FILE_NAME} bytes"
        facts = host[path]
        if facts.exists:
            yield f"'{path}' exists already, and would be overwritten"
        if not facts.directory:
            yield f"the directory of '{path}' does not exist or cannot be written"


def _against_space(resolved: Resolved, host: Mapping[str, PathFacts]) -> Iterator[str]:
    """Sums by file system; the memory counts with its full size, since nobody can tell how much of it is zeroes."""
    needed: dict[int, int] = {}
    example: dict[int, str] = {}

    def need(path: str, size: int) -> None:
        if path in host and (host[path].directory or host[path].exists):
            device = host[path].device
            needed[device] = needed.get(device, 0) + size
            example.setdefault(device, path)

    memory = (resolved.facts.ram_size or 0) + _MEMORY_MARGIN
    for plan in resolved.disks:
        if plan.mode is not DiskMode.NO:
            need(plan.overlay or plan.facts.disk.path, _OVERLAY_SPACE)
    if resolved.memory_disk is not None:
        need(resolved.memory_disk.disk.path, memory)
    if resolved.memory_file is not None:
        need(resolved.memory_file, memory * (2 if resolved.standing else 1))  # first into an image, then copied
    for device, size in needed.items():
        free = host[example[device]].free
        if free < size:
            yield f"{free} bytes are free where '{example[device]}' is, and up to {size} are needed"
