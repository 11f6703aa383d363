"""A backing chain seen as one: the extents of each layer laid over each other.

    layer.layer_extents()          rows of one layer; UNALLOCATED rows are asked of the layer below
    resolve(top, offset, length)   rows of the chain; column `layer` says whose they are

A row that stays UNALLOCATED in the result is in no layer: its `layer` is the deepest one that was asked, as in
qemu-img's map (a range behind the end of a short backing file is not asked of it).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcowlib.errors import CorruptMetadata
from qcowlib.extents import ExtentKind, ExtentTable

# Up to this many unallocated runs in a batch are asked one by one; more are asked as one span and overlaid.
_SINGLE_RUNS = 16
_ROWS_PER_TABLE = 1 << 16


class Layer(Protocol):
    """One image of a chain, as the reader needs it. Offsets are guest bytes; `backing` is the layer below."""

    @property
    def size(self) -> int:
        """Size of the virtual disk in bytes."""
        ...

    @property
    def backing(self) -> Layer | None:
        """The layer below."""
        ...

    def layer_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """Rows of this layer alone, for who wants to know where data is."""
        ...

    def read_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """Rows of this layer alone, for who is going to read them: holes of the host file need not be looked for."""
        ...

    def lookup(self, offset: int) -> tuple[int, int, int]:
        """(kind, host offset or -1, bytes of the same kind from `offset` on) for one guest offset."""
        ...

    def read_data(self, guest: int, host: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a DATA row."""
        ...

    def read_compressed(self, guest: int, host: int, host_length: int, view: memoryview) -> None:
        """Fill `view` with bytes of a COMPRESSED row from guest offset `guest` on."""
        ...

    def read_missing(self, guest: int, view: memoryview, fresh: bool) -> None:
        """Fill `view` where no layer has data; `fresh` says that it holds zeroes already."""
        ...


def resolve(top: Layer, offset: int, length: int, *, reading: bool = False, depth: int = 0) -> Iterator[ExtentTable]:
    """Rows of `top` and the chain below it, in batches.

    Args:
        top: the uppermost layer to ask; it gets the number `depth` in the result.
        offset, length: guest range in bytes, inside of `top`.
        reading: take the rows meant for reading.

    Raises:
        CorruptMetadata: the mapping of a layer is damaged in the part of the range that is asked of it.
    """
    below = top.backing
    for shallow in top.read_extents(offset, length) if reading else top.layer_extents(offset, length):
        table = _with_layer(shallow, depth)
        if below is None:
            yield table
        else:
            yield from _gather(_fall_through(table, below, reading, depth + 1))


def chain_layers(top: Layer) -> list[Layer]:
    """The layers of a chain by their number."""
    layers = [top]
    while (below := layers[-1].backing) is not None:
        layers.append(below)
    return layers


def _fall_through(table: ExtentTable, below: Layer, reading: bool, depth: int) -> Iterator[ExtentTable]:
    """The rows of `table`, unallocated ones replaced by what the layer below has."""
    end = _end(table)
    limit = min(end, below.size)
    runs = _unallocated_runs(table, limit)
    if len(runs) > _SINGLE_RUNS:
        first, last = int(runs[0, 0]), int(runs[-1, 1])
        try:
            pieces = resolve(below, first, last - first, reading=reading, depth=depth)
            shown = [overlay(table, piece) for piece in pieces]
        except CorruptMetadata:
            pass  # it may lie where this layer has data of its own; asking run by run tells
        else:
            yield clip(table, int(table.start[0]), first)
            yield from shown
            yield clip(table, last, end)
            return
    position = int(table.start[0])
    for first, last in runs.tolist():
        yield clip(table, position, first)
        yield from resolve(below, first, last - first, reading=reading, depth=depth)
        position = last
    yield clip(table, position, end)


def _unallocated_runs(table: ExtentTable, limit: int) -> npt.NDArray[np.int64]:
    """Maximal unallocated ranges below `limit` as rows of (first byte, end)."""
    missing = (table.kind == ExtentKind.UNALLOCATED) & (table.start < limit)
    edges = np.flatnonzero(np.diff(missing.astype(np.int8), prepend=np.int8(0), append=np.int8(0)))
    first, behind = edges[0::2], edges[1::2]
    ends = np.minimum(table.start[behind - 1] + table.length[behind - 1], limit)
    return np.stack([table.start[first], ends], axis=1)


