"""qcow dd: blocks of an image copied into a new image."""

from __future__ import annotations

from qcowlib.cli.common import (
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    SHORT_FORMAT,
    CommandFailed,
    report,
    size_argument,
    stock_errno,
    stock_text,
)
from qcowlib.cli.creation_options import require_creatable
from qcowlib.cli.opening import ImageName, image_name, open_image_name
from qcowlib.cli.options import Arguments, Option, Syntax
from qcowlib.errors import FormatError, QcowError, StorageError
from qcowlib.image.drivers import KNOWN_FORMATS

SYNTAX = Syntax(
    "dd",
    "[--image-opts] [-U] [-f FMT] [-O FMT] [bs=BYTES] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    (
        SHORT_FORMAT._replace(help="format of the input: qcow2 or raw (default: by its content)"),
        Option("target-format", "O", "", "FMT", "format of the output: raw (default) or qcow2"),
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "  bs=BYTES      size of a block (default: 512)\n"
    "  count=BLOCKS  end behind so many blocks of the input, skipped ones included\n"
    "  skip=BLOCKS   leave out blocks at the beginning of the input\n"
    "  if=INPUT      the image to read\n"
    "  of=OUTPUT     the image to make; it is replaced; zeroes leave holes in it\n"
    "Until it is done the output is called OUTPUT.qcow-incomplete. Exit codes: 0 done, 1 failed.",
)

_OPERANDS = ("bs", "count", "if", "of", "skip")
_INT_MAX = (1 << 31) - 1


def run(arguments: Arguments) -> int:
    """Copy blocks."""
    operands = _operands(arguments.operands)
    block_size = size_argument(operands.get("bs", "512"), "bs", minimum=1, maximum=_INT_MAX)
    count = size_argument(operands["count"], "count") if "count" in operands else None
    skip = size_argument(operands.get("skip", "0"), "skip")
    if "if" not in operands or "of" not in operands:
        raise CommandFailed("Must specify both input and output files")
    source_name = image_name(arguments, operands["if"])
    with open_image_name(source_name, force_share=arguments.has("force-share"), open_backing=True) as source:
        from qcowlib.image.policy import LocalFiles
        from qcowlib.operations.dd import dd

        image_format = _target_format(arguments)
        output = operands["of"]
        try:
            part = dd(
                source,
                ImageName.of_file(output).reference.path,
                target_format=image_format,
                block_size=block_size,
                count=count,
                skip=skip,
                policy=LocalFiles(),
            )
        except CommandFailed:
            raise
        except QcowError as error:
            raise _told(error, output) from error
    if part.beyond_end:
        report(f"{operands['if']}: cannot skip to specified offset")
    return 0


def _told(error: QcowError, output: str) -> CommandFailed:
    """The error in qemu-img's words, which do not say where in the images it was."""
    reason = stock_errno(error) or stock_text(error)
    if error.stock.startswith("error while writing at byte "):
        return CommandFailed(f"error while writing to output image file: {reason}")
    foreign = isinstance(error, StorageError) and error.name != output
    if error.stock.startswith("error while reading at byte ") or isinstance(error, FormatError) or foreign:
        return CommandFailed(f"error while reading from input image file: {reason}")
    return CommandFailed(f"{output}: error while creating output image: {stock_text(error)}")


def _operands(words: list[str]) -> dict[str, str]:
    operands = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in _OPERANDS:
            raise CommandFailed(f"unrecognized operand {name}")
        operands[name] = value
    return operands


def _target_format(arguments: Arguments) -> str:
    image_format = arguments.last("target-format") or "raw"
    if image_format not in KNOWN_FORMATS:
        raise CommandFailed("Unknown file format")
    try:
        require_creatable(image_format)
    except QcowError as error:
        raise CommandFailed(str(error)) from None
    return image_format
