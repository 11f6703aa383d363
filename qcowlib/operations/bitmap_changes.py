"""Changes to the persistent dirty bitmaps of one image: any number of actions, stored together.

    actions in memory
    -> FILL  bits and tables in new clusters, new directory        LINK  header        RELEASE  what they replace

Source: qcow2.txt, "Bitmaps"; rules and texts are those of QEMU 7.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from qcowlib.errors import BitmapError, ImageStateError, NoSuchBitmap, QcowError, StorageError
from qcowlib.format import constants as k
from qcowlib.format.bitmap_directory import BitmapEntry, BitmapFlags
from qcowlib.image.interface import BlockImage
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.metadata.bitmap_bits import BitmapBits, bits_for
from qcowlib.metadata.bitmap_pointer import require_pointer_room
from qcowlib.metadata.bitmaps import (
    drop_stale_pointer,
    is_inconsistent,
    load_bits,
    put_bits,
    release_abandoned,
    release_bits,
    sound_bitmaps,
    write_bitmap_directory,
)
from qcowlib.metadata.heal import require_enough_refcounts
from qcowlib.metadata.transaction import MetadataTransaction

_LEAST_DEFAULT, _LARGEST_DEFAULT = 4096, 65536
_SPILL_BYTES = 16 << 20  # bits in memory at which a merge puts them into the file
_SMALL = 4 << 20  # bytes of bits up to which a bitmap is written anew with each change to any of them


class BitmapChanges:
    """The bitmaps of an image as they shall be, in memory until `store`.

    Args:
        image: qcow2, opened for writing; any other image has no bitmaps and can have none.
        transaction: its transaction; None for another image.
    """

    def __init__(self, image: BlockImage, transaction: MetadataTransaction | None) -> None:
        self._image = image
        self._transaction = transaction
        self._bits: dict[str, BitmapBits] = {}  # of bitmaps that are new or changed
        self._gone: list[BitmapEntry] = []
        self._dropped: list[BitmapBits] = []  # of bitmaps that were removed: they may have clusters in the file already
        self._changed = False
        self._damage: QcowError | None = None
        self.entries: list[BitmapEntry] = []
        if transaction is not None:
            self.entries = list(sound_bitmaps(transaction.state))
            self._damage = _damage(transaction)
        self._old = len(self.entries)

    def find(self, name: str) -> BitmapEntry:
        """The bitmap of a name.

        Raises:
            NoSuchBitmap: there is none.
        """
        return find_bitmap(self.entries, name)

    def add(self, name: str, granularity: int | None = None, *, disabled: bool = False) -> None:
        """See `add_bitmap`."""
        if not name:
            raise BitmapError("Bitmap name cannot be empty")
        chosen = granularity or min(max(_LEAST_DEFAULT, self._image.cluster_size), _LARGEST_DEFAULT)
        bits = chosen.bit_length() - 1
        if chosen & (chosen - 1) or not k.MIN_BITMAP_GRANULARITY_BITS <= bits <= k.MAX_BITMAP_GRANULARITY_BITS:
            raise BitmapError("Granularity must be power of 2 and at least 512")
        if self._transaction is None:
            raise BitmapError(f"Can't store persistent bitmaps to {self._image.name}: Operation not supported")
        state = self._sound().state
        if any(entry.name == name for entry in self.entries):
            raise BitmapError(f"Bitmap already exists: {name}")
        entry = BitmapEntry(
            table_offset=0,
            table_size=0,
            flags=0 if disabled else BitmapFlags.AUTO,
            type=k.BITMAP_TYPE_DIRTY_TRACKING,
            granularity_bits=bits,
            name=name,
        )
        self._require_possible(entry)
        require_pointer_room(state.header)
        # QEMU's order: those that are added together stand behind the others, the last one first.
        self.entries.insert(self._old, entry)
        self._bits[name] = BitmapBits(state.storage, state.geometry, bits, state.header.virtual_size)
        self._changed = True

    def remove(self, name: str) -> None:
        """See `remove_bitmap`."""
        entry = self.find(name)
        self._old -= self.entries.index(entry) < self._old
        self.entries.remove(entry)
        bits = self._bits.pop(name, None)
        if bits is not None:
            bits.clear()
            self._dropped.append(bits)
        self._changed = True
        if entry.table_offset:
            self._gone.append(entry)

    def remove_all(self) -> None:
        """See `remove_all_bitmaps`."""
        for entry in list(self.entries):
            self.remove(entry.name)

    def clear(self, name: str) -> None:
        """See `clear_bitmap`."""
        self._bits_of(name).clear()
        self._changed = True

    def enable(self, name: str) -> None:
        """See `enable_bitmap`."""
        self._put_flags(name, BitmapFlags.AUTO)

    def disable(self, name: str) -> None:
        """See `disable_bitmap`."""
        self._put_flags(name, 0)

    def merge(self, name: str, source_name: str, source: BlockImage | None = None) -> None:
        """See `merge_bitmap`."""
        entry = self.find(name)
        found = self.find(source_name) if source is None else find_bitmap(settled(source), source_name)
        require_consistent(entry)
        require_consistent(found)
        if source is not None and source.size != self._image.size:
            sizes = f"(destination size is {self._image.size}, source size is {source.size})"
            raise BitmapError(f"Bitmaps are of different sizes {sizes} and can't be merged")
        bits = self._bits_of(name)
        other = load_bits(source.state, found) if isinstance(source, Qcow2Image) else self._bits_of(source_name)
        self._changed = True
        if other is not bits:
            transaction = self._sound()
            with transaction.direct_writes():
                _merge_bits(transaction, bits, other)

    def store(self) -> None:
        """Write what has changed, and commit."""
        transaction = self._transaction
        if transaction is None or not self._changed:
            return
        freeing = self._damage is None
        with transaction.direct_writes():
            for entry in self._gone if freeing else ():
                release_bits(transaction, entry)
            for bits in self._dropped:
                release_abandoned(transaction, bits)
            self.entries = [self._written(transaction, entry) for entry in self.entries] if freeing else self.entries
            write_bitmap_directory(transaction, self.entries, freeing=freeing)

    def _written(self, transaction: MetadataTransaction, entry: BitmapEntry) -> BitmapEntry:
        """A bitmap, put into the file; small ones that have not changed are moved, as QEMU moves all.

        So the same commands give files of the same layout.
        """
        if is_inconsistent(entry):
            return entry
        bits = self._bits.get(entry.name)
        if bits is None:
            bits = load_bits(transaction.state, entry)
        return put_bits(transaction, entry, bits, anew=bits.stored_bytes + bits.changed_bytes <= _SMALL)

    def _put_flags(self, name: str, flags: int) -> None:
        entry = require_consistent(self.find(name))
        self._sound()
        self.entries[self.entries.index(entry)] = replace(entry, flags=flags)
        self._changed = True

    def _bits_of(self, name: str) -> BitmapBits:
        """The bits of a consistent bitmap, to be changed."""
        entry = require_consistent(self.find(name))
        if name not in self._bits:
            self._bits[name] = load_bits(self._sound().state, entry)
        return self._bits[name]

    def _sound(self) -> MetadataTransaction:
        """The transaction of an image in which clusters can be taken and freed.

        Raises:
            QcowError: it is damaged. Bitmaps can still be removed; their clusters are left over for a repair.
        """
        if self._damage is not None:
            raise self._damage
        assert self._transaction is not None
        return self._transaction

    def _require_possible(self, entry: BitmapEntry) -> None:
        """QEMU's limits for a new bitmap."""
        state = self._sound().state
        prefix = f"Can't make bitmap '{entry.name}' persistent in '{self._image.name}': "
        if state.header.version < 3:
            raise BitmapError(f"{prefix}Cannot store dirty bitmaps in qcow2 v2 files")
        require_constraints(entry, state.header.virtual_size, state.geometry.cluster_size, prefix)
        if len(self.entries) >= k.MAX_BITMAPS:
            raise BitmapError(f"{prefix}Maximum number of persistent bitmaps is already reached")
        if sum(len(other.build()) for other in (*self.entries, entry)) > k.MAX_BITMAP_DIRECTORY_SIZE:
            raise BitmapError(f"{prefix}Not enough space in the bitmap directory")


