"""Asking for everything that a plan depends on: the domain, the catalog, the files."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence

import qcowlib
from snapshot import offline, plan_delete
from snapshot.copies import state_facts
from snapshot.domain import ActiveDomain, Domain, DomainFacts, StoredSnapshot, backing_file, backing_paths, same_file
from snapshot.errors import NoSuchDomainSnapshot, QmpError
from snapshot.foreign import found_in_files, stored_in
from snapshot.journal import Journal
from snapshot.model import (
    DeleteOptions,
    DiskMode,
    DiskRequest,
    DomainSnapshot,
    RevertOptions,
    SnapshotRequest,
    name_from_time,
)
from snapshot.plan import PathFacts
from snapshot.plan_revert_request import RevertRequest
from snapshot.session import Store


def delete_request(
    domain: Domain, catalog: Store, journal: Journal, name: str, options: DeleteOptions
) -> plan_delete.DeleteRequest:
    """What a deletion depends on."""
    layers = journal.layers()
    facts, description = domain.facts(layers), domain.description
    snapshot = find(catalog, name, facts)
    known = known_files(catalog, facts)
    files = {disk.overlay: "qcow2" for disk in snapshot.disks if disk.overlay is not None}
    files |= {disk.file: disk.format for disk in snapshot.disks}
    raw = raw_files(catalog, facts)
    based = offline.dependents(files, known, raw)
    return plan_delete.DeleteRequest(
        snapshot=snapshot,
        others=[one for one in catalog.load() if one.name != name],
        facts=facts,
        options=options,
        layers=layers,
        files={path: _file_facts(path, files[path], based[path]) for path in files},
        described={} if description is None else {disk.target: disk.path for disk in description.disks},
        raw=sorted(raw),
        made=journal.made(),
        token=secrets.token_hex(4),
    )


def _file_facts(path: str, image_format: str, based: list[str]) -> plan_delete.FileFacts:
    if not os.path.exists(path):
        return plan_delete.FileFacts(False)
    with qcowlib.open_image(path, format=image_format, open_backing=False, force_share=True) as image:
        size, names = image.size, [stored.name for stored in image.snapshots]
    below = backing_file(path) if image_format == "qcow2" else None
    return plan_delete.FileFacts(
        exists=True,
        format=image_format,
        backing=None if below is None else below.path,
        backing_format=None if below is None else below.format,
        dependents=based,
        snapshots=names,
        size=size,
        data=offline.data_bytes(path, image_format),
    )


def find(catalog: Store, name: str, facts: DomainFacts) -> DomainSnapshot:
    """A snapshot of the catalog; else one that somebody else has made in the domain's files.

    Raises:
        NoSuchDomainSnapshot: there is none of that name.
    """
    known = catalog.load()
    found = [one for one in known if one.name == name]
    if not found:
        found = [one for one in found_in_files(facts, known) if one.name == name]
    if found:
        return found[0]
    raise NoSuchDomainSnapshot(f"there is no snapshot '{name}'")


def revert_request(
    domain: Domain, catalog: Store, journal: Journal, snapshot: DomainSnapshot, options: RevertOptions
) -> RevertRequest:
    """What a revert depends on."""
    layers = journal.layers()
    facts, description = domain.facts(layers), domain.description
    disks = [disk for disk in snapshot.disks if disk.mode is not DiskMode.NO]
    files = [disk.file for disk in disks]
    known = known_files(catalog, facts)
    wanted = [*files, snapshot.memory.file] if options.disks is None else files
    based = offline.dependents(files, known, raw_files(catalog, facts))
    frozen = {d.file for one in catalog.load() for d in one.disks if d.mode is DiskMode.EXTERNAL}
    tops = {one.disk.path: one.snapshots for one in facts.disks}
    inside = [disk for disk in disks if disk.mode is DiskMode.INTERNAL and os.path.exists(disk.file)]
    return RevertRequest(
        snapshot=snapshot,
        facts=facts,
        options=options,
        described={} if description is None else {disk.target: disk.path for disk in description.disks},
        command=() if description is None else tuple(description.command),
        memory_files=_memory_files(domain),
        folder=None if description is None else description.folder,
        socket=_socket(domain),
        layers=layers,
        current=catalog.current,
        token=secrets.token_hex(4),
        directory=journal.directory,
        dependents=based,
        frozen=frozen,
        stored={disk.file: _stored(disk.file, tops) for disk in inside},
        states={
            disk.file: state_facts(disk.file, disk.internal_name or snapshot.name, _free(disk.file))
            for disk in inside
            if based[disk.file] or disk.file in frozen or not any(same_file(disk.file, top) for top in tops)
        },
        missing=[path for path in wanted if path is not None and not os.path.exists(path)],
        stems={path: _stem(path, journal.made()) for path in files},
    )


def _stored(path: str, tops: Mapping[str, Sequence[StoredSnapshot]]) -> Sequence[StoredSnapshot]:
    """The internal snapshots in a file, as QEMU says where it writes the file."""
    found = [snapshots for top, snapshots in tops.items() if same_file(path, top)]
    return found[0] if found else stored_in(path)


def _free(path: str) -> int:
    status = os.statvfs(os.path.dirname(path) or ".")
    return status.f_bavail * status.f_frsize


def _memory_files(domain: Domain) -> list[str]:
    """Files that a running guest's memory lies in, so that whoever opens them changes it."""
    if not isinstance(domain, ActiveDomain):
        return []
    found: list[str] = []
    for one in domain.qmp.execute("query-memdev"):
        where = {"path": f"/objects/{one.get('id')}", "property": "mem-path"}
        with contextlib.suppress(QmpError):  # no such property: the memory is in no file
            found.append(str(domain.qmp.execute("qom-get", where)) if one["share"] else "")
    return [path for path in found if os.path.isfile(path)]  # not the directory of huge pages


