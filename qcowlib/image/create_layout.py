"""The layout of a fresh qcow2 image: every table's place, decided before anything is written.

    options -> plan_layout -> Layout (places) -> metadata_writes -> (host offset, bytes) batches

The places are those that `qemu-img create` chooses, so that the two files are equal byte for byte: header, refcount
table, first refcount block, L1 table; then what is preallocated; at last the LUKS header.

Source: the observed files of QEMU 7.2; qcow2.txt.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcowlib.addresses import Geometry
from qcowlib.format.constants import L1_ENTRY_SIZE, MAX_L1_ENTRIES
from qcowlib.format.entries import ENTRY_DTYPE, OFLAG_COPIED
from qcowlib.format.refcount_block import encode_refcounts, refcount_dtype
from qcowlib.image.create_space import HostSpace, ImageTooLarge
from qcowlib.units import round_up

Int64Array = npt.NDArray[np.int64]
Write = tuple[int, bytes | memoryview]

# QEMU maps at most this many bytes with one request when it preallocates metadata.
_MAX_REQUEST = (1 << 31) - 1
_BATCH_BYTES = 8 << 20


@dataclass
class _Mapping:
    """Runs of preallocated guest clusters (adjacent in guest and host), in guest order, never across an L2 table."""

    guest: array[int] = field(default_factory=lambda: array("q"))
    host: array[int] = field(default_factory=lambda: array("q"))
    length: array[int] = field(default_factory=lambda: array("q"))
    l2_tables: array[int] = field(default_factory=lambda: array("q"))

    def add(self, guest: int, host: int, length: int) -> None:
        self.guest.append(guest)
        self.host.append(host)
        self.length.append(length)


@dataclass(frozen=True)
class Layout:
    """Places of everything in a fresh image. Indices count host clusters.

    Attributes:
        geometry: cluster size, refcount width, L2 entry kind.
        size: guest bytes.
        space: the used clusters and the refcount structures.
        l1_cluster: start of the L1 table, 0 when there is none (size 0).
        l1_entries: its entries.
        crypto_cluster: start of the LUKS header, 0 when there is none.
        data_range: host bytes (start, end) of the data area that falloc and full reserve; empty when start == end.
        file_size: length of the finished file in bytes.
        data_file_size: length of the external data file in bytes, 0 without one.
    """

    geometry: Geometry
    size: int
    space: HostSpace
    l1_cluster: int
    l1_entries: int
    crypto_cluster: int
    data_range: tuple[int, int]
    file_size: int
    data_file_size: int
    _mapping: _Mapping

    @property
    def l1_offset(self) -> int:
        """Host offset of the L1 table in bytes."""
        return self.l1_cluster << self.geometry.cluster_bits

    @property
    def crypto_offset(self) -> int:
        """Host offset of the LUKS header in bytes."""
        return self.crypto_cluster << self.geometry.cluster_bits

    @property
    def refcount_table_offset(self) -> int:
        """Host offset of the refcount table in bytes."""
        return self.space.table.cluster << self.geometry.cluster_bits

    @property
    def metadata_bytes(self) -> int:
        """Host bytes that the metadata takes."""
        tables = len(self._mapping.l2_tables) + len(self.space.blocks) + self.space.table.clusters + 1
        return (tables + self.geometry.clusters_for(self.l1_entries * L1_ENTRY_SIZE)) * self.geometry.cluster_size

    def metadata_writes(self) -> Iterator[Write]:
        """The L2 tables, L1 table, refcount blocks and refcount table as writes; the header is not among them."""
        yield from self._l2_writes()
        if self.l1_entries:
            yield self.l1_offset, self._l1_table()
        yield from self._refcount_block_writes()
        yield self.refcount_table_offset, self._refcount_table()

    def _l1_table(self) -> bytes:
        table = np.zeros(self.l1_entries, dtype=ENTRY_DTYPE)
        places = np.array(self._mapping.l2_tables, dtype=np.uint64)
        table[: len(places)] = places << np.uint64(self.geometry.cluster_bits) | np.uint64(OFLAG_COPIED)
        return table.tobytes()

    def _l2_writes(self) -> Iterator[Write]:
        geometry, mapping = self.geometry, self._mapping
        guest = np.array(mapping.guest, dtype=np.int64)
        shift = np.array(mapping.host, dtype=np.int64) - guest
        length = np.array(mapping.length, dtype=np.int64)
        batch = max(1, _BATCH_BYTES // geometry.cluster_size)
        for first in range(0, len(mapping.l2_tables), batch):
            tables = mapping.l2_tables[first : first + batch]
            start = first << geometry.l2_bits
            low, high = np.searchsorted(guest, [start, start + (len(tables) << geometry.l2_bits)])
            entries = self._l2_entries(start, len(tables), shift[low:high], length[low:high])
            view = memoryview(entries.data).cast("B")
            for index, cluster in enumerate(tables):
                at = index << geometry.cluster_bits
                yield cluster << geometry.cluster_bits, view[at : at + geometry.cluster_size]

    def _l2_entries(self, start: int, tables: int, shift: Int64Array, length: Int64Array) -> npt.NDArray[np.uint64]:
        """L2 tables of the guest clusters from `start` on. With extended entries all subclusters are unallocated."""
        geometry = self.geometry
        count = int(length.sum())
        hosts = np.arange(start, start + count, dtype=np.int64) + np.repeat(shift, length)
        words = np.zeros((tables << geometry.l2_bits, geometry.l2_entry_size // 8), dtype=ENTRY_DTYPE)
        words[:count, 0] = hosts.astype(np.uint64) << np.uint64(geometry.cluster_bits) | np.uint64(OFLAG_COPIED)
        return words.reshape(-1)

    def _refcount_table(self) -> bytes:
        table = np.zeros(self.space.table_entries, dtype=ENTRY_DTYPE)
        for index, cluster in self.space.blocks.items():
            table[index] = cluster << self.geometry.cluster_bits
        return table.tobytes()

    def _refcount_block_writes(self) -> Iterator[Write]:
        geometry = self.geometry
        entries = geometry.refcount_block_entries
        ones = np.ones(entries, dtype=refcount_dtype(geometry.refcount_order))
        full = encode_refcounts(ones, geometry.refcount_order)
        for index, cluster in self.space.blocks.items():
            first = index * entries
            used = self.space.used.clipped(first, first + entries)
            if used == [(first, first + entries)]:
                block = full
            else:
                counts = np.zeros_like(ones)
                for start, end in used:
                    counts[start - first : end - first] = 1
                block = encode_refcounts(counts, geometry.refcount_order)
            yield cluster << geometry.cluster_bits, block


def plan_layout(
    geometry: Geometry, size: int, *, preallocation: str = "off", data_file: bool = False, crypto_length: int = 0
) -> Layout:
    """Decide the places of everything in a fresh image.

    Args:
        geometry: cluster size, refcount width, L2 entry kind.
        size: guest bytes, a multiple of 512.
        preallocation: "off", "metadata", "falloc" or "full".
        data_file: guest data lies in an external data file, at the guest's own offsets.
        crypto_length: bytes of the LUKS header and its key material; 0 without one.

    Raises:
        ImageTooLarge: the L1 table or the refcount table would pass the format's limit.
    """
    l1_entries = geometry.l1_entries_for(size)
    if l1_entries > MAX_L1_ENTRIES:
        raise ImageTooLarge()
    space = HostSpace(geometry)
    l1_cluster = space.allocate(geometry.clusters_for(l1_entries * L1_ENTRY_SIZE)) if l1_entries else 0
    # A table that fills its last cluster in part ends the file where its last entry ends.
    file_size = (l1_cluster << geometry.cluster_bits) + l1_entries * L1_ENTRY_SIZE if l1_entries else 0
    mapping = _Mapping()
    data_range = (0, 0)
    data_file_size = size if data_file else 0
    if preallocation == "metadata" or (data_file and preallocation != "off"):
        data_end = _preallocate_metadata(geometry, size, space, mapping, data_file=data_file)
        if data_file:
            data_file_size = data_end
        else:
            file_size = max(file_size, data_end)
    elif preallocation != "off":
        data_range = _preallocate_data(geometry, size, space, mapping)
        file_size = max(file_size, data_range[1])
    crypto_cluster = space.allocate(geometry.clusters_for(crypto_length)) if crypto_length else 0
    structures = [*mapping.l2_tables, *space.blocks.values(), space.table.cluster + space.table.clusters - 1]
    if crypto_cluster:
        structures.append(crypto_cluster + geometry.clusters_for(crypto_length) - 1)
    file_size = max(file_size, (max(structures) + 1) << geometry.cluster_bits)
    return Layout(
        geometry, size, space, l1_cluster, l1_entries, crypto_cluster, data_range, file_size, data_file_size, mapping
    )


def _preallocate_metadata(
    geometry: Geometry, size: int, space: HostSpace, mapping: _Mapping, *, data_file: bool
) -> int:
    """Map every guest cluster, L2 tables and data in the order of QEMU's requests; returns the data's end in bytes."""
    total = geometry.clusters_for(size)
    max_request = _MAX_REQUEST >> geometry.cluster_bits
    position = end = 0
    while position < total:
        request = min(total - position, max_request)
        done = first_host = 0
        while done < request:
            guest = position + done
            if guest >> geometry.l2_bits == len(mapping.l2_tables):
                mapping.l2_tables.append(space.allocate(1))
            count = min(request - done, geometry.l2_entries - (guest & (geometry.l2_entries - 1)))
            if data_file:
                host = guest
            elif done == 0:
                host = first_host = space.allocate(count)
            else:  # the rest of a request must follow its first clusters on the host; else it is a new request
                host = first_host + done
                count = space.allocate_at(host, count)
                if count == 0:
                    break
            mapping.add(guest, host, count)
            done += count
        position += done
        end = (mapping.host[-1] + mapping.length[-1]) << geometry.cluster_bits
    # The last cluster is mapped whole, but QEMU fills only its last subcluster up behind the guest's end.
    return end - (geometry.cluster_end(size) - round_up(size, geometry.subcluster_size))


def _preallocate_data(geometry: Geometry, size: int, space: HostSpace, mapping: _Mapping) -> tuple[int, int]:
    """One run for all data behind refcount structures that cover it; the L2 tables where there is room."""
    clusters = geometry.clusters_for(size)
    tables = -(-clusters // geometry.l2_entries)
    start = space.renew_refcounts(space.used.end, clusters + tables + 1)
    space.allocate_at(start, clusters)
    for first in range(0, clusters, geometry.l2_entries):
        mapping.l2_tables.append(space.allocate(1))
        mapping.add(first, start + first, min(geometry.l2_entries, clusters - first))
    return start << geometry.cluster_bits, (start + clusters) << geometry.cluster_bits
