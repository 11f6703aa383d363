"""A host that fails at any one call, once or from then on, or that is full: only QcowError, and nothing is lost."""

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qcowlib.errors import QcowError, StorageError
from qcowlib.storage.recorder import Fault, FaultyStorage
from tests.crash.images import Scenario, build
from tests.crash.programs import SCENARIOS
from tests.faults.attempt import Attempt, InterruptedStorage, attempt, examine
from tests.oracle import assert_clean

Record = Callable[[str, object], None]

_NAMES = [f"{name}-v3-512" for name in ("shared", "packed", "zeroes", "create", "apply", "delete", "vmstates")]
_NAMES += [f"{name}-v2-512" for name in ("shared", "packed", "create", "apply", "delete", "blocks")]
_NAMES += ["resize-v3-512", "resize-shared-v3-512", "resize-backing-v3-16k-parts"]
_NAMES += ["amend-v3-512", "amend-backing-v3-512"]
_NAMES += ["blocks-v3-512-r64", "shared-v3-16k-parts", "backing-v3-4k-r8"]
CHOSEN = [scenario for scenario in SCENARIOS if scenario.name in _NAMES]

FAILURES = {
    "EIO": Fault("change", 0, errno.EIO),
    "short writes": Fault("change", 0, errno.ENOSPC, written=512),
    "EIO from then on": Fault("change", 0, errno.EIO, lasting=True),
}


class Session:
    """Attempts on one scenario; counts them."""

    def __init__(self, scenario: Scenario, directory: Path) -> None:
        self.scenario, self.directory = scenario, directory
        self.name = str(directory / "image.qcow2")
        self.initial, self.guest, self.backing = build(scenario, directory)
        self.counts: Counter[str] = Counter(programs=1)

    def calls(self, call: str) -> int:
        """How many calls of a name the program makes when all is well."""
        done = self.run()
        assert not done.errors
        return done.storage.counts[call]

    def run(self, *plan: Fault, capacity: int | None = None, host: type[FaultyStorage] = FaultyStorage) -> Attempt:
        """One attempt."""
        return attempt(self.initial, self.guest, self.scenario.steps, plan, self.name, capacity=capacity, host=host)

    def prove(self, label: str, done: Attempt, code: int) -> None:
        """What must hold after an attempt that met a failure."""
        self.counts[label] += 1
        try:
            assert done.storage.failures, "the program made fewer calls than planned"
            for error in done.errors:
                assert isinstance(error, QcowError) or label == "interrupts"
                assert "\n" not in str(error)
            first = next((error for error in done.errors if isinstance(error, StorageError)), None)
            assert first is None or first.cause.errno == code
            healed = examine(done, self.backing, self.name)
            if sum(self.counts.values()) % 60 == 30:
                self.counts["checked by stock QEMU"] += 1
                path = self.directory / "healed.qcow2"
                path.write_bytes(healed)
                assert_clean(path)
        except Exception as error:
            error.add_note(f"{self.scenario.name}: {label}, raised {done.errors}")
            raise


@pytest.mark.parametrize("scenario", CHOSEN, ids=lambda scenario: scenario.name)
def test_every_change_fails(scenario: Scenario, tmp_path: Path, record_property: Record) -> None:
    """Each write, discard and flush of the program fails, once and for good."""
    session = Session(scenario, tmp_path)
    for number in range(1, session.calls("change") + 1):
        for label, fault in FAILURES.items():
            if fault.lasting and number % 3:
                continue
            try:
                done = session.run(replace(fault, nth=number))
                session.prove(label, done, fault.code)
            except Exception as error:
                error.add_note(f"call {number}")
                raise
    record_property("counted", ("failing calls", dict(session.counts)))


@pytest.mark.parametrize("scenario", CHOSEN, ids=lambda scenario: scenario.name)
def test_reads_fail(scenario: Scenario, tmp_path: Path, record_property: Record) -> None:
    """A read of the host fails once."""
    session = Session(scenario, tmp_path)
    for number in range(1, session.calls("pread") + 1):
        try:
            session.prove("EIO in a read", session.run(Fault("pread", number, errno.EIO)), errno.EIO)
        except Exception as error:
            error.add_note(f"call {number}")
            raise
    record_property("counted", ("failing calls", dict(session.counts)))


@pytest.mark.parametrize("scenario", CHOSEN, ids=lambda scenario: scenario.name)
def test_host_is_full(scenario: Scenario, tmp_path: Path, record_property: Record) -> None:
    """The host has room for so many clusters more, and no more: from none to almost enough."""
    session = Session(scenario, tmp_path)
    start, end = len(session.initial), len(session.run().data)
    step = max(scenario.cluster_size // 2, (end - start) // 40 // 256 * 256)
    for capacity in range(start, end, step):
        try:
            session.prove("disk full", session.run(capacity=capacity), errno.ENOSPC)
        except Exception as error:
            error.add_note(f"room for {capacity - start} of {end - start} bytes")
            raise
    record_property("counted", ("failing calls", dict(session.counts)))


@pytest.mark.parametrize("scenario", CHOSEN[::3], ids=lambda scenario: scenario.name)
def test_interrupts(scenario: Scenario, tmp_path: Path, record_property: Record) -> None:
    """Ctrl-C at each write, discard and flush of the program."""
    session = Session(scenario, tmp_path)
    for number in range(1, session.calls("change") + 1):
        try:
            session.prove("interrupts", session.run(Fault("change", number), host=InterruptedStorage), 0)
        except Exception as error:
            error.add_note(f"call {number}")
            raise
    record_property("counted", ("failing calls", dict(session.counts)))
