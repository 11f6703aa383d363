"""qcow map: where the data of an image is, as qemu-img's table or JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcowlib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    CommandFailed,
    one_filename,
    size_argument,
    stock_text,
    wants_json,
)
from qcowlib.cli.opening import image_name, open_image_name
from qcowlib.cli.options import Arguments, Option, Syntax
from qcowlib.errors import QcowError

if TYPE_CHECKING:
    from qcowlib.operations.map import MapRow

SYNTAX = Syntax(
    "map",
    "[--object OBJECT] [--image-opts] [-f FMT] [-s OFFSET] [-l LENGTH] [--output=human|json] [-U] FILENAME",
    (
        FORMAT,
        OUTPUT,
        Option("start-offset", "s", "start-offset", "OFFSET", "begin here (default: 0)"),
        Option("max-length", "l", "max-length", "LENGTH", "tell about so many bytes (default: up to the end)"),
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "The table shows data alone; JSON shows every range of the disk: the depth of the layer that decides, whether a\n"
    "layer has it, whether it reads as zeroes, whether there is data, and where.\n"
    "Exit codes: 0 shown, 1 failed (the table cannot show compressed or encrypted data).",
)


def run(arguments: Arguments) -> int:
    """Map one image through its chain."""
    offset = size_argument(arguments.last("start-offset") or "0", "start offset")
    length_text = arguments.last("max-length")
    length = None if length_text is None else size_argument(length_text, "max length")
    filename = one_filename(arguments)
    as_json = wants_json(arguments)
    name = image_name(arguments, filename)
    with open_image_name(name, force_share=arguments.has("force-share"), open_backing=True) as image:
        from qcowlib.operations.map import map_image

        rows = _readable(map_image(image, offset, length))
        if as_json:
            _print_json(rows, offset)
        else:
            _print_table(rows)
    return 0


def _readable(rows: Iterator[MapRow]) -> Iterator[MapRow]:
    try:
        yield from rows
    except QcowError as error:
        raise CommandFailed(f"Could not read file metadata: {stock_text(error)}") from error


def _print_table(rows: Iterator[MapRow]) -> None:
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    lines = (
        f"{_hex(row.start):<16}{_hex(row.length):<16}{_hex(_offset(row)):<16}{row.filename or ''}\n"
        for row in rows
        if row.data and not row.zero
    )
    sys.stdout.writelines(lines)


def _offset(row: MapRow) -> int:
    if row.offset is None:
        raise CommandFailed("File contains external, encrypted or compressed clusters.")
    return row.offset


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"


def _print_json(rows: Iterator[MapRow], start: int) -> None:
    lines = (
        f'{{ "start": {row.start}, "length": {row.length}, "depth": {row.depth}, "present": {_word(row.present)}, '
        f'"zero": {_word(row.zero)}, "data": {_word(row.data)}'
        + ("}" if row.offset is None else f', "offset": {row.offset}}}')
        for row in rows
    )
    print("[", end="")
    # An empty range has its line, too.
    empty = f'{{ "start": {start}, "length": 0, "depth": 0, "present": false, "zero": false, "data": false}}'
    print(next(lines, empty), end="")
    sys.stdout.writelines(",\n" + line for line in lines)
    print("]")


def _word(flag: bool) -> str:
    return "true" if flag else "false"
