"""Converting an image: a new target (or an existing one) with the content of a source.

options checked -> source's mapping walked (damage is found before anything is written) -> target made -> copied
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from typing import Unpack

from qcowlib.errors import BitmapError, ImageStateError, OptionError
from qcowlib.image.chain import chain_layers
from qcowlib.image.creation import create_image
from qcowlib.image.creation_options import CreationOptions
from qcowlib.image.opening import open_image
from qcowlib.image.policy import OpenPolicy
from qcowlib.image.qcow2 import MappedLayer
from qcowlib.image.raw import RawImage, StorageWindow
from qcowlib.image.reader import ReadableImage
from qcowlib.operations.bitmaps import copy_bitmaps, require_bitmaps_possible, require_copyable
from qcowlib.operations.copying import CopyJob, Progress, WritableImage, copy
from qcowlib.storage.local import LocalFile
from qcowlib.storage.protocol import ReadStorage

DEFAULT_SPARSE_SIZE = 4096


def convert(
    source: ReadableImage,
    target: str | os.PathLike[str],
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
    policy: OpenPolicy | None = None,
    target_passphrase: str | bytes | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **options: Unpack[CreationOptions],
) -> None:
    """Write the content of an image to another one.

        with open_image("old.qcow2") as source, ThreadPoolExecutor(2) as pool:
            convert(source, "new.qcow2", target_format="qcow2", compressed=True, executor=pool)

    Args:
        source: an opened image, or a snapshot of one.
        target: name of the file to write.
        target_format: "raw" or "qcow2".
        create: make the target, with the size of the source; False writes into an existing one.
        compressed: write compressed clusters (qcow2 only).
        backing_file, backing_fmt: backing file of the new target; it must have the content of the source's backing
            file, since what the source has not allocated itself is left to it.
        sparse_size: bytes of zeroes from which on a range is left out of the target; 0 allocates everything.
        target_is_zero: an existing target is known to read as zeroes.
        bitmaps: copy the persistent dirty bitmaps of the source, too (qcow2 only).
        skip_broken_bitmaps: leave out inconsistent ones instead of refusing.
        warn: called with a sentence about each that is left out.
        policy: which files that the target names may be opened (its backing file).
        target_passphrase: of an encrypted target; by default that of `options`.
        executor: reads (and compresses) ahead in it; compressed clusters then lie in the order in which they were done.
        progress: called with (bytes done, bytes to do) of data.
        options: see `CreationOptions`.

    Raises:
        OptionError: the arguments do not fit each other.
        BitmapError: the bitmaps cannot be copied; with `create`, nothing was made then.
        ImageStateError: the target is a file of the source.
        CorruptMetadata: the source cannot be read; when its mapping is damaged, the target was not touched.
        StorageError, ImageLocked, ChainError: the target cannot be made or written. A file that was made is removed.
    """
    path = os.fspath(target)
    _refuse_bad_options(target_format, create, compressed, backing_file, target_is_zero, options)
    if bitmaps:
        require_copyable(source, skip_broken=skip_broken_bitmaps)
        if create and (target_format != "qcow2" or options.get("compat") in ("0.10", "v2")):
            raise BitmapError(f"Format driver '{target_format}' does not support bitmaps")
    refuse_own_source(source, path)
    job = CopyJob(source, 0, source.size, backing_file is not None, compressed, sparse_size, executor, progress)
    total = job.data_bytes()
    if not create:
        with open_image(
            path, format=target_format, writable=True, policy=policy, passphrase=target_passphrase
        ) as image:
            if image.size < source.size:
                raise OptionError("output file is smaller than input file")
            if bitmaps:
                require_bitmaps_possible(image)
            copy(job, image, is_zero=target_is_zero, total=total)
            if bitmaps:
                copy_bitmaps(source, image, skip_broken=skip_broken_bitmaps, warn=warn)
        return
    passphrase = target_passphrase or options.get("encrypt_passphrase")
    with created(path, source.size, target_format, backing_file, backing_fmt, policy, passphrase, options) as image:
        copy(job, image, is_zero=backing_file is None, total=total)
        if bitmaps:
            copy_bitmaps(source, image, skip_broken=skip_broken_bitmaps, warn=warn)


@contextmanager
def created(
    path: str,
    size: int,
    image_format: str,
    backing_file: str | None,
    backing_fmt: str | None,
    policy: OpenPolicy | None,
    passphrase: str | bytes | None,
    options: CreationOptions,
) -> Iterator[WritableImage]:
    """A new image, open for writing. When the block fails, a file that was not there before is removed again."""
    existed = os.path.lexists(path)
    create_image(
        path,
        size,
        format=image_format,
        backing_file=backing_file,
        backing_fmt=backing_fmt,
        policy=policy,
        **options,
    )
    try:
        with open_image(path, format=image_format, writable=True, policy=policy, passphrase=passphrase) as image:
            yield image
    except BaseException:
        if not existed:
            with suppress(OSError):
                os.unlink(path)
        raise


def refuse_own_source(source: ReadableImage, path: str) -> None:
    """Raise when `path` is one of the files that the source is read from.

    Raises:
        ImageStateError: it is.
    """
    try:
        target = os.stat(path)
    except OSError:
        return
    for layer in chain_layers(source):
        for storage in _storages(layer):
            if isinstance(storage, LocalFile) and os.path.samestat(os.fstat(storage.fileno()), target):
                raise ImageStateError(f"'{path}' is the source or a file of its chain; it was not changed")


def _storages(layer: object) -> tuple[ReadStorage, ...]:
    if isinstance(layer, MappedLayer):
        return layer.state.storage, layer.state.data_storage
    if isinstance(layer, RawImage):
        storage = layer.storage
        while isinstance(storage, StorageWindow):
            storage = storage.inner
        return (storage,)
    return ()


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
    if compressed and target_format == "raw":
        raise OptionError("Compression not supported for this file format")
    if compressed and options.get("encrypt_format") is not None:
        raise OptionError("Compression and encryption not supported at the same time")
    if compressed and options.get("preallocation", "off") != "off":
        raise OptionError("Compression and preallocation not supported at the same time")
    if create and target_is_zero:
        raise OptionError("--target-is-zero requires use of -n flag")
    if not create and (options or backing_file is not None):
        raise OptionError("-o has no effect when skipping image creation")
