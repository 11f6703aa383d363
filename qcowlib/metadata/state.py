"""The metadata of one open image: header, active L1 table, snapshot table, bitmap directory, L2 tables.

Everything but the header is read at first use: `info` of an image with a damaged L1 table must not fail, a read must.
"""

from __future__ import annotations

from errno import EFBIG, EINVAL
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata
from qcowlib.format.bitmap_directory import BitmapEntry, parse_bitmap_directory
from qcowlib.format.constants import MAX_L1_SIZE
from qcowlib.format.entries import ENTRY_DTYPE, REFCOUNT_TABLE_OFFSET_MASK, Entries, Int64Array, offsets
from qcowlib.format.header import Header, header_span, parse_header
from qcowlib.format.refcount_block import decode_refcounts
from qcowlib.format.snapshot_table import SnapshotEntry, parse_snapshot_table
from qcowlib.metadata.mapping import ClusterMapping
from qcowlib.metadata.regions import MetadataRegions, RegionKind
from qcowlib.metadata.tables import EntryRules, TableCache
from qcowlib.storage.helpers import read_exact, read_padded
from qcowlib.storage.protocol import ReadStorage

_SECTOR = 512


class Qcow2State:
    """The live metadata of one image.

    Attributes:
        storage: the qcow2 file.
        data_storage: the file that holds guest clusters (`storage` without an external data file).
        header: the parsed header.
        geometry: sizes that follow from the header.
        tables: L2 tables in memory.
        for_writing: trust the refcount table as to where refcount blocks are, as a writer must; set before first use.
    """

    def __init__(self, storage: ReadStorage, header: Header, data_storage: ReadStorage | None = None) -> None:
        self.storage = storage
        self.data_storage: ReadStorage = data_storage if data_storage is not None else storage
        self.header = header
        self.geometry: Geometry = header.geometry
        self.tables = TableCache(storage, self.geometry)
        self.for_writing = False

    @cached_property
    def l1(self) -> Entries:
        """The active L1 table ('>u8', header.l1_size entries).

        Raises:
            CorruptMetadata: the table overlaps the header or is not wholly inside the file.
        """
        return load_l1(self.storage, self.header.l1_table_offset, self.header.l1_size, "L1 table")

    @cached_property
    def snapshots(self) -> list[SnapshotEntry]:
        """The snapshot table, in its order on disk.

        Raises:
            FormatError: the table is damaged.
        """
        return parse_snapshot_table(lambda offset, length: self.storage.pread(length, offset), self.header)

    @cached_property
    def bitmaps(self) -> list[BitmapEntry]:
        """The persistent dirty bitmaps' directory entries; empty when the autoclear bit says they are not valid.

        Raises:
            FormatError: the directory is damaged.
        """
        extension = self.header.bitmaps_extension
        if extension is None:
            return []
        data = read_exact(self.storage, extension.directory_offset, extension.directory_size, "bitmap directory")
        return parse_bitmap_directory(data, extension)

    @cached_property
    def regions(self) -> MetadataRegions:
        """Where the header, the refcount structure and the active mapping lie (what a read must not hit)."""
        regions = MetadataRegions(self.geometry.cluster_bits)
        self._fill_regions(regions)
        return regions

    def refresh_regions(self) -> None:
        """Build the map of metadata anew: another L1 table is active, with other L2 tables."""
        self._fill_regions(self.regions)

    def _fill_regions(self, regions: MetadataRegions) -> None:
        size, header = self.geometry.cluster_size, self.header
        single = np.array([[0], [header.refcount_table_offset], [header.l1_table_offset]], dtype=np.int64)
        regions.build(
            [
                (RegionKind.HEADER, single[0], size),
                (RegionKind.REFCOUNT_TABLE, single[1], header.refcount_table_clusters * size),
                (RegionKind.L1_TABLE, single[2], header.l1_size * 8),
                (RegionKind.REFCOUNT_BLOCK, self._refcount_blocks(), size),
                (RegionKind.L2_TABLE, table_offsets(self.l1, self.geometry), size),
            ]
        )

    def _refcount_blocks(self) -> Int64Array:
        """Host offsets of the refcount blocks, as far as the refcount table can be read."""
        length = self.header.refcount_table_clusters * self.geometry.cluster_size
        data = self.storage.pread(length, self.header.refcount_table_offset)
        table = np.frombuffer(data, dtype=ENTRY_DTYPE, count=len(data) // 8)
        found = offsets(table, REFCOUNT_TABLE_OFFSET_MASK)
        sound: npt.NDArray[np.bool_] = (
            (found > 0) & (found < self.storage.size()) & (found & (self.geometry.cluster_size - 1) == 0)
        )
        chosen: Int64Array = found[sound]
        return chosen

    def _is_metadata(self, cluster: int) -> bool:
        """Whether a cluster in `regions` is what that says: a damaged refcount table may name guest data.

        A real refcount block says 1 for the metadata clusters that it covers, itself and the header among them.
        """
        if self.regions.kind_of(cluster) is not RegionKind.REFCOUNT_BLOCK:
            return True
        bits, block_bits = self.geometry.cluster_bits, self.geometry.refcount_block_bits
        table = read_padded(
            self.storage, self.header.refcount_table_offset, self.header.refcount_table_clusters << bits
        )
        entries = np.frombuffer(table, dtype=ENTRY_DTYPE)
        counts = decode_refcounts(read_padded(self.storage, cluster << bits, 1 << bits), self.geometry.refcount_order)
        for index in np.flatnonzero(offsets(entries, REFCOUNT_TABLE_OFFSET_MASK) == cluster << bits).tolist():
            first = index << block_bits
            covered = [c for c in (0, cluster, self.header.refcount_table_offset >> bits) if c >> block_bits == index]
            if all(counts[c - first] == 1 for c in covered):
                return True
        return False

    @cached_property
    def rules(self) -> EntryRules:
        """What an L2 entry must satisfy to be followed."""
        return EntryRules(
            geometry=self.geometry,
            version=self.header.version,
            data_storage=self.data_storage,
            has_data_file=self.header.has_data_file,
            regions=None if self.header.has_data_file else self.regions,
            is_metadata=None if self.for_writing else self._is_metadata,
        )

    @cached_property
    def mapping(self) -> ClusterMapping:
        """The active layer's mapping."""
        return ClusterMapping(self.storage, self.tables, self.rules, self.l1)

    def snapshot_mapping(self, entry: SnapshotEntry) -> ClusterMapping:
        """The mapping of an internal snapshot.

        Raises:
            CorruptMetadata: the snapshot's L1 table is unaligned, too large or not wholly inside the file.
        """
        if entry.l1_table_offset & (self.geometry.cluster_size - 1):
            stock = "Snapshot L1 table offset invalid"
            rule = "is not cluster aligned"
            raise CorruptMetadata("snapshot L1 table", entry.l1_table_offset, rule, stock=stock, errno=EINVAL)
        l1 = load_l1(self.storage, entry.l1_table_offset, entry.l1_size, "snapshot L1 table")
        return ClusterMapping(self.storage, self.tables, self.rules, l1)


def load_state(storage: ReadStorage, data_storage: ReadStorage | None = None, *, for_check: bool = False) -> Qcow2State:
    """The metadata of the qcow2 image in `storage`.

    Args:
        storage: the qcow2 file.
        data_storage: the file with guest clusters, if it is another one.
        for_check: take a header that only a check can make something of (no refcount table).

    Raises:
        FormatError: the header is not valid.
    """
    # No more than is needed: on some file systems what was read once stops being a hole of the host file.
    start = storage.pread(_SECTOR, 0)
    data = storage.pread(header_span(start), 0)
    return Qcow2State(storage, parse_header(data, storage.size(), for_check=for_check), data_storage)


def load_l1(storage: ReadStorage, offset: int, entries: int, structure: str) -> Entries:
    """An L1 table ('>u8', a writable copy).

    Raises:
        CorruptMetadata: it is too large, overlaps the header, or is not wholly inside the file.
    """
    if entries * 8 > MAX_L1_SIZE:
        rule = f"{entries} entries exceed the limit of {MAX_L1_SIZE} bytes"
        stock = f"{structure[0].upper()}{structure[1:]} too large"
        raise CorruptMetadata(structure, offset, rule, stock=stock, errno=EFBIG)
    if not entries:
        return np.zeros(0, dtype=ENTRY_DTYPE)
    if not offset:
        raise CorruptMetadata(structure, offset, "overlaps the header")
    return np.frombuffer(bytearray(read_exact(storage, offset, entries * 8, structure)), dtype=ENTRY_DTYPE)


def table_offsets(l1: Entries, geometry: Geometry) -> Int64Array:
    """Host offsets of the aligned L2 tables that an L1 table names."""
    host = offsets(l1)
    aligned: Int64Array = host[(host != 0) & (host & (geometry.cluster_size - 1) == 0)]
    return aligned
