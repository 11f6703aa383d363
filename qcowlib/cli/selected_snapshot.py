"""The snapshot that -l names, for commands that read one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowlib.cli.common import CommandFailed, stock_text
from qcowlib.cli.options import parse_key_values
from qcowlib.errors import QcowError

if TYPE_CHECKING:
    from qcowlib.image.reader import ReadableImage


def snapshot_selection(text: str) -> dict[str, str]:
    """Keyword arguments of `open_snapshot` for a -l argument: an id or name, or snapshot.id=ID,snapshot.name=NAME."""
    if not text.startswith("snapshot."):
        return {"id_or_name": text}
    names = {"snapshot.id": "snapshot_id", "snapshot.name": "name"}
    selection = {}
    for element in parse_key_values(text):
        if element.name not in names:
            raise CommandFailed(
                f"Invalid parameter '{element.name}'\nFailed in parsing snapshot param '{text}'", repeat=True
            )
        selection[names[element.name]] = element.value
    return selection


def open_selected(image: ReadableImage, selection: dict[str, str]) -> ReadableImage:
    """The snapshot that a selection names, to be read.

    Raises:
        CommandFailed: there is none.
    """
    from qcowlib.image.qcow2 import Qcow2Image

    if not isinstance(image, Qcow2Image):
        raise CommandFailed(
            "Failed to load snapshot: Block format 'raw' used by device '' does not support temporarily loading "
            "internal snapshots"
        )
    try:
        return image.open_snapshot(**selection)
    except QcowError as error:
        raise CommandFailed(f"Failed to load snapshot: {stock_text(error)}") from error
