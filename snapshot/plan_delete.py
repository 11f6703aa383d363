"""Planning the deletion of a snapshot: the reasons against it, or the steps.

    catalog entry gone  ->  internal: deleted in each file
    (takes effect)          external: frozen file F and overlay O become one file, O into F or F into O
                            other entries and active layers that named the vanished file name the other one
                            memory file and vanished files removed

The entry goes first: nobody can go back to a snapshot that is half merged. Every later step can be done again, so that
an operation that is cut off is finished by `recover`. At every moment the guest's disks read the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snapshot.against import against_state
from snapshot.domain import DomainFacts, same_file
from snapshot.model import DeleteOptions, DiskMode, DiskSnapshot, DomainSnapshot, MemoryMode
from snapshot.step import Step, qmp_command


@dataclass(frozen=True)
class FileFacts:
    """What is true of a file that takes part in a merge.

    Attributes:
        exists: it is there.
        format: "qcow2" or "raw".
        backing, backing_format: the file that it is based on, and its format where the header states it.
        dependents: files that are based on it.
        snapshots: names of the internal snapshots in it.
        size: of its disk, in bytes.
        data: bytes of data in it, which a merge of it has to move.
    """

    exists: bool
    format: str = "raw"
    backing: str | None = None
    backing_format: str | None = None
    dependents: Sequence[str] = ()
    snapshots: Sequence[str] = ()
    size: int = 0
    data: int = 0


@dataclass(frozen=True)
class DeleteRequest:
    """Everything that a deletion depends on.

    Attributes:
        snapshot, others: the one to delete, and the rest of the catalog.
        facts, options, layers: of the domain now; what is asked for; active layers as the journal has them.
        files: facts of every file of the snapshot, by path.
        described: path of each disk in the domain's description, by target.
        raw: files that are raw disks.
        made: overlays that were made by this package: other files are never removed.
        token: for names.
    """

    snapshot: DomainSnapshot
    others: Sequence[DomainSnapshot]
    facts: DomainFacts
    options: DeleteOptions
    layers: Mapping[str, str]
    files: Mapping[str, FileFacts]
    described: Mapping[str, str]
    raw: Sequence[str]
    made: Collection[str]
    token: str


@dataclass(frozen=True)
class Merge:
    """How the two files of one external disk snapshot become one.

    Attributes:
        disk: the disk.
        frozen, overlay: the two files.
        into: "base" or "overlay"; None when neither is possible.
        against: for each direction what is against it.
        moved: for each direction the bytes that it moves at most.
    """

    disk: DiskSnapshot
    frozen: str
    overlay: str
    into: str | None
    against: Mapping[str, Sequence[str]]
    moved: Mapping[str, int]


def merges(request: DeleteRequest) -> list[Merge]:
    """The merges of a deletion: one for each external disk whose overlay is still based on its frozen file."""
    dead = _dead_overlays(request)
    return [
        _merge(request, disk, disk.overlay)
        for disk in request.snapshot.disks
        if disk.mode is DiskMode.EXTERNAL
        and disk.overlay is not None
        and disk.overlay not in dead
        and _based(request, disk)
    ]


def reasons(request: DeleteRequest) -> list[str]:
    """Everything that is against a deletion; empty when it can be done."""
    if request.options.metadata_only:
        return []
    return [*_against_state(request), *_against_internal(request), *_against_merges(request)]


def steps(request: DeleteRequest) -> list[Step]:
    """The steps of a deletion that nothing is against."""
    return list(_steps(request))


def _based(request: DeleteRequest, disk: DiskSnapshot) -> bool:
    facts = request.files.get(disk.overlay or "", FileFacts(False))
    return facts.exists and facts.backing is not None and same_file(facts.backing, disk.file)


def _dead_overlays(request: DeleteRequest) -> list[str]:
    """Overlays of the snapshot that the domain left by a revert, and from which nothing goes on."""
    used = [path for one in request.facts.disks for path in (one.disk.path, *one.disk.backing_chain)]
    used += [one.file for other in request.others for one in other.disks] + list(request.described.values())
    found = []
    for path in (one.overlay for one in request.snapshot.disks if one.overlay is not None):
        facts = request.files.get(path, FileFacts(False))
        alone = facts.exists and not facts.dependents and not facts.snapshots
        if path in request.made and alone and not any(same_file(path, other) for other in used):
            found.append(path)
    return found


def _merge(request: DeleteRequest, disk: DiskSnapshot, overlay: str) -> Merge:
    base, top = request.files[disk.file], request.files[overlay]
    against: dict[str, list[str]] = {"base": [], "overlay": []}
    for other in base.dependents:
        if not same_file(other, overlay):
            against["base"].append(f"'{other}' is based on '{disk.file}' as well")
    for snapshot in request.others:
        if any(one.mode is DiskMode.EXTERNAL and one.file == disk.file for one in snapshot.disks):
            against["base"].append(f"the snapshot '{snapshot.name}' needs '{disk.file}' as it is")
    chains = [(one.disk.path, *one.disk.backing_chain) for one in request.facts.disks]
    if any(same_file(disk.file, path) for chain in chains for path in chain) and not any(
        same_file(overlay, path) for chain in chains for path in chain
    ):
        against["base"].append(f"the domain uses '{disk.file}' without '{overlay}'")
    if any(same_file(overlay, chain[0]) for chain in chains) and top.dependents:
        against["base"].append(f"'{top.dependents[0]}' is based on '{overlay}', which the domain writes")
    if top.snapshots:
        against["base"].append(f"'{overlay}' holds the internal snapshot '{top.snapshots[0]}', which would be lost")
        # Only the active layer gets what it reads from the base: the states inside would read what lies below instead.
        against["overlay"].append(f"'{overlay}' holds the internal snapshot '{top.snapshots[0]}', which reads from it")
    if top.size > base.size:
        against["base"].append(f"'{overlay}' is a larger disk than '{disk.file}'")
    moved = {"base": top.data, "overlay": base.data}
    possible = [way for way in ("base", "overlay") if not against[way] and request.options.into in (None, way)]
    # Copied into its overlay, a file that has to stay would leave the domain, and QEMU could not load from it.
    stays = any(
        one.mode is DiskMode.INTERNAL and same_file(one.file, disk.file)
        for other in request.others
        for one in other.disks
    )
    into = min(possible, key=lambda way: (stays and way == "overlay", moved[way])) if possible else None
    return Merge(disk, disk.file, overlay, into, against, moved)


def _against_state(request: DeleteRequest) -> Iterator[str]:
    if request.facts.active:
        yield from against_state(request.facts)
    for facts in request.facts.disks:
        if facts.in_use is not None:
            yield f"disk {facts.disk.target} is in use by {facts.in_use}"


def _against_internal(request: DeleteRequest) -> Iterator[str]:
    """QEMU deletes in a backing file by name alone."""
    for disk in request.snapshot.disks:
        name = disk.internal_name or request.snapshot.name
        count = list(request.files[disk.file].snapshots).count(name) if disk.file in request.files else 0
        if disk.mode is DiskMode.INTERNAL and _node_below(request, disk.file) is not None and count > 1:
            yield (
                f"disk {disk.target}: '{disk.file}' holds {count} internal snapshots '{name}' and is a backing file "
                "now, where a running QEMU cannot tell them apart: shut the domain down first"
            )


def _node_below(request: DeleteRequest, path: str) -> str | None:
    """The node of a file that a running QEMU has open as a backing file of one of the domain's disks."""
    for facts in request.facts.disks if request.facts.active else ():
        for below, node in zip(facts.disk.backing_chain, facts.chain_nodes, strict=False):
            if same_file(below, path):
                return node
    return None


