"""Persistent dirty bitmaps: add, remove, clear, enable, disable, merge, copy; and what an incremental backup needs.

Each call is one transaction: a crash leaves the bitmaps as they were or as they shall be (`bitmap_changes`). Guest
writes are recorded by the image itself (`metadata/bitmaps.py`).

Source: qcow2.txt, "Bitmaps"; rules and texts are those of QEMU 7.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qcowlib.errors import BitmapError, QcowError
from qcowlib.format.bitmap_directory import BitmapEntry, BitmapFlags
from qcowlib.format.entries import Int64Array
from qcowlib.image.interface import BlockImage
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.metadata.bitmap_bits import BitmapBits, bits_for
from qcowlib.metadata.bitmaps import BitmapRecorder, is_inconsistent, load_bits, sound_bitmaps
from qcowlib.metadata.transaction import MetadataTransaction
from qcowlib.operations.bitmap_changes import (
    BitmapChanges,
    change_bitmaps,
    find_bitmap,
    require_consistent,
    require_constraints,
    settled,
)


class DirtyRanges(NamedTuple):
    """Ranges of the disk that a bitmap says have changed: sorted, none touches the next.

    Attributes:
        start: first guest byte of each range (int64, n).
        length: guest bytes of each range, multiples of the granularity but at the end of the disk (int64, n).
    """

    start: Int64Array
    length: Int64Array


def dirty_extents(image: BlockImage, name: str) -> Iterator[DirtyRanges]:
    """The ranges that have changed since a bitmap was made or cleared, as an incremental backup wants them.

        for batch in qcowlib.dirty_extents(image, "since-monday"):
            for start, length in zip(batch.start.tolist(), batch.length.tolist()):
                backup.write_at(start, image.read(start, length))

    Args:
        image: not written meanwhile; when it is open for writing, what it has recorded so far is stored first.
        name: of the bitmap.

    Returns: batches of bounded size, none of them empty; ranges of different batches do not touch either.

    Raises:
        NoSuchBitmap: there is none of this name.
        BitmapError: it is inconsistent: changes may be missing in it.
        CorruptMetadata: its table is damaged.
    """
    entry = require_consistent(find_bitmap(settled(image), name))
    assert isinstance(image, Qcow2Image)
    return _ranges(load_bits(image.state, entry), image.size)


def _ranges(bits: BitmapBits, size: int) -> Iterator[DirtyRanges]:
    for first, last in bits.runs():
        start = first << bits.granularity_bits
        yield DirtyRanges(start, np.minimum(last << bits.granularity_bits, size) - start)


def add_bitmap(image: BlockImage, name: str, *, granularity: int | None = None, disabled: bool = False) -> BitmapEntry:
    """Add a bitmap in which nothing is marked.

    Args:
        image: a qcow2 image opened for writing, version 3.
        name: not one that is there already; at most 1023 bytes.
        granularity: guest bytes for one bit, a power of 2 from 512 to 2 GiB; None: the cluster size, but within 4 KiB
            to 64 KiB.
        disabled: do not record guest writes.

    Returns: its entry in the bitmap directory.

    Raises:
        BitmapError: the name or the granularity cannot be used, or the image cannot have bitmaps.
        OptionError: the header has no room for the pointer to bitmaps.
    """
    with change_bitmaps(image) as changes:
        changes.add(name, granularity, disabled=disabled)
    return changes.find(name)


def remove_bitmap(image: BlockImage, name: str) -> None:
    """Remove a bitmap, also an inconsistent one.

    Raises:
        NoSuchBitmap: there is none of this name.
    """
    with change_bitmaps(image) as changes:
        changes.remove(name)


def remove_all_bitmaps(image: BlockImage) -> None:
    """Remove every bitmap of an image; nothing to do is no error."""
    with change_bitmaps(image) as changes:
        changes.remove_all()


def clear_bitmap(image: BlockImage, name: str) -> None:
    """Let nothing be marked in a bitmap. Raises as `enable_bitmap`."""
    with change_bitmaps(image) as changes:
        changes.clear(name)


def enable_bitmap(image: BlockImage, name: str) -> None:
    """Record guest writes in a bitmap from now on.

    Raises:
        NoSuchBitmap: there is none of this name.
        BitmapError: it is inconsistent.
    """
    with change_bitmaps(image) as changes:
        changes.enable(name)


def disable_bitmap(image: BlockImage, name: str) -> None:
    """Record no guest writes in a bitmap any more. Raises as `enable_bitmap`."""
    with change_bitmaps(image) as changes:
        changes.disable(name)


def merge_bitmap(image: BlockImage, name: str, source_name: str, source: BlockImage | None = None) -> None:
    """Mark in a bitmap all that another one has marked; their granularities may differ.

    Args:
        image: with the bitmap that is changed.
        name: of that bitmap.
        source_name: of the bitmap that is read.
        source: the image that has it, when it is another one.

    Raises:
        NoSuchBitmap: one of them does not exist.
        BitmapError: one of them is inconsistent, or the disks are of different sizes.
    """
    with change_bitmaps(image) as changes:
        changes.merge(name, source_name, source)


def copy_bitmaps(
    source: BlockImage, target: BlockImage, *, skip_broken: bool = False, warn: Callable[[str], None] | None = None
) -> None:
    """Give an image the bitmaps of another one, enabled where they are.

    Args:
        source: a qcow2 image; bitmaps of its backing files are left alone.
        target: a qcow2 image opened for writing, of the same size.
        skip_broken: leave inconsistent bitmaps out.
        warn: called with a sentence about each that is left out.

    Raises:
        BitmapError: a bitmap is inconsistent, or cannot be made in the target. Those before it (QEMU's order: from the
            last to the first) have been copied.
    """
    entries = settled(source)
    require_copyable(source, skip_broken=skip_broken)
    require_bitmaps_possible(target)
    with change_bitmaps(target) as changes:
        for entry in reversed(entries):
            if not is_inconsistent(entry):
                _copy(changes, source, entry)
            elif warn is not None:
                warn(f"Skipping inconsistent bitmap '{entry.name}'")


def require_copyable(source: BlockImage, *, skip_broken: bool) -> None:
    """Make sure that the bitmaps of an image can be copied.

    Raises:
        BitmapError: the format has no bitmaps, or one is inconsistent and not to be skipped.
    """
    if not isinstance(source, Qcow2Image) or source.header.version < 3:
        raise BitmapError("Source lacks bitmap support")
    for entry in reversed(source.bitmaps):
        if is_inconsistent(entry) and not skip_broken:
            text = f"Cannot copy inconsistent bitmap '{entry.name}'"
            hint = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
            raise BitmapError(text, stock=f"{text}\n{hint}")


def require_bitmaps_possible(image: BlockImage) -> None:
    """Make sure that an image can have bitmaps.

    Raises:
        BitmapError: it is no qcow2 image of version 3.
    """
    if not isinstance(image, Qcow2Image) or image.header.version < 3:
        raise BitmapError(f"Format driver '{image.format}' does not support bitmaps")


def bitmaps_size(image: BlockImage, cluster_size: int) -> int:
    """Bytes that the bitmaps of an image take in a new image at most.

    Args:
        image: the image that has the bitmaps; without any the answer is 0.
        cluster_size: of the new image, in bytes.

    Source: QEMU's rule for `qemu-img measure`: all bits allocated, tables, and one directory.
    """
    total = directory = 0
    for entry in getattr(image, "bitmaps", ()):
        data = -(-bits_for(image.size, entry.granularity_bits) // 8)
        clusters = -(-data // cluster_size)
        total += (clusters + -(-clusters * 8 // cluster_size)) * cluster_size
        directory += len(replace(entry, extra_data=b"", name_rest=b"", padding=b"").build())
    return total + -(-directory // cluster_size) * cluster_size


@contextmanager
def resize_bitmaps(transaction: MetadataTransaction, size: int) -> Iterator[None]:
    """For a resize: the bitmaps follow the size of the disk. New bits are clear.

        with image.exclusive() as transaction, resize_bitmaps(transaction, size):
            ...  # change the size, and commit

    In between they are marked as in use, as nobody may take a bitmap for one of another size.

    Args:
        transaction: of the image; nothing is pending.
        size: the size that the disk will have, in bytes.

    Raises:
        BitmapError: a bitmap is inconsistent, or would become too large. Nothing was changed.
    """
    state = transaction.state
    if size == state.header.virtual_size:
        yield
        return
    for entry in sound_bitmaps(state):
        require_consistent(entry)
        require_constraints(entry, size, state.geometry.cluster_size)
    recorder = BitmapRecorder(transaction, state.bitmaps)
    try:
        yield
    except QcowError:
        if not transaction.failed:
            recorder.store(state.header.virtual_size)
        raise
    recorder.store(state.header.virtual_size)


def _copy(changes: BitmapChanges, source: BlockImage, entry: BitmapEntry) -> None:
    disabled = not entry.flags & BitmapFlags.AUTO
    try:
        changes.add(entry.name, 1 << entry.granularity_bits, disabled=disabled)
    except BitmapError as error:
        raise BitmapError(f"Failed to create bitmap {entry.name}: {error}") from error
    try:
        changes.merge(entry.name, entry.name, source)
    except BitmapError as error:
        changes.remove(entry.name)
        raise BitmapError(f"Failed to populate bitmap {entry.name}: {error}") from error
