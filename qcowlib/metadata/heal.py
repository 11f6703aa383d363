"""Heal the refcounts of an image whose last session was cut off.

    census --> expected refcounts (+ new refcount blocks and table, where some are missing)
        1 raise   refcounts that are too low, clear COPIED where the refcount is not 1, fill new blocks and table
        2 grow    refcount table entries or header name the new blocks and table          (only if there are new ones)
        3 lower   refcounts that are too high (leaks), set COPIED where the refcount is 1
        4 done    clear the dirty bit

A repair does the same on an overlay, with two more things: the refcounts may be made from nothing (the stored ones are
taken as empty), and what it changes in the mapping is linked between 2 and 3.

A barrier ends each step; a crash between any two writes leaves an image that heals again. Only changed blocks and
tables are written. Where the mapping or the refcount structure is damaged nothing is changed: a cluster that nothing
seems to refer to may be one whose reference is damaged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcowlib.errors import CorruptMetadata, ImageStateError
from qcowlib.findings import CheckReport, Finding, Severity
from qcowlib.format.constants import MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_SIZE
from qcowlib.format.entries import ENTRY_DTYPE, OFLAG_COPIED, Entries, flagged
from qcowlib.format.features import Incompatible
from qcowlib.format.header import Header
from qcowlib.format.refcount_block import RefcountArray, encode_refcounts
from qcowlib.metadata.census import Census, census
from qcowlib.metadata.comparison import Comparison
from qcowlib.metadata.copied_flags import Ones, wrong_l1_entries, wrong_l2_tables
from qcowlib.metadata.free_clusters import FreeClusters
from qcowlib.metadata.state import Qcow2State
from qcowlib.metadata.stored_refcounts import StoredRefcounts
from qcowlib.storage.protocol import Storage

BoolArray = npt.NDArray[np.bool_]

_SECTOR = 512


def heal(state: Qcow2State, storage: Storage) -> CheckReport:
    """Make refcounts and COPIED flags right, and clear the dirty bit.

    The state is stale afterwards where the header changed: load it again.

    Args:
        state: the image's metadata.
        storage: the qcow2 file, writable.

    Returns:
        What was wrong and has been made right: one finding for each kind.

    Raises:
        CorruptMetadata: the mapping or the refcount structure is damaged; nothing was changed.
        ImageStateError: the image is too large to be counted, or a refcount does not fit; nothing was changed.
        StorageError: the host file failed; what was written so far does no harm.
    """
    found = census(state)
    require_countable(found, "healed")
    healing = Healing(state.header, storage, found)
    healing.run()
    healing.mark_clean()
    return CheckReport(healing.findings())


def require_countable(found: Census, purpose: str) -> None:
    """Refuse an image of which it cannot be told what its clusters hold.

    Args:
        found: the census.
        purpose: what is not done to the refcounts then, for the message ("healed").

    Raises:
        CorruptMetadata: the mapping or the refcount structure is damaged.
        ImageStateError: the image is too large to be counted.
    """
    if found.stopped is not None:
        raise ImageStateError(
            f"the image cannot be checked, so that the refcounts cannot be {purpose}: {found.stopped}"
        )
    if found.mapping_damaged or found.refcounts_damaged:
        texts = [finding.text.partition("\n")[0] for finding in found.findings]
        texts += [f"cluster {cluster} holds {first} and {second}" for cluster, first, second in found.overlaps]
        structure = "mapping" if found.mapping_damaged else "refcount structure"
        raise CorruptMetadata(structure, None, f"is damaged, so that the refcounts cannot be {purpose}: {texts[0]}")


def require_enough_refcounts(state: Qcow2State) -> None:
    """Make sure that no refcount is lower than the references to its cluster, before anything is freed.

    Else the cluster of one snapshot is freed with another that shares it.

    Args:
        state: the image's metadata, of which nothing is pending.

    Raises:
        CorruptMetadata: a refcount is too low, or the image is damaged otherwise; it needs a repair.
        ImageStateError: the image is too large to be counted.
    """
    found = census(state)
    require_countable(found, "lowered")
    for rows in Comparison(found, state.geometry).differences():
        low = np.flatnonzero(rows.stored < rows.expected)
        if len(low):
            cluster, stored, expected = (int(column[low[0]]) for column in (rows.clusters, rows.stored, rows.expected))
            rule = f"refcount {stored} of a cluster with {expected} references; the image needs a repair"
            raise CorruptMetadata("refcount block", cluster << state.geometry.cluster_bits, rule)


@dataclass(frozen=True)
class _Growth:
    """Refcount blocks and a refcount table that are missing, placed behind the end of the file.

    Attributes:
        blocks: host offset by index of each new block.
        table_offset: host offset of a new, larger table; None when the old one has room.
        table_entries: its entries.
    """

    blocks: dict[int, int]
    table_offset: int | None
    table_entries: int


class Healing:
    """The refcounts and COPIED flags of one image in the making.

    Args:
        header: of the image; without a refcount table (no clusters), the refcounts are made from nothing.
        storage: the qcow2 file, or an overlay over it.
        found: the census, undamaged; its `stored` belongs to this header.
        free: places new refcount blocks and a new refcount table; None: behind the end of the file.
        link: writes what refers to newly counted clusters; called when their refcounts are durable.

    Attributes:
        header: as it is after what was done so far.
    """

    def __init__(
        self,
        header: Header,
        storage: Storage,
        found: Census,
        *,
        free: FreeClusters | None = None,
        link: Callable[[Header], None] | None = None,
    ) -> None:
        self.header = header
        self.free = free
        self.link = link
        self.geometry = header.geometry
        self.storage = storage
        self.found = found
        self.references = found.references
        self.stored = found.stored
        self.healed: Counter[tuple[str, Severity]] = Counter()
        self.changed = False
        self.mapping = replace(found.mapping, l1=found.mapping.l1.copy())  # its flags are changed as they are on disk

    def run(self) -> None:
        """Steps 1 to 3."""
        growth = self._plan_growth()
        ones = Ones.expected(self.references)
        self._raise_refcounts(growth)
        self._fix_copied(ones, set_flag=False)
        self._barrier()
        if growth.blocks:
            self._swing(growth)
        if self.link is not None:
            self.link(self.header)
        self._lower_refcounts()
        self._fix_copied(ones, set_flag=True)
        self._barrier()

    def mark_clean(self) -> None:
        """Step 4."""
        if self.header.dirty:
            bits = self.header.incompatible_features & ~Incompatible.DIRTY
            self._write_header(replace(self.header, incompatible_features=int(bits)))
            self._barrier()

    def findings(self) -> list[Finding]:
        """What was made right: one finding for each kind."""
        return [
            Finding(code, severity, f"{count} of the kind '{code}' healed", repairable=True, count=count)
            for (code, severity), count in self.healed.items()
        ]

    # -- refcounts

    def _windows(self) -> list[int]:
        """All windows that have references or refcount blocks, also behind the end of the file."""
        bits = self.references.chunk_bits
        every = len(self.stored.table) << self.geometry.refcount_block_bits
        return sorted({*self.references.chunks(), *self.stored.used_windows(bits, every)})

    def _pairs(self) -> Iterator[tuple[int, RefcountArray, RefcountArray]]:
        """(first cluster, stored, expected) for each window where they differ."""
        for window in self._windows():
            first = window << self.references.chunk_bits
            stored = self.stored.window(first, self.references.chunk_size)
            counts = self.references.chunk(window)
            if counts is None:
                if stored.any():
                    yield first, stored, np.zeros_like(stored)
            elif not np.array_equal(stored, counts):
                yield first, stored, counts.astype(stored.dtype)

    def _raise_refcounts(self, growth: _Growth) -> None:
        for first, stored, expected in self._pairs():
            low = stored < expected
            self._count("refcount-too-low", Severity.CORRUPTION, int(low.sum()))
            self._write_blocks(first, np.maximum(stored, expected), low, growth.blocks)

    def _lower_refcounts(self) -> None:
        for first, stored, expected in self._pairs():
            high = stored > expected
            self._count("leak", Severity.LEAK, int((high & (expected == 0)).sum()))
            self._count("refcount-too-high", Severity.LEAK, int((high & (expected > 0)).sum()))
            self._write_blocks(first, expected, high, {})

    def _write_blocks(self, first: int, counts: RefcountArray, changed: BoolArray, new: dict[int, int]) -> None:
        """Write the refcount blocks of a window in which a count has changed."""
        entries = self.geometry.refcount_block_entries
        for block in np.flatnonzero(changed.reshape(-1, entries).any(axis=1)).tolist():
            index = (first >> self.geometry.refcount_block_bits) + block
            host = new.get(index) or int(self.stored.block_offsets[index])
            part = counts[block * entries : (block + 1) * entries]
            self._write(encode_refcounts(part, self.geometry.refcount_order), host)

    # -- growth

    def _plan_growth(self) -> _Growth:
        """Place what is missing; it is then counted in the expected refcounts."""
        missing = self._missing_blocks()
        if not missing:
            return _Growth({}, None, 0)
        geometry = self.geometry
        end = max(self.found.clusters, geometry.clusters_for(self.storage.size()))  # the first cluster behind the file
        free = self.free or FreeClusters(end)
        per_cluster = geometry.cluster_size // 8
        while True:
            table_clusters = 0
            if max(missing) >= len(self.stored.table):
                table_clusters = max(missing) // per_cluster + 1
            blocks, table = free.place(sorted(missing), geometry.refcount_block_bits, table_clusters)
            taken = [*blocks.values(), *range(table, table + table_clusters)]
            more = {c >> geometry.refcount_block_bits for c in taken} - missing
            more = {index for index in more if not self._has_block(index)}
            if not more:
                break
            missing |= more
        self._require_room(max(taken) + 1, table_clusters)
        for cluster in taken:
            self.references.add_run(cluster, cluster + 1)
        places = {index: cluster << geometry.cluster_bits for index, cluster in blocks.items()}
        if not table_clusters:
            return _Growth(places, None, 0)
        return _Growth(places, table << geometry.cluster_bits, table_clusters * per_cluster)

    def _missing_blocks(self) -> set[int]:
        """Indices of refcount blocks that do not exist though clusters of theirs are referred to."""
        missing: set[int] = set()
        bits = self.geometry.refcount_block_bits
        for window in self.references.chunks():
            counts = self.references.chunk(window)
            if counts is not None:
                used = np.flatnonzero(counts.reshape(-1, 1 << bits).any(axis=1))
                indices = used + ((window << self.references.chunk_bits) >> bits)
                missing.update(index for index in indices.tolist() if not self._has_block(index))
        return missing

    def _has_block(self, index: int) -> bool:
        return index < len(self.stored.table) and bool(self.stored.block_offsets[index])

    def _require_room(self, stop: int, table_clusters: int) -> None:
        too_far = stop << self.geometry.cluster_bits > MAX_HOST_OFFSET
        if too_far or table_clusters * self.geometry.cluster_size > MAX_REFCOUNT_TABLE_SIZE:
            raise ImageStateError("the image is too large to add the refcount blocks that it lacks")

    def _swing(self, growth: _Growth) -> None:
        """Name the new blocks: in the refcount table, or in a new one that the header then names."""
        old = self.stored.table
        if growth.table_offset is None:
            for index, offset in growth.blocks.items():
                entry = np.array([offset], dtype=ENTRY_DTYPE).tobytes()
                self._write(entry, self.header.refcount_table_offset + 8 * index)
            self._barrier()
        else:
            table: Entries = np.zeros(growth.table_entries, dtype=ENTRY_DTYPE)
            table[: len(old)] = old
            table[list(growth.blocks)] = list(growth.blocks.values())
            self._write(table.tobytes(), growth.table_offset)
            self._barrier()
            clusters = growth.table_entries * 8 >> self.geometry.cluster_bits
            first = self.header.refcount_table_offset >> self.geometry.cluster_bits
            old_clusters = (first, first + self.header.refcount_table_clusters)
            self._write_header(
                replace(self.header, refcount_table_offset=growth.table_offset, refcount_table_clusters=clusters)
            )
            self._barrier()
            self.references.remove_run(*old_clusters)
        self.stored = StoredRefcounts(self.storage, self.header)

    # -- COPIED

    def _fix_copied(self, ones: Ones, *, set_flag: bool) -> None:
        """Set the flags that are missing, or clear those that must not be, in the active L1 table and its L2 tables."""
        mapping = self.mapping
        self._flip(mapping.l1, wrong_l1_entries(self.header, mapping, ones), set_flag, 1, self.header.l1_table_offset)
        step = 2 if self.geometry.extended_l2 else 1
        for batch in wrong_l2_tables(self.storage, self.header, mapping, ones):
            for words, wrong, host in zip(batch.words, batch.wrong, batch.host_offset.tolist(), strict=True):
                self._flip(words, wrong, set_flag, step, host)

    def _flip(self, words: Entries, wrong: BoolArray, set_flag: bool, step: int, host: int) -> None:
        """Flip the wrong flags of one table (of one kind), and write from the first to the last changed entry."""
        chosen = np.flatnonzero(wrong & (flagged(words[::step], OFLAG_COPIED) != set_flag)) * step
        if not len(chosen):
            return
        words[chosen] = words[chosen].astype(np.uint64) ^ np.uint64(OFLAG_COPIED)
        self._count("copied-flag-wrong", Severity.CORRUPTION, len(chosen))
        first, last = int(chosen[0]), int(chosen[-1])
        self._write(words[first : last + 1].tobytes(), host + 8 * first)

    # -- writing

    def _count(self, code: str, severity: Severity, number: int) -> None:
        if number:
            self.healed[code, severity] += number

    def _write(self, data: bytes, offset: int) -> None:
        self.storage.pwrite(data, offset)
        self.changed = True

    def _write_header(self, header: Header) -> None:
        """One write of the first sector, which holds all fields that change."""
        self._write(header.build()[:_SECTOR], 0)
        self.header = header

    def _barrier(self) -> None:
        if self.changed:
            self.storage.flush()
            self.changed = False
