"""The snapshots that the user sees: the catalog's, and those that only the domain's files know."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from snapshot.cli.output import plain
from snapshot.cli.selection import Selection
from snapshot.errors import DomainSnapshotError, NoSuchDomainSnapshot
from snapshot.model import DomainSnapshot

if TYPE_CHECKING:
    from snapshot.domain import DomainFacts


def all_snapshots(selection: Selection) -> list[DomainSnapshot]:
    """Both kinds, oldest first. What keeps files from being looked into is said on standard error."""
    known = selection.catalog.load()
    say_pending(selection)
    facts = _facts(selection)
    if facts is None:
        return known
    for disk in facts.disks:
        if disk.damaged is not None:
            _note(f"{disk.disk.target}: {disk.damaged}")
        elif disk.in_use is not None and not facts.active:
            _note(f"{disk.disk.target} is used by {disk.in_use}: snapshots that only its file knows are not shown")
    from snapshot.foreign import found_in_files

    both = [*known, *found_in_files(facts, known)]
    return sorted(both, key=lambda snapshot: (snapshot.creation_time, snapshot.name))


def find_snapshot(selection: Selection, name: str) -> DomainSnapshot:
    """One snapshot, the catalog's first; raises NoSuchDomainSnapshot."""
    found = [snapshot for snapshot in all_snapshots(selection) if snapshot.name == name]
    if not found:
        raise NoSuchDomainSnapshot(f"there is no snapshot '{name}'")
    return min(found, key=lambda snapshot: snapshot.foreign)


def say_pending(selection: Selection) -> None:
    """Say that an operation was cut off, if one was."""
    from snapshot.journal import Journal

    if not os.path.isdir(selection.catalog.directory):
        return
    pending = Journal(selection.catalog.directory).pending()
    if pending is not None:
        operation = pending.operation
        _note(f"the {operation.kind} of '{operation.name}' was cut off, or is under way: see domsnap recover")


def _facts(selection: Selection) -> DomainFacts | None:
    if selection.domain is None:
        return None
    from snapshot.journal import Journal

    try:
        return selection.domain.facts(Journal(selection.catalog.directory).layers())
    except DomainSnapshotError as error:
        _note(f"the domain cannot be looked at: {error}")
        return None


def _note(text: str) -> None:
    print(f"domsnap: note: {plain(text)}", file=sys.stderr)
