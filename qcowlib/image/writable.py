"""qcow2 images opened for writing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from qcowlib.codecs.sector_cipher import ClusterCipher
from qcowlib.errors import ImageStateError, OptionError, QcowError
from qcowlib.extents import ExtentTable
from qcowlib.format.entries import compressed_entry
from qcowlib.image.qcow2 import SECTOR_SIZE, Qcow2Image
from qcowlib.image.reader import ReadableImage, read_pieces
from qcowlib.image.writer import ClusterWriter, GuestAccess
from qcowlib.metadata.bitmaps import BitmapRecorder, start_recording
from qcowlib.metadata.heal import heal
from qcowlib.metadata.state import Qcow2State, load_state
from qcowlib.metadata.transaction import MetadataTransaction
from qcowlib.storage.protocol import Buffer, Storage

_ZEROED_TABLES = 8 << 20


class WritableQcow2Image(Qcow2Image):
    """A qcow2 image that can be read and written.

    What was written is durable after `flush` or `close`; what a crash leaves behind is leaked space at worst, which
    the next writable open frees. Threads may share the image; writers and readers take turns.

    Args:
        state, backing, cipher, backing_left_out: as for `Qcow2Image`; the state's storages must be writable.

    Raises:
        CorruptMetadata: the refcounts cannot be relied upon and not be counted anew.
    """

    writable = True

    def __init__(
        self,
        state: Qcow2State,
        *,
        backing: ReadableImage | None = None,
        cipher: ClusterCipher | None = None,
        backing_left_out: bool = False,
    ) -> None:
        storage, data_storage = cast(Storage, state.storage), cast(Storage, state.data_storage)
        # Version 2 has no dirty bit: what an interrupted session left can only be seen by counting.
        if state.header.dirty or state.header.version < 3:
            heal(state, storage)
            state = load_state(storage, data_storage)
        super().__init__(state, backing=backing, cipher=cipher, backing_left_out=backing_left_out)
        self._lock = threading.RLock()
        self._closed = False
        self._data_storage = data_storage
        self._begin(state)

    def _begin(self, state: Qcow2State) -> None:
        """A session on metadata that has just been read."""
        state.for_writing = True
        self._compressed_end = 0  # host offset behind the last compressed cluster
        self._compressed_releases = 0
        self._recorder: BitmapRecorder | None = None  # from the first guest write on
        self.growing_to = 0  # size of the disk that a resize prepares, in bytes
        self.transaction = MetadataTransaction(state, cast(Storage, state.storage), self._data_storage)
        self._writer = ClusterWriter(
            self.transaction,
            GuestAccess(
                read=self._read_for_copy,
                store=self.store,
                alignment=SECTOR_SIZE if self.cipher is not None else 1,
                has_backing=state.header.backing_file is not None,
            ),
        )

    def reload(self) -> None:
        """Read the metadata anew, after an operation that has changed the version or the refcount width."""
        with self._lock:
            try:
                self.transaction.close()
                state = load_state(self.state.storage, self._data_storage)
                self.state = state
                self.clusters.clear()
                self._begin(state)
            except BaseException:
                self.transaction.failed = True  # it does not know the image as it is now
                raise

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset` (see `BlockImage.read`)."""
        # A cluster that a writer releases may be reused at once: no read may be under way then.
        with self._lock:
            return super().read(offset, length)

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill the whole buffer from `offset` (see `BlockImage.readinto`)."""
        with self._lock:
            return super().readinto(offset, buffer)

    def layer_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """Rows of this layer alone; a writer comes in between two batches only."""
        batches = super().layer_extents(offset, length)
        while True:
            with self._lock:
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at guest offset `offset`.

        Raises:
            OutOfRange: the range does not lie inside the disk.
            CorruptMetadata: an L2 entry of the range is damaged; it is not overwritten.
            StorageError: the host file failed; what was written before stays.
        """
        view = memoryview(data).cast("B")
        self._change(offset, len(view))
        with self._changing():
            self._record(offset, len(view))
            self._writer.write(offset, view)
            self._commit_under_pressure()

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes, by zero clusters where that is possible. Raises as `write`."""
        self._change(offset, length)
        # So many L2 tables at once that the changed ones have room in memory.
        step = self.state.geometry.l2_coverage * max(1, _ZEROED_TABLES // self.cluster_size)
        with self._changing():
            self._record(offset, length)
            stop = offset + length
            while offset < stop:
                border = min(stop, (offset // step + 1) * step)
                self._writer.write_zeroes(offset, border - offset)
                self._commit_under_pressure()
                offset = border

    def discard(self, offset: int, length: int) -> None:
        """Give whole clusters of the range back; they then read as zeroes.

        Parts of clusters stay as they are. So does all of a version 2 image with a backing file, which cannot say
        that a cluster is zero. Raises as `write`.
        """
        self._change(offset, length)
        with self._changing():
            self._record(offset, length)
            self._writer.discard(offset, length)
            self._commit_under_pressure()

    def write_compressed(self, offset: int, data: Buffer) -> None:
        """Write one cluster compressed; plain where it does not get smaller.

        Args:
            offset: guest bytes, aligned to clusters.
            data: one cluster; less only at the end of the disk.

        Raises:
            OptionError: not one whole cluster, or the image can hold no compressed clusters.
        """
        self.write_packed(offset, data, self.pack(data))

    def pack(self, data: Buffer) -> bytes | None:
        """The bytes of a cluster (or less, at the end of the disk) compressed for `write_packed`; None when they do
        not get smaller. Changes nothing, and may be called from several threads at once.
        """
        from qcowlib.codecs.compression import compress

        return compress(self.header.compression_type, bytes(data).ljust(self.cluster_size, b"\0"))

    def write_packed(self, offset: int, data: Buffer, packed: bytes | None) -> None:
        """Write one cluster as `packed`, which is what `pack` gave for `data`. Arguments and errors as those of
        `write_compressed`.
        """
        view = memoryview(data).cast("B")
        whole = min(self.cluster_size, self.size - offset)
        if offset % self.cluster_size or len(view) != whole:
            raise OptionError(f"{len(view)} bytes at {offset} are not one cluster")
        if self.header.has_data_file or self.cipher is not None:
            raise OptionError("compressed clusters are not possible with encryption or an external data file")
        self._change(offset, len(view))
        with self._changing():
            self._record(offset, len(view))
            if packed is None:
                self._writer.write(offset, view)
            else:
                self._link_packed(offset, packed)
            self._commit_under_pressure()

    def place(self, offset: int, length: int) -> list[tuple[int, int, int]] | None:
        """Give clusters that have nothing yet their place in the file, for a host that fills them by itself.

        Until then they read as whatever is there. Not for encrypted images.

        Args:
            offset, length: guest bytes, whole clusters; the last one may be cut by the end of the disk.

        Returns: (guest offset, host offset, bytes) of each run; None when the range is not one of whole clusters, or a
            cluster of it has something already. In an external data file it may: its place is always the same.

        Raises: as `write`.
        """
        self._change(offset, length)
        if offset % self.cluster_size or (length % self.cluster_size and offset + length != self.size):
            return None
        with self._changing():
            if not self.header.has_data_file and not self._writer.is_empty(offset, length):
                return None
            self._record(offset, length)
            runs = self._writer.place(offset, length)
            self._commit_under_pressure()
            return runs

    @contextmanager
    def exclusive(self) -> Iterator[MetadataTransaction]:
        """For operations on whole trees: nobody else reads or writes, nothing is pending, no table is in memory."""
        with self._changing():
            if self._closed:
                raise ImageStateError(f"'{self.name}' is closed")
            self.transaction.commit()
            self._store_bitmaps()
            self.state.tables.clear()
            try:
                yield self.transaction
            finally:
                self._recorder = None  # nothing is recorded in between
                self.state.tables.clear()

    @property
    def writer(self) -> ClusterWriter:
        """Changes single clusters, whatever the disk's size and bitmaps say; for operations, inside `exclusive`."""
        return self._writer

    def store(self, host: int, guest: int, data: bytes | memoryview) -> None:
        """Write bytes of a guest cluster to their host offset, encrypted if the image is; for operations.

        Args:
            host: host offset in bytes; a multiple of 512 in an encrypted image, as the length.
            guest: guest offset of the same bytes.
            data: the plain bytes.
        """
        if self.cipher is not None:
            data = self.cipher.encrypt(data, guest if self.cipher.by_guest_offset else host)
        if self.header.has_data_file:
            # A raw data file is as long as the disk: what fills up the last cluster does not belong into it.
            data = memoryview(data)[: max(0, max(self.header.size, self.growing_to) - guest)]
        self._data_storage.pwrite(data, host)

    def flush(self) -> None:
        """Barrier: everything written before is durable when it returns.

        Raises:
            StorageError: the host file failed.
        """
        with self._lock:
            self.transaction.commit()
            self.transaction.flush()

    def close(self) -> None:
        """Commit, clear the dirty bit, release the file; a second call does nothing.

        Raises:
            StorageError: the last changes could not be written.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self.transaction.failed:
                    self._tidy_up()
                else:
                    self.transaction.commit()
                    self._store_bitmaps()
                    self.transaction.close()
            except QcowError:
                if self.transaction.failed:
                    self._tidy_up()
                raise
            finally:
                super().close()

    def _tidy_up(self) -> None:
        """After a failed commit: free at once what it left behind, if the host lets us; else the next open does."""
        storage = cast(Storage, self.state.storage)
        try:
            heal(load_state(storage, self.state.data_storage), storage)
        except QcowError:
            return

    def _change(self, offset: int, length: int) -> None:
        self._require_inside(offset, length)
        if self._closed:
            raise ImageStateError(f"'{self.name}' is closed")

    def _record(self, offset: int, length: int) -> None:
        """Before a guest write: the bitmaps that record writes say that the range has changed."""
        if self._recorder is None:
            self._recorder = start_recording(self.transaction)
        self._recorder.mark(offset, length)

    def _store_bitmaps(self) -> None:
        """What was recorded is in the file afterwards; the next guest write begins anew."""
        if self._recorder is not None:
            self._recorder.store()
            self._recorder = None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One writer at a time; what breaks one off in the middle, such as Ctrl-C, ends the session."""
        with self._lock:
            try:
                yield
            except QcowError:
                raise
            except BaseException:
                self.transaction.failed = True
                raise

    def _commit_under_pressure(self) -> None:
        if self.transaction.pressure:
            self.transaction.commit()

    def _read_for_copy(self, offset: int, length: int) -> bytes:
        """Guest bytes as they are, zeroes behind the end of the disk."""
        buffer = bytearray(length)
        inside = min(length, max(0, self.header.size - offset))
        if inside:
            read_pieces(self, offset, memoryview(buffer)[:inside], fresh=True)
        return bytes(buffer)

    def _link_packed(self, guest: int, packed: bytes) -> None:
        """Put compressed bytes behind the last ones, sharing their cluster, and let the L2 entry name them."""
        bits = self.state.geometry.cluster_bits
        host = self._place_packed(len(packed))
        end = host + len(packed)
        try:
            self._data_storage.pwrite(packed, host)
            # Sectors are read as a whole: the file must reach to the end of the last one.
            missing = -end % SECTOR_SIZE
            if missing and end + missing > self._data_storage.size():
                self._data_storage.pwrite(bytes(missing), end)
            self._writer.link_compressed(guest, compressed_entry(host, len(packed), bits))
        except QcowError:
            self.transaction.give_back(host >> bits, (end - 1 >> bits) - (host >> bits) + 1)
            self._compressed_end = 0  # its cluster may be anybody's now
            raise
        self._compressed_end = end

    def _place_packed(self, length: int) -> int:
        """Host offset for `length` compressed bytes, its clusters counted."""
        bits, size = self.state.geometry.cluster_bits, self.cluster_size
        refcounts = self.transaction.refcounts
        end = self._compressed_end
        tail_cluster, room = end >> bits, -end % size
        # After a release the tail cluster may be somebody else's.
        if self._compressed_releases != self.transaction.releases:
            self._compressed_releases, room = self.transaction.releases, 0
        shareable = bool(room) and 0 < refcounts.get(tail_cluster) < self.state.geometry.refcount_max
        if shareable and length <= room:
            self.transaction.allocate_shared(tail_cluster)
            return end
        first, _ = self.transaction.allocate(1)
        if shareable and first == tail_cluster + 1:
            self.transaction.allocate_shared(tail_cluster)
            return end
        return first << bits
