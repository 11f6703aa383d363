"""Deleting snapshots: what is only in them goes, every other state stays as it is."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.domain import ActiveDomain, Domain
from snapshot.errors import NoSuchDomainSnapshot, NotPossible, RecoverNeeded
from snapshot.model import DeleteOptions, DiskMode, DiskRequest, DomainSnapshot, RevertOptions, SnapshotRequest
from tests import oracle
from tests.live.rig import Faults, MakeRig, Rig, disk_counter, snapshot_counters, snapshot_record

pytestmark = pytest.mark.live

INTERNAL, EXTERNAL = DiskMode.INTERNAL, DiskMode.EXTERNAL


def external(domain: Domain, catalog: Catalog, name: str, **more: object) -> DomainSnapshot:
    taken = executor.create(
        domain,
        catalog,
        SnapshotRequest(name, disk_only=True, default_mode=EXTERNAL, **more),  # type: ignore[arg-type]
    )
    assert isinstance(taken, DomainSnapshot)
    return taken


def chain(guest: Rig, domain: ActiveDomain, catalog: Catalog) -> list[DomainSnapshot]:
    """Three external snapshots, with something written after each."""
    taken = []
    for name in ("one", "two", "three"):
        taken.append(external(domain, catalog, name))
        guest.wait_for_ticks(4)
    return taken


def counters_of(catalog: Catalog) -> dict[str, list[int]]:
    return {snapshot.name: snapshot_counters(snapshot) for snapshot in catalog.load()}


def images(guest: Rig) -> set[str]:
    return {name for name in os.listdir(guest.directory) if name.endswith((".qcow2", ".raw", ".mem"))}


@pytest.mark.parametrize(
    ("into", "order", "first"),
    [
        ("base", ("two", "three", "one"), "raw"),
        ("base", ("three", "one", "two"), "qcow2"),
        ("overlay", ("two", "three", "one"), "qcow2"),
        ("overlay", ("three", "one", "two"), "raw"),
    ],
)
def test_external_in_the_live_process(
    rig: MakeRig, tmp_path: Path, into: str, order: tuple[str, ...], first: str
) -> None:
    guest = rig(first, "qcow2")
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    chain(guest, domain, catalog)
    for name in order:
        wanted = counters_of(catalog)
        del wanted[name]
        executor.delete(domain, catalog, name, DeleteOptions(into=into))
        assert counters_of(catalog) == wanted
        guest.wait_for_ticks(2)
        assert domain.qmp.execute("query-jobs") == []
    assert catalog.current is None
    facts = domain.facts()
    paths = [one.disk.path for one in facts.disks]
    assert executor.Journal(catalog.directory).layers() == (
        {} if into == "base" else {one.disk.target: one.disk.path for one in facts.disks}
    )
    if into == "base":
        assert paths == [disk.path for disk in guest.disks]
        assert images(guest) == {f"d0.{first}", "d1.qcow2"}
    else:
        assert [one.disk.backing_chain for one in facts.disks] == [(), ()]
        assert len(images(guest)) == 4  # the original files stay
    assert not guest.complaints()
    guest.quit(domain.qmp)
    for path in paths:
        if path.endswith("qcow2"):
            oracle.assert_clean(path)
    guest.start(paths={one.disk.target: one.disk.path for one in facts.disks})
    assert not guest.complaints()


@pytest.mark.parametrize("into", ["base", "overlay", None])
def test_external_of_a_domain_that_is_off(rig: MakeRig, tmp_path: Path, into: str | None) -> None:
    guest = rig("raw", "qcow2")
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    chain(guest, domain, catalog)
    guest.quit(domain.qmp)
    journal = executor.Journal(catalog.directory)
    active = [disk_counter(one.disk.path, one.disk.format) for one in guest.inactive().facts(journal.layers()).disks]
    for name in ("two", "three", "one"):
        wanted = counters_of(catalog)
        del wanted[name]
        executor.delete(guest.inactive(), catalog, name, DeleteOptions(into=into))
        assert counters_of(catalog) == wanted
        facts = guest.inactive().facts(journal.layers())
        assert [disk_counter(one.disk.path, one.disk.format) for one in facts.disks] == active
    for one in facts.disks:
        if one.disk.format == "qcow2":
            oracle.assert_clean(one.disk.path)
    guest.start(paths=journal.layers())
    assert not guest.complaints()


def test_internal_and_memory(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    for name in ("a", "b", "c"):
        executor.create(domain, catalog, SnapshotRequest(name))
    mixed = {"vda": DiskRequest(INTERNAL), "vdb": DiskRequest(EXTERNAL)}
    executor.create(domain, catalog, SnapshotRequest("m", disks=mixed))
    guest.wait_for_ticks(2)
    executor.delete(domain, catalog, "m", DeleteOptions())
    assert not [name for name in images(guest) if name.endswith(".mem")]
    kept = {name: snapshot_record(one) for name in ("a", "c") for one in catalog.load() if one.name == name}
    if domain.facts().disks[1].disk.path == guest.disks[1].path:
        executor.delete(domain, catalog, "b", DeleteOptions())
        assert [one.name for one in catalog.load()] == ["a", "c"]
        assert {one.name: one.parent for one in catalog.load()} == {"a": None, "c": "a"}
        for facts in domain.facts().disks:
            assert [one.name for one in facts.snapshots] == ["a", "c"]
    assert kept == {name: snapshot_record(one) for name in ("a", "c") for one in catalog.load() if one.name == name}
    guest.wait_for_ticks(2)
    guest.quit(domain.qmp)
    assert not guest.complaints()
    executor.delete(guest.inactive(), catalog, "a", DeleteOptions(children=True))
    assert catalog.load() == []
    for disk in guest.disks:
        oracle.assert_clean(disk.path)
        assert oracle.image_info(disk.path).get("snapshots", []) == []


def test_branches_that_qemu_does_not_have_open(rig: MakeRig, tmp_path: Path) -> None:
    """After a revert the later snapshots are a branch of their own, which a merge must not leave behind."""
    guest = rig(named=False)
    domain = guest.start()
    assert all(one.node.startswith("#block") for one in domain.facts().disks)
    catalog = Catalog(str(tmp_path / "catalog"))
    chain(guest, domain, catalog)
    executor.revert(domain, catalog, "two", RevertOptions(discard_current=True))
    guest.wait_for_ticks(3)
    for name in ("one", "two", "three"):
        wanted = counters_of(catalog)
        del wanted[name]
        executor.delete(domain, catalog, name, DeleteOptions())
        assert counters_of(catalog) == wanted
        guest.wait_for_ticks(2)
    paths = [one.disk.path for one in domain.facts().disks]
    guest.quit(domain.qmp)
    assert not guest.complaints()
    assert all(oracle.image_check(path)["rc"] == 0 for path in paths)
    guest.start(paths=executor.Journal(catalog.directory).layers())
    assert not guest.complaints()


@pytest.mark.parametrize(
    ("branch", "gone"),
    [
        (False, ("four", "three", "two", "one")),
        (False, ("four", "three", "two")),
        (True, ("three", "four", "two", "one")),
        (True, ("three", "two")),
    ],
)
def test_children_of_a_running_domain(rig: MakeRig, tmp_path: Path, branch: bool, gone: tuple[str, ...]) -> None:
    """Inside and outside mixed: what comes from the last one named goes, the other snapshots and the guest stay.

    branch: one -> two -> three, one -> four, with the guest on the latter; else each comes from the one before.
    """
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    mixed = {"vda": DiskRequest(INTERNAL), "vdb": DiskRequest(EXTERNAL)}
    for request in (
        SnapshotRequest("one", disk_only=True, default_mode=EXTERNAL),
        SnapshotRequest("two"),
        SnapshotRequest("three", default_mode=EXTERNAL),
        SnapshotRequest("four", disks=mixed),
    ):
        if branch and request.name == "four":
            executor.revert(domain, catalog, "one", RevertOptions(discard_current=True))
        executor.create(domain, catalog, request)
        guest.wait_for_ticks(3)
    wanted = {name: each for name, each in counters_of(catalog).items() if name not in gone}
    shown = executor.delete(domain, catalog, gone[-1], DeleteOptions(children=True), dry_run=True)
    assert len(catalog.load()) == 4
    assert isinstance(shown, list)
    assert sum(step.action == "decide" or step.text.startswith("delete '") for step in shown) >= len(gone)
    assert sorted(executor.delete(domain, catalog, gone[-1], DeleteOptions(children=True))) == sorted(gone)
    assert counters_of(catalog) == wanted
    assert catalog.current == ("four" if "four" in wanted else "one" if wanted else None)
    guest.wait_for_ticks(3)
    assert domain.qmp.execute("query-jobs") == []
    facts = domain.facts().disks
    assert {one.name for facts_ in facts for one in facts_.snapshots} <= set(wanted)
    files = {path for one in facts for path in (one.disk.path, *one.disk.backing_chain)}
    kept = {path for one in catalog.load() for disk in one.disks for path in (disk.file, disk.overlay or "")}
    kept |= {one.memory.file or "" for one in catalog.load()}
    left = images(guest) - {os.path.basename(path) for path in files | kept}
    assert left <= {"d0.qcow2", "d1.qcow2"}  # those of the description stay, whoever goes on with what they hold
    assert not guest.complaints()
    guest.quit(domain.qmp)
    for path in files:
        oracle.assert_clean(path)
    guest.start(paths=executor.Journal(catalog.directory).layers())
    assert not guest.complaints()


def test_other_users_of_a_base_are_refused(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    guest.quit(guest.start().qmp)
    catalog = Catalog(str(tmp_path / "catalog"))
    external(guest.inactive(), catalog, "one")
    external(guest.inactive(), catalog, "two")
    executor.revert(guest.inactive(), catalog, "one", RevertOptions(discard_current=True))
    with pytest.raises(NotPossible, match=r"one-.*' is based on"):
        executor.delete(guest.inactive(), catalog, "one", DeleteOptions(into="base"))
    stranger = tmp_path / "stranger.qcow2"
    oracle.qemu_img("create", "-f", "qcow2", "-b", guest.disks[1].path, "-F", "qcow2", stranger)
    with pytest.raises(NotPossible, match="stranger"):
        executor.delete(guest.inactive(), catalog, "one", DeleteOptions(into="base"))
    before = images(guest)
    executor.delete(guest.inactive(), catalog, "one", DeleteOptions(metadata_only=True))
    assert images(guest) == before
    with pytest.raises(NoSuchDomainSnapshot):
        executor.delete(guest.inactive(), catalog, "one", DeleteOptions())


@pytest.mark.slow
@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("into", ["base", "overlay"])
def test_a_deletion_cut_off_at_each_step_is_finished(
    rig: MakeRig, tmp_path: Path, faults: Faults, active: bool, into: str
) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    journal = executor.Journal(catalog.directory)
    if not active:
        guest.quit(domain.qmp)
    plan = None
    number = injected = clean = 0
    while plan is None or number < len(plan):
        here: Domain = domain if active else guest.inactive()
        before = external(here, catalog, f"x{number}")
        external(here, catalog, f"y{number}")
        wanted = counters_of(catalog)
        del wanted[before.name]
        plan = executor.delete(here, catalog, before.name, DeleteOptions(into=into), dry_run=True)
        if active:
            domain.close()
        program = f"""
            import os, signal
            from snapshot import executor
            from snapshot.catalog import Catalog
            from tests.live.rig import Description
            from tests.live.test_domain_faults import at_step
            from snapshot.domain import open_domain
            from snapshot.model import DeleteOptions, Disk
            disks = tuple(Disk(target, path, "qcow2") for target, path in {[(d.target, d.path) for d in guest.disks]!r})
            domain = open_domain(Description("guest", disks, {guest.socket!r}))
            progress = at_step({number}, lambda: os.kill(os.getpid(), signal.SIGKILL))
            catalog = Catalog({catalog.directory!r})
            executor.delete(domain, catalog, {before.name!r}, DeleteOptions(into={into!r}), progress=progress)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], check=False, timeout=120, capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        injected += 1
        if active:
            domain = guest.connect()
        here = domain if active else guest.inactive()
        with pytest.raises(RecoverNeeded):
            external(here, catalog, "z")
        (what,) = executor.recover(here, catalog)
        if what.startswith("undid"):  # cut off before it had begun
            executor.delete(here, catalog, before.name, DeleteOptions(into=into))
        assert counters_of(catalog) == wanted
        assert not [name for name in os.listdir(catalog.directory) if name.startswith("operation")]
        paths = [one.disk.path for one in here.facts(journal.layers()).disks]
        assert len([name for name in images(guest) if name.endswith(f".x{number}.qcow2")]) == (
            0 if into == "base" else 2
        )
        clean += 1
        number += 1
    faults(injected, clean)
    assert injected > 4
    if active:
        guest.wait_for_ticks(2)
        guest.quit(domain.qmp)
    assert not guest.complaints()
    for path in paths:
        assert oracle.image_check(path)["rc"] == 0
    guest.start(paths=journal.layers())
    assert not guest.complaints()
