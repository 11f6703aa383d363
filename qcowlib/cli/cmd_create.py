"""qcow create: a new image, or an overlay on a backing file."""

from __future__ import annotations

from typing import Any

from qcowlib.cli.common import FORMAT, OBJECT, QUIET, CommandFailed, size_argument, stock_text
from qcowlib.cli.creation_options import (
    FORMAT_OPTIONS,
    formatting_line,
    library_options,
    parse_creation_options,
    print_option_help,
    require_creatable,
)
from qcowlib.cli.opening import ImageName
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError, help_wanted, join_option_lists
from qcowlib.cli.secrets import read_secrets
from qcowlib.errors import OptionError, QcowError

SYNTAX = Syntax(
    "create",
    "[--object OBJECT] [-q] [-f FMT] [-b BACKING_FILE [-F|-B BACKING_FMT]] [-u] [-o OPTIONS] FILENAME [SIZE]",
    (
        FORMAT._replace(help="format of the new image: raw (default) or qcow2"),
        Option("options", "o", "options", "OPTIONS", "name=value,... of the format; -o help lists them"),
        Option("backing", "b", "backing", "FILE", "an overlay on this file; a relative name starts at the new image"),
        Option("backing-format", "F", "", "FMT", "format of the backing file"),
        Option("backing-format", "B", "backing-format", "FMT", "the same, as newer qemu-img has it"),
        Option("unsafe", "u", "backing-unsafe", None, "do not open the backing file; SIZE is needed then"),
        OBJECT,
        QUIET._replace(long="quiet"),
    ),
    "SIZE is in bytes or has a suffix k, M, G, T, P or E. Without it an overlay is as large as its backing file.\n"
    "Exit codes: 0 made, 1 not made.",
)


def run(arguments: Arguments) -> int:
    """Make one image."""
    image_format = arguments.last("format") or "raw"
    option_text = join_option_lists(arguments.all("options"))
    secrets = read_secrets(arguments)
    operands = arguments.operands
    if help_wanted(option_text):
        print_option_help(image_format, operands[0] if operands else None)
        return 0
    if not operands:
        raise UsageError("Expecting image file name")
    size = size_argument(operands[1], "image size") if len(operands) > 1 else None
    if len(operands) > 2:
        raise UsageError(f"Unexpected argument: {operands[2]}")
    try:
        _create(arguments, operands[0], size, image_format, option_text, secrets)
    except CommandFailed:
        raise
    except QcowError as error:
        raise OptionError(f"{operands[0]}: {stock_text(error)}") from error
    return 0


def _create(
    arguments: Arguments,
    filename: str,
    size: int | None,
    image_format: str,
    option_text: str | None,
    secrets: dict[str, bytes],
) -> None:
    from qcowlib.image.creation import create_image

    require_creatable(image_format, FORMAT_OPTIONS)
    path = _local_path(filename)
    values = parse_creation_options(image_format, option_text)
    if size is not None:
        if "size" in values:
            raise OptionError("The image size must be specified only once")
        values["size"] = str(size)
    _add_backing(arguments, image_format, values)
    _check_backing(filename, values, look=not arguments.has("unsafe"))
    if "size" not in values:
        raise OptionError("Image creation needs a size parameter")
    if not arguments.has("quiet"):
        print(formatting_line(filename, image_format, values), flush=True)
    options: dict[str, Any] = library_options(values, secrets)
    create_image(
        path,
        int(values["size"]),
        format="raw" if image_format == "file" else image_format,
        backing_file=values.get("backing_file"),
        backing_fmt=values.get("backing_fmt"),
        check_backing=False,
        **options,
    )


def _local_path(filename: str) -> str:
    """The path of a file name that may begin with "file:"."""
    from qcowlib.image.references import has_protocol

    protocol, _, path = filename.partition(":")
    if not has_protocol(filename):
        return filename
    if protocol != "file":
        raise OptionError(f"Unknown protocol '{protocol}'")
    return path


def _add_backing(arguments: Arguments, image_format: str, values: dict[str, str]) -> None:
    backing, backing_format = arguments.last("backing"), arguments.last("backing-format")
    if image_format != "qcow2" and backing is not None:
        raise OptionError(f"Backing file not supported for file format '{image_format}'")
    if image_format != "qcow2" and backing_format is not None:
        raise OptionError(f"Backing file format not supported for file format '{image_format}'")
    if backing is not None:
        values["backing_file"] = backing
    if backing_format is not None:
        values["backing_fmt"] = backing_format


def _check_backing(filename: str, values: dict[str, str], *, look: bool) -> None:
    """Refuse a backing file that cannot be one; takes the size from it where none is given."""
    backing = values.get("backing_file")
    if backing is None:
        return
    if backing == filename:
        raise OptionError("Error: Trying to create an image with the same filename as the backing file")
    if not backing:
        raise OptionError("Expected backing file name, got empty string")
    backing_format = values.get("backing_fmt")
    if look:
        found_format, found_size = _look_at_backing(filename, backing, backing_format)
        if backing_format is None:
            raise CommandFailed(
                f"{filename}: Backing file specified without backing format\nDetected format of {found_format}.",
                end="",  # qemu-img ends this message so
            )
        values.setdefault("size", str(found_size))
    elif backing_format is None:
        raise OptionError("Backing file specified without backing format")


def _look_at_backing(filename: str, backing: str, backing_format: str | None) -> tuple[str, int]:
    """Format and size of the backing file as the overlay will find it; what it names in turn is left alone."""
    from qcowlib.image.opening import open_image
    from qcowlib.operations.info import full_backing_filename

    try:
        name = ImageName.of_file(full_backing_filename(backing, filename), backing_format)
        with open_image(name.reference, force_share=True, open_backing=False) as image:
            return image.format, image.size
    except QcowError as error:
        raise OptionError(f"{stock_text(error)}\nCould not open backing image.") from error
