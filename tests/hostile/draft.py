"""A qcow2 image put together byte by byte, so that each of its rules can be broken on purpose.

Nothing of the library is used: what is under test cannot bend what it is tested with. Files are sparse: a table of
gigabytes costs no space.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

COPIED = 1 << 63
COMPRESSED = 1 << 62
END_OF_EXTENSIONS = struct.pack(">II", 0, 0)

_V3 = ">4sIQIIQIIQQIIQQQQII"


@dataclass
class Draft:
    """One image. With no changes: 16 MiB disk, version 3, cluster 0 of the guest holds `payload`, clean.

    Attributes:
        fields: header fields that replace the valid ones, by the specification's names.
        extensions: the bytes of the header extensions with their end marker.
        pieces: bytes by host offset, written last.
        file_size: bytes of the file, sparse; None ends it behind the last piece, at a whole cluster.
        refcounts: refcounts of the first clusters, 16 bits wide.
    """

    cluster_bits: int = 16
    fields: dict[str, int] = field(default_factory=dict)
    extensions: bytes = END_OF_EXTENSIONS
    pieces: dict[int, bytes] = field(default_factory=dict)
    file_size: int | None = None
    refcounts: list[int] = field(default_factory=lambda: [1] * 6)
    payload: bytes = b"\xa5" * 512

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    def at(self, cluster: int) -> int:
        """Host offset of a cluster. 1: refcount table, 2: refcount block, 3: L1 table, 4: L2 table, 5: data."""
        return cluster << self.cluster_bits

    def header(self) -> bytes:
        """The first bytes of the file."""
        fields = {
            "version": 3,
            "backing_file_offset": 0,
            "backing_file_size": 0,
            "cluster_bits": self.cluster_bits,
            "size": 16 << 20,
            "crypt_method": 0,
            "l1_size": 1,
            "l1_table_offset": self.at(3),
            "refcount_table_offset": self.at(1),
            "refcount_table_clusters": 1,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
            "incompatible_features": 0,
            "compatible_features": 0,
            "autoclear_features": 0,
            "refcount_order": 4,
            "header_length": 112,
        }
        compression = self.fields.get("compression_type", 0)
        unknown = set(self.fields) - set(fields) - {"compression_type"}
        assert not unknown, unknown
        values = [self.fields.get(name, value) for name, value in fields.items()]
        return struct.pack(_V3, b"QFI\xfb", *values) + bytes([compression]) + bytes(7) + self.extensions

    def write(self, path: Path) -> Path:
        """Make the file."""
        pieces = {
            self.at(1): words(self.at(2)),
            self.at(2): struct.pack(f">{len(self.refcounts)}H", *self.refcounts),
            self.at(3): words(self.at(4) | COPIED),
            self.at(4): words(self.at(5) | COPIED),
            self.at(5): self.payload,
            0: self.header(),
        }
        end = max(offset + len(data) for offset, data in [*pieces.items(), *self.pieces.items()])
        with path.open("wb") as file:
            file.truncate(-(-end // self.cluster_size) * self.cluster_size)
            for offset, data in [*pieces.items(), *self.pieces.items()]:
                file.seek(offset)
                file.write(data)
            if self.file_size is not None:
                file.truncate(self.file_size)
        return path


def words(*values: int) -> bytes:
    """64-bit big-endian words."""
    return struct.pack(f">{len(values)}Q", *values)


def extension(magic: int, data: bytes, length: int | None = None) -> bytes:
    """A header extension; `length` tells another length than it has."""
    return struct.pack(">II", magic, len(data) if length is None else length) + data + bytes(-len(data) % 8)


def snapshot_entry(
    l1_offset: int, l1_size: int, *, name: bytes = b"s", number: bytes = b"1", extra: bytes | None = None
) -> bytes:
    """One padded entry of a snapshot table; the extra data says 16 MiB of disk."""
    extra = words(0, 16 << 20) if extra is None else extra
    head = struct.pack(">QIHHIIQII", l1_offset, l1_size, len(number), len(name), 0, 0, 0, 0, len(extra))
    entry = head + extra + number + name
    return entry + bytes(-len(entry) % 8)


def compressed_entry(host: int, sectors: int, cluster_bits: int = 16) -> int:
    """L2 entry of a compressed cluster at `host` that takes `sectors` sectors more than its first."""
    shift = 62 - (cluster_bits - 8)
    return COMPRESSED | sectors << shift | host
