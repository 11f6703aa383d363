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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from qcowlib.errors import ChainError, CorruptMetadata
from qcowlib.extents import ExtentTable, Int64Array, Uint8Array
from qcowlib.format.entries import L1_OFFSET_MASK, offsets
from qcowlib.image.chain import Layer, chain_layers
from qcowlib.image.qcow2 import MappedLayer, SnapshotView
from qcowlib.image.reader import ReadableImage
from qcowlib.metadata.mapping import ClusterMapping
from qcowlib.metadata.reference_counts import distinct
from qcowlib.operations.bitmaps import dirty_extents
from qcowlib.operations.located import (
    DAMAGED,
    Located,
    Places,
    data_storage,
    identity,
    left_out,
    located,
    same_content,
    sound_rows,
)

_SECTOR = 512
_PIECE = 1 << 20  # guest bytes that are compared at once


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
    places = Places()
    for first, last, sound in _spans(old, new, size):
        if sound:
            pieces = _damage(new, first, last)
        else:
            pieces = _changes(located(old, places, first, last), located(new, places, first, last))
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


def changed_since_bitmap(image: ReadableImage, name: str) -> Iterator[ExtentTable]:
    """The same for what a persistent bitmap says has changed since it was made or cleared.

    Args:
        image: a qcow2 image.
        name: of the bitmap.

    Raises:
        NoSuchBitmap: there is none of this name.
        BitmapError: it is inconsistent: changes may be missing in it.
        CorruptMetadata: the bitmap, or the mapping of what has changed, is damaged.
    """
    for batch in dirty_extents(image, name):
        for start, length in zip(batch.start.tolist(), batch.length.tolist(), strict=True):
            yield from image.extents(start, length)


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
    if identity(old.state.storage) != identity(new.state.storage):
        return False
    if (old.backing is None) != (new.backing is None) or left_out(old) != left_out(new):
        return False
    return old.backing is None or new.backing is None or _same_chain(old.backing, new.backing)


def _same_chain(old: Layer, new: Layer) -> bool:
    one, other = chain_layers(old), chain_layers(new)
    return len(one) == len(other) and all(
        identity(data_storage(a)) == identity(data_storage(b)) and a.size == b.size
        for a, b in zip(one, other, strict=True)
    )


# -- what differs


def _damage(image: ReadableImage, first: int, last: int) -> Iterator[ChangeTable]:
    """The damaged ranges of a state: of both, where they share their tables."""
    for table in sound_rows(image, first, min(last, image.size)):
        chosen = table.kind == DAMAGED
        if chosen.any():
            kinds = np.full(int(chosen.sum()), ChangeKind.UNKNOWN, dtype=np.uint8)
            yield ChangeTable(table.start[chosen], table.length[chosen], kinds)


def _changes(old: Iterator[Located], new: Iterator[Located]) -> Iterator[ChangeTable]:
    """Compare the rows of the same range, batch by batch, each cut where the other has an edge."""
    left, right = next(old, None), next(new, None)
    while left is not None and right is not None:
        first = max(int(left.rows.start[0]), int(right.rows.start[0]))
        end = min(left.end, right.end)
        one, other = left.between(first, end), right.between(first, end)
        starts = distinct(np.concatenate((one.rows.start, other.rows.start)))
        yield _judged(one.at(starts, end), other.at(starts, end))
        left = left.between(end, left.end) if left.end > end else next(old, None)
        right = right.between(end, right.end) if right.end > end else next(new, None)


def _judged(old: Located, new: Located) -> ChangeTable:
    """The rows that are not the same, of two lists of rows with the same edges."""
    same = same_content(old, new)
    unknown = (old.rows.kind >= DAMAGED) | (new.rows.kind >= DAMAGED)
    kinds = np.where(unknown, ChangeKind.UNKNOWN, ChangeKind.CHANGED).astype(np.uint8)
    return ChangeTable(new.rows.start[~same], new.rows.length[~same], kinds[~same])


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
