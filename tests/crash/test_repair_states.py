"""A power cut, a failing host or Ctrl-C in the middle of a repair: what could be read stays, another repair finishes.

The damage is of every kind that a repair knows (see `DAMAGE`), each on an image of stock QEMU.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import QcowError, StorageError
from qcowlib.image.opening import open_for_repair
from qcowlib.image.qcow2 import MappedLayer, Qcow2Image
from qcowlib.metadata.state import load_state
from qcowlib.operations.check import check_state
from qcowlib.operations.repair import RepairPlan, carry_out_repair, plan_repair
from qcowlib.operations.repair_undo import read_undo_file, take_back
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.protocol import Storage
from qcowlib.storage.recorder import Fault, FaultyStorage, RecordingStorage, crash_states
from tools.fuzz_images import Seed, seed_images

Record = Callable[[str, object], None]
Content = dict[tuple[str, int], bytes]

#: Seed image: name of the damage -> (label of a field, which of its kind, new value; None flips the lowest used bit).
DAMAGE: dict[str, tuple[str, list[tuple[str, int, int]]]] = {
    "refcounts of nothing": ("plain", [("reftable entry", 0, 0)]),
    "refcount table lost, version 2": ("v2", [("reftable offset", 0, 1 << 40)]),
    "refcounts too low": ("wide-refcounts", [("refcount", 3, 0), ("refcount", 11, 0), ("refcount", 15, 0)]),
    "refcount block unaligned": ("tiny-clusters", [("reftable entry", 0, 0x3100)]),
    "L1 entry beyond the end": ("v2", [("active l1 entry", 0, 1 << 40 | 1 << 63)]),
    "L1 entry unaligned, and refcounts": ("plain", [("active l1 entry", 0, 0x4200), ("refcount", 0, 0)]),
    "L2 entries": ("lazy", [("active l2 entry", 2, 1 << 50), ("active l2 entry", 3, 0x200), ("active l2 entry", 4, 1)]),
    "L2 entry on the L1 table": ("plain", [("active l2 entry", 1, 0x3000)]),
    "L2 entry on its own table": ("lazy", [("active l2 entry", 1, 0x4000)]),
    "L2 entry on a refcount block": ("one-bit-refcounts", [("active l2 entry", 1, 0x2000)]),
    "snapshot's L1 table lost": ("wide-refcounts", [("snapshot l1 offset", 0, 1 << 40)]),
    "snapshot's L1 table is the active one": ("overlay", [("snapshot l1 offset", 0, 0x3000)]),
    "snapshot table lost": ("zlib", [("snapshots offset", 0, 1 << 40)]),
    "snapshot table entry": ("subclusters", [("snapshot name size", 0, 0xFFFF)]),
    "active L1 table lost": ("zlib", [("l1 offset", 0, 1 << 40)]),
    "subclusters": ("subclusters", [("active l2 entry", 1, 0), ("active l2 entry", 0, 1 << 50)]),
    "compressed data": ("zstd", [("active l2 entry", 0, 3 << 62 | 0x5000), ("active l2 entry", 1, 1 << 62 | 5)]),
    "bitmap directory": ("bitmap", [("bitmap field", 2, 0x123)]),
    "bitmap table": ("bitmap", [("bitmap field", 4, 1 << 40)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seed]:
    return seed_images(tmp_path_factory.mktemp("seeds"))


def damaged_image(seeds: dict[str, Seed], name: str) -> bytes:
    seed, changes = DAMAGE[name]
    data = bytearray(seeds[seed].data)
    for label, number, value in changes:
        field = [field for field in seeds[seed].fields if field.label == label][number]
        data[field.offset : field.offset + field.width] = value.to_bytes(field.width, "big")
    return bytes(data)


def readable(data: bytes) -> Content:
    """Each guest cluster that can be read, of the active layer and of each snapshot by its L1 table."""
    found: Content = {}
    try:
        image = qcowlib.open_image(BytesStorage(data, writable=False), format="qcow2", open_backing=False)
    except QcowError:
        return found
    assert isinstance(image, Qcow2Image)
    found |= _clusters(image, "active")
    try:
        snapshots = image.snapshots
    except QcowError:
        return found
    for entry in snapshots:
        try:
            found |= _clusters(image.open_snapshot(snapshot_id=entry.id), f"snapshot {entry.id}")
        except QcowError:
            continue
    return found


def _clusters(layer: MappedLayer, name: str) -> Content:
    found: Content = {}
    for start in range(0, layer.size, layer.cluster_size):
        try:
            found[name, start] = layer.read(start, min(layer.cluster_size, layer.size - start))
        except QcowError:
            continue
    return found


def repair(storage: Storage, undo: Path | None = None) -> RepairPlan:
    image = open_for_repair(storage, "all", format="qcow2")
    assert isinstance(image, Qcow2Image)
    plan = plan_repair(image, "all")
    carry_out_repair(plan, image, None if undo is None else str(undo))
    return plan


def assert_sound(data: bytes) -> None:
    report = check_state(load_state(BytesStorage(data)))
    assert report.findings == []
    assert report.stopped is None


def assert_kept(before: Content, data: bytes, where: str) -> None:
    """Nothing that could be read is lost."""
    now = readable(data)
    lost = [key for key, content in before.items() if now.get(key) != content]
    assert not lost, f"{where}: {lost[:5]}"


def run(initial: bytes, undo: Path) -> tuple[RecordingStorage, bytes]:
    """A whole repair, recorded; what the image is then."""
    disk = BytesStorage(initial)
    recording = RecordingStorage(disk)
    plan = repair(recording, undo)
    assert plan.refusal is None
    assert_sound(disk.getvalue())
    return recording, disk.getvalue()


@pytest.mark.parametrize("name", DAMAGE)
def test_power_cut(name: str, seeds: dict[str, Seed], tmp_path: Path, record_property: Record) -> None:
    initial = damaged_image(seeds, name)
    before = readable(initial)
    undo_path = tmp_path / "undo"
    recording, repaired = run(initial, undo_path)
    assert_kept(before, repaired, "whole repair")
    undo = read_undo_file(str(undo_path)) if undo_path.exists() else None
    counts: Counter[str] = Counter(images=1)
    seen: set[bytes] = set()
    for state in crash_states(recording, initial, samples=4, seed=5):
        data = state.storage().getvalue()
        counts["states"] += 1
        if data in seen:
            continue
        seen.add(data)
        where = f"epoch {state.epoch}, {state.text}"
        assert_kept(before, data, where)
        again = BytesStorage(data)
        plan = repair(again)
        assert plan.refusal is None, where
        assert_sound(again.getvalue())
        assert_kept(before, again.getvalue(), f"{where}, repaired again")
        if undo is not None:
            back = BytesStorage(data)
            take_back(undo, back)
            assert back.getvalue() == initial, where
            counts["taken back"] += 1
    counts["distinct"] = len(seen)
    record_property("counted", ("crash states of repairs", dict(counts)))


def faults() -> Iterator[tuple[str, list[Fault]]]:
    for nth in (1, 2, 3, 5, 8, 13):
        yield f"write {nth} fails", [Fault("pwrite", nth, written=100)]
        yield f"flush {nth} fails", [Fault("flush", nth)]
    yield "everything fails", [Fault("change", 1, lasting=True)]


@pytest.mark.parametrize("name", list(DAMAGE)[::3])
def test_failing_host(name: str, seeds: dict[str, Seed]) -> None:
    initial = damaged_image(seeds, name)
    before = readable(initial)
    failed = 0
    for where, plan in faults():
        disk = BytesStorage(initial)
        faulty = FaultyStorage(disk, plan)
        try:
            repair(faulty)
        except StorageError:
            failed += 1
        assert_kept(before, disk.getvalue(), where)
        repair(disk)
        assert_sound(disk.getvalue())
        assert_kept(before, disk.getvalue(), where)
    assert failed


@pytest.mark.parametrize("name", ["L2 entry on the L1 table", "snapshot table entry"])
def test_full_disk(name: str, seeds: dict[str, Seed]) -> None:
    """The new structures have no room: the image is as it was, to the byte."""
    initial = damaged_image(seeds, name)
    disk = BytesStorage(initial)
    with pytest.raises(StorageError, match="No space left"):
        repair(FaultyStorage(disk, capacity=len(initial)))
    assert_kept(readable(initial), disk.getvalue(), "full disk")
    assert disk.getvalue()[: len(initial)] == initial


class _Interrupting(FaultyStorage):
    """Ctrl-C at the nth write."""

    def __init__(self, inner: Storage, nth: int) -> None:
        super().__init__(inner)
        self.nth = nth

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        self.nth -= 1
        if not self.nth:
            raise KeyboardInterrupt
        super().pwrite(data, offset)


def test_interrupted(seeds: dict[str, Seed]) -> None:
    choose = random.Random(3)
    for name in DAMAGE:
        initial = damaged_image(seeds, name)
        before = readable(initial)
        disk = BytesStorage(initial)
        nth = choose.randint(1, 6)
        try:
            repair(_Interrupting(disk, nth))
        except KeyboardInterrupt:
            assert_kept(before, disk.getvalue(), f"{name}, write {nth}")
        repair(disk)
        assert_sound(disk.getvalue())
        assert_kept(before, disk.getvalue(), f"{name}, write {nth}")
