"""domsnap list: the snapshots of a domain, as a table, a tree or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

from snapshot.cli.found import all_snapshots
from snapshot.cli.output import as_json, disks_text, memory_text, plain, table, when
from snapshot.cli.selection import selected
from snapshot.cli.syntax import DONE
from snapshot.model import DomainSnapshot


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    with selected(arguments) as selection:
        snapshots = all_snapshots(selection)
        current = selection.catalog.current
    if arguments.output == "json":
        print(json.dumps({"current": current, "snapshots": [as_json(each) for each in snapshots]}, indent=4))
    elif arguments.tree:
        print("".join(f"{line}\n" for line in tree_lines(snapshots, current)), end="")
    elif snapshots:
        print(table(_rows(snapshots, current, arguments.long)))
    return DONE


def _rows(snapshots: Sequence[DomainSnapshot], current: str | None, long: bool) -> list[list[str]]:
    """A heading, then one row for each; "*" marks the current one, "+" those that only the files know."""
    rows = [["", "NAME", "CREATED", "CONSISTENCY", "STATE", *(["MEMORY", "DISKS", "PARENT", "DESCRIPTION"] * long)]]
    for each in snapshots:
        mark = "+" if each.foreign else "*" if each.name == current else ""
        worth = "unknown" if each.foreign and each.consistency.value == "crash-consistent" else each.consistency.value
        row = [mark, each.name, when(each.creation_time), worth, each.state.value]
        if long:
            first_line = each.description.split("\n")[0]
            row += [memory_text(each), disks_text(each), each.parent or "-", first_line]
        rows.append(row)
    return rows


def tree_lines(snapshots: Sequence[DomainSnapshot], current: str | None) -> Iterator[str]:
    """The tree of the catalog's snapshots, then the others; parents that are missing or go round make roots."""
    ours = [each for each in snapshots if not each.foreign]
    names = {each.name for each in ours}
    children: dict[str | None, list[str]] = {}
    for each in ours:
        children.setdefault(each.parent if each.parent in names else None, []).append(each.name)
    shown: set[str] = set()
    roots = [*children.get(None, []), *(each.name for each in ours)]
    for root in roots:
        stack = [(root, "", "")]
        while stack:
            name, start, indent = stack.pop()
            if name in shown:
                continue
            shown.add(name)
            yield f"{start}{plain(name)}{' (current)' if name == current else ''}"
            below = [child for child in children.get(name, []) if child not in shown]
            for number, child in reversed(list(enumerate(below))):
                last = number == len(below) - 1
                stack.append((child, f"{indent}+- ", indent + ("   " if last else "|  ")))
    for each in snapshots:
        if each.foreign:
            yield f"{plain(each.name)} (only in the files)"
