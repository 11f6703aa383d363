"""Small images drawn cluster by cluster, for tests that need metadata which no tool would write."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcowlib.format.header import Header, parse_header
from qcowlib.format.refcount_block import encode_refcounts
from qcowlib.metadata.state import Qcow2State
from qcowlib.storage.buffer import BytesStorage

COPIED = 1 << 63
COMPRESSED = 1 << 62


@dataclass
class Sketch:
    """An image of `clusters` host clusters: 0 header, 1 refcount table, 2 refcount block, 3 L1 table, the rest is free.

    Attributes:
        l1: entries of the active L1 table.
        tables: words of other clusters (L2 tables, more refcount blocks, snapshots' L1 tables) by cluster.
        refcounts: by cluster; 1 for those that are not named.
        raw: bytes of other clusters.
        refcount_table: entries of the refcount table.
    """

    clusters: int
    l1: list[int]
    tables: dict[int, list[int]] = field(default_factory=dict)
    refcounts: dict[int, int] = field(default_factory=dict)
    raw: dict[int, bytes] = field(default_factory=dict)
    cluster_bits: int = 9
    refcount_order: int = 4
    incompatible: int = 0
    version: int = 3
    snapshots: tuple[int, int] = (0, 0)
    refcount_table: list[int] | None = None

    @property
    def size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    def header(self) -> Header:
        """The header of the image."""
        entry_bits = 4 if self.incompatible & 16 else 3
        return Header(
            version=self.version,
            cluster_bits=self.cluster_bits,
            size=len(self.l1) << (2 * self.cluster_bits - entry_bits),
            l1_size=len(self.l1),
            l1_table_offset=3 * self.size,
            refcount_table_offset=self.size,
            refcount_table_clusters=1,
            nb_snapshots=self.snapshots[0],
            snapshots_offset=self.snapshots[1],
            incompatible_features=self.incompatible,
            refcount_order=self.refcount_order,
            header_length=112 if self.version == 3 else 72,
        )

    def build(self) -> bytes:
        """The bytes of the image file."""
        data = bytearray(self.clusters * self.size)
        self._put(data, 0, self.header().build())
        table = [2 * self.size] if self.refcount_table is None else self.refcount_table
        self._put(data, 1, np.array(table, dtype=">u8").tobytes())
        counts = np.zeros(self.size * 8 >> self.refcount_order, dtype=np.uint64)
        counts[: self.clusters] = 1
        for cluster, count in self.refcounts.items():
            counts[cluster] = count
        self._put(data, 2, encode_refcounts(counts, self.refcount_order))
        self._put(data, 3, np.array(self.l1, dtype=">u8").tobytes())
        for cluster, words in self.tables.items():
            self._put(data, cluster, np.array(words, dtype=">u8").tobytes())
        for cluster, content in self.raw.items():
            self._put(data, cluster, content)
        return bytes(data)

    def state(self) -> Qcow2State:
        """The metadata of the image."""
        data = self.build()
        return Qcow2State(BytesStorage(data), parse_header(data, len(data), for_check=True))

    def _put(self, data: bytearray, cluster: int, content: bytes) -> None:
        start = cluster * self.size
        data[start : start + len(content)] = content