def _against_merges(request: DeleteRequest) -> Iterator[str]:
    for merge in merges(request):
        if merge.into is None:
            wanted = request.options.into
            for way in ("base", "overlay"):
                if wanted in (None, way):
                    yield from (f"disk {merge.disk.target}: {reason}" for reason in merge.against[way])


def _steps(request: DeleteRequest) -> Iterator[Step]:
    snapshot = request.snapshot
    inside = [disk for disk in snapshot.disks if disk.mode is DiskMode.INTERNAL and not request.options.metadata_only]
    nodes = {disk.file: _node_below(request, disk.file) for disk in inside}
    below = {path: node for path, node in nodes.items() if node is not None}
    for path, node in below.items():
        commands = tuple(reopen_command(node, writable=writable) for writable in (True, False))
        yield Step("try-writing", {"path": path}, f"see that QEMU can write the backing file '{path}'", commands,
                   undo="it only reads it")  # fmt: skip
    yield Step("decide", {}, f"delete '{snapshot.name}': from here on only forward", commits=True)
    yield Step("forget", {"name": snapshot.name}, f"take '{snapshot.name}' out of the catalog")
    if request.options.metadata_only:
        return
    for disk in inside:
        name = disk.internal_name or snapshot.name
        arguments = {"name": name, "id": disk.internal_id, "path": disk.file}
        commands = _delete_commands(below[disk.file], name) if disk.file in below else ()
        yield Step("remove-internal", arguments, f"delete the internal snapshot in '{disk.file}'", commands)
    for number, merge in enumerate(merges(request)):
        yield from _merge_steps(request, merge, f"ds-{request.token}-{number}")
    for path in _dead_overlays(request):
        yield Step("remove-file", _removed(request, path), f"remove '{path}', which nothing goes on from")
    memory = snapshot.memory
    shared = any(other.memory.file == memory.file for other in request.others)
    if memory.mode is MemoryMode.EXTERNAL and memory.file is not None and not shared:
        yield Step("remove-file", {"path": memory.file, "image": False}, f"remove the memory file '{memory.file}'")


