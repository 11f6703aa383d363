"""Persistent dirty bitmaps: add, remove, clear, enable, disable, merge, copy; and what an incremental backup needs.

    FILL  bits and table in new clusters, new directory        LINK  header        RELEASE  what they replace

Each call is one transaction: a crash leaves the bitmaps as they were or as they shall be. Guest writes are recorded by
the image itself (`metadata/bitmaps.py`).

Source: qcow2.txt, "Bitmaps"; rules and texts are those of QEMU 7.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qcowlib.errors import BitmapError, ImageStateError, NoSuchBitmap, QcowError
from qcowlib.format import constants as k
from qcowlib.format.bitmap_directory import BitmapEntry, BitmapFlags
from qcowlib.format.entries import Int64Array
from qcowlib.image.interface import BlockImage
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.metadata.bitmap_bits import BitmapBits, bits_for
from qcowlib.metadata.bitmap_pointer import require_pointer_room
from qcowlib.metadata.bitmaps import (
    BitmapRecorder,
    is_inconsistent,
    load_bits,
    put_bits,
    release_bits,
    sound_bitmaps,
    write_bitmap_directory,
)
from qcowlib.metadata.heal import require_enough_refcounts
from qcowlib.metadata.transaction import MetadataTransaction

_LEAST_DEFAULT, _LARGEST_DEFAULT = 4096, 65536
_SPILL_BYTES = 16 << 20  # bits in memory at which a merge puts them into the file


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
    entry = _require_consistent(_find(_settled(image), name))
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
    if not name:
        raise BitmapError("Bitmap name cannot be empty")
    chosen = _default_granularity(image.cluster_size) if granularity is None else granularity
    bits = chosen.bit_length() - 1
    if chosen & (chosen - 1) or not k.MIN_BITMAP_GRANULARITY_BITS <= bits <= k.MAX_BITMAP_GRANULARITY_BITS:
        raise BitmapError("Granularity must be power of 2 and at least 512")
    if image.format != "qcow2":
        raise BitmapError(f"Can't store persistent bitmaps to {image.name}: Operation not supported")
    with _session(image, name) as transaction:
        entry = _new_entry(transaction, transaction.state.bitmaps, name, chosen, disabled)
        with transaction.direct_writes():
            new = put_bits(transaction, entry, _new_bits(transaction, entry))
            write_bitmap_directory(transaction, [*transaction.state.bitmaps, new])
        return new


def remove_bitmap(image: BlockImage, name: str) -> None:
    """Remove a bitmap, also an inconsistent one.

    Raises:
        NoSuchBitmap: there is none of this name.
    """
    _remove(image, name)


def remove_all_bitmaps(image: BlockImage) -> None:
    """Remove every bitmap of an image; nothing to do is no error."""
    if image.format == "qcow2":
        _remove(image, None)


def clear_bitmap(image: BlockImage, name: str) -> None:
    """Let nothing be marked in a bitmap. Raises as `enable_bitmap`."""
    _change_bits(image, name, BitmapBits.clear)


def enable_bitmap(image: BlockImage, name: str) -> None:
    """Record guest writes in a bitmap from now on.

    Raises:
        NoSuchBitmap: there is none of this name.
        BitmapError: it is inconsistent.
    """
    _set_auto(image, name, enabled=True)


def disable_bitmap(image: BlockImage, name: str) -> None:
    """Record no guest writes in a bitmap any more. Raises as `enable_bitmap`."""
    _set_auto(image, name, enabled=False)


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
    origin = _settled(image if source is None else source)
    with _session(image, name) as transaction:
        entry = _require_consistent(_find(image, name))
        other = _require_consistent(_find(origin, source_name))
        _require_same_size(origin, image.size)
        assert isinstance(origin, Qcow2Image)
        bits, more = load_bits(transaction.state, entry), load_bits(origin.state, other)
        with transaction.direct_writes():
            _merge_bits(transaction, bits, more)
            _replace(transaction, name, bits)


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
    require_copyable(_settled(source), skip_broken=skip_broken)
    require_bitmaps_possible(target)
    assert isinstance(source, Qcow2Image)
    chosen = []
    for entry in reversed(source.bitmaps):
        if not is_inconsistent(entry):
            chosen.append(entry)
        elif warn is not None:
            warn(f"Skipping inconsistent bitmap '{entry.name}'")
    if not chosen:
        return
    with _session(target, chosen[0].name) as transaction:
        failure: BitmapError | None = None
        entries = transaction.state.bitmaps
        at = len(entries)
        with transaction.direct_writes():
            for entry in chosen:
                try:
                    made = _copied(transaction, entries, source, entry)
                except BitmapError as error:
                    failure = error
                    break
                entries = [*entries[:at], made, *entries[at:]]
            write_bitmap_directory(transaction, entries)
    if failure is not None:
        raise failure


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
        _require_consistent(entry)
        _require_constraints(entry.name, 1 << entry.granularity_bits, size, state.geometry.cluster_size)
    recorder = BitmapRecorder(transaction, state.bitmaps)
    try:
        yield
    except QcowError:
        if not transaction.failed:
            recorder.store(state.header.virtual_size)
        raise
    recorder.store(state.header.virtual_size)


# What the operations share


@contextmanager
def _session(image: BlockImage, name: str) -> Iterator[MetadataTransaction]:
    """The transaction of an image whose bitmaps can be changed; nobody else uses it meanwhile.

    Freeing what is replaced needs refcounts that are not too low.
    """
    if image.format != "qcow2":
        raise NoSuchBitmap(f"Dirty bitmap '{name}' not found")
    with _writable(image).exclusive() as transaction:
        sound_bitmaps(transaction.state)
        require_enough_refcounts(transaction.state)
        yield transaction


def _writable(image: BlockImage) -> WritableQcow2Image:
    if not isinstance(image, WritableQcow2Image):
        raise ImageStateError(f"'{image.name}' is not open for writing")
    return image


def _settled(image: BlockImage) -> BlockImage:
    """The image; what it has recorded since it was opened is stored."""
    if isinstance(image, WritableQcow2Image):
        with image.exclusive():
            pass
    return image


def _find(image: BlockImage, name: str) -> BitmapEntry:
    entries: list[BitmapEntry] = getattr(image, "bitmaps", [])
    for entry in entries:
        if entry.name == name:
            return entry
    raise NoSuchBitmap(f"Dirty bitmap '{name}' not found")


def _require_consistent(entry: BitmapEntry) -> BitmapEntry:
    if is_inconsistent(entry):
        text = f"Bitmap '{entry.name}' is inconsistent and cannot be used"
        raise BitmapError(text, stock=f"{text}\nTry block-dirty-bitmap-remove to delete this bitmap from disk")
    return entry


def _default_granularity(cluster_size: int) -> int:
    return min(max(_LEAST_DEFAULT, cluster_size), _LARGEST_DEFAULT)


def _require_same_size(source: BlockImage, size: int) -> None:
    if source.size != size:
        sizes = f"(destination size is {size}, source size is {source.size})"
        raise BitmapError(f"Bitmaps are of different sizes {sizes} and can't be merged")


def _new_entry(
    transaction: MetadataTransaction, existing: list[BitmapEntry], name: str, granularity: int, disabled: bool
) -> BitmapEntry:
    """The entry, without a table, of a bitmap that can be added to those that exist."""
    state = transaction.state
    if any(entry.name == name for entry in existing):
        raise BitmapError(f"Bitmap already exists: {name}")
    prefix = f"Can't make bitmap '{name}' persistent in '{transaction.storage.name}': "
    if state.header.version < 3:
        raise BitmapError(f"{prefix}Cannot store dirty bitmaps in qcow2 v2 files")
    _require_constraints(name, granularity, state.header.virtual_size, state.geometry.cluster_size, prefix)
    entry = BitmapEntry(
        table_offset=0,
        table_size=0,
        flags=0 if disabled else BitmapFlags.AUTO,
        type=k.BITMAP_TYPE_DIRTY_TRACKING,
        granularity_bits=granularity.bit_length() - 1,
        name=name,
    )
    if len(existing) >= k.MAX_BITMAPS:
        raise BitmapError(f"{prefix}Maximum number of persistent bitmaps is already reached")
    if sum(len(other.build()) for other in (*existing, entry)) > k.MAX_BITMAP_DIRECTORY_SIZE:
        raise BitmapError(f"{prefix}Not enough space in the bitmap directory")
    require_pointer_room(state.header)
    return entry


def _require_constraints(name: str, granularity: int, disk_size: int, cluster_size: int, prefix: str = "") -> None:
    length = -(-bits_for(disk_size, granularity.bit_length() - 1) // 8)
    if length > min(k.MAX_BITMAP_BYTES, k.MAX_BITMAP_TABLE_ENTRIES * cluster_size):
        raise BitmapError(f"{prefix}Too much space will be occupied by the bitmap. Use larger granularity")
    if len(name.encode("utf-8", "surrogateescape")) > k.MAX_BITMAP_NAME:
        raise BitmapError(f"{prefix}Name length exceeds maximum ({k.MAX_BITMAP_NAME} characters)")


def _new_bits(transaction: MetadataTransaction, entry: BitmapEntry) -> BitmapBits:
    state = transaction.state
    return BitmapBits(state.storage, state.geometry, entry.granularity_bits, state.header.virtual_size)


def _change_bits(image: BlockImage, name: str, change: Callable[[BitmapBits], None]) -> None:
    with _session(image, name) as transaction:
        bits = load_bits(transaction.state, _require_consistent(_find(image, name)))
        change(bits)
        with transaction.direct_writes():
            _replace(transaction, name, bits)


def _set_auto(image: BlockImage, name: str, *, enabled: bool) -> None:
    with _session(image, name) as transaction:
        entry = _require_consistent(_find(image, name))
        if bool(entry.flags & BitmapFlags.AUTO) == enabled:
            return
        changed = replace(entry, flags=entry.flags ^ BitmapFlags.AUTO)
        with transaction.direct_writes():
            entries = transaction.state.bitmaps
            write_bitmap_directory(transaction, [changed if other is entry else other for other in entries])


def _replace(transaction: MetadataTransaction, name: str, bits: BitmapBits) -> None:
    """Let the bitmap of a name have other bits."""
    write_bitmap_directory(
        transaction,
        [put_bits(transaction, entry, bits) if entry.name == name else entry for entry in transaction.state.bitmaps],
    )


def _remove(image: BlockImage, name: str | None) -> None:
    """Remove the bitmap of a name, or all."""
    if image.format != "qcow2":
        raise NoSuchBitmap(f"Dirty bitmap '{name}' not found")
    with _writable(image).exclusive() as transaction:
        entries = sound_bitmaps(transaction.state)
        gone = list(entries) if name is None else [_find(image, name)]
        if not gone:
            return
        freeing = _can_free(transaction)
        with transaction.direct_writes():
            for entry in gone if freeing else ():
                release_bits(transaction, entry)
            write_bitmap_directory(transaction, [entry for entry in entries if entry not in gone], freeing=freeing)


def _can_free(transaction: MetadataTransaction) -> bool:
    """Whether it can be told what a bitmap's clusters hold; else they are left over, for a repair to free."""
    try:
        require_enough_refcounts(transaction.state)
    except QcowError:
        return False
    return True


