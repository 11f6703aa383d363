"""How long the guest stands for each way of taking a snapshot: QEMU's own STOP and RESUME events are the clock.

    python3 -m pytest -s tests/live/test_pauses.py

Live is shorter than paused, and a disk-only snapshot does not stop the guest at all. Beside them: `snapshot-save`.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshot.cli.main import main
from tests.live import guest
from tests.live.guest import Guest
from tests.live.test_domsnap import domain_file

pytestmark = pytest.mark.live

ROUNDS = 5
#: Enough memory that writing it takes longer than the noise of a busy machine.
MEMORY = 1024

WAYS: dict[str, list[str]] = {
    "domsnap: memory and disks inside": ["--internal"],
    "domsnap: memory file, paused": ["--external"],
    "domsnap: memory file, live": ["--external", "--live"],
    "domsnap: memory file, live=background": ["--external", "--live=background"],
    "domsnap: disk-only inside": ["--disk-only", "--internal"],
    "domsnap: disk-only overlays": ["--disk-only", "--external"],
}
BY_HAND = "by hand: snapshot-save"


def pauses(machine: Guest, take: Callable[[str], None], name: str) -> tuple[list[float], list[float]]:
    """Seconds that the guest stood and seconds that all took, for each of some snapshots."""
    stood, took = [], []
    for number in range(ROUNDS):
        machine.monitor.event_names()
        machine.monitor.events.clear()
        began = time.monotonic()
        take(f"{name}{number}")
        took.append(time.monotonic() - began)
        machine.monitor.event_names()
        stood.append(pause(machine.monitor.events))
        machine.wait_ticks(1)
    return stood, took


def pause(events: list[dict[str, Any]]) -> float:
    """Sum of the times between each STOP and the RESUME after it."""
    total, stopped = 0.0, None
    for event in events:
        stamp = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        if event["event"] == "STOP" and stopped is None:
            stopped = stamp
        elif event["event"] == "RESUME" and stopped is not None:
            total, stopped = total + stamp - stopped, None
    assert stopped is None, "the guest was left standing"
    return total


def test_pauses_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results: dict[str, tuple[list[float], list[float]]] = {}
    for way in [BY_HAND, *WAYS]:  # each on a fresh guest: chains and vm states of one way do not weigh on the next
        folder = tmp_path / str(len(results))
        folder.mkdir()
        disks = guest.make_disks(folder, 2)
        with guest.running(disks, memory=MEMORY) as machine:
            vm = domain_file(folder, disks, machine)

            def take(name: str, way: str = way, machine: Guest = machine, vm: Path = vm) -> None:
                if way == BY_HAND:
                    machine.monitor.job("snapshot-save", tag=name, vmstate="d0", devices=["d0", "d1"])
                else:
                    assert main(["create", name, "-f", str(vm), *WAYS[way]]) == 0, capsys.readouterr().err

            results[way] = pauses(machine, take, "s")
            assert machine.complaints() == []
    lines = [f"pause of the guest ({MEMORY} MiB, {ROUNDS} each), milliseconds: median (smallest to largest); in all"]
    for way, (stood, took) in results.items():
        middle, low, high = (1000 * each for each in (statistics.median(stood), min(stood), max(stood)))
        lines.append(f"  {way:<40} {middle:6.0f} ({low:.0f} to {high:.0f}); {1000 * statistics.median(took):.0f}")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    for way in WAYS:
        if "disk-only" in way:
            assert max(results[way][0]) == 0
