"""qcow convert: an image, or one of its snapshots, copied into a new image or an existing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from qcowlib.cli.common import (
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    SHORT_FORMAT,
    CommandFailed,
    cache_mode,
    report,
    report_error,
    size_argument,
    stock_errno,
    stock_text,
)
from qcowlib.cli.creation_options import (
    library_options,
    parse_creation_options,
    print_option_help,
    require_creatable,
)
from qcowlib.cli.opening import ImageName, image_name, open_image_name, options_name, with_known_format
from qcowlib.cli.options import Arguments, Option, Syntax, help_wanted, join_option_lists
from qcowlib.cli.progress import Progress
from qcowlib.cli.secrets import read_secrets
from qcowlib.cli.selected_snapshot import open_selected, snapshot_selection
from qcowlib.errors import ChainError, ImageLocked, ImageStateError, OptionError, QcowError, StorageError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from qcowlib.image.reader import ReadableImage
    from qcowlib.image.references import Reference
    from qcowlib.operations.copy_source import Loss

SYNTAX = Syntax(
    "convert",
    "[OPTIONS] FILENAME [FILENAME2 ...] OUTPUT_FILENAME",
    (
        SHORT_FORMAT._replace(help="format of the source: qcow2 or raw (default: by its content)"),
        Option("target-format", "O", "", "FMT", "format of the target: raw (default) or qcow2"),
        Option("options", "o", "", "OPTIONS", "name=value,... of the target; -o help lists them"),
        Option(
            "snapshot", "l", "", "SNAPSHOT", "read this snapshot: an id or name, or snapshot.id=ID,snapshot.name=NAME"
        ),
        Option("compressed", "c", "", None, "write compressed clusters (qcow2)"),
        Option("backing", "B", "", "FILE", "backing file of the target, with the content of the source's own"),
        Option("backing-format", "F", "", "FMT", "format of that backing file"),
        Option("no-create", "n", "", None, "write into an existing target"),
        Option("target-is-zero", "", "target-is-zero", None, "with -n: the target is known to read as zeroes"),
        Option("target-image-opts", "", "target-image-opts", None, "with -n: OUTPUT_FILENAME is a list of options"),
        Option("sparse-size", "S", "", "BYTES", "zeroes that make a hole (default: 4k; 0: write all of them)"),
        Option("threads", "m", "", "COUNT", "at most so many threads (1 to 16, default: 8)"),
        Option("out-of-order", "W", "", None, "write to a raw target in any order; those of qcow2 stay in guest order"),
        Option("rate-limit", "r", "", "BYTES", "copy at most so many bytes in a second"),
        Option(
            "copy-offload", "C", "", None, "let the host copy (or share) data by itself; not with -c, -S, --salvage"
        ),
        Option("cache", "t", "", "CACHE", "cache mode of the target; it is on disk at the end, but with -t unsafe"),
        Option("source-cache", "T", "", "CACHE", "cache mode of the source; reading is the same in all of them"),
        Option("salvage", "", "salvage", None, "take what cannot be read for zeroes, with a warning for each piece"),
        Option("bitmaps", "", "bitmaps", None, "copy the dirty bitmaps, too (qcow2)"),
        Option("with-snapshots", "", "with-snapshots", None, "keep snapshots, clusters and all: the same as compact"),
        Option("skip-broken-bitmaps", "", "skip-broken-bitmaps", None, "leave out inconsistent bitmaps"),
        PROGRESS,
        QUIET,
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "Several sources are joined to one disk. A snapshot is read with its own disk size.\n"
    "Until it is done the target is called OUTPUT_FILENAME.qcow-incomplete; a new one is removed after a failure.\n"
    "Exit codes: 0 done, 1 failed.",
)

_MAX_THREADS = 16
_SECTOR = 512
_MAX_SPARSE_SIZE = 32768 * _SECTOR
_JOINED_WITH_BACKING = "Having a backing file for the target makes no sense when concatenating multiple input images"


class _Target(NamedTuple):
    """What is written: a name for messages, a path, a format, the way to open an existing one, a backing file,
    creation options."""

    text: str
    path: str
    format: str
    existing: Reference | None = None
    passphrase: bytes | None = None
    backing_file: str | None = None
    backing_format: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


def run(arguments: Arguments) -> int:
    """Convert one image."""
    if arguments.has("with-snapshots"):
        return _with_snapshots(arguments)
    sparse_size = _sparse_size(arguments)
    threads = _threads(arguments)
    rate = size_argument(arguments.last("rate-limit") or "0", "rate limit")
    option_text = join_option_lists(arguments.all("options"))
    _refuse_contradictions(arguments, option_text)
    sources, filename = arguments.operands[:-1], arguments.operands[-1] if len(arguments.operands) > 1 else None
    if help_wanted(option_text):
        print_option_help(arguments.last("target-format") or "raw", filename)
        return 0
    if filename is None:
        raise CommandFailed("Must specify image file name")
    cache_mode(arguments.last("source-cache"), "writeback", "Invalid source cache option")
    enabled = arguments.has("progress") and not arguments.has("quiet")
    progress = Progress(enabled=enabled, bytes_per_second=rate)
    progress.start()
    code = 1
    try:
        with _sources(arguments, sources) as images, _executor(threads) as executor:
            target = _target(arguments, filename, option_text, joined=len(images) > 1)
            cache_mode(arguments.last("cache"), "unsafe", "Invalid cache option")
            _convert(arguments, images, target, sparse_size, executor, progress)
        code = 0
    except QcowError as error:
        code = report_error(error)
    finally:
        progress.end(complete=code == 0)
    return code


def _convert(
    arguments: Arguments,
    images: list[ReadableImage],
    target: _Target,
    sparse_size: int,
    executor: Executor | None,
    progress: Progress,
) -> None:
    from qcowlib.image.policy import LocalFiles
    from qcowlib.operations.convert import convert

    create = not arguments.has("no-create")
    try:
        convert(
            images,
            target.existing or target.path,
            target_format=target.format,
            create=create,
            compressed=arguments.has("compressed"),
            backing_file=target.backing_file,
            backing_fmt=target.backing_format,
            sparse_size=sparse_size,
            target_is_zero=arguments.has("target-is-zero"),
            bitmaps=arguments.has("bitmaps"),
            skip_broken_bitmaps=arguments.has("skip-broken-bitmaps"),
            warn=lambda text: report(f"warning: {text}"),
            salvage=arguments.has("salvage"),
            lost=None if arguments.has("quiet") else _report_loss,
            offload=arguments.has("copy-offload"),
            out_of_order=arguments.has("out-of-order"),
            durable=arguments.last("cache") != "unsafe",
            policy=LocalFiles(),
            target_passphrase=target.passphrase,
            executor=executor,
            progress=progress,
            **target.options,
        )
    except (OptionError, ImageStateError, ChainError, StorageError) as error:
        raise _about_target(target, error, create=create) from error


def _report_loss(loss: Loss) -> None:
    what = "block status at offset" if loss.mapping else "offset"
    report(f"warning: error while reading {what} {loss.start}: {stock_errno(loss.error) or loss.error}")


def _about_target(target: _Target, error: QcowError, *, create: bool) -> QcowError:
    """The error with qemu-img's words before it, when it is about the target."""
    if error.stock.startswith("error while "):  # it came in the middle of the work
        return error
    if isinstance(error, StorageError) and (error.name != target.path or error.action in {"read", "write"}):
        return error
    if create and target.backing_file is not None and isinstance(error, ChainError):
        reason = stock_text(error).removesuffix("\nCould not open backing image.")
        return CommandFailed(f"Could not open '{target.text}': Could not open backing file: {reason}")
    if not create and isinstance(error, OptionError | ImageStateError) and not isinstance(error, ImageLocked):
        return error
    if not create:
        return CommandFailed(f"Could not open '{target.text}': {stock_text(error)}")
    return CommandFailed(f"{target.text}: error while converting {target.format}: {stock_text(error)}")