def overlay(upper: ExtentTable, lower: ExtentTable) -> ExtentTable:
    """`upper` over `lower` on the range of `lower`, which lies inside that of `upper`: where upper is unallocated,
    lower shows."""
    first, end = int(lower.start[0]), _end(lower)
    upper = clip(upper, first, end)
    starts = np.union1d(upper.start, lower.start)
    above = cut(upper, starts, end)
    below = cut(lower, starts, end)
    shows = above.kind == ExtentKind.UNALLOCATED
    return merge_adjacent(
        ExtentTable(
            above.start,
            above.length,
            np.where(shows, below.kind, above.kind),
            np.where(shows, below.host_offset, above.host_offset),
            np.where(shows, below.host_length, above.host_length),
            np.where(shows, below.layer, above.layer),
        )
    )


def clip(table: ExtentTable, first: int, end: int) -> ExtentTable:
    """The part of a table between two guest offsets; may be empty."""
    if not len(table) or (first <= table.start[0] and end >= _end(table)):
        return table
    ends = table.start + table.length
    chosen = (ends > first) & (table.start < end)
    rows = ExtentTable(
        table.start[chosen],
        table.length[chosen],
        table.kind[chosen],
        table.host_offset[chosen],
        table.host_length[chosen],
        table.layer[chosen],
    )
    return cut(rows, np.maximum(rows.start, first), min(end, _end(rows))) if len(rows) else rows


def merge_adjacent(table: ExtentTable) -> ExtentTable:
    """Join rows that follow each other in the guest and, where they have a host offset, in the host; compressed rows
    stay as they are."""
    if len(table) < 2:
        return table
    ends = table.start + table.length
    same = (table.kind[1:] == table.kind[:-1]) & (table.layer[1:] == table.layer[:-1])
    same &= (table.kind[1:] != ExtentKind.COMPRESSED) & (table.start[1:] == ends[:-1])
    same &= np.where(
        table.host_offset[:-1] < 0,
        table.host_offset[1:] < 0,
        table.host_offset[:-1] + table.length[:-1] == table.host_offset[1:],
    )
    if not same.any():
        return table
    heads = np.flatnonzero(np.concatenate(([True], ~same)))
    length = np.add.reduceat(table.length, heads)
    host_length = np.add.reduceat(table.host_length, heads)
    return ExtentTable(
        table.start[heads], length, table.kind[heads], table.host_offset[heads], host_length, table.layer[heads]
    )


def concatenate(tables: list[ExtentTable]) -> ExtentTable:
    """One table of tables that follow each other."""
    if len(tables) == 1:
        return tables[0]
    return ExtentTable(
        np.concatenate([table.start for table in tables]),
        np.concatenate([table.length for table in tables]),
        np.concatenate([table.kind for table in tables]),
        np.concatenate([table.host_offset for table in tables]),
        np.concatenate([table.host_length for table in tables]),
        np.concatenate([table.layer for table in tables]),
    )


def _gather(tables: Iterator[ExtentTable]) -> Iterator[ExtentTable]:
    """Small tables joined into larger ones, empty ones left out."""
    pending: list[ExtentTable] = []
    rows = 0
    for table in tables:
        if len(table):
            pending.append(table)
            rows += len(table)
        if rows >= _ROWS_PER_TABLE:
            yield concatenate(pending)
            pending, rows = [], 0
    if pending:
        yield concatenate(pending)


def cut(table: ExtentTable, starts: npt.NDArray[np.int64], end: int) -> ExtentTable:
    """Rows of `table` cut at the sorted offsets `starts`, up to `end`."""
    row = np.searchsorted(table.start, starts, side="right") - 1
    length = np.diff(starts, append=np.int64(end))
    kind = table.kind[row]
    host = table.host_offset[row]
    moves = (host >= 0) & (kind != ExtentKind.COMPRESSED)
    host = np.where(moves, host + (starts - table.start[row]), host)
    host_length = np.where(kind == ExtentKind.DATA, length, table.host_length[row])
    return ExtentTable(starts, length, kind, host, host_length, table.layer[row])


def _with_layer(table: ExtentTable, depth: int) -> ExtentTable:
    layer = np.full(len(table), depth, dtype=np.uint16)
    return ExtentTable(table.start, table.length, table.kind, table.host_offset, table.host_length, layer)


def _end(table: ExtentTable) -> int:
    return int(table.start[-1] + table.length[-1])
