"""Digests of the content of all states of an image in one pass: what states share is read and hashed once.

    states, oldest first --> windows of guest bytes with the rows of every state
        block stored as in the state before, or as in any other state of the window --> its digest is known
        else                                                                        --> read, hashed
    digests of the blocks that are not all zero --> running hash of each state

The digest of a state is H(for each 64 KiB block that is not all zero, in order: its guest offset, 8 bytes big-endian,
and H(block); at the end the size of the disk, 8 bytes big-endian). The last block is filled up with zeroes. It depends
on what a guest reads alone: not on clusters, compression, encryption, or the chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcowlib.errors import ChainError, CorruptMetadata, MissingDependency, OptionError
from qcowlib.extents import Int64Array
from qcowlib.format.snapshot_table import SnapshotEntry
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.reader import ReadableImage
from qcowlib.metadata.reference_counts import distinct
from qcowlib.operations.located import Located, Places, join, located, same_content

BLOCK = 1 << 16
ALGORITHMS = ("sha256", "xxh3-128")

_WINDOW = 64 << 20  # guest bytes whose rows and digests are in memory at a time
_ZEROES = bytes(BLOCK)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class StateDigest:
    """The digests of one state.

    Attributes:
        snapshot: the snapshot; None for the active layer.
        size: bytes of its disk.
        digests: hexadecimal digest by name of the algorithm; empty when there is damage.
        damage: why the content cannot be read; None otherwise.
    """

    snapshot: SnapshotEntry | None
    size: int
    digests: dict[str, str]
    damage: str | None = None


def digest_states(
    image: ReadableImage,
    algorithms: Sequence[str] = ALGORITHMS,
    *,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[StateDigest]:
    """Digest the active layer and every internal snapshot.

        with qcowlib.open_image("disk.qcow2", policy=qcowlib.LocalFiles()) as image:
            for state in qcowlib.digest_states(image, ["sha256"]):
                print(state.snapshot.name if state.snapshot else "now", state.digests or state.damage)

    Args:
        image: any opened image; a single state too (a snapshot, a raw image).
        algorithms: of `ALGORITHMS`.
        executor: blocks are read and hashed on it; None works in the caller's thread.
        progress: called with (guest bytes done, guest bytes in all).

    Returns: the active layer first, then the snapshots in the order of the table.

    Raises:
        OptionError: an unknown algorithm.
        MissingDependency: xxh3-128 without the package xxhash.
        FormatError: the snapshot table is damaged. Other damage is told with the states that it concerns.
        StorageError: a file cannot be read.
    """
    makers = [_maker(name) for name in algorithms]
    entries = list(image.snapshots) if isinstance(image, Qcow2Image) else []
    opened: list[tuple[SnapshotEntry | None, ReadableImage]] = []
    unusable: dict[int, StateDigest] = {}
    for number, entry in enumerate(entries):
        assert isinstance(image, Qcow2Image)
        try:
            opened.append((entry, image.open_snapshot(entry)))
        except CorruptMetadata as error:
            unusable[number] = StateDigest(entry, entry.disk_size or image.size, {}, str(error))
    opened.append((None, image))
    # Oldest first: a state has most in common with its neighbour, the active layer with the last snapshot.
    runs = [_Run(entry, state, [make() for make in makers]) for entry, state in opened]
    size = max(run.state.size for run in runs)
    for first, end in _digest_windows(runs, size, makers, executor):
        if progress is not None and end > first:
            progress(end, size)
    done = {id(run.entry): run.result(algorithms) for run in runs}
    return [done[id(None)], *(unusable.get(number) or done[id(entry)] for number, entry in enumerate(entries))]


def _maker(algorithm: str) -> Callable[[], _Hash]:
    if algorithm == "sha256":
        return hashlib.sha256
    if algorithm != "xxh3-128":
        raise OptionError(f"unknown digest '{algorithm}': {' and '.join(ALGORITHMS)} are supported")
    try:
        import xxhash
    except ImportError:
        raise MissingDependency("xxhash", "digest", "the digest xxh3-128") from None
    return xxhash.xxh3_128


@dataclass
class _Run:
    """A state on its way: its running hashes, and the damage that ended them."""

    entry: SnapshotEntry | None
    state: ReadableImage
    hashes: list[_Hash]
    damage: str | None = None

    def update(self, first: int, blocks: _Blocks) -> None:
        """Go on with a window that begins at guest offset `first`."""
        chosen = np.flatnonzero(blocks.known == _DATA)
        where = (first + chosen * BLOCK).astype(">i8").view(np.uint8).reshape(-1, 8)
        for running, digests in zip(self.hashes, blocks.digests, strict=True):
            running.update(np.concatenate((where, digests[chosen]), axis=1).tobytes())

    def result(self, algorithms: Sequence[str]) -> StateDigest:
        """The digests, with the size of the disk as their last bytes."""
        if self.damage is not None:
            return StateDigest(self.entry, self.state.size, {}, self.damage)
        for running in self.hashes:
            running.update(self.state.size.to_bytes(8, "big"))
        names = zip(algorithms, self.hashes, strict=True)
        return StateDigest(self.entry, self.state.size, {name: running.hexdigest() for name, running in names})


_UNKNOWN, _ZERO, _DATA = 0, 1, 2


@dataclass
class _Blocks:
    """What is known of the blocks of a window in one state.

    Attributes:
        known: _UNKNOWN, _ZERO or _DATA for each block.
        digests: for each algorithm the digests, one row for each block.
    """

    known: npt.NDArray[np.uint8]
    digests: list[npt.NDArray[np.uint8]]

    def copy(self) -> _Blocks:
        return _Blocks(self.known.copy(), [rows.copy() for rows in self.digests])


@dataclass
class _Cursor:
    """The rows of one state, taken window by window."""

    source: Iterator[Located]
    rows: list[Located] = field(default_factory=list)

    def zero_until(self, position: int) -> int:
        """The guest offset up to which the metadata says zero, as far as a look ahead tells; at least `position`."""
        here = self._first(position)
        index = int(np.searchsorted(here.rows.start, position, side="right")) - 1
        other = np.flatnonzero(~here.zero[index:])
        return max(position, int(here.rows.start[index + other[0]]) if len(other) else here.end)

    def take(self, first: int, end: int) -> Located:
        """The rows between two guest offsets; those before are gone then."""
        self._first(first)
        while self.rows[-1].end < end:
            self.rows.append(next(self.source))
        return join([part for one in self.rows if len((part := one.between(first, end)).place)])

    def _first(self, position: int) -> Located:
        while self.rows and self.rows[0].end <= position:
            self.rows.pop(0)
        while not self.rows:
            table = next(self.source)
            self.rows = [table] if table.end > position else []
        return self.rows[0]


Digests = tuple[bytes, ...] | None
Outcome = Digests | str
"""Digests of a block, None for one that is all zero, or why it cannot be read."""


def _digest_windows(
    runs: list[_Run], size: int, makers: list[Callable[[], _Hash]], executor: Executor | None
) -> Iterator[tuple[int, int]]:
    """Take all states through the disk; yields each range that is done."""
    places = Places()
    end = -(-size // BLOCK) * BLOCK
    cursors = [_Cursor(located(run.state, places, 0, end)) for run in runs]
    position = 0
    while position < end:
        zero = min(cursor.zero_until(position) for cursor in cursors)
        stop = zero // BLOCK * BLOCK
        if stop <= position:
            stop = min(end, position + _WINDOW)
            window = _Window(position, stop, makers, executor)
            for run, cursor in zip(runs, cursors, strict=True):
                rows = cursor.take(position, stop)
                if run.damage is None:
                    window.digest(run, rows)
        yield position, min(stop, size)
        position = stop


class _Window:
    """The blocks of one window, in one state after the other."""

    def __init__(self, first: int, end: int, makers: list[Callable[[], _Hash]], executor: Executor | None) -> None:
        self._first, self._end = first, end
        self._makers = makers
        self._executor = executor
        self._outcomes: dict[bytes, Outcome] = {}
        self._before: tuple[Located, _Blocks] | None = None

    def digest(self, run: _Run, rows: Located) -> None:
        """Bring a state through the window, or note why that cannot be done."""
        edges = np.arange(self._first, self._end, BLOCK, dtype=np.int64)
        blocks = self._known_blocks(rows)
        here = rows.at(distinct(np.concatenate((edges, rows.rows.start))), self._end)
        block = (here.rows.start - self._first) // BLOCK
        filled = np.zeros(len(edges), dtype=np.bool_)
        filled[block[~here.zero]] = True
        blocks.known[(blocks.known == _UNKNOWN) & ~filled] = _ZERO
        wanted = np.flatnonzero(blocks.known == _UNKNOWN)
        keys = _keys(here, block, wanted)
        self._read_missing(run.state, wanted, keys)
        for number, key in zip(wanted.tolist(), keys, strict=True):
            outcome = self._outcomes[key]
            if isinstance(outcome, str):
                run.damage = outcome
                return
            blocks.known[number] = _ZERO if outcome is None else _DATA
            for rows_of, value in zip(blocks.digests, outcome or (), strict=False):
                rows_of[number] = np.frombuffer(value, dtype=np.uint8)
        run.update(self._first, blocks)
        self._before = rows, blocks

    def _known_blocks(self, rows: Located) -> _Blocks:
        """What the state before tells: all blocks in which both are stored alike."""
        count = (self._end - self._first) // BLOCK
        if self._before is None:
            sizes = [len(make().digest()) for make in self._makers]
            return _Blocks(np.zeros(count, dtype=np.uint8), [np.zeros((count, size), dtype=np.uint8) for size in sizes])
        old, blocks = self._before
        starts = distinct(np.concatenate((old.rows.start, rows.rows.start)))
        differ = ~same_content(old.at(starts, self._end), rows.at(starts, self._end))
        blocks = blocks.copy()
        lengths = np.diff(starts, append=np.int64(self._end))[differ]
        first = (starts[differ] - self._first) // BLOCK
        last = (starts[differ] + lengths - 1 - self._first) // BLOCK
        # +1 where a changed range begins, -1 behind it: what is above 0 in between is touched.
        depth = np.zeros(count + 1, dtype=np.int64)
        np.add.at(depth, first, 1)
        np.add.at(depth, last + 1, -1)
        blocks.known[np.cumsum(depth[:-1]) > 0] = _UNKNOWN
        return blocks

    def _read_missing(self, state: ReadableImage, wanted: Int64Array, keys: list[bytes]) -> None:
        """Read and hash the blocks that no state of the window has had."""
        missing: dict[bytes, int] = {}
        for number, key in zip(wanted.tolist(), keys, strict=True):
            if key not in self._outcomes:
                missing.setdefault(key, self._first + number * BLOCK)

        def read(offset: int) -> Outcome:
            return _outcome(state, offset, self._makers)

        results = map(read, missing.values()) if self._executor is None else self._executor.map(read, missing.values())
        self._outcomes.update(zip(missing, results, strict=True))


def _keys(rows: Located, block: Int64Array, wanted: Int64Array) -> list[bytes]:
    """For each wanted block all that says what it holds: where its rows begin, their kinds, files and host offsets."""
    columns = np.stack((rows.rows.start, rows.rows.kind.astype(np.int64), rows.place, rows.rows.host_offset), axis=1)
    columns[rows.zero, 1:] = -1
    data = columns.tobytes()
    width = columns.shape[1] * columns.itemsize
    first = np.searchsorted(block, wanted) * width
    last = np.searchsorted(block, wanted, side="right") * width
    return [data[start:stop] for start, stop in zip(first.tolist(), last.tolist(), strict=True)]


def _outcome(state: ReadableImage, offset: int, makers: list[Callable[[], _Hash]]) -> Outcome:
    buffer = bytearray(BLOCK)
    inside = min(BLOCK, state.size - offset)
    try:
        state.readinto(offset, memoryview(buffer)[:inside])
    except (CorruptMetadata, ChainError) as error:
        return str(error)
    if buffer == _ZEROES:
        return None
    digests = []
    for make in makers:
        one = make()
        one.update(buffer)  # type: ignore[arg-type]  # any buffer will do
        digests.append(one.digest())
    return tuple(digests)
