"""domsnap recover: undo or finish the operation that was cut off."""

from __future__ import annotations

import argparse

from snapshot.cli.output import Progress, plain
from snapshot.cli.selection import selected
from snapshot.cli.syntax import DONE


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    from snapshot import executor

    progress = Progress(arguments.verbose)
    with selected(arguments) as selection:
        try:
            done = executor.recover(selection.required, selection.catalog, progress=progress, wait=arguments.wait)
        finally:
            progress.clear()
    print("\n".join(plain(line) for line in done) if done else "nothing to recover")
    return DONE
