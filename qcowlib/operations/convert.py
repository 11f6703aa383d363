"""Converting images: a new target (or an existing one) with the content of one or several sources.

options checked -> source's mapping walked (damage is found before anything is written) -> target made -> copied
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Unpack

from qcowlib.errors import BitmapError, OptionError
from qcowlib.image.creation_options import CreationOptions
from qcowlib.image.policy import OpenPolicy
from qcowlib.image.reader import ReadableImage
from qcowlib.image.references import Reference
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.bitmaps import copy_bitmaps, require_bitmaps_possible, require_copyable
from qcowlib.operations.copy_source import CopySource, Loss
from qcowlib.operations.copying import NEVER, CopyJob, Progress, WritableImage, copy
from qcowlib.operations.new_target import NewTarget, created, local_files, refuse_own_source, taken

DEFAULT_SPARSE_SIZE = 4096


def convert(
    source: ReadableImage | Sequence[ReadableImage],
    target: str | os.PathLike[str] | Reference,
    *,
    target_format: str = "raw",
    create: bool = True,
    compressed: bool = False,
    backing_file: str | None = None,
    backing_fmt: str | None = None,
    sparse_size: int = DEFAULT_SPARSE_SIZE,
    target_is_zero: bool = False,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    warn: Callable[[str], None] | None = None,
    salvage: bool = False,
    lost: Callable[[Loss], None] | None = None,
    offload: bool = False,
    out_of_order: bool = False,
    durable: bool = True,
    policy: OpenPolicy | None = None,
    target_passphrase: str | bytes | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **options: Unpack[CreationOptions],
) -> None:
    """Write the content of an image, or of several one behind the other, to another one.

        with open_image("old.qcow2") as source, ThreadPoolExecutor(2) as pool:
            convert(source, "new.qcow2", target_format="qcow2", compressed=True, executor=pool)

    Args:
        source: an opened image, or a snapshot of one; or several.
        target: name of the file to write; an existing one can be described by a `Reference`.
        target_format: "raw" or "qcow2".
        create: make the target, with the size of the source; False writes into an existing one.
        compressed: write compressed clusters (qcow2 only).
        backing_file, backing_fmt: backing file of the target; it must have the content of the source's backing file,
            since what the source has not allocated itself is left to it. Without `create` the target has it already.
        sparse_size: bytes of zeroes from which on a range is left out of the target; 0 allocates everything.
        target_is_zero: an existing target is known to read as zeroes.
        bitmaps: copy the persistent dirty bitmaps of the source, too (qcow2 only).
        skip_broken_bitmaps: leave out inconsistent ones instead of refusing.
        warn: called with a sentence about each that is left out.
        salvage: take what cannot be read for zeroes.
        lost: called with each piece of that.
        offload: let the host copy data by itself, or share it, where it can; zeroes in it are not looked for.
        out_of_order: write to a raw target in any order.
        durable: the target is on disk at the end; False does not wait for that.
        policy: which files that the target names may be opened (its backing file).
        target_passphrase: of an encrypted target; by default that of `options`.
        executor: reads ahead and compresses in it, and writes to a new target.
        progress: called with (bytes done, bytes to do) of data.
        options: see `CreationOptions`.

    The clusters of a qcow2 target lie in guest order, whatever the executor does.

    Raises:
        OptionError: the arguments do not fit each other.
        BitmapError: the bitmaps cannot be copied; with `create`, nothing was made then.
        ImageStateError: the target is a file of the source.
        CorruptMetadata: the source cannot be read; when its mapping is damaged, the target was not touched.
        StorageError, ImageLocked, ChainError: the target cannot be made or written. Nothing is left under its name if
            it was to be made; a note at the error says so if it existed before.
    """
    path = target.path if isinstance(target, Reference) else os.fspath(target)
    images = [source] if isinstance(source, ReadableImage) else list(source)
    _refuse_bad_options(target_format, create, compressed, backing_file, target_is_zero, options)
    if bitmaps:
        _refuse_bitmaps(images, create, target_format, options, skip_broken_bitmaps)
    refuse_own_source(images, path, options.get("data_file"))
    joined = CopySource(images, inherits=backing_file is not None, salvage=salvage)
    job = CopyJob(
        joined,
        0,
        joined.size,
        has_backing=backing_file is not None,
        compressed=compressed,
        sparse_size=sparse_size,
        offload=offload,
        out_of_order=out_of_order,
        executor=executor,
        progress=progress,
        lost=lost,
    )
    total = job.data_bytes()

    def fill(image: WritableImage, zero_from: int, *, fresh: bool) -> None:
        copy(replace(job, zero_from=zero_from, fresh=fresh), image, total=total)
        if bitmaps:
            copy_bitmaps(images[0], image, skip_broken=skip_broken_bitmaps, warn=warn)

    if create:
        new = NewTarget(
            path, joined.size, target_format, options, backing_file, backing_fmt, target_passphrase, policy, durable
        )
        with created(new) as image:
            fill(image, new.zero_from(image), fresh=True)
        return

    def check(image: WritableImage) -> None:
        refuse_own_source(images, *(file.name for file in local_files(image)))
        _refuse_existing(image, joined.size, compressed=compressed, bitmaps=bitmaps)

    with taken(target, target_format, check, policy=policy, passphrase=target_passphrase, durable=durable) as image:
        fill(image, 0 if target_is_zero else NEVER, fresh=False)


def _refuse_bitmaps(
    images: list[ReadableImage], create: bool, target_format: str, options: CreationOptions, skip_broken: bool
) -> None:
    if len(images) > 1:
        raise BitmapError("Copying bitmaps only possible with single source")
    require_copyable(images[0], skip_broken=skip_broken)
    if create and (target_format != "qcow2" or options.get("compat") in ("0.10", "v2")):
        raise BitmapError(f"Format driver '{target_format}' does not support bitmaps")


def _refuse_existing(image: WritableImage, size: int, *, compressed: bool, bitmaps: bool) -> None:
    if image.size < size:
        raise OptionError("output file is smaller than input file")
    if bitmaps:
        require_bitmaps_possible(image)
    if (
        compressed
        and isinstance(image, WritableQcow2Image)
        and (image.header.has_data_file or image.cipher is not None)
    ):
        raise _no_compressed_clusters()


def _refuse_bad_options(
    target_format: str,
    create: bool,
    compressed: bool,
    backing_file: str | None,
    target_is_zero: bool,
    options: CreationOptions,
) -> None:
    if target_format not in ("raw", "qcow2"):
        raise OptionError(f"Unknown file format '{target_format}'")
    if create and target_is_zero:
        raise OptionError("--target-is-zero requires use of -n flag")
    if not create and options:
        raise OptionError("-o has no effect when skipping image creation")
    if target_is_zero and backing_file is not None:
        raise OptionError("Cannot use --target-is-zero when the destination image has a backing file")
    if not compressed:
        return
    if target_format == "raw":
        raise OptionError("Compression not supported for this file format")
    if options.get("encrypt_format") is not None:
        raise OptionError("Compression and encryption not supported at the same time")
    if options.get("preallocation", "off") != "off":
        raise OptionError("Compression and preallocation not supported at the same time")
    if options.get("data_file") is not None:
        raise _no_compressed_clusters()


def _no_compressed_clusters() -> OptionError:
    return OptionError(
        "compressed clusters are not possible with encryption or an external data file",
        stock="error while writing at byte 0: Operation not supported",
    )
