"""Going back: memory and disks fit afterwards, and nothing that was reachable is lost."""

import os
import re
import time
from pathlib import Path

import pytest

from snapshot import executor, plan_revert_reasons
from snapshot.catalog import Catalog
from snapshot.domain import ActiveDomain
from snapshot.errors import DomainSnapshotError, NotPossible
from snapshot.model import (
    DeleteOptions,
    DiskMode,
    DiskRequest,
    DomainSnapshot,
    Liveness,
    RevertOptions,
    SnapshotRequest,
)
from snapshot.qmp import poll
from tests import oracle
from tests.live.rig import MakeRig, Rig, consistent, disk_counter, ram_record, snapshot_counters, snapshot_record
from tests.live.test_domain_faults import state

pytestmark = pytest.mark.live

INTERNAL, EXTERNAL, NO = DiskMode.INTERNAL, DiskMode.EXTERNAL, DiskMode.NO
DISCARD = RevertOptions(discard_current=True)


def create(domain: object, catalog: Catalog, request: SnapshotRequest) -> DomainSnapshot:
    taken = executor.create(domain, catalog, request)  # type: ignore[arg-type]
    assert isinstance(taken, DomainSnapshot)
    return taken


def now(guest: Rig, domain: ActiveDomain) -> tuple[tuple[int, int], list[int]]:
    """Memory record and disk counters of the guest that stands."""
    disks = domain.facts().disks
    record = ram_record(domain.qmp, guest.directory)
    return record, [disk_counter(one.disk.path, one.disk.format) for one in disks]


