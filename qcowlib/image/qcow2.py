"""qcow2 images for reading: the active layer, internal snapshots, and the vm state of a snapshot.

All three are one mapping (an L1 table) over the same data: `MappedLayer` reads it, the classes below say which L1
table, how many guest bytes, and where they start.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qcowlib.codecs.compression import decompress
from qcowlib.errors import ChainError, CorruptMetadata, NoSuchSnapshot, OptionError
from qcowlib.extents import ExtentKind, ExtentTable
from qcowlib.format.bitmap_directory import BitmapEntry, check_bitmap_entry
from qcowlib.format.header import Header
from qcowlib.format.snapshot_table import SnapshotEntry, parse_snapshot_table
from qcowlib.image.reader import ReadableImage, zero_fill
from qcowlib.metadata.mapping import ClusterMapping
from qcowlib.metadata.state import Qcow2State

if TYPE_CHECKING:
    from qcowlib.codecs.sector_cipher import ClusterCipher

SECTOR_SIZE = 512
_DECRYPT_PIECE = 1 << 20
_CLUSTER_CACHE_BYTES = 4 << 20
_LOOK_AHEAD = 64  # clusters that are looked up one by one for a read in one piece

_DATA = int(ExtentKind.DATA)
_ZERO = int(ExtentKind.ZERO)
_UNALLOCATED = int(ExtentKind.UNALLOCATED)


class ClusterCache:
    """The decompressed clusters that were read last, by host offset.

    Args:
        cluster_size: bytes of one.
    """

    def __init__(self, cluster_size: int) -> None:
        self._capacity = max(2, _CLUSTER_CACHE_BYTES // cluster_size)
        self._clusters: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, host: int) -> bytes | None:
        """The cluster's guest bytes, if they are here."""
        with self._lock:
            data = self._clusters.get(host)
            if data is not None:
                self._clusters.move_to_end(host)
            return data

    def put(self, host: int, data: bytes) -> None:
        """Keep a cluster; the one that was not used for longest makes room."""
        with self._lock:
            self._clusters[host] = data
            if len(self._clusters) > self._capacity:
                self._clusters.popitem(last=False)

    def clear(self) -> None:
        """Forget all: their host clusters may hold something else now."""
        with self._lock:
            self._clusters.clear()


