"""What a repair starts from: a header that names an active L1 table, and the snapshots that can be kept.

header --> active L1 table not in the file --> the one place where it can be | cut off with everything else
       --> snapshot table not in the file  --> the one place where it can be | snapshots without names
       --> a snapshot's L1 table not there --> the one place where it can be | dropped
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcowlib.errors import QcowError
from qcowlib.format.constants import MAX_L1_ENTRIES
from qcowlib.format.header import Header
from qcowlib.format.snapshot_table import SnapshotEntry, parse_snapshot_table
from qcowlib.metadata.census import census
from qcowlib.metadata.l2_scan import ScanRules
from qcowlib.metadata.lost_tables import LostTables
from qcowlib.metadata.mapping_repair import NotRepairable
from qcowlib.metadata.snapshot_rescue import RescuedSnapshots, rescue_snapshots
from qcowlib.metadata.state import Qcow2State
from qcowlib.storage.overlay import OverlayStorage
from qcowlib.storage.protocol import ReadStorage


@dataclass
class FoundTables:
    """The result.

    Attributes:
        header: names tables that are there.
        snapshots: what can be kept of the snapshot table.
        found_again: what was not where it was said to be, in words.
    """

    header: Header
    snapshots: RescuedSnapshots
    found_again: list[str]


def find_tables(base: ReadStorage, overlay: OverlayStorage, header: Header) -> FoundTables:
    """Find the tables that the header, or the snapshot table, names.

    Args:
        base: the qcow2 file.
        overlay: over it; gets an empty L1 table behind the end of a file that was cut before its own.
        header: as it can be read.

    Raises:
        NotRepairable: there is no active L1 table, and clusters that only it may refer to; or a snapshot that can be
            read would not be kept.
    """
    return _Finder(base, overlay, header).run()


class _Finder:
    def __init__(self, base: ReadStorage, overlay: OverlayStorage, header: Header) -> None:
        self.base = base
        self.overlay = overlay
        self.header = header
        self.file_end = (base.size() + 511) & -512
        self.found_again: list[str] = []

    def run(self) -> FoundTables:
        """Active layer first: the search for the others needs to know what it refers to."""
        if self.header.l1_size and not self._is_place(self.header.l1_table_offset, 8 * self.header.l1_size):
            self._find_l1_table()
        usable = self._usable_snapshots()
        snapshots = self._find_snapshots()
        kept = {entry.l1_table_offset for entry in snapshots.entries}
        for entry in usable:
            if entry.l1_table_offset not in kept:
                raise NotRepairable(f"snapshot {entry.id} ({entry.name}) can be read, and a repair would drop it")
        return FoundTables(self.header, snapshots, self.found_again)

    def _usable_snapshots(self) -> list[SnapshotEntry]:
        """The snapshots that the table has for who reads it plainly, if their L1 tables can be there."""
        try:
            entries = parse_snapshot_table(
                lambda offset, length: self.base.pread(length, offset), self.header, pad=True
            )
        except QcowError:
            return []
        size = self.header.cluster_size
        return [
            entry
            for entry in entries
            if 0 < entry.l1_size <= MAX_L1_ENTRIES
            and entry.l1_table_offset % size == 0
            and self._is_place(entry.l1_table_offset, 8 * entry.l1_size)
        ]

    def _is_place(self, offset: int, length: int) -> bool:
        """Whether a table can lie there: behind the header and inside the file, but for less than a cluster."""
        return offset > 0 and offset + length - self.file_end < self.header.cluster_size

    def _find_l1_table(self) -> None:
        """Let the header name the one place where the active L1 table can be."""
        search = self._search(replace(self.header, l1_size=0, l1_table_offset=0))
        places = search.l1_tables(self.header.l1_size)
        if len(places) == 1:
            self.found_again.append(f"the active L1 table was found again at {places[0]:#x}")
        elif places or not search.is_all_referenced():
            raise NotRepairable("the active L1 table is not where the header says, and it cannot be found")
        else:
            # The file was cut: it holds nothing that an L1 table could refer to. Behind its end all reads as zeroes.
            places = [self.header.geometry.clusters_for(self.file_end) << self.header.cluster_bits]
            length = self.header.geometry.clusters_for(8 * self.header.l1_size) << self.header.cluster_bits
            self.overlay.pwrite(bytes(length), places[0])
            self.found_again.append("the file was cut before its L1 table: all guest data is lost")
        self.header = replace(self.header, l1_table_offset=places[0])

    def _find_snapshots(self) -> RescuedSnapshots:
        snapshots = rescue_snapshots(self.base, self.header, self.file_end)
        if snapshots is not None:
            if len(snapshots.homeless) == 1:
                places = self._search(self.header).l1_tables(snapshots.homeless[0][1].l1_size)
                if len(places) == 1:
                    named = snapshots.take_in(places[0])
                    self.found_again.append(f"{named}: the L1 table at {places[0]:#x} was found again")
            return snapshots
        search = self._search(self.header)
        places = search.snapshot_tables()
        if len(places) != 1:
            return self._nameless_snapshots(search.l1_tables(self.header.l1_size))
        self.header = replace(self.header, snapshots_offset=places[0])
        self.found_again.append(f"the snapshot table was found again at {places[0]:#x}")
        return rescue_snapshots(self.base, self.header, self.file_end) or RescuedSnapshots()

    def _nameless_snapshots(self, places: list[int]) -> RescuedSnapshots:
        """The snapshots whose L1 tables can be found though the snapshot table cannot; their names are lost."""
        count = self.header.nb_snapshots
        snapshots = RescuedSnapshots()
        text = f"Discarding {count} snapshots (their table cannot be found)"
        snapshots.drop("snapshot-table-lost", text, f"the names and vm states of {count} snapshots")
        for number, offset in enumerate(places[:count], 1):
            entry = SnapshotEntry(
                l1_table_offset=offset,
                l1_size=self.header.l1_size,
                id=str(number),
                name=f"found-{number}",
                date_sec=0,
                date_nsec=0,
                vm_clock_nsec=0,
                disk_size=self.header.size,
            )
            snapshots.entries.append(entry)
            self.found_again.append(f"an L1 table at {offset:#x} is kept as snapshot {number} (found-{number})")
        return snapshots

    def _search(self, header: Header) -> LostTables:
        """A search among the clusters that nothing refers to, as far as the snapshot table can be used."""
        rescued = rescue_snapshots(self.base, header, self.file_end) or RescuedSnapshots()
        found = census(Qcow2State(self.base, header), rescued)
        rules = ScanRules(header.geometry, header.version, header.has_data_file, self.file_end)
        return LostTables(self.base, header, rules, found)