def _copied(
    transaction: MetadataTransaction, existing: list[BitmapEntry], source: Qcow2Image, entry: BitmapEntry
) -> BitmapEntry:
    """A bitmap of another image, written into this one."""
    disabled = not entry.flags & BitmapFlags.AUTO
    try:
        new = _new_entry(transaction, existing, entry.name, 1 << entry.granularity_bits, disabled)
    except BitmapError as error:
        raise BitmapError(f"Failed to create bitmap {entry.name}: {error}") from error
    try:
        _require_same_size(source, transaction.state.header.virtual_size)
    except BitmapError as error:
        raise BitmapError(f"Failed to populate bitmap {entry.name}: {error}") from error
    bits = _new_bits(transaction, new)
    _merge_bits(transaction, bits, load_bits(source.state, entry))
    return put_bits(transaction, new, bits)


def _merge_bits(transaction: MetadataTransaction, bits: BitmapBits, other: BitmapBits) -> None:
    """Set all bits of which `other` has a part set; phase FILL."""
    for first, last in other.runs():
        start = first << other.granularity_bits >> bits.granularity_bits
        stop = ((last << other.granularity_bits) - 1 >> bits.granularity_bits) + 1
        stop = np.minimum(stop, bits.size)
        # With larger steps than before, ranges meet.
        heads = np.concatenate(([True], start[1:] > stop[:-1]))
        tails = np.concatenate((heads[1:], [True]))
        bits.set_many(start[heads], stop[tails])
        if bits.changed_bytes > _SPILL_BYTES:
            bits.spill(transaction)
