"""Rebase: give an image another backing file, without changing what a guest reads.

    where the image has nothing of its own:
        zero in both backing files, or the same place of the same file -> equal without a look
        else read, compared by (sub)clusters -> what differs is copied into the image -> flush
    new backing file name into a free place of the first cluster -> flush
    the first sector, which points to the name -> flush

Until the last write the image shows the old chain, from then on the new one; both read alike. A rebase that was cut
off is simply done again. Internal snapshots get no copies: where the new backing file shows them other bytes, the
rebase is refused.

Source: QEMU 7.2, `qemu-img rebase`, compression from QEMU 8.2. As there, what lies behind the end of the old backing
file becomes zero clusters, other zeroes data. Otherwise than there, which changes internal snapshots silently.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qcowlib.errors import ChainError, CorruptMetadata, OptionError, QcowError, StorageError
from qcowlib.extents import ExtentKind, ExtentTable, Int64Array
from qcowlib.format import constants as k
from qcowlib.format.extensions import HeaderExtension
from qcowlib.format.header import Header
from qcowlib.image.chain import chain_layers
from qcowlib.image.qcow2 import MappedLayer
from qcowlib.image.reader import ReadableImage
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.metadata.header_swing import laid_out, swing_header
from qcowlib.operations.located import Located, Places, identity, located, same_content

_PIECE = 2 << 20  # a multiple of every cluster size
_SECTOR = 512
_MAX_NAME = 1023


def rebase(
    image: WritableQcow2Image,
    backing_file: str | None,
    backing_fmt: str | None = None,
    *,
    new: ReadableImage | None = None,
    unsafe: bool = False,
    compressed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Change the backing file of an image.

        with (
            qcowlib.open_image("overlay.qcow2", writable=True, policy=qcowlib.LocalFiles()) as overlay,
            qcowlib.open_image("older.qcow2", policy=qcowlib.LocalFiles()) as older,
        ):
            qcowlib.rebase(overlay, "older.qcow2", "qcow2", new=older)

    The open image goes on reading through its old backing file: close it afterwards.

    Args:
        image: opened for writing; with its backing file unless `unsafe`.
        backing_file: name of the new backing file as it shall stand in the header; None for none.
        backing_fmt: its format; to be given with `backing_file`.
        new: the new backing file, opened; None when there is none, or with `unsafe`.
        unsafe: change the name alone: for a backing file that was moved, or whose content is known to be the same.
        compressed: write whole clusters that have to be copied compressed.
        progress: called with (bytes looked at, bytes to look at).

    Returns: bytes copied into the image. All is durable.

    Raises:
        OptionError: the name or format is missing or does not fit, clusters cannot be compressed, or an internal
            snapshot would read other bytes. Nothing was changed.
        ChainError: the new backing file is based on the image itself: nothing was changed. Or a backing file cannot be
            read.
        CorruptMetadata, StorageError: as for reads and writes; the image still has its old backing file.
    """
    if (backing_file is None) != (backing_fmt is None):
        raise OptionError("a backing file and its format go together", stock="backing format must be specified")
    if not unsafe:
        if image.backing_left_out:
            raise OptionError("the old backing file must be opened to rebase safely")
        if (backing_file is None) != (new is None):
            raise OptionError("the new backing file must be opened to rebase safely")
        if new is not None:
            _refuse_loop(image, new)
    if compressed and (image.header.has_data_file or image.cipher is not None):
        raise OptionError("compressed clusters are not possible with encryption or an external data file")
    _new_header(image.header, backing_file, backing_fmt)  # refused before anything is copied
    copied = 0
    if not unsafe:
        _refuse_changed_snapshots(image, new)
        if backing_file is not None:
            image.writer.expect_backing()  # zeroes that nothing shows through today must be said to be zero
        copied = _copy_differences(image, new, compressed, progress)
        with _told("Error while writing to COW image"):
            image.flush()
    with _told(f"Could not change the backing file to '{backing_file or ''}'"), image.exclusive() as transaction:
        # Made anew: what was copied may have moved the bitmaps that an extension points to.
        swing_header(transaction, _new_header(transaction.state.header, backing_file, backing_fmt))
    return copied


@contextmanager
def _told(words: str) -> Iterator[None]:
    """A failure of the host is told as qemu-img does, on the command line."""
    try:
        yield
    except StorageError as error:
        error.stock = f"{words}: {error.cause.strerror}"
        raise


