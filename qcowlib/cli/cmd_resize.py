"""qcow resize: another size for a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowlib.cli.common import IMAGE_OPTS, OBJECT, QUIET, SHORT_FORMAT, CommandFailed
from qcowlib.cli.creation_options import size_parameter
from qcowlib.cli.opening import image_name, open_image_name_for_writing, with_known_format
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError

if TYPE_CHECKING:
    from qcowlib.image.raw import WritableRawImage
    from qcowlib.image.writable import WritableQcow2Image

SYNTAX = Syntax(
    "resize",
    "[--object OBJECT] [--image-opts] [-f FMT] [--preallocation=PREALLOC] [-q] [--shrink] FILENAME [+|-]SIZE",
    (
        SHORT_FORMAT,
        Option("preallocation", "", "preallocation", "PREALLOC", "reserve the new space: off, metadata, falloc, full"),
        Option("shrink", "", "shrink", None, "allow a smaller size; what lies behind it is lost"),
        QUIET,
        OBJECT,
        IMAGE_OPTS,
    ),
    "SIZE is in bytes or has a suffix k, M, G, T, P or E; with + or - it is added or taken away.\n"
    "Internal snapshots keep their own sizes. Exit codes: 0 done, 1 not done.",
    ends_with_operand=True,
)

_MODES = ("off", "metadata", "falloc", "full")
_INT64 = 1 << 64


def run(arguments: Arguments) -> int:
    """Resize one image."""
    if len(arguments.operands) + len(arguments.options) < 2:
        raise UsageError("Not enough arguments")
    mode = next((mode for mode in arguments.all("preallocation") if mode not in _MODES), None)
    if mode is not None:
        raise CommandFailed(f"Invalid preallocation mode '{mode}'")
    if len(arguments.operands) != 2:
        raise UsageError("Expecting image file name and size")
    filename, text = arguments.operands
    sign = text[:1] if text[:1] in ("+", "-") else ""
    change = size_parameter(text.removeprefix(sign))
    name = image_name(arguments, filename)
    with open_image_name_for_writing(with_known_format(name), open_backing=True) as image:
        size = image.size + (-change if sign == "-" else change) if sign else change
        size = (size + _INT64 // 2) % _INT64 - _INT64 // 2
        _resize(image, size, arguments)
    if not arguments.has("quiet"):
        print("Image resized.")
    return 0


def _resize(image: WritableQcow2Image | WritableRawImage, size: int, arguments: Arguments) -> None:
    from qcowlib.operations.resize import resize

    preallocation = arguments.last("preallocation") or "off"
    shrink = arguments.has("shrink")
    if 0 < size < image.size and preallocation == "off" and not shrink:
        raise CommandFailed(
            "Use the --shrink option to perform a shrink operation.\n"
            "warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing such "
            "an operation, make sure there is no important data there.",
            repeat=True,
        )
    resize(image, size, shrink=shrink, preallocation=preallocation)
