"""Compaction: every state is equal, stock QEMU finds nothing wrong, nothing is left that nothing needs, and a run that
is cut off anywhere leaves the image and the target's old content alone."""

import errno
import random
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib import LocalFiles, StorageError, digest_states
from qcowlib.operations.compact import _Compaction, compact_size
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import Fault, FaultyStorage
from tests.killing import survives
from tests.model import PASSPHRASE, StockView
from tests.oracle import qemu_img, qemu_io
from tests.property.test_difference import random_program

KIB = 1 << 10
LUKS = {"encrypt_format": "luks", "encrypt_passphrase": PASSPHRASE, "encrypt_iter_time_ms": 0}
GEOMETRIES: tuple[dict[str, Any], ...] = (
    {"cluster_size": 512},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 65536},
    {"cluster_size": 4096, "refcount_bits": 64, "compression_type": "zstd"},
    {"cluster_size": 1024, "refcount_bits": 8, "preallocation": "metadata"},
    {"cluster_size": 4096, **LUKS},
    {"cluster_size": 4096, "encrypt_format": "aes", "encrypt_passphrase": PASSPHRASE},
)


def passphrase(options: dict[str, Any]) -> str | None:
    return PASSPHRASE if "encrypt_format" in options else None


def random_image(tmp_path: Path, seed: int) -> tuple[str, dict[str, Any]]:
    """An image with snapshots and whatever else a random program leaves; every other one on a backing file."""
    chance = random.Random(seed)
    options = GEOMETRIES[seed % len(GEOMETRIES)]
    path = str(tmp_path / "image")
    if seed % 2:
        qcowlib.create_image(path, 300 * KIB, **options)
    else:
        (tmp_path / "base").write_bytes(chance.randbytes(280 * KIB))
        options = {name: value for name, value in options.items() if name != "preallocation"}
        qcowlib.create_overlay(path, "base", backing_fmt="raw", size=300 * KIB, policy=LocalFiles(), **options)
    with qcowlib.open_image(path, writable=True, policy=LocalFiles(), passphrase=passphrase(options)) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        random_program(image, chance)
        if "encrypt_format" not in options:
            for guest in range(0, min(8 * image.cluster_size, image.size - image.cluster_size), image.cluster_size):
                image.write_compressed(guest, bytes([guest // 512 % 251]) * image.cluster_size)
        qcowlib.create_snapshot(image, "last")
        image.write(100 * KIB, bytes(50 * KIB))
        if len(image.snapshots) > 2:
            qcowlib.delete_snapshot(image, image.snapshots[1].id)
    return path, options


def open_whole(path: str | Path, options: dict[str, Any]) -> qcowlib.Qcow2Image:
    image = qcowlib.open_image(path, policy=LocalFiles(), passphrase=passphrase(options))
    assert isinstance(image, qcowlib.Qcow2Image)
    return image


@pytest.mark.parametrize("seed", range(24))
def test_all_states_are_equal(tmp_path: Path, seed: int) -> None:
    path, options = random_image(tmp_path, seed)
    target = str(tmp_path / "smaller")
    before = Path(path).read_bytes()
    with open_whole(path, options) as image:
        size = compact_size(image)
        qcowlib.compact_image(image, target)
        digests, entries = digest_states(image), image.snapshots
    assert Path(path).read_bytes() == before
    cluster = int(options["cluster_size"])
    assert Path(target).stat().st_size == size <= -(-len(before) // cluster) * cluster
    assert not (tmp_path / "smaller.qcow-incomplete").exists()
    with open_whole(target, options) as copy:
        assert [state.digests for state in digest_states(copy)] == [state.digests for state in digests]
        assert [(entry.id, entry.name, entry.date_sec, entry.disk_size) for entry in copy.snapshots] == [
            (entry.id, entry.name, entry.date_sec, entry.disk_size) for entry in entries
        ]
        space = qcowlib.image_space(copy)
        assert space.leaked == space.free == 0
    stock = StockView(Path(target), options.get("encrypt_format"))
    stock.assert_clean()
    # What is compact cannot be made smaller, and it can be written like any image.
    with open_whole(target, options) as copy:
        assert compact_size(copy) == size
    with qcowlib.open_image(target, writable=True, policy=LocalFiles(), passphrase=passphrase(options)) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        image.write(10 * KIB, b"w" * 90 * KIB)
        qcowlib.delete_snapshot(image, image.snapshots[0].id)
        content = image.read(0, image.size)
    stock.assert_clean()
    assert stock.content() == content


def test_bitmaps_and_vm_state_come_along(tmp_path: Path) -> None:
    path, target = tmp_path / "image", tmp_path / "smaller"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_io(path, "write 0 8M", "discard 2M 5M")
    qemu_img("bitmap", "--add", "-g", "65536", path, "b")
    qemu_io(path, "write 10M 100k")
    memory = random.Random(1).randbytes(300_000)
    (tmp_path / "memory").write_bytes(memory)
    with qcowlib.open_image(path, writable=True) as image, open(tmp_path / "memory", "rb") as stream:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        qcowlib.create_snapshot(image, "s")
        qcowlib.attach_vmstate(image, "s", stream)
    with qcowlib.open_image(path) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        qcowlib.compact_image(image, str(target))
        dirty = [table.start.tolist() for table in qcowlib.dirty_extents(image, "b")]
    assert target.stat().st_size < path.stat().st_size - (4 << 20)
    with qcowlib.open_image(target) as copy:
        assert isinstance(copy, qcowlib.Qcow2Image)
        state = copy.open_snapshot("s").vmstate
        assert state.read(0, state.size) == memory
        assert [table.start.tolist() for table in qcowlib.dirty_extents(copy, "b")] == dirty
        assert dirty
    assert qemu_img("check", target).returncode == 0
    assert qemu_img("compare", path, target).returncode == 0


def test_leaks_are_left_behind_and_damage_is_refused(tmp_path: Path) -> None:
    path, target = tmp_path / "image", tmp_path / "smaller"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write 0 512k")
    data = bytearray(path.read_bytes())
    l2 = int.from_bytes(data[0x30000:0x30008], "big") & 0x00FFFFFFFFFFFE00
    data[l2 : l2 + 8] = bytes(8)  # the first data cluster leaks
    path.write_bytes(data)
    with qcowlib.open_image(path) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        qcowlib.compact_image(image, str(target))
    assert qemu_img("check", target).returncode == 0
    assert qemu_img("compare", path, target).returncode == 0
    data[l2 + 14] |= 2  # the second one is unaligned
    path.write_bytes(data)
    with qcowlib.open_image(path) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        with pytest.raises(qcowlib.ImageStateError, match="is damaged, check it"):
            qcowlib.compact_image(image, str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_cut_off_at_every_write(tmp_path: Path, record_property: Any) -> None:
    """The target is no image before its last write; the same run, done again, makes it whole."""
    path, options = random_image(tmp_path, 3)
    points = 0
    with open_whole(path, options) as image:
        digests = [state.digests for state in digest_states(image)]
        compaction = _Compaction(image, None)
        whole = BytesStorage()
        compaction.write(whole)
        while True:
            storage = BytesStorage()
            faulty = FaultyStorage(storage, [Fault("pwrite", points + 1, errno.EIO)])
            try:
                compaction.write(faulty)
                break
            except StorageError:
                points += 1
            content = storage.pread(storage.size(), 0)
            assert not content.startswith(b"QFI\xfb")
            storage.truncate(0)
            compaction.write(storage)
            assert storage.pread(storage.size(), 0) == whole.pread(whole.size(), 0)
    record_property("counted", ("kills of a compaction", {"kill points": points, "finished": points}))
    assert points > 5
    with qcowlib.open_image(whole, policy=LocalFiles()) as copy:
        assert isinstance(copy, qcowlib.Qcow2Image)
        assert [state.digests for state in digest_states(copy)] == digests


def test_killed_at_every_step(tmp_path: Path, record_property: Any) -> None:
    """The target's old content stays, or it is not there; the same call makes it whole."""
    path, options = random_image(tmp_path, 3)
    target = tmp_path / "smaller"
    with open_whole(path, options) as image:
        digests = [state.digests for state in digest_states(image)]

    def run() -> None:
        with open_whole(path, options) as image:
            qcowlib.compact_image(image, str(target))

    points = 0
    while not survives(run, points):
        points += 1
        if target.exists():  # killed behind the last name
            target.unlink()
    with open_whole(target, options) as copy:
        assert [state.digests for state in digest_states(copy)] == digests
    assert not (tmp_path / "smaller.qcow-incomplete").exists()
    assert points > 5
    record_property("counted", ("kills of a compaction", {"kill points": points, "finished": points}))
