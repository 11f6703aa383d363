"""Snapshot views and vm states, and the cache of decompressed clusters."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcowlib import ChainError, CorruptMetadata, LocalFiles, OutOfRange, open_image
from qcowlib.extents import ExtentKind
from qcowlib.format.snapshot_table import build_snapshot_table
from qcowlib.image import qcow2
from qcowlib.image.qcow2 import ClusterCache, Qcow2Image
from tests import oracle

MIB = 1 << 20
#: An L2 table of 4 KiB clusters maps 2 MiB: the vm state of a disk of up to 2 MiB begins there.
COVERAGE = 2 * MIB
STATE = b"QEVM\0\0\0\3" + random.Random(3).randbytes(100_000)


@pytest.fixture
def with_state(tmp_path: Path) -> Path:
    """A disk of 8 MiB with a snapshot that is made to tell of 1 MiB of disk and of a vm state behind it."""
    state = tmp_path / "state"
    state.write_bytes(STATE.ljust(200 * 512, b"\0"))
    path = tmp_path / "disk.qcow2"
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "8M")
    oracle.qemu_io(path, "write -q -P 1 0 1M", f"write -q -s {state} 2M {200 * 512}")
    oracle.qemu_img("snapshot", "-c", "running", path)
    oracle.qemu_io(path, "write -q -P 2 0 8M")
    rewrite_entry(path, disk_size=MIB, vm_state_size=len(STATE))
    return path


def rewrite_entry(path: Path, **changes: Any) -> None:
    with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        offset = image.header.snapshots_offset
        table = build_snapshot_table([replace(image.snapshots[0], **changes)])
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(table)


def test_vm_state(with_state: Path) -> None:
    with open_image(with_state) as image:
        snapshot = image.open_snapshot("running")
        assert (snapshot.size, snapshot.read(0, MIB)) == (MIB, b"\1" * MIB)
        vmstate = snapshot.vmstate
        assert vmstate.size == len(STATE)
        assert vmstate.read(0, len(STATE)) == STATE
        assert vmstate.read(4090, 10) == STATE[4090:4100]
        buffer = bytearray(5000)
        assert vmstate.readinto(70_000, buffer) == 5000
        assert buffer == STATE[70_000:75_000]
        with vmstate.open_stream() as stream:
            stream.seek(-5, 2)
            assert stream.read(100) == STATE[-5:]
            stream.seek(0)
            assert stream.read() == STATE
        with pytest.raises(OutOfRange):
            vmstate.read(len(STATE), 1)
        rows = [row for table in vmstate.extents() for row in table]
        assert rows[0].start == 0
        assert sum(row.length for row in rows) == len(STATE)
        assert {row.kind for row in rows} == {ExtentKind.DATA}


def test_a_vm_state_larger_than_its_mapping_is_damage(with_state: Path) -> None:
    rewrite_entry(with_state, vm_state_size=1 << 40)
    with open_image(with_state) as image:
        snapshot = image.open_snapshot("running")
        assert snapshot.read(0, 10) == b"\1" * 10
        vmstate = snapshot.vmstate
        assert vmstate.read(0, 100) == STATE[:100]
        for reach in (lambda: vmstate.read(8 * MIB, 1), lambda: vmstate.readinto(6 * MIB - 1, bytearray(2)),
                      lambda: list(vmstate.extents())):  # fmt: skip
            with pytest.raises(CorruptMetadata, match="too few for"):
                reach()


def test_a_disk_larger_than_its_mapping_is_damage(with_state: Path) -> None:
    rewrite_entry(with_state, disk_size=1 << 40)
    with open_image(with_state) as image:
        snapshot = image.open_snapshot("running")
        assert snapshot.size == 1 << 40
        assert snapshot.read(0, 10) == b"\1" * 10
        for reach in (lambda: snapshot.read(8 * MIB, 1), lambda: snapshot.read(8 * MIB - 1, 2),
                      lambda: list(snapshot.extents())):  # fmt: skip
            with pytest.raises(CorruptMetadata, match="its 4 entries are too few"):
                reach()


def test_the_snapshot_of_an_overlay_falls_through_to_the_backing_file(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"B" * MIB)
    path = tmp_path / "disk.qcow2"
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path, "2M")
    oracle.qemu_io(path, "write -q -P 1 0 64k")
    oracle.qemu_img("snapshot", "-c", "s", path)
    oracle.qemu_io(path, "write -q -P 2 0 1M")
    with open_image(path, policy=LocalFiles()) as image:
        snapshot = image.open_snapshot("s")
        assert snapshot.backing is image.backing
        assert snapshot.read(65530, 12) == b"\1" * 6 + b"B" * 6
        assert snapshot.read(MIB - 3, 6) == b"BBB\0\0\0"
        assert snapshot.read(0, 2 * MIB) == b"\1" * 65536 + b"B" * (MIB - 65536) + bytes(MIB)
    with open_image(path, open_backing=False) as image:
        snapshot = image.open_snapshot("s")
        assert snapshot.read(0, 65536) == b"\1" * 65536
        with pytest.raises(ChainError, match="was not opened"):
            snapshot.read(65536, 1)


def test_cluster_cache_keeps_what_was_used_last() -> None:
    cache = ClusterCache(2 << 20)  # room for two
    cache.put(1, b"one")
    cache.put(2, b"two")
    assert cache.get(1) == b"one"
    cache.put(3, b"three")
    assert (cache.get(1), cache.get(2), cache.get(3)) == (b"one", None, b"three")
    cache.clear()
    assert cache.get(1) is None


def test_a_compressed_cluster_is_inflated_once_for_small_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"".join(n.to_bytes(4, "big") for n in range(65536)))
    oracle.qemu_img("convert", "-c", "-O", "qcow2", raw, path)
    calls = []
    original = qcow2.decompress
    monkeypatch.setattr(qcow2, "decompress", lambda *args: calls.append(args) or original(*args))
    with open_image(path) as image:
        for offset in range(0, 65536, 4096):
            assert image.read(offset, 4096) == raw.read_bytes()[offset : offset + 4096]
        assert len(calls) == 1
        assert image.read(0, image.size) == raw.read_bytes()
