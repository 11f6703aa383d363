"""Snapshots of a running guest: memory and disks of one instant, in every combination."""

import os
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.domain import ActiveDomain
from snapshot.errors import NotPossible, QmpError
from snapshot.model import Consistency, DiskMode, DiskRequest, DomainSnapshot, Liveness, MemoryMode, SnapshotRequest
from tests import oracle
from tests.live.rig import MakeRig, Rig, consistent, disk_counter, ram_record, snapshot_counters, snapshot_record

pytestmark = pytest.mark.live

INTERNAL, EXTERNAL, NO = DiskMode.INTERNAL, DiskMode.EXTERNAL, DiskMode.NO


def states(domain: ActiveDomain) -> list[str]:
    """STOP and RESUME, in order."""
    return [event["event"] for event in domain.qmp.events() if event["event"] in ("STOP", "RESUME")]


@pytest.mark.parametrize(
    ("modes", "memory_file", "liveness"),
    [
        ([INTERNAL, INTERNAL], False, Liveness.PAUSED),
        ([EXTERNAL, EXTERNAL], False, Liveness.PAUSED),
        ([INTERNAL, INTERNAL], True, Liveness.PAUSED),
        ([EXTERNAL, INTERNAL], False, Liveness.PAUSED),
        ([EXTERNAL, EXTERNAL], False, Liveness.LIVE),
        ([INTERNAL, INTERNAL], False, Liveness.LIVE),
        ([INTERNAL, EXTERNAL], False, Liveness.LIVE),
        ([EXTERNAL, EXTERNAL], False, Liveness.BACKGROUND),
        ([INTERNAL, EXTERNAL], False, Liveness.BACKGROUND),
    ],
)
def test_memory_and_disks_are_of_one_instant(
    rig: MakeRig, tmp_path: Path, modes: list[DiskMode], memory_file: bool, liveness: Liveness
) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    for number in range(2):
        name = f"s-{number}"
        taken = executor.create(
            domain,
            catalog,
            SnapshotRequest(
                name,
                disks={disk.target: DiskRequest(mode) for disk, mode in zip(guest.disks, modes, strict=True)},
                memory_file=str(tmp_path / f"{name}.mem") if memory_file else None,
                liveness=liveness,
            ),
        )
        assert taken.consistency is Consistency.CHECKPOINT
        assert taken.memory.mode is (
            MemoryMode.INTERNAL if modes == [INTERNAL] * 2 and not memory_file and liveness is Liveness.PAUSED
            else MemoryMode.EXTERNAL
        )  # fmt: skip
        assert taken.memory.machine == "pc-i440fx-7.2"
        assert taken.memory.ram_size == 4 << 20
        assert taken.memory.size > 100_000
        assert [disk.mode for disk in taken.disks] == modes
        assert domain.qmp.execute("query-status")["status"] == "running"
        guest.wait_for_ticks(2)
        record, counters = snapshot_record(taken), snapshot_counters(taken)
        assert consistent(record, counters), (record, counters)
    # What was set for the snapshot is as before.
    assert domain.qmp.execute("query-migrate-parameters")["max-bandwidth"] == 128 << 20
    assert not any(one["state"] for one in domain.qmp.execute("query-migrate-capabilities"))
    loaded = catalog.load()
    assert [one.name for one in loaded] == ["s-0", "s-1"]
    assert [one.parent for one in loaded] == [None, "s-0"]
    assert catalog.current == "s-1"
    files = [domain_disk.disk.path for domain_disk in domain.facts().disks]
    guest.quit(domain.qmp)
    assert not guest.complaints()
    for path in files:
        oracle.assert_clean(path)
    leftover = {name for name in os.listdir(tmp_path / "catalog") if name.startswith("operation")}
    assert not leftover


@pytest.mark.parametrize(
    "modes", [[EXTERNAL, EXTERNAL], [INTERNAL, INTERNAL], [EXTERNAL, INTERNAL], [NO, EXTERNAL], [INTERNAL, NO]]
)
def test_disk_only_of_a_running_guest_never_stops_it(rig: MakeRig, tmp_path: Path, modes: list[DiskMode]) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    domain.qmp.events()
    for number in range(2):
        taken = executor.create(
            domain,
            catalog,
            SnapshotRequest(
                f"s-{number}",
                disk_only=True,
                disks={disk.target: DiskRequest(mode) for disk, mode in zip(guest.disks, modes, strict=True)},
            ),
        )
        assert taken.consistency is Consistency.CRASH_CONSISTENT
        assert taken.memory.mode is MemoryMode.NO
        guest.wait_for_ticks(1)
        counters = snapshot_counters(taken)
        assert max(counters) - min(counters) <= 1
        assert counters == sorted(counters, reverse=True)
    assert states(domain) == []
    guest.quit(domain.qmp)
    assert not guest.complaints()


