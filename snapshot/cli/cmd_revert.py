"""domsnap revert: go back to a snapshot."""

from __future__ import annotations

import argparse

from snapshot.cli.output import Progress
from snapshot.cli.running import finish
from snapshot.cli.selection import selected
from snapshot.model import RevertOptions


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    from snapshot import executor

    options = RevertOptions(
        running=arguments.running,
        disks=None if arguments.disks is None else tuple(arguments.disks),
        discard_current=arguments.discard_current,
        safety_name=arguments.safety,
    )
    progress = Progress(arguments.verbose)
    with selected(arguments) as selection:
        try:
            result = executor.revert(
                selection.required,
                selection.catalog,
                arguments.name,
                options,
                dry_run=arguments.dry_run,
                progress=progress,
                wait=arguments.wait,
            )
        finally:
            progress.clear()

    return finish(result, lambda snapshot: f"reverted to snapshot '{snapshot.name}'")
