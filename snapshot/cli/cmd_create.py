"""domsnap create: take a snapshot."""

from __future__ import annotations

import argparse
import os

from snapshot.catalog import Catalog, remember_directory
from snapshot.cli.output import Progress, disks_text, memory_text
from snapshot.cli.running import finish
from snapshot.cli.selection import Selection, selected
from snapshot.errors import DomainSnapshotError, NotPossible
from snapshot.model import DiskMode, DiskRequest, DomainSnapshot, Liveness, SnapshotRequest, name_from_time
from snapshot.safe_xml import require_writable
from snapshot.step import Step


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    request = build_request(arguments)
    unwritable = _unwritable(request)
    with selected(arguments) as selection:
        try:
            # What cannot be recorded is not taken; the engine says what else is against it.
            result = _create(selection, request, arguments, dry_run=arguments.dry_run or bool(unwritable))
        except NotPossible as error:
            raise NotPossible(error.what, [*unwritable, *error.reasons]) from None
        if unwritable:
            raise NotPossible(f"create snapshot '{request.name}'", unwritable)
        code = finish(result, _describe)
        if isinstance(result, DomainSnapshot) and arguments.catalog is None:
            remember_directory(result.domain, selection.catalog.directory)
        if isinstance(result, DomainSnapshot) and arguments.digest:
            _record_digests(selection.catalog, result, arguments.wait)
    return code


def _record_digests(catalog: Catalog, snapshot: DomainSnapshot, wait: float) -> None:
    """Frozen files do not change any more, so that the guest need not wait for this."""
    from snapshot.journal import Journal
    from snapshot.verify import digested

    try:
        with_digests = digested(snapshot)
        with Journal(catalog.directory).locked(wait):
            catalog.replace(with_digests)
    except DomainSnapshotError as error:
        raise DomainSnapshotError(f"the snapshot was taken, but has no digests: {error}") from error


def build_request(arguments: argparse.Namespace) -> SnapshotRequest:
    """What the options ask for; names of files become absolute."""
    disks: dict[str, DiskRequest] = {}
    for target, mode, file in arguments.disks:
        if target in disks:
            raise DomainSnapshotError(f"--disk {target} is given twice")
        disks[target] = DiskRequest(DiskMode(mode), None if file is None else os.path.abspath(file))
    return SnapshotRequest(
        name=arguments.name if arguments.name is not None else name_from_time("snapshot"),
        disk_only=arguments.disk_only,
        default_mode=None if arguments.mode is None else DiskMode(arguments.mode),
        disks=disks,
        memory_file=None if arguments.memory is None else os.path.abspath(arguments.memory),
        liveness=Liveness.PAUSED if arguments.live is None else Liveness(arguments.live),
        quiesce=arguments.quiesce,
        description=arguments.description,
        numbered=arguments.name is None,
    )


def _create(
    selection: Selection, request: SnapshotRequest, arguments: argparse.Namespace, *, dry_run: bool
) -> DomainSnapshot | list[Step]:
    from snapshot import executor

    progress = Progress(arguments.verbose)
    try:
        return executor.create(
            selection.required, selection.catalog, request, dry_run=dry_run, progress=progress, wait=arguments.wait
        )
    finally:
        progress.clear()


def _unwritable(request: SnapshotRequest) -> list[str]:
    """What XML, and so the catalog, cannot hold."""
    found = []
    for text, what in ((request.name, "the name"), (request.description.replace("\r\n", "\n"), "the description")):
        try:
            require_writable(text, what)
        except ValueError as error:
            found.append(str(error))
    return found


def _describe(snapshot: DomainSnapshot) -> str:
    memory = memory_text(snapshot)
    parts = [snapshot.consistency.value, disks_text(snapshot), "" if memory == "-" else f"memory:{memory}"]
    return f"created snapshot '{snapshot.name}': " + ", ".join(part for part in parts if part)
