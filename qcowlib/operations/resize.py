"""Resize: give a disk another size.

    grow     what an accident or an applied snapshot left behind the end is dropped
             larger L1 table -> zeroes or preallocated clusters behind the old end -> new size in the header
    shrink   new size in the header -> L2 and L1 entries behind the new end dropped -> their clusters freed
             -> refcount blocks that count nothing given up -> file cut behind its last cluster

One write of the header's first sector is the moment at which the new size takes effect. A shrink that is cut off after
it has left mapped clusters behind the end of the disk: the next resize, to whatever size, drops them.

Source: the rules and texts of QEMU 7.2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcowlib.errors import OptionError, QcowError
from qcowlib.extents import ExtentKind
from qcowlib.format.constants import MAX_L1_ENTRIES
from qcowlib.format.entries import ENTRY_DTYPE
from qcowlib.image.create_target import lengthen
from qcowlib.image.creation_options import PREALLOCATION_MODES, require_length
from qcowlib.image.probe import probe_format
from qcowlib.image.raw import SECTOR_SIZE, WritableRawImage
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.metadata.heal import require_enough_refcounts
from qcowlib.metadata.transaction import MetadataTransaction
from qcowlib.metadata.trees import count_tree, release_tree, write_active_l1
from qcowlib.operations.bitmaps import resize_bitmaps
from qcowlib.operations.preallocation import preallocate


def resize(
    image: WritableQcow2Image | WritableRawImage,
    size: int,
    *,
    shrink: bool = False,
    preallocation: str = "off",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Change the size of a disk; new bytes read as zeroes.

        with qcowlib.open_image("disk.qcow2", writable=True, policy=qcowlib.LocalFiles()) as image:
            qcowlib.resize(image, 20 << 30)

    Internal snapshots keep their own sizes; version 2 cannot say them, so there snapshots prevent a resize.

    Args:
        image: opened for writing, with its backing file: where that is longer than the disk was, zeroes must hide it.
        size: new size in bytes, a multiple of 512.
        shrink: allow a smaller size; what lies behind it is lost.
        preallocation: "off", "metadata" (qcow2), "falloc" or "full": reserve space for the new part.
        progress: called with (bytes done, bytes to do) while space is preallocated.

    Raises:
        OptionError: a size or mode that is not possible. Nothing was changed.
        BitmapError: a bitmap is inconsistent, or would become too large. Nothing was changed.
        CorruptMetadata: the mapping is damaged, or a refcount too low: it cannot be told what to free.
        StorageError: the host file failed; the size is the old one, or the new one if only freeing space has failed.
    """
    if preallocation not in PREALLOCATION_MODES:
        raise OptionError(f"Invalid preallocation mode '{preallocation}'")
    require_length(size)
    if size <= 0:
        raise OptionError("New image size must be positive")
    if size <= image.size and preallocation != "off":
        raise OptionError("Preallocation can only be used for growing images")
    if size < image.size and not shrink:
        raise OptionError("Use the --shrink option to perform a shrink operation.")
    if isinstance(image, WritableRawImage):
        detected = probe_format(image.storage)
        if detected != "raw":
            raise OptionError(f"'{image.name}' holds a {detected} image: as a raw image it is not resized")
        image.resize(size, preallocation)
        return
    if size % SECTOR_SIZE:
        raise OptionError(f"The new size must be a multiple of {SECTOR_SIZE}")
    if image.header.nb_snapshots and image.header.version < 3:
        raise OptionError("Can't resize a v2 image which has snapshots")
    with image.exclusive() as transaction, resize_bitmaps(transaction, size):
        transaction.flush()  # what was written before the resize is there if the resize is
        if size < image.size:
            _shrink(image, transaction, size)
        else:
            _grow(image, transaction, size, preallocation, progress)


# Growing


