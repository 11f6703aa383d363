"""The difference between two states of a disk: any two of active layer, snapshots, layers of a chain, files.

    both in one file, same L2 table      the same content: looked at for damage only
    elsewhere  rows of old   --.
               rows of new   --'--> cut at each other's edges --> same place in the same file, or zeroes: the same
                                                              --> damaged, or in a file that is not there: unknown
                                                              --> else changed; `exact` compares the bytes

From metadata alone, "changed" means that the two are stored in different places: nothing that differs is left out, and
some of it may hold the same bytes. Behind the end of the smaller disk there are zeroes, as in qemu-img's compare.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from qcowlib.errors import ChainError, CorruptMetadata
from qcowlib.extents import ExtentKind, ExtentTable, Int64Array, Uint8Array
from qcowlib.format.entries import L1_OFFSET_MASK, offsets
from qcowlib.image.chain import Layer, chain_layers, clip, cut
from qcowlib.image.qcow2 import MappedLayer, Qcow2Image, SnapshotView
from qcowlib.image.raw import RawImage, StorageWindow
from qcowlib.image.reader import ReadableImage
from qcowlib.metadata.mapping import ClusterMapping
from qcowlib.storage.protocol import ReadStorage

_SECTOR = 512
_PIECE = 1 << 20  # guest bytes that are compared at once

# Kinds of this module beside those of `ExtentKind`.
_DAMAGED, _MISSING = 254, 255

#: So many damaged places are narrowed down to a cluster; with more, to an L2 table's range; with more yet, not at all.
_NARROW_TO_CLUSTER, _NARROW_TO_TABLE = 1 << 10, 1 << 13


class ChangeKind(IntEnum):
    """What a row of a difference says about its range."""

    CHANGED = 1
    UNKNOWN = 2


@dataclass(frozen=True, slots=True)
class ChangeTable:
    """Ranges in which two states are not known to be the same; sorted by `start`, without overlaps, with gaps.

    Attributes:
        start: guest offset of each range in bytes (int64).
        length: bytes of each range (int64).
        kind: a `ChangeKind` for each range (uint8).
    """

    start: Int64Array
    length: Int64Array
    kind: Uint8Array

    def __len__(self) -> int:
        return len(self.start)

    def rows(self) -> Iterator[tuple[int, int, ChangeKind]]:
        """Rows as plain values: (start, length, kind)."""
        for start, length, kind in zip(self.start.tolist(), self.length.tolist(), self.kind.tolist(), strict=True):
            yield start, length, ChangeKind(kind)


def difference(
    old: ReadableImage,
    new: ReadableImage,
    *,
    exact: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[ChangeTable]:
    """Where two states of a disk differ.

        with qcowlib.open_image("disk.qcow2") as image:
            for table in qcowlib.difference(image.open_snapshot("monday"), image):
                for start, length, kind in table.rows():
                    print(kind.name, start, length)

    Args:
        old, new: any two opened images or snapshots; of one file, or of files that have nothing in common. A backing
            file that was left out makes unknown what only it could tell.
        exact: compare the bytes of what is stored in different places, by sectors of 512 bytes.
        progress: called with (guest bytes done, guest bytes in all).

    Returns: the ranges up to the end of the larger disk, in batches; what the smaller one lacks counts as zeroes.
    Neighbouring ranges of one kind are one, within a batch.

    Raises:
        CorruptMetadata: an L1 table cannot be used at all; damage elsewhere makes ranges unknown.
        StorageError: a file cannot be read.
    """
    size = max(old.size, new.size)
    names = _Places()
    for first, last, sound in _spans(old, new, size):
        if sound:
            pieces = _damage(new, first, last)
        else:
            pieces = _changes(_located(old, names, first, last), _located(new, names, first, last))
        for table in pieces:
            found = _compared(table, old, new) if exact else table
            if len(found):
                yield _joined(found)
        if progress is not None:
            progress(last, size)


def changed_extents(old: ReadableImage, new: ReadableImage, *, exact: bool = False) -> Iterator[ExtentTable]:
    """What an incremental backup of `new` since `old` has to copy: the rows of `new` where it differs.

    Rows of kind ZERO and UNALLOCATED read as zeroes now and did not before (or may not have). Unlike those of
    `extents`, the rows have gaps between them, and end at the size of `new`.

    Args:
        old, new, exact: as for `difference`.

    Raises:
        CorruptMetadata, ChainError: what is new cannot be told, or read, somewhere: a backup must not leave it out.
    """
    for table in difference(old, new, exact=exact):
        unknown = np.flatnonzero(table.kind == ChangeKind.UNKNOWN)
        if len(unknown):
            start, length = int(table.start[unknown[0]]), int(table.length[unknown[0]])
            # Whoever owns the damage says best what it is; what reads well is unknown because of the old state.
            for piece in range(start, min(start + length, new.size), _PIECE):
                new.read(piece, min(_PIECE, start + length - piece, new.size - piece))
            raise ChainError(f"whether {length} bytes at guest offset {start:#x} have changed cannot be told")
        ends = np.minimum(table.start + table.length, new.size)
        for start, end in zip(table.start.tolist(), ends.tolist(), strict=True):
            if end > start:
                yield from new.extents(start, end - start)


# -- where the two are stored alike


def _spans(old: ReadableImage, new: ReadableImage, size: int) -> Iterator[tuple[int, int, bool]]:
    """The disk as (first byte, end, whether both states use the same L2 tables for it)."""
    if not size:
        return
    if not _same_file(old, new):
        yield 0, size, False
        return
    assert isinstance(old, MappedLayer)
    assert isinstance(new, MappedLayer)
    coverage = old.state.geometry.l2_coverage
    # Only ranges that lie inside both disks can be the same without a look at the entries.
    common = min(old.size, new.size) // coverage if old.size != new.size else -(-size // coverage)
    first_l1, second_l1 = _tables(old.mapping, common), _tables(new.mapping, common)
    same = (first_l1 == second_l1) & _mapped(old, common) & _mapped(new, common)
    edges = [0, *(np.flatnonzero(np.diff(same)) + 1).tolist(), common]
    for first, last in itertools.pairwise(edges):
        if first < last:
            yield first * coverage, min(last * coverage, size), bool(same[first])
    if common * coverage < size:
        yield common * coverage, size, False


def _tables(mapping: ClusterMapping, count: int) -> Int64Array:
    """Host offsets of the first `count` L2 tables; 0 for those that do not exist."""
    tables = np.zeros(count, dtype=np.int64)
    known = mapping.l1[:count]
    tables[: len(known)] = offsets(known, L1_OFFSET_MASK)
    return tables


def _mapped(layer: MappedLayer, count: int) -> npt.NDArray[np.bool_]:
    """For which L1 indices the table has an entry: a snapshot's that is too short for its disk is damage."""
    mapped: npt.NDArray[np.bool_] = np.arange(count) < len(layer.mapping.l1)
    return mapped | (not isinstance(layer, SnapshotView))