@contextmanager
def _sources(arguments: Arguments, filenames: list[str]) -> Iterator[list[ReadableImage]]:
    """The images to read, or the snapshot in the first one."""
    snapshot = arguments.last("snapshot")
    selection = None if snapshot is None else snapshot_selection(snapshot)
    with ExitStack() as opened:
        images: list[ReadableImage] = [
            opened.enter_context(
                open_image_name(
                    image_name(arguments, filename), force_share=arguments.has("force-share"), open_backing=True
                )
            )
            for filename in filenames
        ]
        if selection is not None:
            if len(images) > 1 and "id_or_name" in selection:
                raise CommandFailed("No support for concatenating multiple snapshot")
            images[0] = open_selected(images[0], selection)
        yield images


def _target(arguments: Arguments, filename: str, option_text: str | None, *, joined: bool) -> _Target:
    secrets = read_secrets(arguments)
    image_format = arguments.last("target-format")
    if joined and arguments.has("no-create") and arguments.has("backing"):
        raise CommandFailed(_JOINED_WITH_BACKING)
    if arguments.has("no-create"):
        return _existing_target(arguments, filename, image_format, secrets)
    image_format = image_format or "raw"
    try:
        require_creatable(image_format)
        values = parse_creation_options(image_format, option_text)
        options = library_options(values, secrets)
    except OptionError as error:
        raise CommandFailed(str(error)) from error
    backing = arguments.last("backing") or values.get("backing_file")
    backing_format = arguments.last("backing-format") or values.get("backing_fmt")
    if image_format == "raw" and backing is not None:
        raise CommandFailed("Backing file not supported for file format 'raw'")
    if image_format == "raw" and backing_format is not None:
        raise CommandFailed("Backing file format not supported for file format 'raw'")
    if joined and backing is not None:
        raise CommandFailed(_JOINED_WITH_BACKING)
    if backing is not None and backing_format is None:
        raise CommandFailed("Use of backing file requires explicit backing format")
    _refuse_compression(arguments, image_format, options)
    path = ImageName.of_file(filename).reference.path
    return _Target(filename, path, image_format, None, None, backing, backing_format, options)


