"""qcow snapshot: the snapshots inside an image."""

from __future__ import annotations

from qcowlib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    PROGRESS,
    QUIET,
    CommandFailed,
    one_filename,
    report,
    stock_errno,
    stock_text,
    wants_json,
)
from qcowlib.cli.opening import image_name, open_image_name, open_image_name_for_writing, with_known_format
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError
from qcowlib.cli.qapi import dumps
from qcowlib.cli.snapshot_text import print_snapshot_table, snapshot_members
from qcowlib.errors import FormatError, NoSuchSnapshot, QcowError

SYNTAX = Syntax(
    "snapshot",
    "[OPTIONS] [-l | -a SNAPSHOT | -c NAME | -d NAME | [-n] --export DIR | [-n] --import CHAIN] FILE",
    (
        FORMAT,
        Option("list", "l", "list", None, "list the snapshots, also without any of these; times are local"),
        Option(
            "apply", "a", "apply", "SNAPSHOT", "make the disk what it was, size included; SNAPSHOT is an id or a name"
        ),
        Option("create", "c", "create", "NAME", "keep the present state of the disk under a name"),
        Option(
            "delete",
            "d",
            "delete",
            "NAME",
            "delete the first snapshot of this name and give its space back to the image",
        ),
        Option("export", "", "export", "DIR", "write all states as a chain of overlays into a new directory"),
        Option("import", "", "import", "CHAIN", "make FILE from an exported directory, or from the top of any chain"),
        Option("dry-run", "n", "dry-run", None, "with --export and --import: tell what would be written"),
        PROGRESS,
        OUTPUT,
        QUIET,
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "For -l, -a, -c and -d the backing file is not opened. For -a an id wins over a name. An export keeps the names,\n"
    "times and saved memory of snapshots, and an import brings them back; layers of other chains become snapshots\n"
    "that are named like their files. Both only read their source, and can be done again after an interruption.\n"
    "Exit codes: 0 done, 1 not done and nothing changed.",
)

_ACTIONS = ("list", "apply", "create", "delete", "export", "import")


def run(arguments: Arguments) -> int:
    """List, apply, create or delete."""
    actions = [(action, name) for action, name in arguments.options if action in _ACTIONS]
    if len(actions) > 1:
        raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    filename = one_filename(arguments)
    as_json = wants_json(arguments)
    if any(arguments.has(name) for name in ("export", "import")):
        from qcowlib.cli.snapshot_chain import run_chain

        return run_chain(arguments, filename)
    for name in ("dry-run", "progress"):
        if arguments.has(name):
            raise CommandFailed(f"--{name} is for --export and --import")
    action, snapshot = actions[0] if actions else ("list", "")
    if action == "list":
        return _list(arguments, filename, as_json)
    if as_json:
        raise CommandFailed("--output=json is for -l")
    if arguments.has("force-share"):
        raise CommandFailed(f"Could not open '{filename}': force-share=on can only be used with read-only images")
    return _change(arguments, filename, action, snapshot)


def _list(arguments: Arguments, filename: str, as_json: bool) -> int:
    force_share = arguments.has("force-share")
    with open_image_name(image_name(arguments, filename), force_share=force_share, open_backing=False) as image:
        snapshots = list(getattr(image, "snapshots", ()))
    if as_json:
        print(dumps([snapshot_members(entry) for entry in snapshots]))
    elif snapshots:
        print_snapshot_table(snapshots)
    return 0


def _change(arguments: Arguments, filename: str, action: str, snapshot: str) -> int:
    name = with_known_format(image_name(arguments, filename))
    with open_image_name_for_writing(name, open_backing=False) as image:
        from qcowlib.image.qcow2 import find_snapshot
        from qcowlib.image.writable import WritableQcow2Image
        from qcowlib.operations.snapshots import apply_snapshot, create_snapshot, delete_snapshot

        if not isinstance(image, WritableQcow2Image):
            raise CommandFailed(f"Could not {action} snapshot '{snapshot}': {_UNSUPPORTED[action]}")
        try:
            if action == "create":
                create_snapshot(image, snapshot)
            elif action == "apply":
                apply_snapshot(image, snapshot)
            else:
                delete_snapshot(image, find_snapshot(image.snapshots, name=snapshot))  # by name alone, as qemu-img
        except NoSuchSnapshot:
            raise CommandFailed(f"Could not {action} snapshot '{snapshot}': {_MISSING[action]}") from None
        except QcowError as error:
            raise CommandFailed(f"Could not {action} snapshot '{snapshot}': {_reason(action, error)}") from error
    return 0


def _reason(action: str, error: QcowError) -> str:
    """Why it was not done, as qemu-img puts it: for two of the actions it knows an error number only."""
    words = stock_errno(error)
    if words is None or action == "delete":
        return stock_text(error)
    if action == "create":
        return f"-{error.errno} ({words})"
    if isinstance(error, FormatError):
        report(stock_text(error))
    return f"Failed to load snapshot: {words}"


# What a raw image answers, and a snapshot that is not there.
_UNSUPPORTED = {
    "create": "-95 (Operation not supported)",
    "apply": "Block driver does not support snapshots",
    "delete": "snapshot not found",
}
_MISSING = {"apply": "Failed to load snapshot: No such file or directory", "delete": "snapshot not found"}
