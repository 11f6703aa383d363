"""qcow commit: an overlay merged into its backing file, or into one further down its chain."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qcowlib.cli.common import (
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    SHORT_FORMAT,
    CommandFailed,
    cache_mode,
    one_filename,
    size_argument,
    stock_text,
)
from qcowlib.cli.opening import ImageName, image_name, open_image_name_for_writing, with_known_format
from qcowlib.cli.options import Arguments, Option, Syntax
from qcowlib.cli.progress import Progress
from qcowlib.errors import ImageStateError, OptionError, QcowError

if TYPE_CHECKING:
    from qcowlib.image.raw import WritableRawImage
    from qcowlib.image.writable import WritableQcow2Image
    from qcowlib.operations.commit import BackingLayer

SYNTAX = Syntax(
    "commit",
    "[--object OBJECT] [--image-opts] [-f FMT] [-t CACHE] [-b BASE] [-r RATE_LIMIT] [-d] [-p] [-q] FILENAME",
    (
        SHORT_FORMAT._replace(long="format"),
        Option("base", "b", "base", "BASE", "merge into this image of the chain, through those between; implies -d"),
        Option("drop", "d", "drop", None, "leave the overlay as it is: it is going to be removed"),
        Option("rate-limit", "r", "rate-limit", "BYTES", "write at most so many bytes in a second"),
        Option("cache", "t", "cache", "CACHE", "cache mode; the base is on disk before the overlay is emptied in all"),
        PROGRESS._replace(long="progress"),
        QUIET._replace(long="quiet"),
        OBJECT,
        IMAGE_OPTS,
    ),
    "Without -b and -d the overlay is emptied. A smaller base is enlarged. Other overlays on it see its changes.\n"
    "After a failure the overlay reads as before, and the same command finishes the job.\n"
    "Exit codes: 0 done, 1 failed.",
)


def run(arguments: Arguments) -> int:
    """Commit one image."""
    rate = size_argument(arguments.last("rate-limit") or "0", "rate limit")
    filename = one_filename(arguments)
    cache_mode(arguments.last("cache"), "writeback", "Invalid cache option")
    name = with_known_format(image_name(arguments, filename))
    quiet = arguments.has("quiet")
    with open_image_name_for_writing(name, open_backing=True) as overlay:
        progress = Progress(enabled=arguments.has("progress") and not quiet, bytes_per_second=rate)
        progress.start()
        done = False
        try:
            _commit(overlay, name, arguments, progress)
            done = True
        finally:
            progress.end(complete=done)
    if not quiet:
        print("Image committed.")
    return 0


def _commit(
    overlay: WritableQcow2Image | WritableRawImage, name: ImageName, arguments: Arguments, progress: Progress
) -> None:
    from qcowlib.image.raw import RawImage
    from qcowlib.operations.commit import find_backing

    base_name = arguments.last("base")
    found = find_backing(overlay, name.reference, base_name)
    if found is None and base_name is not None:
        raise CommandFailed(f"Did not find '{base_name}' in the backing chain of '{name.text}'")
    if found is None or isinstance(overlay, RawImage):
        raise CommandFailed("Image does not have a backing file")
    found.above.leave_out_backing()  # the base cannot be open twice
    _merge(overlay, found, name.passphrase, progress)
    if base_name is None and not arguments.has("drop"):
        _empty(overlay, name)


def _merge(overlay: WritableQcow2Image, found: BackingLayer, passphrase: bytes | None, progress: Progress) -> None:
    """Write to the base."""
    from qcowlib.image.opening import open_image
    from qcowlib.image.policy import LocalFiles
    from qcowlib.operations.commit import commit

    guessed = found.reference.format is None
    base = open_image(
        found.reference, format=found.image.format, writable=True, policy=LocalFiles(), passphrase=passphrase
    )
    try:
        with base:
            commit(overlay, base, format_guessed=guessed, progress=progress)
    except QcowError as error:
        if error.errno is None and isinstance(error, OptionError | ImageStateError):
            raise  # refused, and nothing was changed
        raise CommandFailed(f"Block job failed: {_reason(error)}") from error


def _empty(overlay: WritableQcow2Image, name: ImageName) -> None:
    """The base has it all now."""
    from qcowlib.operations.commit import make_empty

    try:
        make_empty(overlay)
    except QcowError as error:
        raise CommandFailed(f"Failed to empty {name.text}: {_reason(error)}") from error


def _reason(error: QcowError) -> str:
    return stock_text(error) if error.errno is None else os.strerror(error.errno)