def _stem(path: str, made: set[str]) -> str:
    """The nearest file below that was not made here, without its suffix."""
    chain = [path, *backing_paths(path)] if path in made and os.path.exists(path) else [path]
    return os.path.splitext(next((one for one in chain if one not in made), chain[-1]))[0]


def _socket(domain: Domain) -> str | None:
    if isinstance(domain, ActiveDomain):
        return domain.qmp.path
    return None if domain.description is None else domain.description.qmp_socket


def known_files(catalog: Store, facts: DomainFacts) -> set[str]:
    """Every disk file that the domain has or had."""
    files = {path for one in facts.disks for path in (one.disk.path, *one.disk.backing_chain)}
    for snapshot in catalog.load():
        files.update(path for disk in snapshot.disks for path in (disk.file, disk.overlay) if path is not None)
    return files


def raw_files(catalog: Store, facts: DomainFacts) -> set[str]:
    """Files of the domain that are raw disks."""
    files = {one.disk.path for one in facts.disks if one.disk.format == "raw"}
    return files | {disk.file for snapshot in catalog.load() for disk in snapshot.disks if disk.format == "raw"}


def safety_request(request: RevertRequest) -> SnapshotRequest:
    """Keep the present state in a way that leaves the files that the revert needs alone."""
    name = request.options.safety_name or name_from_time("before-revert")
    inside = any(disk.mode is DiskMode.INTERNAL for disk in request.chosen)
    return SnapshotRequest(
        name,
        disk_only=not request.facts.active,
        default_mode=None if inside else DiskMode.EXTERNAL,
        description=f"before the revert to '{request.snapshot.name}'",
        disks={one.disk.target: DiskRequest(DiskMode.NO) for one in request.facts.disks if one.disk.read_only},
        numbered=request.options.safety_name is None,
    )


def host_facts(paths: set[str]) -> dict[str, PathFacts]:
    """What the host says about file names."""
    found = {}
    for path in paths:
        directory = os.path.dirname(path) or "."
        usable = os.path.isdir(directory) and os.access(directory, os.W_OK | os.X_OK)
        free, device = 0, -1
        if os.path.isdir(directory):
            status = os.statvfs(directory)
            free, device = status.f_bavail * status.f_frsize, os.stat(directory).st_dev
        found[path] = PathFacts(os.path.lexists(path), usable, free, device)
    return found