def test_raw_disks_as_external_bases(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig("raw", "qcow2")
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    taken = executor.create(domain, catalog, SnapshotRequest("one", disks={"vdb": DiskRequest(EXTERNAL)}))
    assert [(disk.mode, disk.format) for disk in taken.disks] == [(EXTERNAL, "raw"), (EXTERNAL, "qcow2")]
    guest.wait_for_ticks(2)
    assert consistent(snapshot_record(taken), snapshot_counters(taken))
    assert oracle.image_info(taken.disks[0].overlay)["backing-filename-format"] == "raw"


@pytest.mark.parametrize(
    ("formats", "modes"),
    [
        (("qcow2", "qcow2"), [EXTERNAL, EXTERNAL]),
        (("qcow2", "qcow2"), [INTERNAL, INTERNAL]),
        (("qcow2", "qcow2"), [INTERNAL, EXTERNAL]),
        (("qcow2", "qcow2"), [NO, INTERNAL]),
        (("raw", "qcow2"), [EXTERNAL, INTERNAL]),
    ],
)
def test_inactive_domain(rig: MakeRig, tmp_path: Path, modes: list[DiskMode], formats: tuple[str, ...]) -> None:
    guest: Rig = rig(*formats)
    guest.quit(guest.start().qmp)
    before = [disk_counter(disk.path, disk.format) for disk in guest.disks]
    catalog = Catalog(str(tmp_path / "catalog"))
    request = {disk.target: DiskRequest(mode) for disk, mode in zip(guest.disks, modes, strict=True)}
    taken = executor.create(guest.inactive(), catalog, SnapshotRequest("off", disk_only=True, disks=request))
    assert taken.consistency is Consistency.CLEAN
    assert snapshot_counters(taken) == [c for c, mode in zip(before, modes, strict=True) if mode is not NO]
    layers = {disk.target: disk.overlay for disk in taken.disks if disk.overlay}
    domain = guest.start(paths=layers)
    guest.quit(domain.qmp)
    assert snapshot_counters(taken) == [c for c, mode in zip(before, modes, strict=True) if mode is not NO]
    facts = guest.inactive().facts(layers)
    assert [one.disk.path for one in facts.disks] == [layers.get(disk.target, disk.path) for disk in guest.disks]
    assert all(disk_counter(one.disk.path, one.disk.format) > c for one, c in zip(facts.disks, before, strict=True))
    assert not guest.complaints()
    # A second one goes on from there.
    again = executor.create(guest.inactive(), catalog, SnapshotRequest("off2", disk_only=True, disks=request))
    assert again.parent == "off"
    for disk, mode in zip(again.disks, modes, strict=True):
        if mode is EXTERNAL:
            assert disk.file == layers[disk.target]


def test_all_reasons_at_once(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig("qcow2", "raw", "qcow2")
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    domain.qmp.execute("block-dirty-bitmap-add", {"node": "d0", "name": "b0"})
    (tmp_path / "taken.qcow2").write_bytes(b"somebody's")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(NotPossible) as caught:
        executor.create(
            domain,
            catalog,
            SnapshotRequest(
                "7",
                disks={
                    "vda": DiskRequest(INTERNAL),
                    "vdb": DiskRequest(INTERNAL),
                    "vdc": DiskRequest(NO),
                    "vdx": DiskRequest(EXTERNAL),
                },
                memory_file=str(tmp_path / "taken.qcow2"),
            ),
        )
    text = "\n".join(caught.value.reasons)
    for part in (
        "reads as a number",
        "no disk 'vdx'",
        "vda has the dirty bitmap 'b0'",
        "vdb is raw",
        "vdc can be written and is left out",
        "taken.qcow2' exists already",
    ):
        assert part in text
    assert len(caught.value.reasons) == 6
    assert sorted(set(os.listdir(tmp_path)) - {"catalog"}) == before
    assert (tmp_path / "taken.qcow2").read_bytes() == b"somebody's"


def test_a_name_that_one_disk_has_is_refused(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    oracle.qemu_img("snapshot", "-c", "twice", guest.disks[1].path)
    domain = guest.start()
    with pytest.raises(NotPossible, match="vdb has an internal snapshot 'twice' already"):
        executor.create(domain, Catalog(str(tmp_path / "catalog")), SnapshotRequest("twice"))


@pytest.mark.parametrize("liveness", [Liveness.LIVE, Liveness.BACKGROUND])
def test_dry_run_touches_nothing(
    rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, liveness: Liveness
) -> None:
    guest = rig()
    domain = guest.start()
    before = sorted(os.listdir(tmp_path))
    execute = domain.qmp.execute
    sent: list[str] = []

    def noted(command: str, arguments: Any = None, **more: Any) -> Any:
        sent.append(command)
        return execute(command, arguments, **more)

    monkeypatch.setattr(domain.qmp, "execute", noted)
    plan = executor.create(
        domain,
        Catalog(str(tmp_path / "catalog")),
        SnapshotRequest("x", default_mode=EXTERNAL, liveness=liveness),
        dry_run=True,
    )
    assert {command for command in sent if not command.startswith(("query-", "x-debug-query-", "qom-"))} == set()
    assert sorted(os.listdir(tmp_path)) == before
    overlays = ["make-overlay", "add-node"] * 2
    assert isinstance(plan, list)
    assert [step.action for step in plan] == [
        *overlays, "make-memory-file",
        *(["memory", "disks", "end-memory"] if liveness is Liveness.LIVE else ["stop", "disks", "memory"]),
        "cont", "keep-memory", "record",
    ]  # fmt: skip
    text = "\n".join(line for step in plan for line in step.lines())
    assert '"type": "blockdev-snapshot"' in text
    assert ("migrate-continue" in text) is (liveness is Liveness.LIVE)
    assert ("background-snapshot" in text) is (liveness is Liveness.BACKGROUND)


def test_a_paused_guest_stays_as_it_is(rig: MakeRig, tmp_path: Path) -> None:
    """It never runs, not for a moment; its images stay QEMU's; and all that can be done with it goes on."""
    guest = rig()
    domain = guest.start()
    domain.qmp.execute("stop")
    domain.qmp.events()
    record = ram_record(domain.qmp, tmp_path)
    catalog = Catalog(str(tmp_path / "catalog"))
    requests = (
        SnapshotRequest("a"),
        SnapshotRequest("b", disk_only=True),
        SnapshotRequest("c", default_mode=EXTERNAL, liveness=Liveness.LIVE),
        SnapshotRequest("d", default_mode=EXTERNAL, liveness=Liveness.BACKGROUND),
        SnapshotRequest("e", disks={"vda": DiskRequest(INTERNAL)}, memory_file=str(tmp_path / "e.mem")),
        SnapshotRequest("f", memory_file=str(tmp_path / "f.mem")),
    )
    for request in requests:
        taken = executor.create(domain, catalog, request)
        assert isinstance(taken, DomainSnapshot)
        assert taken.state.value == ("disk-snapshot" if request.disk_only else "paused")
        assert domain.qmp.execute("query-status")["status"] == "paused"
        if not request.disk_only:
            assert snapshot_record(taken) == record
            assert consistent(record, snapshot_counters(taken))
    assert states(domain) == []
    for facts in domain.facts().disks:
        with pytest.raises(qcowlib.ImageLocked):
            qcowlib.open_image(facts.disk.path, format="qcow2", writable=True, open_backing=False)
    assert ram_record(domain.qmp, tmp_path) == record
    domain.qmp.execute("cont")
    domain.close()
    domain = guest.connect()
    assert domain.qmp.execute("query-fdsets") == []
    guest.wait_for_ticks(3)
    assert not guest.complaints()


def test_background_falls_back_to_live_and_says_why(
    rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = rig()
    domain = guest.start()
    execute = domain.qmp.execute

    def refuse(command: str, arguments: Any = None, **more: Any) -> Any:
        if command == "migrate-set-capabilities":
            for one in arguments["capabilities"]:
                if one["capability"] == "background-snapshot" and one["state"]:
                    raise QmpError(command, "Background-snapshot is not supported by host kernel")
        return execute(command, arguments, **more)

    monkeypatch.setattr(domain.qmp, "execute", refuse)
    said: list[str] = []
    taken = executor.create(
        domain,
        Catalog(str(tmp_path / "catalog")),
        SnapshotRequest("one", default_mode=EXTERNAL, liveness=Liveness.BACKGROUND),
        progress=lambda text, _done, _total: said.append(text),
    )
    assert isinstance(taken, DomainSnapshot)
    assert said[0] == (
        "background snapshots are not possible here (QEMU: Background-snapshot is not supported by host kernel): "
        "taking it live"
    )
    assert "write the rest of the memory, with the guest paused" in said
    assert consistent(snapshot_record(taken), snapshot_counters(taken))
    assert domain.qmp.execute("query-status")["status"] == "running"