class MappedLayer(ReadableImage):
    """Guest bytes through one L1 table.

    Attributes:
        state: the image's metadata.
        cipher: decrypts data clusters; None for an image without encryption.
        clusters: decompressed clusters, shared by all layers of one image.
    """

    format = "qcow2"
    # Guest offset of the layer's first byte in its mapping: not 0 for a vm state, which lies behind the disk.
    _base = 0

    def __init__(
        self,
        state: Qcow2State,
        backing: ReadableImage | None,
        cipher: ClusterCipher | None,
        clusters: ClusterCache,
    ) -> None:
        super().__init__(backing)
        self.state = state
        self.cipher = cipher
        self.clusters = clusters
        self.cluster_size = state.geometry.cluster_size

    @property
    def mapping(self) -> ClusterMapping:
        """The mapping of this layer's L1 table."""
        return self.state.mapping

    def layer_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """Rows of this layer alone, from its L2 tables."""
        base = self._base
        for table in self.mapping.extents(base + offset, length):
            if base:
                start = table.start - base
                yield ExtentTable(start, table.length, table.kind, table.host_offset, table.host_length, table.layer)
            else:
                yield table

    def lookup(self, offset: int) -> tuple[int, int, int]:
        """(kind, host offset or -1, bytes of the same kind from `offset` on), inside one cluster."""
        return self.mapping.lookup(self._base + offset)

    def read_data(self, guest: int, host: int, view: memoryview) -> None:
        """Fill `view` from the data clusters at `host`.

        A cluster that begins inside the file may end behind it (QEMU writes such files): that part reads as zeroes.
        """
        if self.cipher is not None:
            self._read_encrypted(self.cipher, self._base + guest, host, view)
            return
        done = self.state.data_storage.pread_into(view, host)
        if done < len(view):
            zero_fill(view[done:])

    def read_compressed(self, guest: int, host: int, host_length: int, view: memoryview) -> None:
        """Fill `view` from the compressed cluster whose data begins at `host`."""
        inside = (self._base + guest) & (self.cluster_size - 1)
        data = self.clusters.get(host)
        if data is None:
            length = host_length or self.mapping.compressed_size(self._base + guest)
            stored = self.state.data_storage.pread(length, host)
            data = decompress(self.state.header.compression_type, stored, self.cluster_size, host)
            if len(view) < self.cluster_size and not self.writable:
                self.clusters.put(host, data)
        view[:] = memoryview(data)[inside : inside + len(view)]

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at guest offset `offset` (see `ReadableImage.read`)."""
        # The whole work of a random read: one look-up, one read. So is that of a longer one whose clusters follow each
        # other in the file. Everything else goes the general way.
        if offset >= 0 and 0 < length <= self.size - offset and self.cipher is None:
            kind, host, run = self.mapping.lookup(self._base + offset)
            if run < length <= _LOOK_AHEAD * self.cluster_size and kind == _DATA:
                run = self._data_run(offset, host, run, length)
            if length <= run:
                if kind == _DATA:
                    data = self.state.data_storage.pread(length, host)
                    return data if len(data) == length else data.ljust(length, b"\0")
                if kind == _ZERO:
                    return bytes(length)
                if kind == _UNALLOCATED and self._backing is not None and offset + length <= self._backing.size:
                    return self._backing.read(offset, length)
        return super().read(offset, length)

    def _data_run(self, offset: int, host: int, run: int, length: int) -> int:
        """Guest bytes from `offset` on, `length` at most, that lie together at `host`; `run` of them are known to."""
        while run < length:
            kind, next_host, more = self.mapping.lookup(self._base + offset + run)
            if kind != _DATA or next_host != host + run:
                break
            run += more
        return run

    def _read_encrypted(self, cipher: ClusterCipher, guest: int, host: int, view: memoryview) -> None:
        """Decrypt whole sectors, a piece at a time. Bytes that are not in the file cannot be decrypted to anything."""
        done = 0
        while done < len(view):
            skip = host + done & (SECTOR_SIZE - 1)
            wanted = min(len(view) - done, _DECRYPT_PIECE - skip)
            length = -(-(skip + wanted) // SECTOR_SIZE) * SECTOR_SIZE
            start = host + done - skip
            stored = self.state.data_storage.pread(length, start)
            if len(stored) < length:
                raise CorruptMetadata("encrypted cluster", start, "lies beyond the end of the file")
            plain = cipher.decrypt(stored, guest + done - skip if cipher.by_guest_offset else start)
            view[done : done + wanted] = memoryview(plain)[skip : skip + wanted]
            done += wanted


class Qcow2Image(MappedLayer):
    """A qcow2 image: its active layer, its snapshots, its bitmaps.

    Args:
        state: the metadata of the opened file; its storages are closed with the image.
        backing: the opened backing image.
        cipher: for an encrypted image, what the passphrase unlocked; None leaves encrypted data unread.
        backing_left_out: the header names a backing file that was not opened: reading what only it has raises.
    """

    def __init__(
        self,
        state: Qcow2State,
        *,
        backing: ReadableImage | None = None,
        cipher: ClusterCipher | None = None,
        backing_left_out: bool = False,
    ) -> None:
        super().__init__(state, backing, cipher, ClusterCache(state.geometry.cluster_size))
        self.backing_left_out = backing_left_out

    @property
    def size(self) -> int:
        """Size of the virtual disk in bytes, rounded down to a sector as QEMU does."""
        return self.state.header.size & -SECTOR_SIZE

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.state.storage.name

    @property
    def header(self) -> Header:
        """The parsed header."""
        return self.state.header

    @property
    def snapshots(self) -> list[SnapshotEntry]:
        """The internal snapshots in the order of the table.

        A table that the end of the file cuts short is read as QEMU does, as if zeroes followed, so that the snapshots
        before the cut can be used; whoever is going to write the table asks `state.snapshots`, which refuses it.

        Raises:
            FormatError: the snapshot table is damaged.
        """
        try:
            return self.state.snapshots
        except CorruptMetadata:
            storage = self.state.storage
            return parse_snapshot_table(lambda offset, length: storage.pread(length, offset), self.header, pad=True)

    @property
    def bitmaps(self) -> list[BitmapEntry]:
        """The persistent dirty bitmaps.

        Raises:
            FormatError: the bitmap directory is damaged, or holds a bitmap that breaks a rule.
        """
        for entry in self.state.bitmaps:
            check_bitmap_entry(entry, self.cluster_size, self.header.size)
        return self.state.bitmaps

    def open_snapshot(
        self, id_or_name: str | SnapshotEntry | None = None, *, snapshot_id: str | None = None, name: str | None = None
    ) -> SnapshotView:
        """A read-only image of the disk as an internal snapshot has it.

        Args:
            id_or_name: an id or else a name, as `find_snapshot` takes it; or an entry of `snapshots`.
            snapshot_id, name: look for exactly these instead.

        Raises:
            NoSuchSnapshot: there is none.
            CorruptMetadata: its L1 table cannot be used.
        """
        if isinstance(id_or_name, SnapshotEntry):
            entry = id_or_name
        else:
            entry = find_snapshot(self.snapshots, id_or_name, snapshot_id=snapshot_id, name=name)
        return SnapshotView(self, entry)

    def read_missing(self, guest: int, view: memoryview, fresh: bool) -> None:
        """Zeroes, unless a backing file that was left out has the bytes.

        Raises:
            ChainError: the backing file was not opened.
        """
        if self.backing_left_out:
            raise ChainError(
                f"guest offset {guest:#x} of '{self.name}' is in its backing file "
                f"'{self.header.backing_file}', which was not opened"
            )
        super().read_missing(guest, view, fresh)

    def leave_out_backing(self) -> None:
        """Close the chain below; what only that has can then not be read."""
        if self._backing is not None:
            self._backing.close()
            self._backing = None
            self.backing_left_out = True

    def close(self) -> None:
        """Close the file, the external data file and the chain below."""
        super().close()
        self.state.storage.close()
        if self.state.data_storage is not self.state.storage:
            self.state.data_storage.close()


class _SnapshotLayer(MappedLayer):
    """What a snapshot's L1 table maps. Unlike the header's, the size in a snapshot table entry may go beyond it.

    Args:
        image: the image that holds the snapshot; it must stay open. Closing the layer does nothing.
        entry: the snapshot.
        mapping: the mapping of its L1 table.
        size: guest bytes of the layer.
    """

    def __init__(
        self,
        image: Qcow2Image,
        entry: SnapshotEntry,
        mapping: ClusterMapping,
        size: int,
        backing: ReadableImage | None,
    ) -> None:
        super().__init__(image.state, backing, image.cipher, image.clusters)
        self.image = image
        self.entry = entry
        self._mapping = mapping
        self._size = size

    @property
    def mapping(self) -> ClusterMapping:
        """The mapping of the snapshot's L1 table."""
        return self._mapping

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    def layer_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """Rows of the snapshot's own mapping.

        Raises:
            CorruptMetadata: the range goes beyond what the snapshot's L1 table can map.
        """
        self._require_mapped(offset + length)
        return super().layer_extents(offset, length)

    def lookup(self, offset: int) -> tuple[int, int, int]:
        """As of the image; raises as `layer_extents`."""
        self._require_mapped(offset + 1)
        return super().lookup(offset)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset` (see `ReadableImage.read`)."""
        self._require_mapped(min(offset + length, self._size))
        return super().read(offset, length)

    def close(self) -> None:
        """Nothing to release: the files belong to the image."""

    def _require_mapped(self, end: int) -> None:
        entries = len(self._mapping.l1)
        if self._base + end > entries * self.state.geometry.l2_coverage:
            rule = f"its {entries} entries are too few for the {self._size} bytes of {self.name}"
            raise CorruptMetadata("snapshot L1 table", self.entry.l1_table_offset, rule)


class SnapshotView(_SnapshotLayer):
    """The disk as an internal snapshot has it: read-only, at the snapshot's own size.

    Where the snapshot has nothing allocated, the image's present backing file shows.

    Args:
        image: the image that holds the snapshot; it must stay open.
        entry: the snapshot.

    Raises:
        CorruptMetadata: the snapshot's L1 table cannot be used.
    """

    def __init__(self, image: Qcow2Image, entry: SnapshotEntry) -> None:
        disk_size = image.header.size if entry.disk_size is None else entry.disk_size
        super().__init__(image, entry, image.state.snapshot_mapping(entry), disk_size & -SECTOR_SIZE, image.backing)

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.image.name

    @property
    def vmstate(self) -> VmState:
        """The saved state of the virtual machine; its size is 0 when there is none."""
        return VmState(self)

    def read_missing(self, guest: int, view: memoryview, fresh: bool) -> None:
        """As of the image."""
        self.image.read_missing(guest, view, fresh)


class VmState(_SnapshotLayer):
    """The saved state of a virtual machine: a plain byte stream, stored behind the disk in the snapshot's mapping.

    Args:
        snapshot: the snapshot's view.

    Source: QEMU puts it at the first L1 entry behind those of the disk.
    """

    def __init__(self, snapshot: SnapshotView) -> None:
        super().__init__(snapshot.image, snapshot.entry, snapshot.mapping, snapshot.entry.vm_state_size, None)
        geometry = snapshot.state.geometry
        self._base = geometry.l1_entries_for(snapshot.size) * geometry.l2_coverage

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"the vm state of snapshot {self.entry.id} in '{self.image.name}'"


def find_snapshot(
    snapshots: Sequence[SnapshotEntry],
    id_or_name: str | None = None,
    *,
    snapshot_id: str | None = None,
    name: str | None = None,
) -> SnapshotEntry:
    """The first snapshot with an id; if there is none, the first with that name.

    Args:
        snapshots: the snapshot table.
        id_or_name: looked for among all ids first, then among all names.
        snapshot_id, name: used when `id_or_name` is None; both given: both must fit.

    Raises:
        NoSuchSnapshot: there is none.

    Source: QEMU 7.2, `convert -l` and `snapshot -a`.
    """
    if id_or_name is not None:
        for entry in snapshots:
            if entry.id == id_or_name:
                return entry
        snapshot_id, name = None, id_or_name
    elif snapshot_id is None and name is None:
        raise OptionError("neither an id nor a name of a snapshot is given")
    for entry in snapshots:
        if snapshot_id in (None, entry.id) and name in (None, entry.name):
            return entry
    raise NoSuchSnapshot("Can't find snapshot")
