"""Each way of taking a snapshot of a running guest, twenty times: of one instant, and again after going back.

One guest per way: twenty snapshots in a row, then back to each of them. The run's summary has a line for each way. The
host's oracle decides; it is exact (see `rig`). Without memory it asks for the same of the disks, at a moment between
two looks at the guest's memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.domain import ActiveDomain
from snapshot.model import DiskMode, DiskRequest, DomainSnapshot, Liveness, RevertOptions, SnapshotRequest
from tests.live.rig import (
    MakeRig,
    Rig,
    consistent,
    disk_counter,
    fits_some_moment,
    ram_record,
    snapshot_counters,
    snapshot_record,
)

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

INTERNAL, EXTERNAL, NO = DiskMode.INTERNAL, DiskMode.EXTERNAL, DiskMode.NO
TIMES = 20


@dataclass(frozen=True)
class Cell:
    """One way. Attributes: modes: of each disk; memory: "inside", "file" or None; liveness: while it is written."""

    modes: tuple[DiskMode, ...]
    memory: str | None
    liveness: Liveness = Liveness.PAUSED

    def __str__(self) -> str:
        disks = "+".join("left out" if mode is NO else mode.value for mode in self.modes)
        how = "disk-only" if self.memory is None else f"memory {self.memory}, {self.liveness.value}"
        return f"{disks}, {how}"

    def request(self, guest: Rig, name: str) -> SnapshotRequest:
        """What takes a snapshot this way."""
        return SnapshotRequest(
            name,
            disk_only=self.memory is None,
            disks={disk.target: DiskRequest(mode) for disk, mode in zip(guest.disks, self.modes, strict=True)},
            memory_file=str(guest.directory / f"{name}.mem") if self.memory == "file" else None,
            liveness=self.liveness,
        )


CELLS = [
    Cell((INTERNAL, INTERNAL), "inside"),
    *(Cell((EXTERNAL, EXTERNAL), "file", liveness) for liveness in Liveness),
    *(Cell((INTERNAL, INTERNAL), "file", liveness) for liveness in Liveness),
    *(Cell((INTERNAL, EXTERNAL), "file", liveness) for liveness in Liveness),
    Cell((INTERNAL, INTERNAL), None),
    Cell((EXTERNAL, EXTERNAL), None),
    Cell((EXTERNAL, INTERNAL), None),
    Cell((INTERNAL, NO), None),
    Cell((NO, EXTERNAL), None),
    Cell((INTERNAL, NO, EXTERNAL), None),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_twenty_of_twenty(
    rig: MakeRig, tmp_path: Path, cell: Cell, record_property: Callable[[str, object], None]
) -> None:
    guest = rig(*["qcow2"] * len(cell.modes), period=2)
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    taken: list[DomainSnapshot] = []
    pauses: list[float] = []
    fitting = 0
    for number in range(TIMES):
        earliest, _phase = ram_record(domain.qmp, tmp_path)
        domain.qmp.events()
        snapshot = executor.create(domain, catalog, cell.request(guest, f"s{number}-"))
        pauses.append(pause(domain.qmp.events()))
        latest, _phase = ram_record(domain.qmp, tmp_path)
        assert isinstance(snapshot, DomainSnapshot)
        taken.append(snapshot)
        guest.wait_for_ticks(1)
        counters = dict(zip(taking_part(cell), snapshot_counters(snapshot), strict=True))
        if cell.memory is None:
            fitting += fits_some_moment(earliest, latest, len(cell.modes), counters)
        else:
            record = snapshot_record(snapshot)
            fitting += earliest <= record[0] <= latest and consistent(record, list(counters.values()))
    assert fitting == TIMES
    assert not guest.complaints()
    back = 0
    for snapshot in taken:
        domain = went_back(guest, domain, catalog, snapshot)
        back += (restored if cell.memory is not None else booted)(guest, domain, snapshot)
    assert back == TIMES
    assert not guest.complaints()
    guest.quit(domain.qmp)
    if cell.memory is None:
        assert max(pauses) == 0
    record_property(
        "counted", (str(cell), {f"of {TIMES} consistent": fitting, f"of {TIMES} reverted and consistent": back})
    )


def taking_part(cell: Cell) -> list[int]:
    """Numbers of the disks that are not left out."""
    return [number for number, mode in enumerate(cell.modes) if mode is not NO]


def went_back(guest: Rig, domain: ActiveDomain, catalog: Catalog, snapshot: DomainSnapshot) -> ActiveDomain:
    """The domain after the revert, with its guest standing; it may be another process."""
    executor.revert(domain, catalog, snapshot.name, RevertOptions(running=False, discard_current=True))
    domain.close()
    return guest.connect()


def restored(guest: Rig, domain: ActiveDomain, snapshot: DomainSnapshot) -> bool:
    """Whether memory and disks are those of the snapshot, of one instant, and the guest goes on with them."""
    record, counters = ram_record(domain.qmp, guest.directory), counters_now(domain)
    fits = record == snapshot_record(snapshot) and counters == snapshot_counters(snapshot)
    return run_on(guest, domain, lambda line: line.startswith("T")) and fits and consistent(record, counters)


def booted(guest: Rig, domain: ActiveDomain, snapshot: DomainSnapshot) -> bool:
    """Whether the disks are those of the snapshot, and the guest boots from them."""
    now = counters_now(domain)
    wanted = [disk.mode is not NO for disk in snapshot.disks]
    fits = [counter for counter, part in zip(now, wanted, strict=True) if part] == snapshot_counters(snapshot)
    return run_on(guest, domain, lambda line: line == f"B{now[0]:08X}") and fits


def counters_now(domain: ActiveDomain) -> list[int]:
    return [disk_counter(one.disk.path, one.disk.format) for one in domain.facts().disks]


def run_on(guest: Rig, domain: ActiveDomain, expected: Callable[[str], bool]) -> bool:
    """Let the guest run until it has printed a line after the one that was expected."""
    before = len(guest.lines()) - 1
    domain.qmp.execute("cont")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lines = guest.lines()
        new = lines[before:] if len(lines) > before else lines  # a new QEMU begins a new file
        if any(map(expected, new[:-1])) and sum(line.startswith("T") for line in new[:-1]) >= 1:
            return True
        time.sleep(0.02)
    return False


def pause(events: list[dict[str, object]]) -> float:
    """Seconds from STOP to RESUME."""
    moments = {
        event["event"]: event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6  # type: ignore[index]
        for event in events
        if event["event"] in ("STOP", "RESUME")
    }
    return moments["RESUME"] - moments["STOP"] if len(moments) == 2 else 0.0
