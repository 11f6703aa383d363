"""A host that fails while bitmaps are changed or recorded in: only QcowError, and no bitmap misses a change."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qcowlib.errors import QcowError
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import Fault, FaultyStorage
from tests.crash.bitmap_sessions import RECORDING, SESSIONS, Moment, misses, prepare, run
from tests.crash.images import open_writable
from tests.crash.invariants import examine_broken, examine_healed, heal
from tests.crash.second_opinion import SecondOpinion
from tests.faults.attempt import InterruptedStorage
from tests.oracle import assert_clean

Record = Callable[[str, object], None]
PLANS = {
    "write fails": (Fault("change", 0, errno.EIO), FaultyStorage),
    "disk full from then on": (Fault("change", 0, errno.ENOSPC, lasting=True), FaultyStorage),
    "read fails": (Fault("pread", 0, errno.EIO), FaultyStorage),
    "interrupt": (Fault("change", 0), InterruptedStorage),
}


def session(name: str, disk: BytesStorage, plan: list[Fault], host: type[FaultyStorage]) -> tuple[FaultyStorage, bool]:
    """One session on a host that fails; the host, and whether all steps and the close went through."""
    storage, well = host(disk, plan), True
    try:
        image = open_writable(storage)
    except (QcowError, KeyboardInterrupt):
        return storage, False
    for step in SESSIONS[name]:
        try:
            step(image)
        except (QcowError, KeyboardInterrupt):
            well = False
    try:
        image.close()
    except (QcowError, KeyboardInterrupt):
        well = False
    image.close()
    return storage, well


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *(("512", name) for name in ("writes", "write-clear-write", "remove", "merge", "grow", "shrink")),
        *(("64k", name) for name in ("writes", "add", "remove-all")),
    ],
)
def test_every_call_fails(layout: str, name: str, tmp_path: Path, record_property: Record) -> None:
    storage, backing = prepare(layout, tmp_path, bitmaps=True)
    initial, file_name = storage.getvalue(), storage.name
    steps = SESSIONS[name]
    before = Moment.of(initial, backing)
    after = Moment.of(run(initial, steps, file_name)[1], backing)
    counts: Counter[str] = Counter()
    whole, _ = session(name, BytesStorage(initial, name=file_name), [], FaultyStorage)
    for label, (fault, host) in PLANS.items():
        total = whole.counts[fault.call]
        for number in range(1, total + 1, max(1, total // 12)):
            disk = BytesStorage(initial, name=file_name)
            try:
                failing, well = session(name, disk, [replace(fault, nth=number)], host)
                assert failing.failures
                counts[label] += 1
                data = disk.getvalue()
                expected = examine_broken(data, backing, file_name)
                found = Moment.of(data, backing)
                if name in RECORDING:
                    missing = misses(found, before)
                    assert missing in ([], ["auto"] if name == "write-clear-write" else []), f"{missing} miss a change"
                else:
                    assert found.bitmaps in (before.bitmaps, after.bitmaps)
                if well:
                    assert found.bitmaps == after.bitmaps, "said to be done"
                healed = heal(BytesStorage(data, name=file_name), expected)
                examine_healed(healed, backing, expected)
                assert SecondOpinion(healed, backing).bitmaps == found.bitmaps
                if sum(counts.values()) % 50 == 11:
                    (tmp_path / "healed").write_bytes(healed)
                    assert_clean(tmp_path / "healed")
            except Exception as error:
                error.add_note(f"{layout}, {name}: {label}, call {number}")
                raise
    record_property("counted", ("failing calls with bitmaps", dict(counts)))