def _refuse_loop(image: WritableQcow2Image, new: ReadableImage) -> None:
    own = identity(image.state.storage)
    if any(isinstance(layer, MappedLayer) and identity(layer.state.storage) == own for layer in chain_layers(new)):
        raise ChainError(f"'{new.name}' is '{image.name}' or based on it: the chain would be a loop")


def _refuse_changed_snapshots(image: WritableQcow2Image, new: ReadableImage | None) -> None:
    """What a snapshot has nothing of its own for must be the same in both backing files."""
    for entry in image.snapshots:
        snapshot = image.open_snapshot(entry)
        gaps = _Gaps(snapshot, image.backing, new, image.state.geometry.subcluster_size)
        for table in snapshot.layer_extents(0, snapshot.size):
            for start, end in gaps.suspects(table):
                for offset, before, after in gaps.differing(start, end):
                    one, other = (np.frombuffer(data, dtype=np.uint8) for data in (before, after))
                    where = offset + int(np.argmax(one != other))
                    raise OptionError(
                        f"at {where} the internal snapshot '{entry.name}' would read other bytes from the new backing "
                        "file: delete it or export it first, or change the name alone (-u)"
                    )


# -- the name in the header


def _new_header(header: Header, backing_file: str | None, backing_fmt: str | None) -> Header:
    """The header with another backing name, such that one write of the first sector swings it."""
    if backing_file is not None and header.has_raw_data_file:
        message = "the external data file alone must show the disk: no backing file is possible"
        raise OptionError(message, errno=errno.EINVAL)
    if len((backing_file or "").encode("utf-8", "surrogateescape")) > _MAX_NAME:
        raise OptionError(f"the name of the backing file is longer than {_MAX_NAME} bytes", errno=errno.EINVAL)
    extension = None if backing_fmt is None else HeaderExtension(k.EXTENSION_BACKING_FORMAT, backing_fmt.encode())
    extensions = header.with_extension(k.EXTENSION_BACKING_FORMAT, extension)
    return laid_out(header, replace(header, backing_file=backing_file, extensions=extensions, layout=None))


# -- the content


