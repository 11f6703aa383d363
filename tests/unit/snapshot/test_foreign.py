"""Snapshots that only the files know: grouped over the disks, those of the catalog left out, nothing guessed."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

import qcowlib
from snapshot.domain import DiskFacts, DomainFacts, StoredSnapshot, image_facts
from snapshot.foreign import found_in_files
from snapshot.model import Consistency, Disk, DiskMode, MemoryMode
from tests.unit.snapshot.samples import EXTERNAL, OFFLINE

SECOND = 10**9


def disk(target: str, *entries: StoredSnapshot, read_only: bool = False) -> DiskFacts:
    return DiskFacts(Disk(target, f"/images/{target}.qcow2", "qcow2", read_only=read_only), "qcow2", entries)


def domain(*disks: DiskFacts) -> DomainFacts:
    return DomainFacts("guest", True, disks)


def test_one_snapshot_of_all_disks_with_memory() -> None:
    facts = domain(
        disk("vda", StoredSnapshot("1", "s1", 700, 5 * SECOND)),
        disk("vdb", StoredSnapshot("4", "s1", 0, 6 * SECOND)),
        disk("iso", read_only=True),
    )
    (found,) = found_in_files(facts, [])
    assert (found.name, found.domain, found.foreign, found.creation_time) == ("s1", "guest", True, 5 * SECOND)
    assert (found.memory.mode, found.memory.file, found.memory.size) == (MemoryMode.INTERNAL, "/images/vda.qcow2", 700)
    assert found.consistency is Consistency.CHECKPOINT
    assert [(each.mode, each.internal_id) for each in found.disks] == [
        (DiskMode.INTERNAL, "1"),
        (DiskMode.INTERNAL, "4"),
        (DiskMode.NO, None),
    ]


def test_a_writable_disk_without_it_is_no_checkpoint() -> None:
    (found,) = found_in_files(domain(disk("vda", StoredSnapshot("1", "s1", 700)), disk("vdb")), [])
    assert found.consistency is Consistency.CRASH_CONSISTENT


def test_a_name_twice_is_two_snapshots() -> None:
    twice = (StoredSnapshot("1", "s1", 0, 1), StoredSnapshot("2", "s1", 0, 9))
    first, second = found_in_files(domain(disk("vda", *twice), disk("vdb", twice[0])), [])
    assert [each.internal_id for each in first.disks] == ["1", "1"]
    assert [each.internal_id for each in second.disks] == ["2", None]


def test_what_the_catalog_knows_is_left_out() -> None:
    facts = domain(disk("vda", StoredSnapshot("1", "off", 0), StoredSnapshot("2", "other", 0)))
    known = replace(OFFLINE, disks=(replace(OFFLINE.disks[0], file="/images/vda.qcow2"),))
    assert [found.name for found in found_in_files(facts, [known])] == ["other"]
    elsewhere = replace(OFFLINE, disks=(replace(OFFLINE.disks[0], file="/images/else.qcow2"),))
    assert [found.name for found in found_in_files(facts, [elsewhere])] == ["off", "other"]


def test_backing_files_and_other_overlays_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, left, right = (str(tmp_path / f"{name}.qcow2") for name in ("base", "left", "right"))
    qcowlib.create_image(base, 1 << 20)
    with qcowlib.open_image(base, writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        qcowlib.create_snapshot(image, "deep", vmstate=io.BytesIO(b"state"), date_ns=7 * SECOND)
    for overlay in (left, right):
        qcowlib.create_overlay(overlay, base, backing_fmt="qcow2", policy=qcowlib.LocalFiles())
    with qcowlib.open_image(left, writable=True, open_backing=False) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        qcowlib.create_snapshot(image, "left behind", date_ns=8 * SECOND)
    facts = domain(image_facts(Disk("vda", right, "qcow2")))
    known = replace(EXTERNAL, disks=(replace(EXTERNAL.disks[0], target="vda", file=base, overlay=left),))
    deep, behind = found_in_files(facts, [known])
    assert (deep.name, deep.disks[0].file, deep.memory.file, deep.memory.size) == ("deep", base, base, 5)
    assert (behind.name, behind.disks[0].file) == ("left behind", left)
