"""The snapshot table read for a repair: every entry that can be used, and what is wrong with the others.

    bytes of the table --> entry after entry --> kept as it is | mended (lengths, extra data) | dropped (disk is lost)

The entries have no fixed length, so that one wrong length hides all that follow. Where the entry that should follow is
none, the next place that looks like one is searched for, and the lengths before it are put right.
Texts are QEMU 7.2's where it repairs the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from qcowlib.format import constants as k
from qcowlib.format.entries import ENTRY_DTYPE
from qcowlib.format.header import Header
from qcowlib.format.records import SNAPSHOT_HEADER, decode_text
from qcowlib.format.snapshot_table import SnapshotEntry, parse_snapshot_table
from qcowlib.storage.helpers import read_padded
from qcowlib.storage.protocol import ReadStorage

_FIXED = k.SNAPSHOT_HEADER_SIZE
_MAX_NAME = 1023
_REACH = _FIXED + k.MAX_SNAPSHOT_EXTRA_DATA + 2 * k.MAX_SNAPSHOT_STRING + 8  # an entry is no longer than this
_CHUNK = 1 << 20
_V3_EXTRA_DATA = 16  # version 3 demands at least that much
_LIKELY_EXTRA_DATA = (k.SNAPSHOT_EXTRA_DATA_SIZE, _V3_EXTRA_DATA, 8, 0)


@dataclass
class RescuedSnapshots:
    """The result.

    Attributes:
        entries: snapshots to keep, in their order.
        length: bytes that the table takes where it is, up to the last entry that was found.
        repairs: (code, text, count) of what a repair does; none: the table is as it should be.
        rewrite: the table must be written anew, elsewhere; else it is enough to correct the number of its entries.
        lost: descriptions of the snapshots that are dropped.
        homeless: those of them that have everything but an L1 table: (place among `entries`, the entry).
    """

    entries: list[SnapshotEntry] = field(default_factory=list)
    length: int = 0
    repairs: list[tuple[str, str, int]] = field(default_factory=list)
    rewrite: bool = False
    lost: list[str] = field(default_factory=list)
    homeless: list[tuple[int, SnapshotEntry]] = field(default_factory=list)

    def take_in(self, l1_table_offset: int) -> str:
        """Keep the only homeless snapshot with this L1 table; returns what it is called."""
        place, entry = self.homeless.pop()
        self.entries.insert(place, replace(entry, l1_table_offset=l1_table_offset))
        named = f"snapshot {entry.id} ({entry.name})"
        self.lost.remove(named)
        return named

    def drop(self, code: str, text: str, lost: str) -> None:
        """Note an entry that is not kept."""
        self.repairs.append((code, text, 1))
        self.lost.append(lost)
        self.rewrite = True


def rescue_snapshots(storage: ReadStorage, header: Header, file_end: int) -> RescuedSnapshots | None:
    """Read the snapshot table of an image as far as it makes sense.

    Args:
        storage: the qcow2 file.
        header: its header; the place of the table need not be valid.
        file_end: length of the file in bytes, rounded up to 512.

    Returns: None where there is no table at the place that the header names: all snapshots are lost with it.
    """
    if not header.nb_snapshots:
        return RescuedSnapshots()
    offset = header.snapshots_offset
    if not offset or offset % header.cluster_size or offset >= file_end:
        return None
    return _Rescue(storage, header, file_end).run()


def needed_l1_entries(entry: SnapshotEntry, header: Header) -> int:
    """Entries of its L1 table that a snapshot cannot do without: for its disk, and the vm state behind it."""
    geometry = header.geometry
    disk = geometry.l1_entries_for(header.size if entry.disk_size is None else entry.disk_size)
    if not entry.vm_state_size:
        return disk
    return geometry.l1_entries_for(disk * geometry.l2_coverage + entry.vm_state_size)


class _Rescue:
    def __init__(self, storage: ReadStorage, header: Header, file_end: int) -> None:
        self.storage = storage
        self.header = header
        self.file_end = file_end
        self.result = RescuedSnapshots()
        self._chunk = b""
        self._chunk_start = 0

    def run(self) -> RescuedSnapshots | None:
        """Entry by entry; each step advances by at least the fixed part of an entry."""
        count, result = self.header.nb_snapshots, self.result
        if count > k.MAX_SNAPSHOTS:
            more = count - k.MAX_SNAPSHOTS
            result.repairs.append(("snapshots-too-many", f"Discarding {more} overhanging snapshots", more))
            count = k.MAX_SNAPSHOTS
        position, table_length = 0, 0
        for index in range(count):
            if not self._is_entry(position):
                return self._cut(index, count) if index else None
            entry, end, mended = self._entry(position, index, is_last=index == count - 1)
            table_length += -table_length % 8 + len(entry.build())
            if table_length > k.MAX_SNAPSHOT_TABLE_SIZE:
                text = f"Discarding {count - index} overhanging snapshots (snapshot table is too big)"
                result.repairs.append(("snapshot-table-too-big", text, count - index))
                break
            # As for QEMU, a table may end behind the file by less than a cluster.
            result.length = min(end, self.file_end - self.header.snapshots_offset + self.header.cluster_size - 1)
            self._keep(entry, index, mended)
            position = end + -end % 8
        return result

    def _cut(self, index: int, count: int) -> RescuedSnapshots:
        """The table ends before the last of its entries."""
        text = f"Discarding {count - index} overhanging snapshots (no snapshot table entry {index})"
        self.result.repairs.append(("snapshot-table-short", text, count - index))
        return self.result

    def _keep(self, entry: SnapshotEntry, index: int, mended: bool) -> None:
        result = self.result
        named = f"snapshot {entry.id} ({entry.name})"
        wrong = self._wrong_table(entry)
        if wrong is not None:
            fitting = replace(entry, l1_size=min(entry.l1_size, needed_l1_entries(entry, self.header)))
            if self._wrong_table(fitting) is None:
                text = f"Repairing {named} l1_size={entry.l1_size:#x}: L1 table is larger than the snapshot needs"
                result.repairs.append(("snapshot-l1-too-large", text, 1))
                entry, mended, wrong = fitting, True, None
        if self.header.version >= 3 and len(entry.extra_data) < _V3_EXTRA_DATA:
            text = f"Repairing snapshot table entry {index} is incomplete"
            result.repairs.append(("snapshot-entry-incomplete", text, 1))
            size_then = self.header.virtual_size if entry.disk_size is None else entry.disk_size
            extra = entry.extra_data.ljust(k.SNAPSHOT_EXTRA_DATA_SIZE, b"\0")
            entry, mended = replace(entry, disk_size=size_then, extra_data=extra), True
        result.rewrite |= mended
        if wrong is None:
            result.entries.append(entry)
            return
        code, what = wrong
        result.drop(code, f"Repairing {named} {what}; snapshot table entry corrupted", named)
        if entry.l1_size <= k.MAX_L1_ENTRIES:
            result.homeless.append((len(result.entries), entry))

    def _wrong_table(self, entry: SnapshotEntry) -> tuple[str, str] | None:
        """What is wrong with the place of an L1 table: code and text."""
        size, end = self.header.cluster_size, entry.l1_table_offset + 8 * entry.l1_size
        if entry.l1_table_offset % size:
            return "snapshot-l1-unaligned", f"l1_offset={entry.l1_table_offset:#x}: L1 table is not cluster aligned"
        if entry.l1_size > k.MAX_L1_ENTRIES:
            return "snapshot-l1-too-large", f"l1_size={entry.l1_size:#x}: L1 table is too large"
        if entry.l1_size and (not entry.l1_table_offset or end - self.file_end >= size):
            return "reference-beyond-end", f"l1_offset={entry.l1_table_offset:#x}: L1 table is outside image"
        return None

    # -- one entry

    def _entry(self, position: int, index: int, *, is_last: bool) -> tuple[SnapshotEntry, int, bool]:
        """The entry at a position of the table: (entry, where it ends, whether its lengths had to be put right)."""
        fields = SNAPSHOT_HEADER.parse(self._read(position, _FIXED), "snapshot table entry")
        id_size, name_size, extra_size = fields["id_size"], fields["name_size"], fields["extra_data_size"]
        mended = extra_size > k.MAX_SNAPSHOT_EXTRA_DATA
        if mended:
            text = (
                f"Discarding too much extra metadata in snapshot table entry {index} "
                f"({extra_size} > {k.MAX_SNAPSHOT_EXTRA_DATA})"
            )
            self.result.repairs.append(("snapshot-extra-data", text, 1))
        end = position + _FIXED + extra_size + id_size + name_size
        strings = position + _FIXED + extra_size
        kept_extra = min(extra_size, k.MAX_SNAPSHOT_EXTRA_DATA)
        following = end + -end % 8
        fits = self.header.snapshots_offset + end - self.file_end < self.header.cluster_size
        fits &= not self._is_overlong(strings, id_size, name_size) if is_last else self._is_entry(following)
        if mended and not _is_text(self._read(strings, id_size + name_size)):
            for likely in _LIKELY_EXTRA_DATA:
                start = position + _FIXED + likely
                if _is_text(self._read(start, id_size + name_size)):
                    strings, kept_extra = start, likely
                    behind = start + id_size + name_size
                    end = end if is_last and fits else behind
                    fits |= is_last or self._is_entry(behind + -behind % 8)
                    break
        if fits:
            text_bytes = self._read(strings, id_size + name_size)
            return self._built(position, kept_extra, text_bytes[:id_size], text_bytes[id_size:]), end, mended
        return self._resynchronised(position, index, kept_extra, id_size, is_last=is_last)

    def _is_overlong(self, start: int, id_size: int, name_size: int) -> bool:
        """Whether an id or a name is longer than any, and ends before its length says."""
        parts = self._read(start, id_size), self._read(start + id_size, name_size)
        return any(len(part) > _MAX_NAME and part[0] and b"\0" in part for part in parts)

    def _resynchronised(
        self, position: int, index: int, extra_size: int, id_size: int, *, is_last: bool
    ) -> tuple[SnapshotEntry, int, bool]:
        """An entry whose lengths are wrong: it ends before the next one that can be found, or where its text ends."""
        for likely in (extra_size, *_LIKELY_EXTRA_DATA):
            if self._read(position + _FIXED + likely, 1).isdigit():  # QEMU's ids are numbers
                extra_size = likely
                break
        start = position + _FIXED + extra_size
        found = None if is_last else self._next_entry(position + _FIXED)
        stop = start + _REACH if found is None else found
        text = self._read(start, max(0, min(stop - start, 2 * _MAX_NAME))).partition(b"\0")[0]
        digits = len(text) - len(text.lstrip(b"0123456789"))
        known = id_size if 0 < id_size < len(text) and text[:id_size].isdigit() else max(1, digits)
        stored_id, name = text[:known], text[known:]
        if not stored_id:
            stored_id, name = f"{index + 1}".encode(), f"found-{index + 1}".encode()
        end = found if found is not None else start + len(text)
        self.result.repairs.append(
            ("snapshot-entry-lengths", f"Repairing snapshot table entry {index}: its lengths are wrong", 1)
        )
        return self._built(position, extra_size, stored_id, name[:_MAX_NAME]), end, True

    def _built(self, position: int, extra_size: int, stored_id: bytes, stored_name: bytes) -> SnapshotEntry:
        """The entry with these lengths, by the one parser of entries."""
        head = bytearray(self._read(position, _FIXED))
        head[12:14] = len(stored_id).to_bytes(2, "big")
        head[14:16] = len(stored_name).to_bytes(2, "big")
        head[36:40] = extra_size.to_bytes(4, "big")
        data = bytes(head) + self._read(position + _FIXED, extra_size) + stored_id + stored_name
        alone = replace(self.header, nb_snapshots=1, snapshots_offset=0)
        return parse_snapshot_table(lambda offset, length: data[offset : offset + length], alone)[0]

    def _is_entry(self, position: int) -> bool:
        """Whether an entry can begin here: its L1 table is possible, and it has that or an id; or its id is text."""
        if self.header.snapshots_offset + position + _FIXED > self.file_end:
            return False
        head = self._read(position, _FIXED)
        if self.header.version < 3 and not any(head):
            return True
        l1_offset, l1_size = int.from_bytes(head[:8], "big"), int.from_bytes(head[8:12], "big")
        id_size, extra = int.from_bytes(head[12:14], "big"), int.from_bytes(head[36:40], "big")
        l1_possible = l1_offset % self.header.cluster_size == 0 and l1_offset < self.file_end
        if l1_possible and l1_size <= k.MAX_L1_ENTRIES:
            return bool(id_size or (l1_offset and l1_size))
        return extra <= k.MAX_SNAPSHOT_EXTRA_DATA and _is_text(self._read(position + _FIXED + extra, id_size))

    def _next_entry(self, position: int) -> int | None:
        """The next place, a multiple of 8, that looks like an entry with an L1 table inside the file and an id."""
        position += -position % 8
        data = self._read(position, _REACH)
        words = np.frombuffer(data[: len(data) & -8], dtype=ENTRY_DTYPE).astype(np.uint64)
        likely = (words != 0) & (words % np.uint64(self.header.cluster_size) == 0) & (words < np.uint64(self.file_end))
        for place in np.flatnonzero(likely).tolist():
            start = position + 8 * place
            head = self._read(start, _FIXED)
            l1_size = int.from_bytes(head[8:12], "big")
            id_size, extra = int.from_bytes(head[12:14], "big"), int.from_bytes(head[36:40], "big")
            if 0 < l1_size <= k.MAX_L1_ENTRIES and 0 < id_size <= _MAX_NAME and extra <= k.MAX_SNAPSHOT_EXTRA_DATA:
                stored_id = self._read(start + _FIXED + extra, id_size)
                if _is_text(stored_id):
                    return start
        return None

    def _read(self, position: int, length: int) -> bytes:
        """Bytes of the table, zeroes behind the end of the file."""
        skip = position - self._chunk_start
        if skip < 0 or skip + length > len(self._chunk):
            self._chunk = read_padded(self.storage, self.header.snapshots_offset + position, max(length, _CHUNK))
            self._chunk_start, skip = position, 0
        return self._chunk[skip : skip + length]


def _is_text(stored: bytes) -> bool:
    """Whether bytes are what an id or a name is: some text without zero bytes."""
    return bool(stored) and b"\0" not in stored and decode_text(stored)[0].isprintable()