def _removed(request: DeleteRequest, path: str) -> dict[str, Any]:
    return {"path": path, "image": True, "raw": list(request.raw)}


def _delete_commands(node: str, name: str) -> tuple[dict[str, Any], ...]:
    delete = qmp_command("snapshot-delete", job_id="ds-delete-below", tag=name, devices=[node])
    return reopen_command(node, writable=True), delete, reopen_command(node, writable=False)


def reopen_command(node: str, *, writable: bool) -> dict[str, Any]:
    """The command that lets QEMU write a node from now on, or only read it, its other options as they are."""
    line = f'qemu-io {node} "reopen -{"w" if writable else "r"}"'
    return qmp_command("human-monitor-command", command_line=line)


def _merge_steps(request: DeleteRequest, merge: Merge, job: str) -> Iterator[Step]:
    frozen, overlay, target = merge.frozen, merge.overlay, merge.disk.target
    base = request.files[frozen]
    moved = f"{merge.moved[merge.into or 'base']} bytes"
    arguments = {"frozen": frozen, "format": base.format, "overlay": overlay, "job": job}
    if merge.into == "base":
        children = list(request.files[overlay].dependents)
        text = f"merge '{overlay}' into '{frozen}' ({moved})"
        yield Step("merge-down", arguments | {"children": children}, text, _job_commands(request, merge, job))
        yield Step("rename", {"old": overlay, "new": frozen, "format": base.format, "target": target,
                              "described": request.described.get(target)}, f"'{frozen}' takes its place")  # fmt: skip
        yield Step("remove-file", _removed(request, overlay), f"remove '{overlay}'")
        return
    text = f"merge '{frozen}' into '{overlay}' ({moved})"
    yield Step(
        "merge-up",
        arguments | {"below": base.backing, "below_format": base.backing_format},
        text,
        _job_commands(request, merge, job),
    )
    needed = any(one.file == frozen for other in request.others for one in other.disks)
    others = [path for path in base.dependents if not same_file(path, overlay)]
    if frozen in request.made and not needed and not others:
        yield Step("rename", {"old": frozen, "new": overlay, "format": "qcow2", "target": target, "described": None},
                   f"'{overlay}' takes its place")  # fmt: skip
        yield Step("remove-file", _removed(request, frozen), f"remove '{frozen}'")


def _job_commands(request: DeleteRequest, merge: Merge, job: str) -> tuple[dict[str, Any], ...]:
    """The job of a running QEMU that has both files open; otherwise the merge is done here, without one."""
    for facts in request.facts.disks if request.facts.active else ():
        nodes = dict(zip((facts.disk.path, *facts.disk.backing_chain), (facts.node, *facts.chain_nodes), strict=False))
        top, base = nodes.get(merge.overlay), nodes.get(merge.frozen)
        if top is None or base is None:
            continue
        if merge.into == "overlay":
            below = list(nodes.values())[list(nodes.values()).index(base) + 1 :]
            lower = {"base_node": below[0]} if below else {}
            return (qmp_command("block-stream", job_id=job, device=top, **lower),)
        middle = {} if top == facts.node else {"top_node": top}
        return (qmp_command("block-commit", job_id=job, device=facts.node, base_node=base, **middle),)
    return ()