def _grow(
    image: WritableQcow2Image,
    transaction: MetadataTransaction,
    size: int,
    preallocation: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    state, old = transaction.state, image.size
    entries = state.geometry.l1_entries_for(size)
    if entries > MAX_L1_ENTRIES:
        raise OptionError("Failed to grow the L1 table: File too large")
    hides = image.backing is not None and image.backing.size > old and size > old
    if hides and state.header.version < 3 and preallocation in ("off", "metadata"):
        raise OptionError("Failed to zero out new clusters: Operation not supported")
    if state.header.has_raw_data_file and preallocation == "off":
        preallocation = "metadata"  # what can be read from the data file alone must be mapped one to one
    _drop_behind(image, transaction, old)
    if size == old:
        return
    # What a raw data file has behind the disk becomes a part of it, as in QEMU; of another one, nothing does.
    data_end = max(old, transaction.data_storage.size()) if state.header.has_raw_data_file else old
    if entries > len(state.l1):
        l1 = np.zeros(entries, dtype=ENTRY_DTYPE)
        l1[: len(state.l1)] = state.l1
        transaction.replace_l1(l1)
        transaction.commit()
    try:
        _prepare(image, transaction, size, preallocation, hides=hides, data_end=data_end, progress=progress)
        transaction.commit()
        transaction.flush()  # the new part reads as it shall before it is a part of the disk
        transaction.change_header(size=size)
        transaction.commit()
    except QcowError:
        _take_back(image, transaction, old, data_end)
        raise
    finally:
        image.growing_to = 0


def _prepare(
    image: WritableQcow2Image,
    transaction: MetadataTransaction,
    size: int,
    preallocation: str,
    *,
    hides: bool,
    data_end: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Make what is behind the old end read as zeroes; with a data file it grows at once."""
    state, old = transaction.state, image.size
    geometry, data_storage = state.geometry, transaction.data_storage
    image.growing_to = size
    if state.header.has_data_file:
        data_storage.truncate(data_end)
        if data_end < size:
            lengthen(data_storage, data_end, size, preallocation)
    boundary, whole = geometry.cluster_end(old), geometry.cluster_end(size)
    begin, head = boundary, b""
    if preallocation in ("falloc", "full") and not state.header.has_data_file:
        begin = geometry.cluster_start(old)
        head = image.read(begin, old - begin)  # the last cluster moves, so that the new space is in one piece
    elif hides:
        start = -(-old // geometry.subcluster_size) * geometry.subcluster_size
        stop = whole if preallocation == "off" else boundary
        image.writer.write(old, memoryview(bytes(min(start, size) - old)))
        if stop > start:
            image.writer.zero_units(start, stop)
    elif boundary > old and data_end == old and (preallocation != "off" or _has_bytes(image, old, min(boundary, size))):
        image.writer.write(old, memoryview(bytes(min(boundary, size) - old)))
    if preallocation == "off" or whole <= begin:
        return
    encrypted = image.cipher is not None
    reserved = preallocation != "metadata" and not state.header.has_data_file and not encrypted
    # Where zeroes in the file are not zeroes of the guest, or somebody else's bytes would show, the entries say zero.
    preallocate(
        transaction,
        image.writer,
        begin,
        whole,
        preallocation,
        zero=state.header.version >= 3 and (encrypted or (hides and not reserved)),
        full=hides and reserved,
        fill=encrypted and state.header.version < 3,
        head=head,
        progress=progress,
    )


def _has_bytes(image: WritableQcow2Image, start: int, stop: int) -> bool:
    """Whether the image holds anything but zeroes in a range behind the end of its disk: a shrink left it there."""
    while start < stop:
        kind, host, run = image.lookup(start)
        data = bytearray(min(run, stop - start))
        if kind == ExtentKind.DATA:
            image.read_data(start, host, memoryview(data))
        elif kind == ExtentKind.COMPRESSED:
            image.read_compressed(start, host, 0, memoryview(data))
        if any(data):
            return True
        start += len(data)
    return False


def _take_back(image: WritableQcow2Image, transaction: MetadataTransaction, old: int, data_end: int) -> None:
    """After a failure: the new part is dropped again, as far as the host lets us; else the next resize does it."""
    if transaction.failed or image.size != old:
        return
    try:
        if transaction.state.header.has_data_file:
            transaction.data_storage.truncate(data_end)
        transaction.commit()
        _drop_behind(image, transaction, old)
    except QcowError:
        return


# Shrinking


def _shrink(image: WritableQcow2Image, transaction: MetadataTransaction, size: int) -> None:
    require_enough_refcounts(transaction.state)
    transaction.change_header(size=size)
    transaction.commit()
    _drop_behind(image, transaction, size)
    transaction.trim()
    if transaction.state.header.has_data_file:
        transaction.data_storage.truncate(size)


def _drop_behind(image: WritableQcow2Image, transaction: MetadataTransaction, size: int) -> None:
    """Unmap and free all that lies behind the end of the disk in the active layer."""
    state = transaction.state
    geometry = state.geometry
    kept = geometry.l1_entries_for(size)
    if kept and kept <= len(state.l1) and size % geometry.l2_coverage:
        image.writer.forget(geometry.cluster_end(size), kept - 1)
    transaction.commit()
    lost = state.l1.copy()
    lost[:kept] = 0
    if not lost.any():
        return
    require_enough_refcounts(state)
    counts = count_tree(state, lost)
    with transaction.direct_writes():
        state.l1[kept:] = 0
        write_active_l1(transaction)
        transaction.flush()  # references must be gone before their clusters are free
        release_tree(transaction, counts)
        state.tables.clear()
        state.refresh_regions()
