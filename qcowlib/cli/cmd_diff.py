"""qcow diff: the ranges in which two states of a disk differ, from the metadata or byte by byte."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING

from qcowlib.cli.common import (
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    CommandFailed,
    report,
    wants_json,
    warn_of_sharing,
)
from qcowlib.cli.opening import ImageName, image_name, open_image_name
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError
from qcowlib.errors import ChainError, QcowError
from qcowlib.units import format_size

if TYPE_CHECKING:
    from qcowlib.image.reader import ReadableImage
    from qcowlib.operations.difference import ChangeTable

SYNTAX = Syntax(
    "diff",
    "[--exact] [--old-snapshot SNAPSHOT | --bitmap NAME] [--new-snapshot SNAPSHOT] [--output=OFMT] [-U] OLD [NEW]",
    (
        Option(
            "old-snapshot", "", "old-snapshot", "SNAPSHOT", "the old state is this snapshot inside OLD (id or name)"
        ),
        Option("new-snapshot", "", "new-snapshot", "SNAPSHOT", "the new state is this snapshot inside NEW"),
        Option(
            "bitmap", "", "bitmap", "NAME", "what has changed since this persistent bitmap of OLD was made or cleared"
        ),
        Option("exact", "", "exact", None, "compare the bytes of what is stored in different places"),
        Option("old-format", "f", "", "FMT", "format of OLD: qcow2 or raw (default: by its content)"),
        Option("new-format", "F", "", "FMT", "format of NEW"),
        OUTPUT,
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "Without NEW both states are in OLD: `qcow diff --old-snapshot monday disk.qcow2`. From the metadata alone, what\n"
    "is stored in different places counts as changed, whether or not the bytes are equal; nothing that differs is\n"
    "left out. What is damaged, or in a backing file that is not there, is told as unknown.\n"
    "Exit codes: 0 told, 1 failed.",
)

SHAPE_VERSION = 1
_IN_MEMORY = 16 << 20  # bytes of ranges that wait for the totals; more of them wait in a file


def run(arguments: Arguments) -> int:
    """Tell the differences."""
    if not 1 <= len(arguments.operands) <= 2:
        raise UsageError("Expecting one or two image file names")
    as_json = wants_json(arguments)
    share = warn_of_sharing(arguments)
    with ExitStack() as stack:
        names = [_name(arguments, text, which) for text, which in zip(arguments.operands, ("old", "new"), strict=False)]
        images = [stack.enter_context(_open(name, share=share)) for name in names]
        if arguments.has("bitmap"):
            return _since_bitmap(arguments, names, images[0], as_json=as_json)
        old = _state(images[0], arguments.last("old-snapshot"))
        new = _state(images[-1], arguments.last("new-snapshot"))
        from qcowlib.operations.difference import difference

        with _Ranges() as ranges:
            for table in difference(old, new, exact=arguments.has("exact")):
                ranges.add(table)
            if as_json:
                _print_json(_states_shape(arguments, (names[0], names[-1]), (old, new)), ranges)
            else:
                _print_table(ranges)
    return 0


def _since_bitmap(arguments: Arguments, names: list[ImageName], image: ReadableImage, *, as_json: bool) -> int:
    if len(names) > 1 or any(arguments.has(name) for name in ("old-snapshot", "new-snapshot", "exact")):
        raise CommandFailed("--bitmap tells about the active layer of one image, and nothing else")
    import numpy as np

    from qcowlib.operations.bitmaps import dirty_extents
    from qcowlib.operations.difference import ChangeKind, ChangeTable

    bitmap = arguments.last("bitmap") or ""
    with _Ranges() as ranges:
        try:
            for batch in dirty_extents(image, bitmap):
                kinds = np.full(len(batch.start), ChangeKind.CHANGED, dtype=np.uint8)
                ranges.add(ChangeTable(batch.start, batch.length, kinds))
        except QcowError as error:
            raise CommandFailed(f"Could not read the bitmap '{bitmap}' of '{names[0].text}': {error}") from error
        if as_json:
            new = {"filename": names[0].shown, "snapshot": None, "virtual-size": image.size}
            _print_json({"bitmap": bitmap, "new": new, "exact": False}, ranges)
        else:
            _print_table(ranges)
    return 0


def _name(arguments: Arguments, text: str, which: str) -> ImageName:
    image_format = arguments.last(f"{which}-format")
    options = [(name, value) for name, value in arguments.options if name != "format"]
    if image_format is not None:
        options.append(("format", image_format))
    return image_name(Arguments(options, [text]), text)


def _open(name: ImageName, *, share: bool) -> ReadableImage:
    """Open with the chain below; where that is not whole, without it: the metadata still tells much."""
    try:
        return open_image_name(name, force_share=share, open_backing=True)
    except CommandFailed as error:
        if not isinstance(error.__cause__, ChainError):
            raise
        image = open_image_name(name, force_share=share, open_backing=False)
        report(f"warning: {error}; what only the backing file could tell is unknown")
        return image


def _state(image: ReadableImage, snapshot: str | None) -> ReadableImage:
    if snapshot is None:
        return image
    from qcowlib.image.qcow2 import Qcow2Image

    if not isinstance(image, Qcow2Image):
        raise CommandFailed(f"'{image.name}' is a raw image and has no snapshots")
    try:
        return image.open_snapshot(snapshot)
    except QcowError as error:
        raise CommandFailed(f"Could not open snapshot '{snapshot}' of '{image.name}': {error}") from error


class _Ranges:
    """The ranges that were found, kept until the totals, which are printed first, are known."""

    def __init__(self) -> None:
        self.changed = self.unknown = self.count = 0
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> _Ranges:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, table: ChangeTable) -> None:
        """Keep the rows of a table."""
        import numpy as np

        rows = np.stack((table.start, table.length, table.kind.astype(np.int64)), axis=1)
        self._file.write(rows.tobytes())
        self.count += len(rows)
        unknown = int(table.length[table.kind == 2].sum())
        self.unknown += unknown
        self.changed += int(table.length.sum()) - unknown

    def rows(self) -> Iterator[tuple[int, int, str]]:
        """(start, length, word)."""
        import numpy as np

        self._file.seek(0)
        while data := self._file.read(24 << 10):
            for start, length, kind in np.frombuffer(data, dtype=np.int64).reshape(-1, 3).tolist():
                yield start, length, "changed" if kind == 1 else "unknown"


def _print_table(ranges: _Ranges) -> None:
    print(f"changed: {format_size(ranges.changed)} ({ranges.changed} bytes)")
    print(f"unknown: {format_size(ranges.unknown)} ({ranges.unknown} bytes)")
    if ranges.count:
        print(f"{'Offset':<20}{'Length':<20}State")
    sys.stdout.writelines(f"{start:<#20x}{length:<#20x}{word}\n" for start, length, word in ranges.rows())


def _states_shape(
    arguments: Arguments, names: tuple[ImageName, ImageName], states: tuple[ReadableImage, ReadableImage]
) -> dict[str, object]:
    shape: dict[str, object] = {}
    for which, name, state in zip(("old", "new"), names, states, strict=True):
        snapshot = arguments.last(f"{which}-snapshot")
        shape[which] = {"filename": name.shown, "snapshot": snapshot, "virtual-size": state.size}
    return shape | {"exact": arguments.has("exact")}


def _print_json(shape: dict[str, object], ranges: _Ranges) -> None:
    import json

    head = {"version": SHAPE_VERSION, **shape, "changed": ranges.changed, "unknown": ranges.unknown}
    print(json.dumps(head, indent=4).removesuffix("\n}") + ',\n    "extents": [', end="")
    separator = "\n"
    for start, length, word in ranges.rows():
        sys.stdout.write(f'{separator}        {{ "start": {start}, "length": {length}, "state": "{word}" }}')
        separator = ",\n"
    print("\n    ]\n}")
