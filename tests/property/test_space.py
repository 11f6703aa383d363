"""The space of an image against a walk that is written here, and against what deleting a snapshot really frees."""

import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib import image_space
from tests.oracle import qemu_img
from tests.property.test_difference import GEOMETRIES, random_program

KIB = 1 << 10
OFFSET = 0x00FF_FFFF_FFFF_FE00


class Walk:
    """Clusters by state, read from the file with nothing but the format's own words."""

    def __init__(self, path: Path, extended: bool) -> None:
        self.data = path.read_bytes()
        self.bits = self.u32(20)
        self.extended = extended
        self.states = [self.tree(self.u64(40), self.u32(36), self.u64(24))]
        position = self.u64(64)
        for _ in range(self.u32(60)):
            l1, entries, id_size, name_size = struct.unpack_from(">QIHH", self.data, position)
            extra = self.u32(position + 36)
            self.states.append(self.tree(l1, entries, self.u64(position + 48)))
            position += 40 + extra + id_size + name_size
            position = -(-position // 8) * 8

    def u32(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 4], "big")

    def u64(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 8].ljust(8, b"\0"), "big")

    def tree(self, l1: int, entries: int, disk: int) -> dict[str, set[int]]:
        """The clusters of one state: all, those of tables, those of the vm state."""
        found: dict[str, set[int]] = {"all": set(), "tables": set(), "vmstate": set()}
        size = 1 << self.bits
        step = 16 if self.extended else 8
        coverage = size // step * size
        found["tables"] |= {l1 + byte >> self.bits for byte in range(0, entries * 8, 8)}
        for index in range(entries):
            l2 = self.u64(l1 + 8 * index) & OFFSET
            if not l2:
                continue
            found["tables"].add(l2 >> self.bits)
            clusters = {l2 >> self.bits}
            for word in range(l2, l2 + size, step):
                clusters |= self.clusters(self.u64(word))
            found["all"] |= clusters
            if index * coverage >= disk:
                found["vmstate"] |= clusters
        found["all"] |= found["tables"]
        return found

    def clusters(self, entry: int) -> set[int]:
        if entry >> 62 & 1:
            split = 62 - (self.bits - 8)
            start = entry & (1 << split) - 1
            sectors = (entry >> split & (1 << self.bits - 8) - 1) + 1
            end = (start & ~511) + sectors * 512
            return set(range(start >> self.bits, (end - 1 >> self.bits) + 1))
        return {(entry & OFFSET) >> self.bits} if entry & OFFSET else set()


def assert_space(path: Path, extended: bool) -> qcowlib.ImageSpace:
    walk = Walk(path, extended)
    with qcowlib.open_image(path, open_backing=False) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        space = image_space(image)
        size = image.cluster_size
    uses = Counter(cluster for state in walk.states for cluster in state["all"])
    assert len(space.states) == len(walk.states)
    for told, state in zip(space.states, walk.states, strict=True):
        alone = sum(uses[cluster] == 1 for cluster in state["all"])
        assert told.damage is None
        assert told.exclusive == alone * size
        assert told.shared == (len(state["all"]) - alone) * size
        assert told.tables == len(state["tables"]) * size
        assert told.vmstate == len(state["vmstate"]) * size
    assert space.mapped == len(uses) * size
    parts = space.mapped + space.refcounts + space.other_metadata + space.bitmaps + space.leaked + space.free
    assert parts == -(-space.file_length // size) * size
    return space


@pytest.mark.parametrize("seed", range(12))
def test_a_walk_says_the_same(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    options: dict[str, Any] = GEOMETRIES[seed % len(GEOMETRIES)]
    path = tmp_path / "i"
    qcowlib.create_image(path, 300 * KIB, **options)
    with qcowlib.open_image(path, writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        random_program(image, chance)
        image.write_compressed(0, b"z" * image.cluster_size)
        qcowlib.create_snapshot(image, "last")
        image.write(100 * KIB, b"after")
        names = [entry.name for entry in image.snapshots]
    before = assert_space(path, bool(options.get("extended_l2")))
    victim = chance.randrange(len(names))
    qemu_img("snapshot", "-d", names[victim], path)
    after = assert_space(path, bool(options.get("extended_l2")))
    assert before.mapped - after.mapped == before.states[1 + victim].exclusive


def test_bitmaps_and_leaks(tmp_path: Path) -> None:
    path = tmp_path / "i"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_img("bitmap", "--add", path, "b")
    with open(path, "r+b") as file:  # a cluster with a refcount that nothing refers to
        end = file.seek(0, 2)
        cluster = -(-end // 65536)
        file.truncate((cluster + 1) * 65536)
        file.seek(0x20000 + 2 * cluster)
        file.write(b"\0\1")
    space = assert_space(path, False)
    assert space.leaked == 65536
    assert space.bitmaps == 2 * 65536  # directory and table
    assert qemu_img("check", path, check=False).returncode == 3
