"""domsnap delete: delete a snapshot."""

from __future__ import annotations

import argparse

from snapshot.cli.output import Progress
from snapshot.cli.running import finish
from snapshot.cli.selection import selected
from snapshot.model import DeleteOptions


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    from snapshot import executor

    options = DeleteOptions(children=arguments.children, metadata_only=arguments.metadata_only, into=arguments.into)
    progress = Progress(arguments.verbose)
    with selected(arguments) as selection:
        try:
            result = executor.delete(
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

    return finish(result, lambda names: "\n".join(f"deleted snapshot '{name}'" for name in names))
