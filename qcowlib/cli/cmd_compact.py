"""qcow compact: a smaller image with the same states."""

from __future__ import annotations

from qcowlib.cli.common import FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, CommandFailed, warn_of_sharing
from qcowlib.cli.opening import image_name, open_image_name
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError
from qcowlib.cli.progress import Progress
from qcowlib.errors import QcowError

SYNTAX = Syntax(
    "compact",
    "[-n] [-p] [-q] [-U] [--image-opts] [--object OBJECT] FILENAME TARGET",
    (
        FORMAT,
        Option("dry-run", "n", "dry-run", None, "tell the size of the new file, write nothing"),
        PROGRESS,
        QUIET,
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "Leaked clusters, clusters that are only reserved and clusters of zeroes are left out; snapshots with their saved\n"
    "memory, bitmaps, compressed clusters, encryption and the backing file are kept. FILENAME is only read. Until it\n"
    "is done the new file is called TARGET.qcow-incomplete; after an interruption, run the same command again.\n"
    "Exit codes: 0 done, 1 failed and TARGET is not there.",
)


def run(arguments: Arguments) -> int:
    """Compact one image into a new file."""
    if len(arguments.operands) != 2:
        raise UsageError("Expecting an image file name and the name of the new file")
    filename, target = arguments.operands
    name = image_name(arguments, filename)
    with open_image_name(name, force_share=warn_of_sharing(arguments), open_backing=False, with_key=True) as image:
        from qcowlib.image.create_target import same_file
        from qcowlib.image.qcow2 import Qcow2Image
        from qcowlib.operations.compact import compact_image, compact_size

        if not isinstance(image, Qcow2Image):
            raise CommandFailed(f"'{filename}' is a raw image: there is nothing to compact")
        if same_file(image.name, target):
            raise CommandFailed("the new file must be another one than the image")
        if arguments.has("dry-run"):
            print(f"{image.state.storage.size()} bytes now, {compact_size(image)} bytes afterwards")
            return 0
        progress = Progress(enabled=arguments.has("progress") and not arguments.has("quiet"))
        progress.start()
        complete = False
        try:
            compact_image(image, target, progress=progress)
            complete = True
        except QcowError as error:
            raise CommandFailed(f"Could not compact '{filename}': {error}") from error
        finally:
            progress.end(complete=complete)
        if not arguments.has("quiet"):
            _tell(filename, image.state.storage.size(), target)
    return 0


def _tell(filename: str, before: int, target: str) -> None:
    import os

    from qcowlib.units import format_size

    after = os.stat(target).st_size
    print(f"{filename}: {format_size(before)} ({before} bytes), {target}: {format_size(after)} ({after} bytes)")
