"""qcow space: where the bytes of an image file are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowlib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    CommandFailed,
    one_filename,
    wants_json,
    warn_of_sharing,
)
from qcowlib.cli.opening import image_name, open_image_name
from qcowlib.cli.options import Arguments, Syntax
from qcowlib.errors import QcowError
from qcowlib.units import format_size

if TYPE_CHECKING:
    from qcowlib.operations.space import ImageSpace, StateSpace

SYNTAX = Syntax(
    "space",
    "[--output=human|json] [-U] FILENAME",
    (FORMAT, OUTPUT, OBJECT, IMAGE_OPTS, FORCE_SHARE),
    "Sizes are whole clusters of the file. EXCLUSIVE is what only this state uses: deleting the snapshot frees it.\n"
    "SHARED is used by other states, too. Of both together, TABLES are L1 and L2 tables, VMSTATE is saved memory.\n"
    "Only the metadata of this one file is read.\n"
    "Exit codes: 0 shown, 1 failed.",
)

SHAPE_VERSION = 1


def run(arguments: Arguments) -> int:
    """Show the space of one image."""
    filename = one_filename(arguments)
    as_json = wants_json(arguments)
    name = image_name(arguments, filename)
    with open_image_name(name, force_share=warn_of_sharing(arguments), open_backing=False) as image:
        from qcowlib.image.qcow2 import Qcow2Image
        from qcowlib.operations.space import image_space

        if not isinstance(image, Qcow2Image):
            raise CommandFailed("This image format does not support this: it has no metadata")
        try:
            space = image_space(image)
        except QcowError as error:
            raise CommandFailed(f"Could not count the space of '{name.text}': {error}") from error
    if as_json:
        _print_json(name.shown, space)
    else:
        _print_table(space)
    return 0


def _print_table(space: ImageSpace) -> None:
    print(f"{'ID':<10}{'TAG':<20}{'EXCLUSIVE':>12}{'SHARED':>12}{'TABLES':>12}{'VMSTATE':>12}")
    for state in space.states:
        identity, tag = ("-", "(active layer)") if state.snapshot is None else (state.snapshot.id, state.snapshot.name)
        sizes = (state.exclusive, state.shared, state.tables, state.vmstate)
        text = "".join(f"{format_size(size):>12}" for size in sizes) if state.damage is None else f"  {state.damage}"
        print(f"{identity:<9} {tag:<19} {text}")
    for what, size in _totals(space).items():
        print(f"{what + ':':<20}{format_size(size)} ({size} bytes)")


def _totals(space: ImageSpace) -> dict[str, int]:
    return {
        "file length": space.file_length,
        "all states": space.mapped,
        "refcounts": space.refcounts,
        "other metadata": space.other_metadata,
        "bitmaps": space.bitmaps,
        "leaked": space.leaked,
        "free": space.free,
    }


def _print_json(filename: str, space: ImageSpace) -> None:
    import json

    shape = {
        "version": SHAPE_VERSION,
        "filename": filename,
        **{what.replace(" ", "-"): size for what, size in _totals(space).items()},
        "states": [_state(state) for state in space.states],
    }
    print(json.dumps(shape, indent=4))


def _state(state: StateSpace) -> dict[str, object]:
    entry = state.snapshot
    shape: dict[str, object] = {"snapshot": None if entry is None else {"id": entry.id, "name": entry.name}}
    if state.damage is not None:
        return shape | {"damage": state.damage}
    freed = None if entry is None else state.exclusive
    return shape | {
        "exclusive": state.exclusive,
        "shared": state.shared,
        "tables": state.tables,
        "vmstate": state.vmstate,
        "freed-by-delete": freed,
    }
