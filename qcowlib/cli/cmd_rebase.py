"""qcow rebase: another backing file for an image, or none."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qcowlib.cli.common import (
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    SHORT_FORMAT,
    CommandFailed,
    cache_mode,
    one_filename,
    stock_text,
)
from qcowlib.cli.opening import (
    ImageName,
    image_name,
    open_image_name_for_writing,
    with_known_format,
)
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError
from qcowlib.cli.progress import Progress
from qcowlib.errors import OptionError, QcowError
from qcowlib.image.drivers import KNOWN_FORMATS

if TYPE_CHECKING:
    from qcowlib.image.raw import WritableRawImage
    from qcowlib.image.reader import ReadableImage
    from qcowlib.image.writable import WritableQcow2Image

SYNTAX = Syntax(
    "rebase",
    "[--object OBJECT] [--image-opts] [-U] [-q] [-f FMT] [-t CACHE] [-T SRC_CACHE] [-p] [-c] [-u] -b BACKING_FILE "
    "[-F BACKING_FMT] FILENAME",
    (
        SHORT_FORMAT._replace(long="format"),
        Option("backing", "b", "backing", "FILE", 'the new backing file; "" for none'),
        Option("backing-format", "F", "", "FMT", "its format"),
        Option("backing-format", "B", "backing-format", "FMT", "the same, as newer qemu-img has it"),
        Option("unsafe", "u", "backing-unsafe", None, "change the name alone; without -b: to none"),
        Option("compressed", "c", "compress", None, "write whole clusters that have to be copied compressed"),
        Option("cache", "t", "cache", "CACHE", "cache mode of the image; it is on disk at the end in all of them"),
        Option("source-cache", "T", "backing-cache", "CACHE", "cache mode of the backing files; makes no difference"),
        PROGRESS._replace(long="progress"),
        QUIET._replace(long="quiet"),
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE._replace(help="open the new backing file although it is in use; what is read may be torn"),
    ),
    "Without -u what the new backing file shows differently is copied into the image: it reads as before.\n"
    "After a failure it still has its old backing file, and the same command finishes the job.\n"
    "Exit codes: 0 done, 1 failed.",
)


def run(arguments: Arguments) -> int:
    """Rebase one image."""
    filename = one_filename(arguments)
    unsafe, backing = arguments.has("unsafe"), arguments.last("backing")
    if not unsafe and backing is None:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    progress = Progress(enabled=arguments.has("progress") and not arguments.has("quiet"), step=2.0)
    progress.start()
    done = False
    try:
        cache_mode(arguments.last("cache"), "writeback", "Invalid cache option")
        cache_mode(arguments.last("source-cache"), "writeback", "Invalid source cache option")
        name = with_known_format(image_name(arguments, filename))
        with open_image_name_for_writing(name, open_backing=not unsafe) as image:
            _rebase(image, name, arguments, progress)
        done = True
    finally:
        progress.end(complete=done)
    return 0


def _rebase(
    image: WritableQcow2Image | WritableRawImage, name: ImageName, arguments: Arguments, progress: Progress
) -> None:
    from qcowlib.image.raw import RawImage

    compressed, unsafe = arguments.has("compressed"), arguments.has("unsafe")
    backing, backing_format = arguments.last("backing"), arguments.last("backing-format")
    if compressed and isinstance(image, RawImage):
        raise CommandFailed("Compression not supported for this file format")
    if backing_format is not None and backing_format not in KNOWN_FORMATS:
        raise CommandFailed(f"Invalid format name: '{backing_format}'")
    with _new_backing(name, arguments, needed=bool(backing) and not unsafe) as new:
        refused = f"Could not change the backing file to '{'(null)' if backing is None else backing}'"
        if isinstance(image, RawImage):
            raise CommandFailed(f"{refused}: {os.strerror(errno.EOPNOTSUPP)}")
        from qcowlib.operations.rebase import rebase

        try:
            rebase(
                image,
                backing or None,
                backing_format if backing else None,
                new=new,
                unsafe=unsafe,
                compressed=compressed,
                progress=progress,
            )
        except OptionError as error:
            told = error.stock != str(error) or error.errno is None
            raise CommandFailed(f"{refused}: {stock_text(error) if told else os.strerror(error.errno or 0)}") from error


@contextmanager
def _new_backing(name: ImageName, arguments: Arguments, *, needed: bool) -> Iterator[ReadableImage | None]:
    """The new backing file, opened."""
    if not needed:
        yield None
        return
    from qcowlib.image.opening import open_image
    from qcowlib.image.policy import LocalFiles
    from qcowlib.image.probe import probe_format
    from qcowlib.image.raw import RawImage
    from qcowlib.image.references import backing_reference

    backing, backing_format = arguments.last("backing") or "", arguments.last("backing-format")
    try:
        image = open_image(
            backing_reference(backing, backing_format, name.reference.path),
            policy=LocalFiles(),
            force_share=arguments.has("force-share"),
            passphrase=name.passphrase,
        )
    except QcowError as error:
        raise CommandFailed(f"Could not open new backing file '{backing}': {stock_text(error)}") from error
    with image:
        detected = probe_format(image.storage) if isinstance(image, RawImage) else image.format
        if detected != image.format:
            raise CommandFailed(f"Could not open new backing file '{backing}': it holds a {detected} image")
        yield image