def _same_file(old: ReadableImage, new: ReadableImage) -> bool:
    """Whether both are states in one qcow2 file, over the same backing file."""
    if not isinstance(old, MappedLayer) or not isinstance(new, MappedLayer):
        return False
    if _identity(old.state.storage) != _identity(new.state.storage):
        return False
    if (old.backing is None) != (new.backing is None) or _left_out(old) != _left_out(new):
        return False
    return old.backing is None or new.backing is None or _same_chain(old.backing, new.backing)


def _same_chain(old: Layer, new: Layer) -> bool:
    one, other = chain_layers(old), chain_layers(new)
    return len(one) == len(other) and all(
        _identity(_storage(a)) == _identity(_storage(b)) and a.size == b.size for a, b in zip(one, other, strict=True)
    )


# -- rows with their places


class _Places:
    """Numbers for the files that hold data, the same for the same file however it was opened."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def number(self, what: object) -> int:
        """The number of a file, or of the name of one that is not there."""
        return self._numbers.setdefault(what, len(self._numbers))


@dataclass(frozen=True, slots=True)
class _Located:
    """Rows of a state and the number of the file that each is in."""

    rows: ExtentTable
    place: Int64Array

    @property
    def end(self) -> int:
        return int(self.rows.start[-1] + self.rows.length[-1])

    def between(self, first: int, end: int) -> _Located:
        rows = clip(self.rows, first, end)
        if len(rows) == len(self.place):
            return _Located(rows, self.place)
        index = np.searchsorted(self.rows.start, rows.start, side="right") - 1
        return _Located(rows, self.place[index])

    def at(self, starts: Int64Array, end: int) -> _Located:
        index = np.searchsorted(self.rows.start, starts, side="right") - 1
        return _Located(cut(self.rows, starts, end), self.place[index])


def _located(image: ReadableImage, names: _Places, first: int, last: int) -> Iterator[_Located]:
    """Rows of a state from `first` to `last`, which may lie behind its end; never raises for damage."""
    layers = chain_layers(image)
    places = np.array([names.number(_identity(_storage(layer))) for layer in layers], dtype=np.int64)
    bottom = layers[-1]
    missing = _left_out(bottom)
    end = min(last, image.size)
    for table in _sound_rows(image, first, end) if first < end else ():
        place = places[table.layer]
        if missing is not None:
            lost = (table.kind == ExtentKind.UNALLOCATED) & (table.layer == len(layers) - 1)
            table.kind[lost] = _MISSING
            place[lost] = names.number(missing)
        yield _Located(table, place)
    if max(first, end) < last:
        start = max(first, end)
        row = ExtentTable.from_rows([(start, last - start, ExtentKind.UNALLOCATED, -1, 0, 0)])
        yield _Located(row, np.zeros(1, dtype=np.int64))


def _sound_rows(image: ReadableImage, first: int, last: int) -> Iterator[ExtentTable]:
    """Extents in which a damaged range is a row of its own."""
    narrowed = 0
    pending = [(first, last)]
    while pending:
        position, end = pending.pop()
        try:
            for table in image.extents(position, end - position):
                yield table
                position = int(table.start[-1] + table.length[-1])
        except (CorruptMetadata, ChainError):
            unit = _unit(image, narrowed)
            middle = (position + end) // 2 // unit * unit
            if middle <= position:
                middle = (position // unit + 1) * unit
            if middle >= end:
                narrowed += 1
                yield ExtentTable.from_rows([(position, end - position, _DAMAGED, -1, 0, 0)])
            else:
                pending += [(middle, end), (position, middle)]


def _unit(image: ReadableImage, narrowed: int) -> int:
    """The smallest range that damage is narrowed down to, in bytes."""
    if narrowed < _NARROW_TO_CLUSTER:
        return image.cluster_size
    if narrowed < _NARROW_TO_TABLE and isinstance(image, MappedLayer):
        return image.state.geometry.l2_coverage
    return 1 << 62


def _storage(layer: Layer) -> ReadStorage | None:
    if isinstance(layer, MappedLayer):
        return layer.state.data_storage
    return layer.storage if isinstance(layer, RawImage) else None


def _identity(storage: ReadStorage | None) -> object:
    """Equal for storages of the same host file."""
    while isinstance(storage, StorageWindow):
        storage = storage.inner  # host offsets count in the file below all windows
    fileno = getattr(storage, "fileno", None)
    if fileno is None:
        return id(storage)
    status = os.fstat(fileno())
    return status.st_dev, status.st_ino


def _left_out(layer: Layer) -> str | None:
    """Name of the backing file that was not opened."""
    image = layer.image if isinstance(layer, SnapshotView) else layer
    return image.header.backing_file if isinstance(image, Qcow2Image) and image.backing_left_out else None


# -- what differs


def _damage(image: ReadableImage, first: int, last: int) -> Iterator[ChangeTable]:
    """The damaged ranges of a state: of both, where they share their tables."""
    for table in _sound_rows(image, first, min(last, image.size)):
        chosen = table.kind == _DAMAGED
        if chosen.any():
            kinds = np.full(int(chosen.sum()), ChangeKind.UNKNOWN, dtype=np.uint8)
            yield ChangeTable(table.start[chosen], table.length[chosen], kinds)


def _changes(old: Iterator[_Located], new: Iterator[_Located]) -> Iterator[ChangeTable]:
    """Compare the rows of the same range, batch by batch, each cut where the other has an edge."""
    left, right = next(old, None), next(new, None)
    while left is not None and right is not None:
        first = max(int(left.rows.start[0]), int(right.rows.start[0]))
        end = min(left.end, right.end)
        one, other = left.between(first, end), right.between(first, end)
        starts = np.union1d(one.rows.start, other.rows.start)
        yield _judged(one.at(starts, end), other.at(starts, end))
        left = left.between(end, left.end) if left.end > end else next(old, None)
        right = right.between(end, right.end) if right.end > end else next(new, None)


def _judged(old: _Located, new: _Located) -> ChangeTable:
    """The rows that are not the same, of two lists of rows with the same edges."""
    same_kind = old.rows.kind == new.rows.kind
    same_place = same_kind & (old.place == new.place) & (old.rows.host_offset == new.rows.host_offset)
    unknown = (old.rows.kind >= _DAMAGED) | (new.rows.kind >= _DAMAGED)
    same = same_place & (old.rows.kind != _DAMAGED)
    same |= _zero(old.rows) & _zero(new.rows)
    kinds = np.where(unknown, ChangeKind.UNKNOWN, ChangeKind.CHANGED).astype(np.uint8)
    return ChangeTable(new.rows.start[~same], new.rows.length[~same], kinds[~same])


def _zero(rows: ExtentTable) -> npt.NDArray[np.bool_]:
    zero: npt.NDArray[np.bool_] = (rows.kind == ExtentKind.ZERO) | (rows.kind == ExtentKind.UNALLOCATED)
    return zero


def _joined(table: ChangeTable) -> ChangeTable:
    """Neighbouring rows of one kind as one."""
    ends = table.start + table.length
    goes_on = (table.start[1:] == ends[:-1]) & (table.kind[1:] == table.kind[:-1])
    heads = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    return ChangeTable(table.start[heads], np.add.reduceat(table.length, heads), table.kind[heads])


# -- comparing bytes


def _compared(table: ChangeTable, old: ReadableImage, new: ReadableImage) -> ChangeTable:
    """The rows narrowed down to the sectors that differ."""
    parts = []
    for start, length, kind in table.rows():
        if kind is ChangeKind.UNKNOWN:
            parts.append(_row(start, length, kind))
            continue
        for offset in range(start, start + length, _PIECE):
            parts.append(_differing_sectors(old, new, offset, min(_PIECE, start + length - offset)))
    return _concatenated(parts) if parts else table


def _differing_sectors(old: ReadableImage, new: ReadableImage, offset: int, length: int) -> ChangeTable:
    try:
        one, other = _content(old, offset, length), _content(new, offset, length)
    except (CorruptMetadata, ChainError):  # a payload is damaged: narrow it down to the cluster
        unit = max(old.cluster_size, new.cluster_size)
        middle = max(offset // unit + 1, (offset + length // 2) // unit) * unit
        if middle >= offset + length:
            return _row(offset, length, ChangeKind.UNKNOWN)
        return _concatenated(
            [
                _differing_sectors(old, new, offset, middle - offset),
                _differing_sectors(old, new, middle, offset + length - middle),
            ]
        )
    sectors = (one != other).reshape(-1, _SECTOR // one.itemsize).any(axis=1)
    edges = np.flatnonzero(np.diff(sectors.astype(np.int8), prepend=np.int8(0), append=np.int8(0)))
    start, end = edges[0::2] * _SECTOR, edges[1::2] * _SECTOR
    return ChangeTable(offset + start, end - start, np.full(len(start), ChangeKind.CHANGED, dtype=np.uint8))


def _content(image: ReadableImage, offset: int, length: int) -> npt.NDArray[np.uint64]:
    """Guest bytes as words; zeroes behind the end of the disk."""
    buffer = bytearray(length)
    inside = max(0, min(length, image.size - offset))
    if inside:
        image.readinto(offset, memoryview(buffer)[:inside])
    return np.frombuffer(buffer, dtype=np.uint64)


def _row(start: int, length: int, kind: ChangeKind) -> ChangeTable:
    return ChangeTable(
        np.array([start], dtype=np.int64), np.array([length], dtype=np.int64), np.array([kind], dtype=np.uint8)
    )


def _concatenated(parts: list[ChangeTable]) -> ChangeTable:
    return ChangeTable(
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.kind for part in parts]),
    )
