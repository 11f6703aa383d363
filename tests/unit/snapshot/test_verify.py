"""Whether everything that a snapshot needs is there: each thing that can be missing or wrong is found."""

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest

import qcowlib
from snapshot.errors import DomainSnapshotError
from snapshot.model import DiskMode, DiskSnapshot, DomainSnapshot, MemoryMode, MemorySnapshot
from snapshot.verify import digested, file_digest, problems
from tests.unit.snapshot.samples import INTERNAL
from tests.unit.snapshot.test_memory import WHOLE

MIB = 1 << 20


@pytest.fixture
def snapshot(tmp_path: Path) -> DomainSnapshot:
    """One internal disk with the vm state, one external disk two files deep, one left out."""
    inside, base, frozen = (str(tmp_path / f"{name}.qcow2") for name in ("inside", "base", "frozen"))
    qcowlib.create_image(inside, MIB)
    with qcowlib.open_image(inside, writable=True) as image:
        image.write(0, b"data")
        qcowlib.create_snapshot(image, "s1", vmstate=io.BytesIO(WHOLE))  # type: ignore[arg-type]
    qcowlib.create_image(base, MIB)
    qcowlib.create_overlay(frozen, base, backing_fmt="qcow2", policy=qcowlib.LocalFiles())
    with qcowlib.open_image(frozen, writable=True, policy=qcowlib.LocalFiles()) as image:
        image.write(0, b"frozen")
    return replace(
        INTERNAL,
        name="s1",
        memory=MemorySnapshot(MemoryMode.INTERNAL, inside, len(WHOLE), "pc-i440fx-7.2"),
        disks=(
            DiskSnapshot(
                "vda", DiskMode.INTERNAL, inside, "qcow2", internal_id="1", internal_name="s1", virtual_size=MIB
            ),
            DiskSnapshot("vdb", DiskMode.EXTERNAL, frozen, "qcow2", overlay=str(tmp_path / "gone"), virtual_size=MIB),
            DiskSnapshot("vdc", DiskMode.NO, str(tmp_path / "never"), "raw"),
        ),
    )


def both(snapshot: DomainSnapshot) -> list[str]:
    """The problems of the quick look, which the thorough one has as well."""
    quick = problems(snapshot)
    assert set(quick) <= set(problems(snapshot, thorough=True))
    return quick


def with_disk(snapshot: DomainSnapshot, index: int, **changes: object) -> DomainSnapshot:
    disks = list(snapshot.disks)
    disks[index] = replace(disks[index], **changes)  # type: ignore[arg-type]
    return replace(snapshot, disks=tuple(disks))


def test_a_whole_snapshot_has_none(snapshot: DomainSnapshot) -> None:
    assert both(snapshot) == []
    assert problems(digested(snapshot), thorough=True) == []


def test_internal(snapshot: DomainSnapshot) -> None:
    assert "no more" in both(with_disk(snapshot, 0, internal_id="2"))[0]
    assert "no more" in both(with_disk(snapshot, 0, internal_name="s2"))[0]
    assert "instead of 512" in both(with_disk(snapshot, 0, virtual_size=512))[0]
    with open(snapshot.disks[0].file, "r+b") as file:
        file.write(b"none")
    found = both(snapshot)
    assert [text.split(":")[0] for text in found] == ["vda", "memory"]


def test_missing_files(snapshot: DomainSnapshot) -> None:
    for disk in snapshot.disks[:2]:
        os.unlink(disk.file)
    assert both(snapshot) == [
        f"vda: '{snapshot.disks[0].file}' is missing",
        f"vdb: '{snapshot.disks[1].file}' is missing",
        f"memory: '{snapshot.disks[0].file}' is missing",
    ]


def test_a_broken_chain(snapshot: DomainSnapshot, tmp_path: Path) -> None:
    os.rename(tmp_path / "base.qcow2", tmp_path / "moved.qcow2")
    (problem,) = both(snapshot)
    assert problem.startswith("vdb: ")
    assert "base.qcow2" in problem


def test_frozen_files_that_changed_or_are_damaged(snapshot: DomainSnapshot) -> None:
    frozen = snapshot.disks[1].file
    before = digested(snapshot)
    with qcowlib.open_image(frozen, writable=True, policy=qcowlib.LocalFiles()) as image:
        image.write(MIB // 2, b"x")
    assert problems(before) == []
    assert problems(before, thorough=True) == [f"vdb: '{frozen}' has changed since the snapshot was taken"]
    with open(frozen, "r+b") as file:  # the L2 entry of the disk's end, used by nothing else, leads beyond the file
        l1_offset = int.from_bytes(file.read(48)[40:], "big")
        file.seek(l1_offset)
        l2_offset = int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
        file.seek(l2_offset + 15 * 8)
        file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))
    assert problems(snapshot) == []
    (problem,) = problems(snapshot, thorough=True)
    assert problem.startswith(f"vdb: '{frozen}' is damaged (")


def test_memory(snapshot: DomainSnapshot, tmp_path: Path) -> None:
    memory = snapshot.memory
    assert "instead of 5" in both(replace(snapshot, memory=replace(memory, size=5)))[0]
    path = tmp_path / "memory"
    path.write_bytes(WHOLE)
    outside = replace(snapshot, memory=replace(memory, mode=MemoryMode.EXTERNAL, file=str(path)))
    assert both(outside) == []
    other = replace(outside, memory=replace(outside.memory, machine="pc-q35-7.2"))
    assert "is of a pc-i440fx-7.2, not of a pc-q35-7.2" in both(other)[0]
    with_digest = digested(outside)
    assert with_digest.memory.digest == file_digest(str(path))
    path.write_bytes(WHOLE[:5000] + b"X" + WHOLE[5001:])
    assert problems(with_digest) == []
    assert problems(with_digest, thorough=True) == [f"memory: '{path}' has changed since the snapshot was taken"]
    path.write_bytes(WHOLE[:-1])
    assert "bytes instead of" in both(outside)[0]
    assert "does not end" in both(replace(outside, memory=replace(outside.memory, size=0)))[0]
    path.unlink()
    assert both(outside) == [f"memory: '{path}' is missing"]
    with pytest.raises(DomainSnapshotError, match="No such file"):
        digested(outside)


def test_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(str(tmp_path / "file")) == "06b05ab6733a618578af5f94892f3950"
