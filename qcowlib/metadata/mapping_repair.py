"""The mapping of a damaged image, made sound on an overlay: nothing refers to what cannot be, nothing has two owners.

    snapshots' L1 tables that lie on something else     copied away, or the snapshot is dropped
    L1 entries     mended in place
    L2 tables that lie on something else                their L1 entries are dropped
    L2 entries, bitmap tables     mended in place
    guest data that lies on metadata                    copied away, linked when the copy is counted
    snapshot table                                      written anew where it is not what it should be

What is dropped in place needs no order: it only takes references away. What is copied lies behind the end of the file,
and a reference to it is staged. The refcount structure is not looked at here: where it lies on something else, it is
made anew. Bytes of other structures are never changed: a table is mended only where nothing else lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qcowlib.addresses import Geometry
from qcowlib.errors import FormatError
from qcowlib.format.bitmap_directory import (
    BITMAP_TABLE_ALL_ONES,
    BITMAP_TABLE_OFFSET_MASK,
    BitmapEntry,
    check_bitmap_entry,
    parse_bitmap_directory,
)
from qcowlib.format.entries import (
    ENTRY_DTYPE,
    OFLAG_COPIED,
    OFLAG_ZERO,
    SUBCLUSTERS_ALLOCATED,
    ClusterType,
    Entries,
    Int64Array,
    classify_many,
    compressed_locations,
    flagged,
    offsets,
)
from qcowlib.format.features import Autoclear
from qcowlib.format.header import Header
from qcowlib.format.snapshot_table import build_snapshot_table
from qcowlib.metadata.census import Census, census
from qcowlib.metadata.l2_scan import ScanRules
from qcowlib.metadata.ledger import Overlap
from qcowlib.metadata.lost_tables import LostTables, is_no_l2_table
from qcowlib.metadata.mapping_census import SCAN_BYTES
from qcowlib.metadata.mending import (
    MAX_LOST_RANGES,
    LostRanges,
    Mended,
    changed_spans,
    mend_bitmap_table,
    mend_l1,
    mend_l2,
)
from qcowlib.metadata.references import empty_words, read_tables, split_words
from qcowlib.metadata.snapshot_rescue import RescuedSnapshots, needed_l1_entries
from qcowlib.metadata.state import Qcow2State
from qcowlib.storage.helpers import read_exact, read_padded
from qcowlib.storage.overlay import OverlayStorage
from qcowlib.storage.protocol import ReadStorage

_MOST_LOOKS = 256  # tables that are looked at to judge an L1 table
_MAX_ROUNDS = 32  # of resolving overlaps: each round takes claims away
_FIXED_PLACES = ("header", "encryption header")
_BITMAPS = ("bitmap directory", "bitmap table", "bitmap data")


class NotRepairable(Exception):
    """What is damaged cannot be repaired without guessing; the argument says what."""


class _Layer(NamedTuple):
    """An L1 table: of the active layer, or of a snapshot (its index among the rescued ones)."""

    name: str
    offset: int
    entries: int
    snapshot: int | None


class MappingRepair:
    """One repair of a mapping.

    Args:
        base: the file as it is.
        overlay: over it; receives the changes.
        header: of the image; must name an active L1 table inside the file.
        rescued: what can be kept of the snapshot table; changed where snapshots must be dropped or moved.

    Attributes:
        header: with the new place of the snapshot table, and without bitmaps where they had to be dropped.
        lost: guest ranges that were dropped, layer by layer.
        actions: what was done that no finding of a check names.
        moved: guest clusters that were copied away from metadata.
    """

    def __init__(self, base: ReadStorage, overlay: OverlayStorage, header: Header, rescued: RescuedSnapshots) -> None:
        self.base = base
        self.overlay = overlay
        self.geometry = header.geometry
        self.size = header.cluster_size
        self.file_end = (base.size() + 511) & -512
        self.rules = ScanRules(self.geometry, header.version, header.has_data_file, self.file_end)
        self.header = header
        self.rescued = rescued
        self.lost = LostRanges()
        self.actions: list[str] = []
        self.moved = 0
        self._next = 0  # next cluster behind the end of the file; 0: none was taken yet

    def drop(self) -> None:
        """Mend what can be mended in place: entries that refer to nothing that can be.

        Raises:
            NotRepairable: the damage leaves more than one way to read the image, or none.
        """
        if self.header.has_data_file and self.rescued.entries:
            raise NotRepairable("snapshots in an image with an external data file")
        self._fill_last_cluster()
        self._settle_tables()
        self._mend_l2_tables()
        self._mend_bitmaps()
        self.overlay.flush()

    def move(self) -> None:
        """Copy away guest data that lies on metadata, and write the snapshot table anew where that is needed."""
        for _ in range(_MAX_ROUNDS):
            found = self._census()
            clusters = [overlap.cluster for overlap in found.overlaps if "guest data" in overlap[1:]]
            if not clusters:
                break
            self._move_data(np.array(clusters, dtype=np.int64))
        self._write_snapshot_table()

    # -- who lies where

    def _census(self) -> Census:
        """The census of the overlay; damaged bitmaps are mended or dropped."""
        if (found := self._bare_census(self.overlay)).stopped is not None:
            last = found.findings[-1]
            if last.code in ("bitmap-directory-damaged", "bitmap-table-damaged", "bitmap-tables-too-large"):
                if last.code == "bitmap-table-damaged" and self._mend_bitmaps():
                    return self._census()
                self._drop_bitmaps()
                return self._census()
            raise NotRepairable(last.text.removeprefix("ERROR").lstrip(": "))
        return found

    def _bare_census(self, storage: ReadStorage) -> Census:
        """A census without the refcount structure, which gives way to everything else."""
        header = replace(self.header, refcount_table_offset=0, refcount_table_clusters=0)
        return census(Qcow2State(storage, header), self.rescued)

    def _layers(self) -> list[_Layer]:
        layers = [_Layer("active layer", self.header.l1_table_offset, self.header.l1_size, None)]
        layers += [
            _Layer(f"snapshot {entry.id} ({entry.name})", entry.l1_table_offset, entry.l1_size, index)
            for index, entry in enumerate(self.rescued.entries)
        ]
        return layers

    def _settle_tables(self) -> None:
        """Give every L1 and L2 table a place of its own, and mend the L1 tables on the way."""
        mended = False
        for _ in range(_MAX_ROUNDS):
            overlaps = self._census().overlaps
            if self._settle_snapshots(overlaps):
                continue
            if not mended:
                tables = self._l1_tables()
                self._replace_l1_tables([(at, l1, mend_l1(l1, self.geometry, self.file_end)) for at, l1 in tables])
                mended = True
            elif not self._settle_l2_tables(overlaps):
                return
        raise NotRepairable("too many structures lie on each other")

    def _settle_snapshots(self, overlaps: Sequence[Overlap]) -> bool:
        """Deal with what lies on L1 tables, the snapshot table and the bitmaps; whether anything was done."""
        on_l1: dict[str, set[int]] = {}
        for cluster, first, second in overlaps:
            names = {first, second}
            if names & set(_BITMAPS):
                self._free_of_bitmaps(cluster, names)
                return True
            # Where the snapshot table is sound, an L1 entry that takes it for an L2 table is wrong.
            if "snapshot table" in names and (
                "L2 table" not in names or self.rescued.repairs or not self._no_tables([cluster])
            ):
                self.rescued.rewrite, self.rescued.length = True, 0
                return True
            if "active L1 table" in names and names & set(_FIXED_PLACES):
                raise NotRepairable("the active L1 table lies in the header")
            if "snapshot L1 table" in names:
                on_l1.setdefault(second if first == "snapshot L1 table" else first, set()).add(cluster)
        done = False
        for other, clusters in on_l1.items():
            for layer in reversed(self._layers()[1:]):
                if not clusters.isdisjoint(self._place(layer)):
                    done |= self._free_of_snapshot(layer, other)
                    if done and other == "snapshot L1 table":
                        return True  # the other one has the place for itself now
        return done

    def _place(self, layer: _Layer) -> range:
        start = layer.offset >> self.geometry.cluster_bits
        return range(start, start + self.geometry.clusters_for(layer.entries * 8))

    def _free_of_snapshot(self, layer: _Layer, other: str) -> bool:
        """An L1 table of a snapshot that lies on something: copy it away, or drop the snapshot; whether it was done."""
        assert layer.snapshot is not None
        entry = self.rescued.entries[layer.snapshot]
        l1 = self._read_l1(layer)
        sound = np.array_equal(l1, mend_l1(l1, self.geometry, self.file_end).words)
        if sound and other in ("active L1 table", "snapshot L1 table"):
            offset = self._new_clusters(l1.tobytes())
            self.rescued.entries[layer.snapshot] = replace(entry, l1_table_offset=offset)
            self.rescued.rewrite = True
            self.actions.append(f"{layer.name}: L1 table copied away from the {other} at {layer.offset:#x}")
            return True
        needed = needed_l1_entries(entry, self.header)
        if needed < entry.l1_size:
            self.rescued.entries[layer.snapshot] = replace(entry, l1_size=needed)
            self.rescued.rewrite = True
            self.actions.append(f"{layer.name}: L1 table cut to the {needed} entries that it needs")
            return True
        named = _looked_at(l1, self.geometry)
        if sound and other in ("L2 table", "guest data") and 2 * len(self._no_tables(named)) <= len(named):
            return False  # the entry that refers to this place is wrong
        if sound and other == "guest data" and self._drop_no_tables(layer, l1):
            return True
        found = self._lost_l1_table(layer.snapshot)
        if found is not None:
            self.rescued.entries[layer.snapshot] = replace(entry, l1_table_offset=found)
            self.rescued.rewrite = True
            self.actions.append(f"{layer.name}: the L1 table at {found:#x} was found again")
            return True
        del self.rescued.entries[layer.snapshot]
        text = f"Repairing {layer.name} l1_offset={layer.offset:#x}: L1 table lies on the {other}"
        self.rescued.drop("overlap", text, layer.name)
        return True

    def _drop_no_tables(self, layer: _Layer, l1: Entries) -> bool:
        """Drop the entries that lead to no L2 table, if then nothing lies on the L1 table; whether it was done.

        What they lead to is read as an L2 table, and may name anything as guest data: also the L1 table itself.
        """
        named = offsets(l1) >> self.geometry.cluster_bits
        chosen = np.isin(named, np.array(self._no_tables(_looked_at(l1, self.geometry)), dtype=np.int64)) & (l1 != 0)
        view, new = OverlayStorage(self.overlay), l1.copy()
        new[chosen] = 0
        view.pwrite(new.tobytes(), layer.offset)
        found = self._bare_census(view)
        if found.stopped is not None or any(one.cluster in self._place(layer) for one in found.overlaps):
            return False
        others = [one for one in self._l1_tables() if one[0].offset != layer.offset]
        unchanged = [(one, table, Mended(table.copy(), np.zeros(0, dtype=np.bool_))) for one, table in others]
        self._replace_l1_tables([(layer, l1, Mended(new, chosen)), *unchanged])
        return True

    def _settle_l2_tables(self, overlaps: Sequence[Overlap]) -> bool:
        """Drop the L1 entries whose L2 tables lie on something else; whether there were any."""
        wrong: list[int] = []
        for cluster, *names in overlaps:
            if "L2 table" not in names:
                if "guest data" not in names:
                    raise NotRepairable(f"cluster {cluster} holds the {names[0]} and the {names[1]}")
            elif "guest data" not in names or self._no_tables([cluster]):
                wrong.append(cluster)
        if not wrong:
            return False
        mended = []
        for layer, l1 in self._l1_tables():
            named = offsets(l1) >> self.geometry.cluster_bits
            chosen = np.isin(named, np.array(wrong, dtype=np.int64)) & (l1 != 0)
            new = l1.copy()
            new[chosen] = 0
            mended.append((layer, l1, Mended(new, chosen)))
        self._replace_l1_tables(mended)
        return True

    def _no_tables(self, clusters: list[int]) -> list[int]:
        """Those of some clusters where most of what should be entries of an L2 table cannot be."""
        return [cluster for cluster in clusters if is_no_l2_table(self.overlay, cluster, self.rules)]

    def _lost_l1_table(self, snapshot: int) -> int | None:
        """The place of the L1 table of a snapshot whose entry names another one, where there is no doubt about it."""
        entry = self.rescued.entries[snapshot]
        others = [one for index, one in enumerate(self.rescued.entries) if index != snapshot]
        found = census(Qcow2State(self.overlay, self.header), replace(self.rescued, entries=others))
        if found.stopped is not None:
            return None
        places = LostTables(self.overlay, self.header, self.rules, found).l1_tables(entry.l1_size)
        return places[0] if len(places) == 1 else None

    # -- mending in place

    def _fill_last_cluster(self) -> None:
        """Let the file end with a whole cluster: what was cut off from a table reads as zeroes, and is there again."""
        end = max(self.overlay.size(), self.header.l1_table_offset + 8 * self.header.l1_size)
        missing = end + -end % self.size - self.overlay.size()
        if missing:
            self.overlay.pwrite(bytes(missing), self.overlay.size())

    def _read_l1(self, layer: _Layer) -> Entries:
        return np.frombuffer(read_padded(self.overlay, layer.offset, layer.entries * 8), dtype=ENTRY_DTYPE)

    def _replace_words(self, old: Entries, new: Entries, offset: int, *, later: bool = False) -> None:
        write = self.overlay.stage if later else self.overlay.pwrite
        for first, stop in changed_spans(old, new):
            write(new[first:stop].tobytes(), offset + 8 * first)

    def _replace_l1_tables(self, mended: list[tuple[_Layer, Entries, Mended]]) -> None:
        """Put mended L1 tables in place; the one L2 table that they lose is looked for."""
        found_again = self._lost_l2_table(mended) if sum(int(new.lost.sum()) for _, _, new in mended) == 1 else None
        for layer, l1, new in mended:
            lost = np.flatnonzero(new.lost)
            if found_again is not None and len(lost):
                # Not dropped first: cut off in between, the table that was found would be given back as a leak.
                self.overlay.stage(found_again.to_bytes(8, "big"), layer.offset + 8 * int(lost[0]))
                self.actions.append(f"{layer.name}: the L2 table at {found_again:#x} was found again")
                new.words[lost] = l1[lost]
                lost = lost[:0]
            self._replace_words(l1, new.words, layer.offset)
            self.lost.add(layer.name, lost, self.geometry.l2_coverage)

    def _l1_tables(self) -> Iterator[tuple[_Layer, Entries]]:
        """The L1 tables, each once."""
        seen: set[tuple[int, int]] = set()
        for layer in self._layers():
            if (layer.offset, layer.entries) not in seen:
                seen.add((layer.offset, layer.entries))
                yield layer, self._read_l1(layer)

    def _lost_l2_table(self, mended: list[tuple[_Layer, Entries, Mended]]) -> int | None:
        """The place of the L2 table that a damaged L1 entry named, where there is no doubt about it.

        It is in use, and nothing refers to it; or the same part of another layer does, and is one reference short.
        """
        view = OverlayStorage(self.overlay)
        for layer, _, new in mended:
            view.pwrite(new.words.tobytes(), layer.offset)
        found = census(Qcow2State(view, self.header), self.rescued)
        if found.stopped is not None:
            return None
        search = LostTables(view, self.header, self.rules, found)
        places = search.l2_tables()
        index = next(int(np.flatnonzero(new.lost)[0]) for _, _, new in mended if new.lost.any())
        beside = {int(offsets(new.words[index : index + 1])[0]) for _, _, new in mended if index < len(new.words)} - {0}
        places += search.lacking(sorted(beside))
        return places[0] if len(places) == 1 else None

    def _mend_l2_tables(self) -> None:
        lost: dict[int, Int64Array] = {}
        kept = 0
        shared = [o.cluster << self.geometry.cluster_bits for o in self._census().overlaps if "guest data" in o[1:]]
        for host, words in self._l2_batches():
            mended = mend_l2(words.reshape(-1), self.rules)
            new = mended.words.reshape(words.shape)
            losses = mended.lost.reshape(len(host), -1)
            for row in np.flatnonzero((new != words).any(axis=1)).tolist():
                # Where guest data lies on the table, its bytes are needed until that has been copied away.
                self._replace_words(words[row], new[row], int(host[row]), later=int(host[row]) in shared)
                indices = np.flatnonzero(losses[row])
                if len(indices) and kept < MAX_LOST_RANGES:
                    lost[int(host[row])] = indices
                    kept += len(indices)
                else:
                    self.lost.more += len(indices)
        if not lost:
            return
        tables = np.array(sorted(lost), dtype=np.int64)
        for layer in self._layers():
            host = offsets(self._read_l1(layer))
            for l1_index in np.flatnonzero(np.isin(host, tables)).tolist():
                base = l1_index * self.geometry.l2_entries
                self.lost.add(layer.name, lost[int(host[l1_index])] + base, self.size)

    def _l2_batches(self) -> Iterator[tuple[Int64Array, Entries]]:
        """(host offsets, words) of all L2 tables inside the file, each once."""
        host = np.unique(np.concatenate([np.unique(offsets(l1)) for _, l1 in self._l1_tables()]))
        host = host[(host != 0) & (host < self.file_end) & (host & (self.size - 1) == 0)]
        per_batch = max(1, SCAN_BYTES >> self.geometry.cluster_bits)
        for start in range(0, len(host), per_batch):
            part = host[start : start + per_batch]
            words = empty_words(len(part), self.geometry)
            read_tables(self.overlay, self.geometry, part, words)
            yield part, words

    # -- bitmaps

    def _bitmap_entries(self) -> list[BitmapEntry] | None:
        """The bitmap directory; None where it cannot be used."""
        extension = self.header.bitmaps_extension
        if extension is None:
            return []
        try:
            data = read_exact(self.overlay, extension.directory_offset, extension.directory_size, "bitmap directory")
            entries = parse_bitmap_directory(data, extension)
            for entry in entries:
                check_bitmap_entry(entry, self.size, self.header.virtual_size)
        except FormatError:
            return None
        inside = all(entry.table_offset + 8 * entry.table_size <= self.file_end for entry in entries)
        return entries if inside else None

    def _mend_bitmaps(self, taken: set[int] | None = None) -> bool:
        """Mend the tables of the bitmaps; data on `taken` clusters counts as all dirty. Whether anything changed."""
        entries = self._bitmap_entries()
        if entries is None:
            self._drop_bitmaps()
            return True
        changed = False
        for entry in entries:
            data = read_exact(self.overlay, entry.table_offset, 8 * entry.table_size, "bitmap table")
            table = np.frombuffer(data, dtype=ENTRY_DTYPE)
            new = mend_bitmap_table(table, self.size, self.file_end)
            if taken:
                clusters = offsets(new, BITMAP_TABLE_OFFSET_MASK) >> self.geometry.cluster_bits
                new[np.isin(clusters, list(taken)) & (clusters != 0)] = BITMAP_TABLE_ALL_ONES
            if not np.array_equal(table, new):
                self._replace_words(table, new, entry.table_offset)
                self.actions.append(f"bitmap '{entry.name}': damaged parts count as all dirty now")
                changed = True
        return changed

    def _free_of_bitmaps(self, cluster: int, names: set[str]) -> None:
        only_data = not names & {"bitmap directory", "bitmap table"}
        if not (only_data and self._mend_bitmaps({cluster})):
            self._drop_bitmaps()

    def _drop_bitmaps(self) -> None:
        """Let the header say that its bitmaps are not to be used."""
        if not self.header.autoclear_features & Autoclear.BITMAPS:
            raise NotRepairable("the bitmaps are damaged")
        bits = self.header.autoclear_features & ~Autoclear.BITMAPS
        self.header = replace(self.header, autoclear_features=int(bits))
        self.actions.append("all persistent bitmaps are dropped: their directory is damaged")

    # -- copies

    def _new_clusters(self, data: bytes) -> int:
        """Write bytes into new clusters behind the end of the file, filled up with zeroes; their host offset."""
        if not self._next:
            self._next = self.geometry.clusters_for(self.overlay.size())
        offset = self._next << self.geometry.cluster_bits
        self.overlay.pwrite(data + bytes(-len(data) % self.size), offset)
        self._next += max(1, self.geometry.clusters_for(len(data)))
        return offset

    def _move_data(self, clusters: Int64Array) -> None:
        """Copy guest clusters that touch any of these host clusters, entry by entry, and stage the new entries."""
        bits, step = self.geometry.cluster_bits, self.geometry.l2_entry_size
        for host, words in self._l2_batches():
            entries, bitmaps = split_words(words, self.geometry)
            native = entries.astype(np.uint64)
            kind = classify_many(native, self.geometry.extended_l2, self.header.has_data_file)
            start = offsets(native)
            length = np.full(start.shape, self.size, dtype=np.int64)
            compressed = kind == ClusterType.COMPRESSED
            start[compressed], length[compressed] = compressed_locations(native[compressed], bits)
            placed = (kind == ClusterType.NORMAL) | (kind == ClusterType.ZERO_ALLOC) | compressed
            first, last = start >> bits, (start + length - 1) >> bits
            touched = np.isin(first, clusters) | np.isin(last, clusters) | np.isin(first + 1, clusters) & (last > first)
            empty = kind == ClusterType.ZERO_ALLOC
            if bitmaps is not None:
                empty = (kind == ClusterType.NORMAL) & ~flagged(bitmaps, SUBCLUSTERS_ALLOCATED)
            for row, index in np.argwhere(placed & touched).tolist():
                where = int(host[row]) + index * step
                entry = int(native[row, index]) & ~OFLAG_COPIED
                if empty[row, index]:
                    new = 0 if bitmaps is not None else OFLAG_ZERO  # nothing lies there that would be read
                else:
                    low = int(first[row, index]) << bits
                    old = read_padded(self.base, low, (int(last[row, index]) + 1 << bits) - low)
                    new = entry + self._new_clusters(old) - low
                self.overlay.stage(new.to_bytes(8, "big"), where)
                self.moved += 1

    def _write_snapshot_table(self) -> None:
        """Let the header name the snapshots that are kept."""
        count = len(self.rescued.entries)
        if not self.rescued.repairs and not self.rescued.rewrite:
            return
        offset = self.header.snapshots_offset if count else 0
        if self.rescued.rewrite and count:
            offset = self._new_clusters(build_snapshot_table(self.rescued.entries))
        self.header = replace(self.header, nb_snapshots=count, snapshots_offset=offset)


def _looked_at(l1: Entries, geometry: Geometry) -> list[int]:
    """Clusters that an L1 table names as L2 tables, so many of them as are looked at to judge it."""
    named: list[int] = np.unique(offsets(l1) >> geometry.cluster_bits)[-_MOST_LOOKS:].tolist()
    return [cluster for cluster in named if cluster]