def test_internal_in_the_live_process(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    taken = create(domain, catalog, SnapshotRequest("one"))
    guest.wait_for_ticks(4)
    assert executor.revert(domain, catalog, "one", RevertOptions(running=False)) == taken
    assert catalog.current == "one"
    record, counters = now(guest, domain)
    assert record == snapshot_record(taken)
    assert counters == snapshot_counters(taken)
    domain.qmp.execute("cont")
    guest.wait_for_ticks(3)
    # The state before is in the safety snapshot, and can be gone back to as well.
    (safety,) = [one.name for one in catalog.load() if one.name != "one"]
    executor.revert(domain, catalog, safety, DISCARD)
    assert domain.qmp.execute("query-status")["status"] == "running"
    guest.wait_for_ticks(3)
    assert not guest.complaints()
    names = {one.name for facts in domain.facts().disks for one in facts.snapshots}
    assert names == {"one", safety}
    guest.quit(domain.qmp)
    for disk in guest.disks:
        oracle.assert_clean(disk.path)


@pytest.mark.parametrize("what", ["bitmap", "duplicate", "gone", "left out", "ram", "devices", "swapped"])
def test_what_qemu_would_find_out_too_late_is_refused(rig: MakeRig, tmp_path: Path, what: str) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    create(domain, catalog, SnapshotRequest("one"))
    if what == "bitmap":
        domain.qmp.execute("block-dirty-bitmap-add", {"node": "d1", "name": "b"})
    elif what == "gone":
        domain.qmp.execute("blockdev-snapshot-delete-internal-sync", {"device": "d1", "name": "one"})
    else:
        guest.quit(domain.qmp)
        extra, paths = [], {}
        if what == "duplicate":
            oracle.qemu_img("snapshot", "-c", "one", guest.disks[1].path)
        elif what == "left out":
            qcow2 = tmp_path / "extra.qcow2"
            oracle.qemu_img("create", "-f", "qcow2", qcow2, "8M")
            extra = ["-drive", f"if=none,id=x,format=qcow2,file={qcow2}", "-device", "virtio-blk-pci,drive=x,id=x"]
        elif what == "ram":
            guest.memory = 8
        elif what == "devices":
            extra = ["-device", "virtio-rng-pci,id=rng"]
        else:
            paths = {"vda": guest.disks[1].path, "vdb": guest.disks[0].path}
        domain = guest.start(*extra, paths=paths)
        guest.wait_for_ticks(3)
    message = {
        "bitmap": "vdb has the dirty bitmap 'b'",
        "duplicate": "vdb has 2 internal snapshots 'one'",
        "gone": "vdb has 0 internal snapshots 'one'",
        "left out": "disk x can be written and is not in the snapshot",
        "ram": "4194304 bytes of RAM, and the domain 8388608",
        "devices": r"new rng \(virtio-rng-pci\)",
        "swapped": "disk vda is a virtio-blk-pci addr=24 now, and was a virtio-blk-pci addr=16: the memory would not",
    }[what]
    ticks = len(guest.lines())
    with pytest.raises(NotPossible, match=message):
        executor.revert(domain, catalog, "one", DISCARD)
    assert domain.qmp.execute("query-status")["status"] == "running"
    guest.wait_for_ticks(2)
    assert len(guest.lines()) > ticks
    assert not guest.complaints()


def test_a_load_that_fails_half_way_is_taken_back(
    rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks are taken out: QEMU itself fails, with disks half reverted."""
    guest = rig()
    guest.quit(guest.start().qmp)
    catalog = Catalog(str(tmp_path / "catalog"))
    domain = guest.start()
    create(domain, catalog, SnapshotRequest("one"))
    guest.quit(domain.qmp)
    guest.memory = 8
    domain = guest.start()
    monkeypatch.setattr(plan_revert_reasons, "_against_machine", lambda _request: iter(()))
    guest.wait_for_ticks(3)
    with pytest.raises(DomainSnapshotError, match="while loading VM state"):
        executor.revert(domain, catalog, "one", DISCARD)
    assert domain.qmp.execute("query-status")["status"] == "running"
    guest.wait_for_ticks(3)
    domain.qmp.execute("stop")
    assert consistent(*now(guest, domain))
    assert not guest.complaints()
    assert {one.name for facts in domain.facts().disks for one in facts.snapshots} == {"one"}


@pytest.mark.parametrize("formats", [("qcow2", "qcow2"), ("raw", "qcow2")])
def test_external_disks_in_the_live_process(rig: MakeRig, tmp_path: Path, formats: tuple[str, ...]) -> None:
    guest = rig(*formats)
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    taken = create(domain, catalog, SnapshotRequest("one", disk_only=True, default_mode=EXTERNAL))
    later = create(domain, catalog, SnapshotRequest("two", disk_only=True, default_mode=EXTERNAL))
    guest.wait_for_ticks(6)
    wanted = snapshot_counters(taken)
    executor.revert(domain, catalog, "one", RevertOptions())
    guest.wait_for_ticks(3)
    assert f"B{wanted[0]:08X}" in guest.lines()
    assert snapshot_counters(taken) == wanted
    assert catalog.current == "one"
    layers = [one.disk.path for one in domain.facts().disks]
    assert all(".one-" in path for path in layers)
    nodes = [node["node-name"] for node in domain.qmp.execute("query-named-block-nodes", {"flat": True})]
    assert len([name for name in nodes if name.startswith("ds-") and name.endswith("-0")]) == 1
    # What came later is still there, and can be gone back to.
    executor.revert(domain, catalog, "two", DISCARD)
    guest.wait_for_ticks(2)
    assert f"B{snapshot_counters(later)[0]:08X}" in guest.lines()
    guest.quit(domain.qmp)
    assert all(oracle.image_check(path)["rc"] == 0 for path in layers)


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("liveness", [Liveness.PAUSED, Liveness.LIVE])
def test_memory_file_through_the_start_command(rig: MakeRig, tmp_path: Path, active: bool, liveness: Liveness) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    taken = create(domain, catalog, SnapshotRequest("one", default_mode=EXTERNAL, liveness=liveness))
    guest.wait_for_ticks(4)
    old = guest.process
    if active:
        executor.revert(domain, catalog, "one", RevertOptions(running=False))
    else:
        guest.quit(domain.qmp)
        executor.revert(guest.inactive(), catalog, "one", RevertOptions(running=False))
        domain = guest.connect()
    old.wait(60)
    try:
        record, counters = now(guest, domain)
        assert record == snapshot_record(taken)
        assert counters == snapshot_counters(taken)
        domain.qmp.execute("cont")
        wait_for_lines(guest)
        assert not guest.complaints()
        assert len(catalog.load()) == 2
        assert [one.disk.path for one in domain.facts().disks] == list(
            executor.Journal(catalog.directory).layers().values()
        )
    finally:
        domain.qmp.execute("quit")
        domain.close()


@pytest.mark.parametrize("what", ["other ram", "other machine", "cut file", "no start", "other disk", "swapped"])
def test_a_new_qemu_that_fails_leaves_the_old_one_running(rig: MakeRig, tmp_path: Path, what: str) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    taken = create(domain, catalog, SnapshotRequest("one", default_mode=EXTERNAL))
    guest.wait_for_ticks(2)
    before = state(guest, domain, catalog)
    command = guest.description.command
    if what == "other ram":
        command[command.index("-m") + 1] = "8"
    elif what == "other machine":
        command[command.index("pc")] = "q35"
    elif what == "cut file":
        assert taken.memory.file is not None
        os.truncate(taken.memory.file, taken.memory.size // 2)
    elif what == "no start":
        command.insert(1, "-nonsense")
    elif what == "swapped":
        other = {"{disk:vda}": "{disk:vdb}", "{disk:vdb}": "{disk:vda}"}
        guest.description.command = [re.sub(r"\{disk:\w+\}", lambda found: other[found[0]], word) for word in command]
    else:
        guest.description.command = [word.replace("{disk:vdb}", guest.disks[1].path) for word in command]
        guest.description.command.append("{disk:vdb}")
    message = {
        "other ram": "8388608 bytes of RAM, and the memory has 4194304",
        "other machine": "starts a pc-q35-7.2, and the memory is of a pc-i440fx-7.2",
        "cut file": "load of migration failed",
        "no start": "-nonsense: invalid option",
        "swapped": r"makes '.*' a virtio-blk-pci addr=24, and in the snapshot it was a virtio-blk-pci addr=16",
        "other disk": r"opens '.*/d1.qcow2' for writing, which is no disk of the domain",
    }[what]
    with pytest.raises(DomainSnapshotError, match=message):
        executor.revert(domain, catalog, "one", DISCARD)
    after = state(guest, domain, catalog)
    assert [name for name in after.pop("files") if name not in before["files"]] == []
    del before["files"]
    assert after == before
    assert [name for name in os.listdir(catalog.directory) if name.startswith(("operation", "start.pid"))] == []
    domain.qmp.execute("stop")
    record = ram_record(domain.qmp, guest.directory)
    assert consistent(record, [disk_counter(one.disk.path, one.disk.format) for one in domain.facts().disks])


def wait_for_lines(guest: Rig, count: int = 3) -> None:
    """Wait for lines of whichever QEMU runs; one that the engine has started begins a new serial file."""
    lines = len(guest.lines())
    end = time.monotonic() + 60
    while len(guest.lines()) < lines + count:
        lines = min(lines, len(guest.lines()))
        assert time.monotonic() < end, guest.lines()[-3:]
        time.sleep(0.02)


def test_mixed_with_memory_file_when_off(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    modes = {"vda": DiskRequest(INTERNAL), "vdb": DiskRequest(EXTERNAL)}
    taken = create(domain, catalog, SnapshotRequest("one", disks=modes))
    guest.wait_for_ticks(4)
    guest.quit(domain.qmp)
    executor.revert(guest.inactive(), catalog, "one", RevertOptions(running=False))
    domain = guest.connect()
    try:
        record, counters = now(guest, domain)
        assert record == snapshot_record(taken)
        assert counters == snapshot_counters(taken)
        assert not [one for facts in domain.facts().disks for one in facts.snapshots if one.name.startswith("ds-")]
    finally:
        domain.qmp.execute("quit")
        domain.close()


def test_memory_in_the_qcow2_of_a_domain_that_is_off(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    taken = create(domain, catalog, SnapshotRequest("one"))
    guest.wait_for_ticks(4)
    guest.quit(domain.qmp)
    executor.revert(guest.inactive(), catalog, "one", RevertOptions(running=False))
    domain = guest.connect()
    try:
        record, counters = now(guest, domain)
        assert record == snapshot_record(taken)
        assert counters == snapshot_counters(taken)
        domain.qmp.execute("cont")
        wait_for_lines(guest)
        assert not guest.complaints()
    finally:
        domain.qmp.execute("quit")
        domain.close()


@pytest.mark.parametrize("modes", [[INTERNAL, INTERNAL], [EXTERNAL, EXTERNAL], [EXTERNAL, INTERNAL]])
def test_disks_of_a_domain_that_is_off(rig: MakeRig, tmp_path: Path, modes: list[DiskMode]) -> None:
    guest = rig()
    guest.quit(guest.start().qmp)
    catalog = Catalog(str(tmp_path / "catalog"))
    requests = {disk.target: DiskRequest(mode) for disk, mode in zip(guest.disks, modes, strict=True)}
    taken = create(guest.inactive(), catalog, SnapshotRequest("one", disk_only=True, disks=requests))
    wanted = snapshot_counters(taken)
    journal = executor.Journal(catalog.directory)
    guest.quit(guest.start(paths=journal.layers()).qmp)
    before = [disk_counter(one.disk.path, "qcow2") for one in guest.inactive().facts(journal.layers()).disks]
    assert all(b > w for b, w in zip(before, wanted, strict=True))
    executor.revert(guest.inactive(), catalog, "one", RevertOptions(safety_name="safe"))
    facts = guest.inactive().facts(journal.layers())
    assert [disk_counter(one.disk.path, "qcow2") for one in facts.disks] == wanted
    assert catalog.current == "one"
    assert not [one for disk in facts.disks for one in disk.snapshots if one.name.startswith("ds-")]
    guest.quit(guest.start(paths=journal.layers()).qmp)
    assert snapshot_counters(taken) == wanted
    executor.revert(guest.inactive(), catalog, "safe", DISCARD)
    facts = guest.inactive().facts(journal.layers())
    assert [disk_counter(one.disk.path, "qcow2") for one in facts.disks] == before
    for one in facts.disks:
        oracle.assert_clean(one.disk.path)
    assert not guest.complaints()


def test_snapshots_that_others_have_made(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    command = {"job-id": "j", "tag": "theirs", "vmstate": "d0", "devices": ["d0", "d1"]}
    domain.qmp.execute("snapshot-save", command)
    poll(lambda: domain.qmp.execute("query-jobs")[0]["status"] == "concluded" or None, deadline=60, what="the job")
    domain.qmp.execute("job-dismiss", {"id": "j"})
    wanted = [disk_counter(disk.path, "qcow2", "theirs") for disk in guest.disks]
    guest.wait_for_ticks(4)
    executor.revert(domain, catalog, "theirs", RevertOptions(running=False))
    record, counters = now(guest, domain)
    assert counters == wanted
    assert consistent(record, counters)
    assert catalog.current is None
    domain.qmp.execute("cont")
    guest.wait_for_ticks(3)
    assert not guest.complaints()
    guest.quit(domain.qmp)
    for disk in guest.disks:
        oracle.qemu_img("snapshot", "-c", "offline", disk.path)
    before = [disk_counter(disk.path, "qcow2") for disk in guest.disks]
    guest.quit(guest.start().qmp)
    executor.revert(guest.inactive(), catalog, "offline", DISCARD)
    assert [disk_counter(disk.path, "qcow2") for disk in guest.disks] == before
    executor.delete(guest.inactive(), catalog, "offline", DeleteOptions())
    executor.delete(guest.inactive(), catalog, "theirs", DeleteOptions())
    for disk in guest.disks:
        oracle.assert_clean(disk.path)
        names = [one["name"] for one in oracle.image_info(disk.path)["snapshots"]]
        assert names == [one.name for one in catalog.load()]