def _existing_target(
    arguments: Arguments, filename: str, image_format: str | None, secrets: dict[str, bytes]
) -> _Target:
    if arguments.has("target-image-opts"):
        name = options_name(filename, secrets)
    else:
        name = ImageName.of_file(filename, image_format or "raw")
    name = with_known_format(name)
    image_format = name.reference.format or "raw"
    _refuse_compression(arguments, image_format, {})
    path = name.reference.path
    return _Target(filename, path, image_format, name.reference, name.passphrase, arguments.last("backing"))


def _refuse_compression(arguments: Arguments, image_format: str, options: dict[str, Any]) -> None:
    if not arguments.has("compressed"):
        return
    if image_format == "raw":
        raise CommandFailed("Compression not supported for this file format")
    if "encrypt_format" in options:
        raise CommandFailed("Compression and encryption not supported at the same time")
    if options.get("preallocation", "off") != "off":
        raise CommandFailed("Compression and preallocation not supported at the same time")


def _with_snapshots(arguments: Arguments) -> int:
    """All states go into the new image, as they are stored."""
    from qcowlib.cli import cmd_compact

    kept = {"with-snapshots", "target-format", "format", "progress", "quiet", "object", "image-opts", "force-share"}
    for name, _ in arguments.options:
        if name not in kept:
            raise CommandFailed(f"--with-snapshots keeps the image as it is: {name} cannot be given with it")
    if arguments.last("target-format") != "qcow2":
        raise CommandFailed("--with-snapshots needs -O qcow2: no other format has snapshots")
    return cmd_compact.run(arguments)


def _sparse_size(arguments: Arguments) -> int:
    text = arguments.last("sparse-size")
    if text is None:
        return 4096
    size = size_argument(text, "buffer size for sparse output")
    if size % _SECTOR or size > _MAX_SPARSE_SIZE:
        raise CommandFailed(
            f"Invalid buffer size for sparse output specified. Valid sizes are multiples of {_SECTOR} up to "
            f"{_MAX_SPARSE_SIZE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return size


def _threads(arguments: Arguments) -> int:
    text = arguments.last("threads") or "8"
    try:
        threads = int(text, 0)
    except ValueError:
        threads = 0
    if not 1 <= threads <= _MAX_THREADS:
        raise CommandFailed(
            f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {_MAX_THREADS}"
        )
    return threads


@contextmanager
def _executor(threads: int) -> Iterator[Executor | None]:
    """Threads for reading and compressing; more than the processors have does not help."""
    import os

    threads = min(threads, os.cpu_count() or 1)
    if threads == 1:
        yield None
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as executor:
        yield executor


def _refuse_contradictions(arguments: Arguments, option_text: str | None) -> None:
    creates = not arguments.has("no-create")
    for contradicts, message in (
        (
            arguments.has("skip-broken-bitmaps") and not arguments.has("bitmaps"),
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        (
            arguments.has("compressed") and arguments.has("copy-offload"),
            "Cannot enable copy offloading when -c is used",
        ),
        (
            arguments.has("sparse-size") and arguments.has("copy-offload"),
            "Cannot enable copy offloading when -S is used",
        ),
        (
            arguments.has("salvage") and arguments.has("copy-offload"),
            "Cannot use copy offloading in salvaging mode",
        ),
        (arguments.has("target-image-opts") and creates, "--target-image-opts requires use of -n flag"),
        (option_text is not None and not creates, "-o has no effect when skipping image creation"),
        (arguments.has("target-is-zero") and creates, "--target-is-zero requires use of -n flag"),
    ):
        if contradicts:
            raise CommandFailed(message)
