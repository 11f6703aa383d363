"""qcow compare: whether two images have the same content, in qemu-img's words and with its exit codes."""

from __future__ import annotations

import os
from errno import EIO
from typing import TYPE_CHECKING

from qcowlib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    CommandFailed,
    cache_mode,
    report,
)
from qcowlib.cli.opening import image_name, open_image_name
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError
from qcowlib.cli.progress import Progress
from qcowlib.cli.secrets import read_secrets

if TYPE_CHECKING:
    from qcowlib.operations.compare import Comparison, NotComparable

IDENTICAL, DIFFERENT, NOT_OPENED, NO_MAPPING, NOT_READ = 0, 1, 2, 3, 4

_SECOND_FORMAT = "second-format"

SYNTAX = Syntax(
    "compare",
    "[--object OBJECT] [--image-opts] [-f FMT] [-F FMT] [-T CACHE] [-p] [-q] [-s] [-U] FILENAME1 FILENAME2",
    (
        FORMAT._replace(long="a-format", help="format of the first image: qcow2 or raw (default: by its content)"),
        Option(_SECOND_FORMAT, "F", "b-format", "FMT", "format of the second image"),
        Option("strict", "s", "strict", None, "sizes, and what is allocated, must be equal as well"),
        Option("cache", "T", "cache", "CACHE", "cache mode for reading; reading is the same in all of them"),
        PROGRESS._replace(long="progress"),
        QUIET._replace(long="quiet"),
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "Without -s the larger image may have more, if that is zero.\n"
    "Exit codes: 0 identical, 1 different, 2 not opened, 3 a mapping could not be read, 4 data could not be read.",
)


def run(arguments: Arguments) -> int:
    """Compare two images."""
    try:
        read_secrets(arguments)
        if len(arguments.operands) != 2:
            raise UsageError("Expecting two image file names")
        return _compare(arguments)
    except CommandFailed as error:
        error.code = NOT_OPENED
        raise


def _compare(arguments: Arguments) -> int:
    quiet = arguments.has("quiet")
    progress = Progress(enabled=arguments.has("progress") and not quiet, step=2.0)
    one, other = arguments.operands
    try:
        cache_mode(arguments.last("cache"), "writeback", "Invalid source cache option")
        force_share = arguments.has("force-share")
        with (
            open_image_name(image_name(arguments, one), force_share=force_share, open_backing=True) as first,
            open_image_name(
                image_name(_of_second(arguments), other), force_share=force_share, open_backing=True
            ) as second,
        ):
            from qcowlib.operations.compare import NotComparable, Outcome, compare

            progress.start()
            try:
                found = compare(first, second, strict=arguments.has("strict"), progress=progress)
            except NotComparable as error:
                return _report(error, arguments.operands[error.number])
            if not quiet:
                _print(found)
            return IDENTICAL if found.outcome is Outcome.IDENTICAL else DIFFERENT
    finally:
        progress.end(complete=False)


def _of_second(arguments: Arguments) -> Arguments:
    """The arguments as they concern the second image."""
    options = [(name, value) for name, value in arguments.options if name != "format"]
    return Arguments(
        [("format" if name == _SECOND_FORMAT else name, value) for name, value in options], arguments.operands
    )


def _report(error: NotComparable, filename: str) -> int:
    if error.offset is None:
        report(f"Sector allocation test failed for {filename}")
        return NO_MAPPING
    reason = os.strerror(EIO if error.errno is None else error.errno)  # qemu-img knows of damaged data no more
    report(f"Error while reading offset {error.offset} of {filename}: {reason}")
    return NOT_READ


def _print(found: Comparison) -> None:
    from qcowlib.operations.compare import Outcome

    if found.sizes_differ:
        print("Warning: Image size mismatch!")
    print(
        {
            Outcome.IDENTICAL: "Images are identical.",
            Outcome.CONTENT: f"Content mismatch at offset {found.offset}!",
            Outcome.STATUS: f"Strict mode: Offset {found.offset} block status mismatch!",
            Outcome.SIZE: "Strict mode: Image size mismatch!",
        }[found.outcome]
    )
