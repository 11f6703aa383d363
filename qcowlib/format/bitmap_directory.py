"""The bitmap directory and bitmap tables of persistent dirty bitmaps.

Reading the directory and judging its entries are two things: an entry that QEMU refuses is still an entry that a check
wants to name.

Source: qcow2.txt, "Bitmaps"; limits are QEMU's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import KEEP, IntEnum, IntFlag

import numpy as np

from qcowlib.errors import CorruptMetadata, FormatError, UnsupportedFeature
from qcowlib.format import constants as k
from qcowlib.format.entries import BoolArray, Entries, Uint8Array, flagged
from qcowlib.format.extensions import BitmapsExtension
from qcowlib.format.records import BITMAP_ENTRY, decode_text, encode_text

__all__ = [
    "BITMAP_TABLE_OFFSET_MASK",
    "BitmapCluster",
    "BitmapEntry",
    "BitmapFlags",
    "BitmapsExtension",
    "bitmap_table_entries",
    "build_bitmap_directory",
    "check_bitmap_entry",
    "classify_bitmap_table",
    "invalid_bitmap_table_entries",
    "parse_bitmap_directory",
]

BITMAP_TABLE_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
BITMAP_TABLE_RESERVED = 0xFF00_0000_0000_01FE
BITMAP_TABLE_ALL_ONES = 1


class BitmapFlags(IntFlag, boundary=KEEP):
    """Flags of a bitmap directory entry."""

    IN_USE = 1
    AUTO = 2
    EXTRA_DATA_COMPATIBLE = 4


# QEMU knows no extra data, hence not its flag either. A plain number: ~ of a flag keeps to the named bits.
_SUPPORTED_FLAGS = 0x3


class BitmapCluster(IntEnum):
    """What a bitmap table entry says about its cluster of bitmap data."""

    ZEROES = 0
    ONES = 1
    DATA = 2


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """One entry of the bitmap directory.

    Attributes:
        table_offset: host offset of the bitmap table in bytes.
        table_size: entries of the bitmap table.
        flags: `BitmapFlags` bits.
        type: 1 for a dirty tracking bitmap.
        granularity_bits: log2 of the guest bytes that one bit stands for.
        name: undecodable bytes as surrogate escapes.
        extra_data: unknown data, kept.
        name_rest: bytes of the name from the first zero byte on; QEMU does not show them.
        padding: bytes up to the next entry as found on disk.
    """

    table_offset: int
    table_size: int
    flags: int
    type: int
    granularity_bits: int
    name: str
    extra_data: bytes = field(default=b"", repr=False)
    name_rest: bytes = field(default=b"", repr=False)
    padding: bytes = field(default=b"", repr=False)

    def build(self) -> bytes:
        """The entry's bytes, padded to a multiple of 8.

        Raises:
            FormatError: a value does not fit into its field.
        """
        name = encode_text(self.name, "bitmap directory entry") + self.name_rest
        fields = {
            "table_offset": self.table_offset,
            "table_size": self.table_size,
            "flags": self.flags,
            "type": self.type,
            "granularity_bits": self.granularity_bits,
            "name_size": len(name),
            "extra_data_size": len(self.extra_data),
        }
        body = BITMAP_ENTRY.build(fields, "bitmap directory entry") + self.extra_data + name
        missing = -len(body) % 8
        return body + self.padding[:missing].ljust(missing, b"\0")


def parse_bitmap_directory(data: bytes, extension: BitmapsExtension) -> list[BitmapEntry]:
    """The entries of a bitmap directory, none of them judged yet (see `check_bitmap_entry`).

    Args:
        data: the directory, extension.directory_size bytes.
        extension: the bitmaps extension that announces it.

    Raises:
        CorruptMetadata: entries reach beyond the directory or do not fill it, or their number is another.
    """
    if not data:
        raise _damage(extension, "has no bytes", "Requested bitmap directory size is zero")
    entries: list[BitmapEntry] = []
    position = 0
    while position < len(data):
        if len(entries) == extension.count:
            rule = f"holds more than the {extension.count} bitmaps that the header announces"
            raise _damage(extension, rule, "More bitmaps found than specified in header extension")
        head_end = position + BITMAP_ENTRY.size
        if head_end > len(data):
            raise _damage(extension, f"its entry {len(entries)} is cut short", "Broken bitmap directory")
        fields = BITMAP_ENTRY.parse(data[position:head_end], "bitmap directory entry")
        name_start = head_end + fields.pop("extra_data_size")
        name_end = name_start + fields.pop("name_size")
        end = name_end + -name_end % 8
        if end > len(data):
            raise _damage(extension, f"its entry {len(entries)} is cut short", "Broken bitmap directory")
        name, rest = decode_text(data[name_start:name_end])
        entry = BitmapEntry(
            **fields,
            name=name,
            extra_data=data[head_end:name_start],
            name_rest=rest,
            padding=data[name_end:end],
        )
        entries.append(entry)
        position = end
    if len(entries) != extension.count:
        rule = f"holds {len(entries)} bitmaps where the header announces {extension.count}"
        raise _damage(extension, rule, "Less bitmaps found than specified in header extension")
    return entries


def _damage(extension: BitmapsExtension, rule: str, stock: str) -> CorruptMetadata:
    return CorruptMetadata("bitmap directory", extension.directory_offset, rule, stock=stock)


def build_bitmap_directory(entries: Iterable[BitmapEntry]) -> bytes:
    """The bytes of a bitmap directory.

    Raises:
        FormatError: a value does not fit into its field, or the directory exceeds QEMU's limits.
    """
    built = [entry.build() for entry in entries]
    size = sum(map(len, built))
    if len(built) > k.MAX_BITMAPS or size > k.MAX_BITMAP_DIRECTORY_SIZE:
        raise FormatError("bitmap directory", None, f"{len(built)} bitmaps in {size} bytes exceed the limit")
    return b"".join(built)


def check_bitmap_entry(entry: BitmapEntry, cluster_size: int, disk_size: int) -> None:
    """What QEMU demands of an entry before it opens an image that has it.

    Args:
        entry: the directory entry.
        cluster_size: bytes in a cluster.
        disk_size: virtual disk size in bytes; a bitmap that is not in use has exactly the size for it.

    Raises:
        UnsupportedFeature: another type, a granularity or extra data that QEMU does not support.
        CorruptMetadata: the bitmap table cannot be right.
    """
    where, stock = f"bitmap '{entry.name}'", f"Bitmap '{entry.name}' doesn't satisfy the constraints"

    def unsupported(rule: str) -> UnsupportedFeature:
        return UnsupportedFeature(where, None, rule, stock=stock)

    def damaged(rule: str) -> CorruptMetadata:
        return CorruptMetadata(where, entry.table_offset, rule, stock=stock)

    if entry.extra_data:
        rule = "extra data is not supported"
        raise UnsupportedFeature(where, None, rule, stock="Bitmap extra data is not supported")
    if entry.type != k.BITMAP_TYPE_DIRTY_TRACKING:
        raise unsupported(f"its type {entry.type} is not known")
    if entry.flags & ~_SUPPORTED_FLAGS:
        raise unsupported(f"its flags {entry.flags:#x} are not known")
    if not k.MIN_BITMAP_GRANULARITY_BITS <= entry.granularity_bits <= k.MAX_BITMAP_GRANULARITY_BITS:
        raise unsupported(f"its granularity of 2^{entry.granularity_bits} bytes is not supported")
    if len(encode_text(entry.name, where)) + len(entry.name_rest) > k.MAX_BITMAP_NAME:
        raise damaged(f"its name is longer than {k.MAX_BITMAP_NAME} bytes")
    if not entry.table_offset or entry.table_offset % cluster_size:
        raise damaged("its table is not at a cluster boundary behind the header")
    bitmap_bytes = entry.table_size * cluster_size
    if not 0 < bitmap_bytes <= k.MAX_BITMAP_BYTES or entry.table_size > k.MAX_BITMAP_TABLE_ENTRIES:
        raise damaged(f"its table of {entry.table_size} entries is out of bounds")
    needed = bitmap_table_entries(disk_size, entry.granularity_bits, cluster_size)
    if not entry.flags & BitmapFlags.IN_USE and entry.table_size != needed:
        raise damaged(f"its table has {entry.table_size} entries where a disk of {disk_size} bytes needs {needed}")


def bitmap_table_entries(disk_size: int, granularity_bits: int, cluster_size: int) -> int:
    """Entries of the bitmap table for a disk: clusters of bitmap data, which QEMU rounds up to 64-bit words."""
    bits = (disk_size + (1 << granularity_bits) - 1) >> granularity_bits
    data_bytes = -(-bits // 64) * 8
    return -(-data_bytes // cluster_size)


def classify_bitmap_table(entries: Entries) -> Uint8Array:
    """What each entry of a bitmap table stands for: `BitmapCluster` values, same shape."""
    has_data = flagged(entries, BITMAP_TABLE_OFFSET_MASK)
    ones = flagged(entries, BITMAP_TABLE_ALL_ONES)
    return np.where(has_data, np.uint8(BitmapCluster.DATA), ones.astype(np.uint8))


def invalid_bitmap_table_entries(entries: Entries, cluster_size: int) -> BoolArray:
    """Which entries of a bitmap table have reserved bits set or an offset that is not cluster aligned."""
    has_data = flagged(entries, BITMAP_TABLE_OFFSET_MASK)
    unaligned = flagged(entries, BITMAP_TABLE_OFFSET_MASK & (cluster_size - 1))
    return flagged(entries, BITMAP_TABLE_RESERVED) | unaligned | (has_data & flagged(entries, BITMAP_TABLE_ALL_ONES))
