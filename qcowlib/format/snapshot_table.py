"""The snapshot table: internal snapshots' descriptions.

Entries have variable length and start at multiples of 8; the table's length in bytes is in no header field, so it is
read entry by entry. The fields in the extra data (64-bit size of the VM state, disk size, icount) are known; what
follows them is kept.

Source: qcow2.txt, "Snapshots"; limits are QEMU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from errno import EFBIG

from qcowlib.errors import CorruptMetadata, FormatError
from qcowlib.format.constants import (
    MAX_SNAPSHOT_EXTRA_DATA,
    MAX_SNAPSHOT_TABLE_SIZE,
    SNAPSHOT_EXTRA_DATA_SIZE,
)
from qcowlib.format.header import Header
from qcowlib.format.header_rules import check_snapshot_table_place
from qcowlib.format.records import SNAPSHOT_HEADER, decode_text, encode_text

_ENTRY = "snapshot table entry"
_CHUNK = 64 << 10
_NO_ICOUNT = b"\xff" * 8

ReadAt = Callable[[int, int], bytes]
"""(host offset, length) -> bytes, fewer only where the file ends."""


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """One internal snapshot.

    Attributes:
        l1_table_offset: host offset of the snapshot's L1 table in bytes.
        l1_size: its number of entries.
        id: unique string, a number as QEMU chooses it. Undecodable bytes as surrogate escapes, here and in `name`.
        name: the tag.
        date_sec, date_nsec: when it was taken, since the epoch.
        vm_clock_nsec: how long the guest had been running.
        vm_state_size: bytes of VM state, 0 when none was saved.
        disk_size: the virtual disk's size in bytes then; None where the entry does not say (old version 2 images).
        icount: instruction count of record/replay; None when disabled or not there.
        extra_data: the entry's extra data as on disk. The three known fields in it are written from the attributes.
        vm_state_size_32: the 32-bit field where it differs from what QEMU would write.
        id_rest, name_rest: bytes of id and name from the first zero byte on; QEMU shows none of them.
        padding: bytes up to the next entry as found on disk.
    """

    l1_table_offset: int
    l1_size: int
    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    extra_data: bytes = field(default=bytes(SNAPSHOT_EXTRA_DATA_SIZE), repr=False)
    vm_state_size_32: int | None = field(default=None, repr=False)
    id_rest: bytes = field(default=b"", repr=False)
    name_rest: bytes = field(default=b"", repr=False)
    padding: bytes = field(default=b"", repr=False)

    def build(self) -> bytes:
        """The entry's bytes without padding.

        Raises:
            FormatError: a value does not fit, or the disk size is not set in an entry that has room for it.
        """
        extra = self._extra_data()
        stored_id = encode_text(self.id, _ENTRY) + self.id_rest
        stored_name = encode_text(self.name, _ENTRY) + self.name_rest
        size_32 = _derived_size_32(self.vm_state_size) if self.vm_state_size_32 is None else self.vm_state_size_32
        fields = {
            "l1_table_offset": self.l1_table_offset,
            "l1_size": self.l1_size,
            "id_size": len(stored_id),
            "name_size": len(stored_name),
            "date_sec": self.date_sec,
            "date_nsec": self.date_nsec,
            "vm_clock_nsec": self.vm_clock_nsec,
            "vm_state_size": size_32,
            "extra_data_size": len(extra),
        }
        return SNAPSHOT_HEADER.build(fields, _ENTRY) + extra + stored_id + stored_name

    def _extra_data(self) -> bytes:
        needed = 0
        if self.icount is not None:
            needed = 24
        elif self.disk_size is not None:
            needed = 16
        elif self.vm_state_size >= 1 << 32:
            needed = 8
        extra = bytearray(self.extra_data.ljust(needed, b"\0"))
        if len(extra) >= 8:
            extra[:8] = _field(self.vm_state_size)
        if len(extra) >= 16:
            if self.disk_size is None:
                raise FormatError(_ENTRY, None, "has no disk size")
            extra[8:16] = _field(self.disk_size)
        if len(extra) >= 24:
            extra[16:24] = _NO_ICOUNT if self.icount is None else _field(self.icount)
        return bytes(extra)


def _field(value: int) -> bytes:
    if not 0 <= value < 1 << 64:
        raise FormatError(_ENTRY, None, f"{value} does not fit into 64 bits")
    return value.to_bytes(8, "big")


def _derived_size_32(vm_state_size: int) -> int:
    """A size that does not fit is written as 0, so that old readers see a snapshot without VM state, not a cut one."""
    return vm_state_size if vm_state_size < 1 << 32 else 0


def parse_snapshot_table(read: ReadAt, header: Header, *, pad: bool = False) -> list[SnapshotEntry]:
    """The snapshots of an image, in their order on disk.

    Args:
        read: reads the image's host file.
        header: says where the table starts and how many entries it has.
        pad: take what lies behind the end of the file as zeroes, as QEMU does; else it is damage.

    Raises:
        CorruptMetadata: the table is cut short, too large, or an entry has too much extra data.
        FormatError: too many snapshots, or a table that is not cluster aligned.
    """
    check_snapshot_table_place(header.snapshots_offset, header.nb_snapshots, header.cluster_size)
    source = _TableReader(read, header.snapshots_offset, pad)
    return [_parse_entry(source, index, header.nb_snapshots - index) for index in range(header.nb_snapshots)]


def build_snapshot_table(entries: Iterable[SnapshotEntry]) -> bytes:
    """The bytes of a snapshot table; the last entry is not padded, so that the length is what QEMU takes for it.

    Raises:
        FormatError: a value does not fit into its field, or the table exceeds QEMU's limit.
    """
    table = bytearray()
    padding = b""
    for entry in entries:
        missing = -len(table) % 8
        table += padding[:missing].ljust(missing, b"\0")
        table += entry.build()
        padding = entry.padding
        if len(table) > MAX_SNAPSHOT_TABLE_SIZE:
            rule = f"exceeds the limit of {MAX_SNAPSHOT_TABLE_SIZE} bytes"
            raise FormatError("snapshot table", None, rule, errno=EFBIG)
    return bytes(table)


class _TableReader:
    """Consecutive pieces of the snapshot table, read in chunks."""

    def __init__(self, read: ReadAt, start: int, pad: bool) -> None:
        self._read = read
        self._start = start
        self._pad = pad
        self._chunk = b""
        self._chunk_start = 0
        self.position = 0
        self.left = 0

    @property
    def host_offset(self) -> int:
        return self._start + self.position

    def take(self, length: int) -> bytes:
        if self.position + length > MAX_SNAPSHOT_TABLE_SIZE:
            rule = f"exceeds the limit of {MAX_SNAPSHOT_TABLE_SIZE} bytes"
            stock = (
                f"Snapshot table is too big\nYou can force-remove all {self.left} overhanging snapshots with "
                "{program} check -r all"
            )
            raise CorruptMetadata("snapshot table", self._start, rule, stock=stock, errno=EFBIG)
        skip = self.position - self._chunk_start
        if skip + length > len(self._chunk):
            self._chunk = self._read(self.host_offset, max(length, _CHUNK))
            self._chunk_start = self.position
            skip = 0
        piece = self._chunk[skip : skip + length]
        if len(piece) < length:
            if not self._pad:
                raise CorruptMetadata("snapshot table", self._start, "lies beyond the end of the file")
            piece = piece.ljust(length, b"\0")
        self.position += length
        return piece


def _parse_entry(source: _TableReader, index: int, left: int) -> SnapshotEntry:
    start = source.host_offset
    source.left = left
    fields = SNAPSHOT_HEADER.parse(source.take(SNAPSHOT_HEADER.size), _ENTRY, start)
    id_size, name_size, extra_size = fields.pop("id_size"), fields.pop("name_size"), fields.pop("extra_data_size")
    if extra_size > MAX_SNAPSHOT_EXTRA_DATA:
        rule = f"its extra data of {extra_size} bytes exceeds the limit of {MAX_SNAPSHOT_EXTRA_DATA}"
        stock = (
            f"Too much extra metadata in snapshot table entry {index}\n"
            "You can force-remove this extra metadata with {program} check -r all"
        )
        raise CorruptMetadata(_ENTRY, start, rule, stock=stock, errno=EFBIG)
    extra = source.take(extra_size)
    snapshot_id, id_rest = decode_text(source.take(id_size))
    name, name_rest = decode_text(source.take(name_size))
    padding = b"" if left == 1 else source.take(-source.position % 8)

    size_32 = fields.pop("vm_state_size")
    vm_state_size = int.from_bytes(extra[:8], "big") if extra_size >= 8 else size_32
    return SnapshotEntry(
        **fields,
        id=snapshot_id,
        name=name,
        vm_state_size=vm_state_size,
        disk_size=int.from_bytes(extra[8:16], "big") if extra_size >= 16 else None,
        icount=None if extra_size < 24 or extra[16:24] == _NO_ICOUNT else int.from_bytes(extra[16:24], "big"),
        extra_data=extra,
        vm_state_size_32=None if size_32 == _derived_size_32(vm_state_size) else size_32,
        id_rest=id_rest,
        name_rest=name_rest,
        padding=padding,
    )
