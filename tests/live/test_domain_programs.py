"""Random programs on a domain that runs, stands still or is off: every snapshot stays what it was, and leads back.

The host's oracle decides after every step: the counters in all snapshots' disks, the record in their memory, and what
the guest has after it went back.
"""

import random
from collections import Counter
from pathlib import Path

import pytest

from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.domain import ActiveDomain, Domain
from snapshot.errors import NotPossible
from snapshot.journal import Journal
from snapshot.model import (
    DeleteOptions,
    DiskMode,
    DiskRequest,
    DomainSnapshot,
    Liveness,
    MemoryMode,
    RevertOptions,
    SnapshotRequest,
)
from snapshot.qmp import listening, poll
from tests import oracle
from tests.live.rig import MakeRig, Rig, consistent, disk_counter, ram_record, snapshot_counters, snapshot_record
from tests.live.test_domain_revert import wait_for_lines

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 24
FORMATS = (("qcow2", "qcow2"), ("qcow2", "raw"), ("raw", "qcow2"), ("qcow2", "qcow2", "qcow2"))


class Program:
    """One guest, and what its snapshots have to hold.

    Attributes:
        held: by the snapshot's name, record of the memory (None without) and counters of the disks.
        refusals: what was not possible.
        done: how many of what.
    """

    def __init__(self, guest: Rig, directory: Path, seed: int) -> None:
        self.guest, self.directory = guest, directory
        self.chance = random.Random(seed)
        self.catalog = Catalog(str(directory / "catalog"))
        self.domain: Domain = guest.start()
        self.held: dict[str, tuple[tuple[int, int] | None, list[int]]] = {}
        self.done: Counter[str] = Counter()
        self.refusals: list[str] = []

    @property
    def active(self) -> ActiveDomain | None:
        return self.domain if isinstance(self.domain, ActiveDomain) else None

    def create(self) -> None:
        name = f"s{self.done.total()}-"
        facts = self.domain.facts(Journal(self.catalog.directory).layers())
        both = [DiskMode.EXTERNAL, DiskMode.EXTERNAL, DiskMode.INTERNAL]
        possible = [both if one.disk.format == "qcow2" else both[:1] for one in facts.disks]
        modes = [self.chance.choice(one) for one in possible]
        memory = self.chance.choice(["inside", "file", "file", None]) if self.active else None
        if memory == "inside" and self.chance.random() < 0.7:
            modes = [one[-1] for one in possible]
        if memory is None and self.chance.random() < 0.3:
            modes[self.chance.randrange(len(modes))] = DiskMode.NO
        request = SnapshotRequest(
            name,
            disk_only=memory is None,
            disks={disk.target: DiskRequest(mode) for disk, mode in zip(self.guest.disks, modes, strict=True)},
            memory_file=str(self.directory / f"{name}.mem") if memory == "file" else None,
            liveness=self.chance.choice(list(Liveness)) if memory == "file" else Liveness.PAUSED,
        )
        taken = executor.create(self.domain, self.catalog, request)
        assert isinstance(taken, DomainSnapshot)
        self.keep(taken)

    def keep(self, taken: DomainSnapshot) -> None:
        record = None if taken.memory.mode is MemoryMode.NO else snapshot_record(taken)
        counters = snapshot_counters(taken)
        if record is not None:
            assert consistent(record, counters)
        self.held[taken.name] = record, counters

    def revert(self, name: str | None = None) -> None:
        names = sorted(self.held)
        if not names:
            return
        name = name or self.chance.choice(names)
        discard = self.chance.random() < 0.5
        before = {one.name for one in self.catalog.load()}
        try:
            executor.revert(self.domain, self.catalog, name, RevertOptions(running=False, discard_current=discard))
        finally:
            self.find()
        (snapshot,) = (one for one in self.catalog.load() if one.name == name)
        safe = [one for one in self.catalog.load() if one.name not in before]
        assert len(safe) == (0 if discard else 1)
        for one in safe:
            self.keep(one)
        record, counters = self.held[name]
        taking_part = {disk.target for disk in snapshot.disks if disk.mode is not DiskMode.NO}
        disks = [one.disk for one in self.domain.facts(Journal(self.catalog.directory).layers()).disks]
        assert [disk_counter(one.path, one.format) for one in disks if one.target in taking_part] == counters
        if self.active is not None:
            if record is not None:
                assert ram_record(self.active.qmp, self.directory) == record
            self.active.qmp.execute("cont")
            wait_for_lines(self.guest, 2)

    def delete(self) -> None:
        if len(self.held) < 3:
            return
        name = self.chance.choice(sorted(self.held))
        executor.delete(
            self.domain, self.catalog, name, DeleteOptions(into=self.chance.choice([None, "base", "overlay"]))
        )
        del self.held[name]

    def switch(self) -> None:
        """Off, or on again."""
        if self.active is not None:
            self.quit()
            self.domain = self.guest.inactive()
            return
        self.domain.close()
        layers = Journal(self.catalog.directory).layers()
        self.domain = self.guest.start(paths=layers)

    def quit(self) -> None:
        """End QEMU in order, whoever has started it."""
        assert self.active is not None
        self.active.qmp.execute("quit")
        self.domain.close()
        poll(lambda: None if self.guest.running() else True, deadline=60, what="QEMU")

    def pause(self) -> None:
        """A guest that stands still, or goes on."""
        if self.active is not None:
            running = self.active.qmp.execute("query-status")["status"] == "running"
            self.active.qmp.execute("stop" if running else "cont")

    # -- after a step

    def find(self) -> None:
        """The domain may be another process now, or one at all."""
        self.domain.close()
        self.domain = self.guest.connect() if listening(self.guest.socket) else self.guest.inactive()

    def look(self) -> None:
        assert not self.guest.complaints()
        stored = {one.name: one for one in self.catalog.load()}
        assert set(stored) == set(self.held)
        for name, (record, counters) in self.held.items():
            assert snapshot_counters(stored[name]) == counters, name
            if record is not None:
                assert snapshot_record(stored[name]) == record, name
        if self.active is not None and self.active.qmp.execute("query-status")["status"] == "running":
            wait_for_lines(self.guest, 2)


@pytest.mark.parametrize("seed", range(4))
def test_every_snapshot_stays_what_it_was(rig: MakeRig, tmp_path: Path, seed: int) -> None:
    program = Program(rig(*FORMATS[seed % len(FORMATS)], period=2), tmp_path, seed)
    steps = [program.create, program.revert, program.delete, program.switch, program.pause]
    for _ in range(STEPS):
        (step,) = program.chance.choices(steps, [8, 4, 4, 2, 1])
        try:
            step()
            program.done[step.__name__] += 1
        except NotPossible as error:
            program.done[f"{step.__name__} refused"] += 1
            program.refusals.append(str(error))
        program.look()
    for name in sorted(program.held):
        try:
            program.revert(name)
            program.done["at the end"] += 1
        except NotPossible as error:
            program.refusals.append(str(error))
        program.look()
    if program.active is not None:
        program.quit()
    for path in tmp_path.glob("*.qcow2"):
        oracle.assert_clean(path)
    for what, least in {"create": 5, "at the end": 2}.items():
        assert program.done[what] >= least, (program.done, program.refusals)