def _copy_differences(
    image: WritableQcow2Image,
    new: ReadableImage | None,
    compressed: bool,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Give the image of its own what the new backing file would show differently; the bytes written."""
    with _metadata_told():
        total = sum(int(table.length[_gaps(table)].sum()) for table in image.layer_extents(0, image.size))
    between = _Gaps(image, image.backing, new, image.state.geometry.subcluster_size)
    copier = _Copier(image, compressed=compressed)
    done = 0
    with _metadata_told():
        # What is written belongs to a batch of rows that has been looked at.
        for table in image.layer_extents(0, image.size):
            gaps = _gaps(table)
            if not gaps.any():
                continue
            for start, end in between.suspects(table):
                for offset, before, after in between.differing(start, end):
                    with _told("Error while writing to COW image"):
                        copier.write_differing(offset, before, after)
            done += int(table.length[gaps].sum())
            if progress is not None:
                progress(done, total)
    return copier.written


@contextmanager
def _metadata_told() -> Iterator[None]:
    """Damage of the image's own mapping is told as qemu-img does, on the command line."""
    try:
        yield
    except CorruptMetadata as error:
        error.stock = "error while reading image metadata: Input/output error"
        raise


def _gaps(table: ExtentTable) -> npt.NDArray[np.bool_]:
    """Rows that the image leaves to its backing file."""
    gaps: npt.NDArray[np.bool_] = table.kind == ExtentKind.UNALLOCATED
    return gaps


class _Gaps:
    """What a state of an image leaves to its backing file, as the old and the new one show it.

    Args:
        state: the active layer or an internal snapshot.
        old, new: backing files; None for none.
        unit: bytes of a (sub)cluster.
    """

    def __init__(self, state: ReadableImage, old: ReadableImage | None, new: ReadableImage | None, unit: int) -> None:
        self.state, self.old, self.new, self.unit = state, old, new, unit
        self.places = Places()

    def suspects(self, table: ExtentTable) -> Iterator[tuple[int, int]]:
        """Ranges of the gaps in a batch of rows that may differ, by metadata; in whole units."""
        own = Located(table, np.full(len(table), -1, dtype=np.int64))
        first, last = int(table.start[0]), own.end
        for before in self._rows(self.old, first, last):
            for after in self._rows(self.new, int(before.rows.start[0]), before.end):
                low, high = int(after.rows.start[0]), after.end
                mine = own.between(low, high)
                starts = np.union1d(np.union1d(mine.rows.start, after.rows.start), before.between(low, high).rows.start)
                gaps = _gaps(mine.at(starts, high).rows)
                differ = gaps & ~same_content(before.at(starts, high), after.at(starts, high))
                yield from self._whole_units(starts, high, differ)

    def differing(self, start: int, end: int) -> Iterator[tuple[int, bytes, bytes]]:
        """Read a range of both backing files: the pieces that differ, with their guest offsets."""
        for offset in range(start, end, _PIECE):
            length = min(_PIECE, end - offset)
            before = self._content(self.old, "old", offset, length)
            after = self._content(self.new, "new", offset, length)
            if before != after:
                yield offset, before, after

    def _rows(self, backing: ReadableImage | None, first: int, last: int) -> Iterator[Located]:
        """Rows of a backing file; what lies behind its end is zero."""
        if backing is not None:
            yield from located(backing, self.places, first, last)
        else:
            row = ExtentTable.from_rows([(first, last - first, ExtentKind.UNALLOCATED, -1, 0, 0)])
            yield Located(row, np.full(1, -1, dtype=np.int64))

    def _whole_units(self, starts: Int64Array, end: int, chosen: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
        """The chosen rows widened to whole units, those that touch joined."""
        index = np.flatnonzero(chosen)
        if not len(index):
            return
        ends = np.append(starts[1:], end)
        low = starts[index] // self.unit * self.unit
        high = np.minimum(-(-ends[index] // self.unit) * self.unit, self.state.size)
        heads = np.flatnonzero(np.concatenate(([True], low[1:] > high[:-1])))
        tails = np.append(heads[1:], len(low)) - 1
        yield from zip(low[heads].tolist(), high[tails].tolist(), strict=True)

    @staticmethod
    def _content(backing: ReadableImage | None, which: str, offset: int, length: int) -> bytes:
        """Guest bytes of a backing file as they show through: zeroes behind its end."""
        inside = 0 if backing is None else max(0, min(length, backing.size - offset))
        if backing is None or not inside:
            return bytes(length)
        try:
            return backing.read(offset, inside).ljust(length, b"\0")
        except QcowError as error:
            text = f"error while reading from {which} backing file"
            raise ChainError(f"{text} '{backing.name}': {error}", stock=text) from error


class _Copier:
    """Gives the image of its own what the new backing file has differently.

    Args:
        image: where to write.
        compressed: compress whole clusters.

    Attributes:
        written: bytes so far.
    """

    def __init__(self, image: WritableQcow2Image, *, compressed: bool) -> None:
        self.image, self.old, self.compressed = image, image.backing, compressed
        self.unit = image.state.geometry.subcluster_size
        self.written = 0

    def write_differing(self, offset: int, before: bytes, after: bytes) -> None:
        """Write the runs of units of a piece that differ."""
        padded = -(-len(before) // self.unit) * self.unit
        one, other = (
            np.frombuffer(data.ljust(padded, b"\0"), dtype=np.uint64).reshape(-1, self.unit // 8)
            for data in (before, after)
        )
        differ = (one != other).any(axis=1)
        edges = np.flatnonzero(np.diff(differ.astype(np.int8), prepend=np.int8(0), append=np.int8(0))) * self.unit
        view = memoryview(before)
        # Behind its end the old backing file shows zeroes of which nothing needs to be stored.
        old_size = 0 if self.old is None else -(-self.old.size // self.unit) * self.unit
        for start, end in zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True):
            stop = min(end, len(before))
            inside = min(max(old_size - offset, start), stop)
            self._write(offset + start, view[start:inside])
            if inside < stop:
                self.image.write_zeroes(offset + inside, stop - inside)
            self.written += stop - start

    def _write(self, offset: int, data: memoryview) -> None:
        """Write units; with compression the clusters of which the image has no part and which differ wholly."""
        size, end = self.image.cluster_size, offset + len(data)
        low = high = end
        if self.compressed:
            low = min(-(-offset // size) * size, end)
            high = end if end == self.image.size else max(low, end // size * size)
        for start, stop in ((offset, low), (high, end)):
            if start < stop:
                self.image.write(start, data[start - offset : stop - offset])
        for start in range(low, high, size):
            self.image.write_compressed(start, data[start - offset : min(start + size, high) - offset])
