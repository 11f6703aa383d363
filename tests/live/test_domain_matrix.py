"""Each way of taking memory and disks, twenty times: of one instant when taken, and again after going back."""

import sys
import time
from pathlib import Path

import pytest

from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.domain import open_domain
from snapshot.model import DiskMode, DiskRequest, DomainSnapshot, Liveness, RevertOptions, SnapshotRequest
from tests.live.rig import MakeRig, Rig, consistent, disk_counter, ram_record, snapshot_counters, snapshot_record

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

INTERNAL, EXTERNAL = DiskMode.INTERNAL, DiskMode.EXTERNAL
TIMES = 20


@pytest.mark.parametrize(
    ("modes", "memory_file", "liveness"),
    [
        ([INTERNAL, INTERNAL], False, Liveness.PAUSED),
        *(([EXTERNAL, EXTERNAL], True, liveness) for liveness in Liveness),
        *(([INTERNAL, INTERNAL], True, liveness) for liveness in Liveness),
        *(([INTERNAL, EXTERNAL], True, liveness) for liveness in Liveness),
    ],
)
def test_twenty_of_twenty(
    rig: MakeRig,
    tmp_path: Path,
    modes: list[DiskMode],
    memory_file: bool,
    liveness: Liveness,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    journal = executor.Journal(catalog.directory)
    disks = {disk.target: DiskRequest(mode) for disk, mode in zip(guest.disks, modes, strict=True)}
    taken: list[DomainSnapshot] = []
    pauses: list[float] = []
    for number in range(TIMES):
        file = str(tmp_path / f"s{number}-.mem") if memory_file else None
        request = SnapshotRequest(f"s{number}-", disks=disks, memory_file=file, liveness=liveness)
        domain.qmp.events()
        snapshot = executor.create(domain, catalog, request)
        assert isinstance(snapshot, DomainSnapshot)
        taken.append(snapshot)
        pauses.append(pause(domain.qmp.events()))
        guest.wait_for_ticks(1 + number % 3)
    fitting = sum(consistent(snapshot_record(one), snapshot_counters(one)) for one in taken)
    assert fitting == TIMES
    assert not guest.complaints()
    mixed = INTERNAL in modes and memory_file
    restored = 0
    for snapshot in [taken[-1]] if EXTERNAL in modes and INTERNAL in modes else taken:
        if mixed:
            domain.qmp.execute("quit")
        domain.close()
        if mixed:
            while any(one.in_use for one in guest.inactive().facts(journal.layers()).disks):
                time.sleep(0.05)
        here = open_domain(guest.description)
        executor.revert(here, catalog, snapshot.name, RevertOptions(running=False, discard_current=True))
        here.close()
        domain = guest.connect()
        counters = [disk_counter(one.disk.path, one.disk.format) for one in domain.facts().disks]
        record = ram_record(domain.qmp, tmp_path)
        assert record == snapshot_record(snapshot)
        assert consistent(record, counters)
        domain.qmp.execute("cont")
        wait_for_lines(guest, 2)
        restored += 1
    assert not guest.complaints()
    domain.qmp.execute("quit")
    domain.close()
    median = sorted(pauses)[len(pauses) // 2] * 1000
    names = "+".join(mode.value for mode in modes)
    with capsys.disabled():
        result = f"{fitting} of {TIMES} fit, {restored} restored, pause {median:.0f} ms"
        sys.stdout.write(f"\n{names} {liveness.value}: {result}\n")


def pause(events: list[dict[str, object]]) -> float:
    """Seconds from STOP to RESUME."""
    moments = {
        event["event"]: event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6  # type: ignore[index]
        for event in events
        if event["event"] in ("STOP", "RESUME")
    }
    return moments["RESUME"] - moments["STOP"] if len(moments) == 2 else 0.0


def wait_for_lines(guest: Rig, count: int) -> None:
    """Wait for lines of whichever QEMU runs; a new one begins a new file."""
    lines = len(guest.lines())
    end = time.monotonic() + 60
    while time.monotonic() < end:
        now = len(guest.lines())
        lines = min(lines, now)
        if now >= lines + count:
            return
        time.sleep(0.02)
    raise AssertionError("the guest does not count")