@contextmanager
def change_bitmaps(image: BlockImage) -> Iterator[BitmapChanges]:
    """Several changes to the bitmaps of an image as one transaction; nobody else uses the image meanwhile.

        with change_bitmaps(image) as changes:
            changes.clear("monday")
            changes.disable("sunday")

    After a `QcowError` from one of them those before it are stored nevertheless, as by qemu-img.

    Raises:
        ImageStateError: a qcow2 image that is not open for writing.
        FormatError: the bitmap directory is damaged.
    """
    if image.format != "qcow2":
        yield BitmapChanges(image, None)
        return
    if not isinstance(image, WritableQcow2Image):
        raise ImageStateError(f"'{image.name}' is not open for writing")
    with image.exclusive() as transaction:
        drop_stale_pointer(transaction)
        changes = BitmapChanges(image, transaction)
        try:
            yield changes
        except QcowError:
            if not transaction.failed:
                changes.store()
            raise
        changes.store()


def _damage(transaction: MetadataTransaction) -> QcowError | None:
    """Why nothing can be freed in an image, if so."""
    try:
        require_enough_refcounts(transaction.state)
    except StorageError:
        raise  # it may be whole
    except QcowError as error:
        return error
    return None


def settled(image: BlockImage) -> list[BitmapEntry]:
    """The bitmaps of an image; what it has recorded since it was opened is stored."""
    if isinstance(image, WritableQcow2Image):
        with image.exclusive():
            pass
    entries: list[BitmapEntry] = getattr(image, "bitmaps", [])
    return entries


def find_bitmap(entries: list[BitmapEntry], name: str) -> BitmapEntry:
    """The bitmap of a name; raises `NoSuchBitmap`."""
    for entry in entries:
        if entry.name == name:
            return entry
    raise NoSuchBitmap(f"Dirty bitmap '{name}' not found")


def require_consistent(entry: BitmapEntry) -> BitmapEntry:
    """The entry, unless changes may be missing in it: then raises `BitmapError`."""
    if is_inconsistent(entry):
        text = f"Bitmap '{entry.name}' is inconsistent and cannot be used"
        raise BitmapError(text, stock=f"{text}\nTry block-dirty-bitmap-remove to delete this bitmap from disk")
    return entry


def require_constraints(entry: BitmapEntry, disk_size: int, cluster_size: int, prefix: str = "") -> None:
    """QEMU's limits for a bitmap; raises `BitmapError` with its words after `prefix`. Sizes are in bytes."""
    length = -(-bits_for(disk_size, entry.granularity_bits) // 8)
    if length > min(k.MAX_BITMAP_BYTES, k.MAX_BITMAP_TABLE_ENTRIES * cluster_size):
        raise BitmapError(f"{prefix}Too much space will be occupied by the bitmap. Use larger granularity")
    if len(entry.name.encode("utf-8", "surrogateescape")) > k.MAX_BITMAP_NAME:
        raise BitmapError(f"{prefix}Name length exceeds maximum ({k.MAX_BITMAP_NAME} characters)")


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
