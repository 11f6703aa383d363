"""Healing refcounts: the outcome is judged by stock qemu-img, on images that it made and that were then cut off."""

import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcowlib.errors import CorruptMetadata, QcowError, StorageError
from qcowlib.findings import CheckReport
from qcowlib.metadata.heal import heal
from qcowlib.metadata.state import load_state
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import Fault, FaultyStorage, RecordingStorage, crash_states
from tests.oracle import assert_clean, content, image_check, image_info, qemu_img, qemu_io, run

MIB = 1 << 20


def create(path: Path, options: str, size: str = "4M") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size)
    return path


def heal_file(path: Path) -> CheckReport:
    """Heal a file through memory; returns the report."""
    storage = BytesStorage(path.read_bytes())
    report = heal(load_state(storage), storage)
    path.write_bytes(storage.getvalue())
    return report


def counts(report: CheckReport) -> dict[str, int]:
    return {finding.code: finding.count for finding in report.findings}


def contents(path: Path) -> list[bytes]:
    """Guest content of the active layer and of every snapshot."""
    names = [f"snapshot.id={entry['id']}" for entry in image_info(path).get("snapshots", [])]
    return [content(path, path.parent), *(content(path, path.parent, snapshot=name) for name in names)]


def field(path: Path, offset: int, length: int = 8) -> int:
    return int.from_bytes(path.read_bytes()[offset : offset + length], "big")


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def set_dirty(path: Path) -> None:
    patch(path, 79, bytes([field(path, 79, 1) | 1]))


def is_dirty(path: Path) -> bool:
    return bool(field(path, 79, 1) & 1)


@pytest.mark.parametrize("options", ["cluster_size=65536", "cluster_size=512", "cluster_size=4096,refcount_bits=64"])
def test_an_image_aborted_by_qemu_with_lazy_refcounts(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "lazy.qcow2", f"lazy_refcounts=on,{options}")
    qemu_io(path, "write -P 1 0 512k")
    qemu_img("snapshot", "-c", "before", path)
    done = run(
        "qemu-io",
        *("-f", "qcow2", "-c", "write -P 2 100k 600k", "-c", "write -P 3 3M 64k", "-c", "flush", "-c", "abort", path),
        check=False,
    )
    assert done.returncode != 0
    assert is_dirty(path)
    assert image_check(path)["corruptions"] > 0
    before = contents(path)

    report = heal_file(path)

    assert counts(report)["refcount-too-low"] > 0
    assert not is_dirty(path)
    assert_clean(path)
    assert contents(path) == before
    qemu_io(path, "read -P 2 100k 600k", "read -P 3 3M 64k", "write -P 4 0 4M", "read -P 4 0 4M")
    assert_clean(path)


def test_the_corpus_images_that_were_aborted(corpus: Path, manifest: dict[str, Any], tmp_path: Path) -> None:
    images = [image for image in manifest["images"] if image["group"] == "lazy"]
    assert len(images) == 4
    for image in images:
        path = tmp_path / image["file"]
        shutil.copyfile(corpus / image["file"], path)
        wrong = image["answers"]["check"]["json"].get("corruptions", 0)
        before = content(path, tmp_path)
        report = heal_file(path)
        # qemu-img counts a cluster without refcount and its COPIED flag; one raised refcount mends both.
        assert sum(counts(report).values()) * 2 == wrong, image["id"]
        assert_clean(path)
        assert content(path, tmp_path) == before
        assert not is_dirty(path)


def test_a_sound_image_is_not_written(tmp_path: Path) -> None:
    path = create(tmp_path / "sound.qcow2", "cluster_size=4096")
    qemu_io(path, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 0 300k")
    storage = RecordingStorage(BytesStorage(path.read_bytes()))
    assert heal(load_state(storage), storage).findings == []
    assert [epoch for epoch in storage.epochs if epoch] == []


def test_only_the_dirty_bit_is_cleared_where_nothing_is_wrong(tmp_path: Path) -> None:
    path = create(tmp_path / "dirty.qcow2", "cluster_size=4096")
    qemu_io(path, "write -P 1 0 1M")
    clean = path.read_bytes()
    set_dirty(path)
    assert counts(heal_file(path)) == {}
    assert path.read_bytes() == clean


def damage_refcounts(path: Path, seed: int) -> None:
    """Wrong refcounts and COPIED flags, as any order of lost writes could leave them, but no damaged mapping."""
    choose = random.Random(seed)
    data = bytearray(path.read_bytes())
    size = 1 << int.from_bytes(data[20:24], "big")
    table = int.from_bytes(data[48:56], "big")
    used = len(data) // size
    width = 1 << int.from_bytes(data[96:100], "big") if data[7] == 3 else 16
    for index in range(size // 8):
        block = int.from_bytes(data[table + 8 * index : table + 8 * index + 8], "big")
        for _ in range(choose.randrange(8) if block else 0):
            data[block + choose.randrange(min(size, max(1, used * width // 8)))] = choose.choice((0, 0, 1, 2, 255))
    l1_size, l1 = int.from_bytes(data[36:40], "big"), int.from_bytes(data[40:48], "big")
    for index in range(l1_size):
        entry = l1 + 8 * index
        l2 = int.from_bytes(data[entry : entry + 8], "big") & 0x00FF_FFFF_FFFF_FE00
        if not l2:
            continue
        if choose.random() < 0.3:
            data[entry] ^= 0x80
        for place in range(l2, l2 + size, 16 if data[79] & 16 else 8):
            if not data[place] & 0x40 and any(data[place : place + 7]) and choose.random() < 0.1:
                data[place] ^= 0x80
    path.write_bytes(data)


OPTIONS = [
    "cluster_size=65536",
    "cluster_size=512",
    "compat=0.10",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=4096,refcount_bits=2",
    "cluster_size=4096,refcount_bits=4",
    "cluster_size=4096,refcount_bits=8",
    "cluster_size=4096,refcount_bits=32",
    "cluster_size=4096,refcount_bits=64",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=65536,preallocation=metadata",
]


def written(path: Path, options: str) -> Path:
    """An image with data, zeroes, compressed clusters and (where refcounts allow) a snapshot and a bitmap."""
    create(path, options)
    qemu_io(path, "write -P 1 0 300k", "write -P 2 1M 100k")
    if "refcount_bits=1" not in options:
        qemu_img("snapshot", "-c", "one", path)
    if "compat=0.10" not in options:
        qemu_io(path, "write -z 64k 128k")
        qemu_img("bitmap", "--add", path, "bitmap")
    qemu_io(path, "write -P 3 64k 200k", "write -P 4 3M 5k")
    if "refcount_bits" not in options and "preallocation" not in options:
        qemu_io(path, "write -c -P 5 3584k 64k", "write -c -P 6 3712k 64k")
    assert_clean(path)
    return path


@pytest.mark.parametrize("options", OPTIONS)
def test_wrong_refcounts_and_flags_are_made_right(tmp_path: Path, options: str) -> None:
    original = written(tmp_path / "original.qcow2", options)
    expected = contents(original)
    snapshots = qemu_img("snapshot", "-l", original).stdout
    path = tmp_path / "damaged.qcow2"
    wrong = 0
    for seed in range(8):
        shutil.copyfile(original, path)
        damage_refcounts(path, seed)
        wrong += image_check(path)["rc"] != 0
        heal_file(path)
        assert_clean(path)
        assert contents(path) == expected, (options, seed)
        assert qemu_img("snapshot", "-l", path).stdout == snapshots
    assert wrong > 4


def references_hold(image: bytes, path: Path) -> None:
    """Heal once more and let qemu-img judge."""
    storage = BytesStorage(image)
    heal(load_state(storage), storage)
    path.write_bytes(storage.getvalue())
    assert_clean(path)


def growing_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Images whose refcount structure lacks blocks, or has a table that is too small for them."""
    original = create(path, "cluster_size=512,refcount_bits=64,lazy_refcounts=on", "6M")
    qemu_io(path, "write -P 1 0 5M")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 1M 64k")
    data = original.read_bytes()
    table, clusters = struct.unpack(">QI", data[48:60])
    assert clusters > 2
    with_gaps = bytearray(data)
    for index in (0, 3, 40, 41, 80, 120, 150):
        with_gaps[table + 8 * index : table + 8 * index + 8] = bytes(8)
    yield "missing blocks", bytes(with_gaps)
    empty = bytearray(data)
    empty[table : table + 512 * clusters] = bytes(512 * clusters)
    yield "no blocks at all", bytes(empty)
    short = bytearray(data)
    short[56:60] = (1).to_bytes(4, "big")
    yield "a table of one cluster", bytes(short)
    small = bytearray(empty)
    small[56:60] = (1).to_bytes(4, "big")
    yield "an empty table of one cluster", bytes(small)


def test_missing_refcount_blocks_and_a_table_that_is_too_small(tmp_path: Path) -> None:
    tried = 0
    for name, data in growing_images(tmp_path / "original.qcow2"):
        expected = contents(tmp_path / "original.qcow2")
        path = tmp_path / "growing.qcow2"
        path.write_bytes(data)
        set_dirty(path)
        assert image_check(path)["corruptions"] > 0, name
        heal_file(path)
        assert not is_dirty(path)
        assert_clean(path)
        assert contents(path) == expected, name
        tried += 1
    assert tried == 4


@pytest.mark.parametrize("kind", ["flags and refcounts", "missing blocks", "an empty table of one cluster"])
def test_a_power_cut_while_healing_leaves_an_image_that_heals(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.qcow2"
    if kind == "flags and refcounts":
        written(path, "cluster_size=4096")
        expected = contents(path)
        damage_refcounts(path, 3)
        set_dirty(path)
        initial = path.read_bytes()
    else:
        initial = dict(growing_images(path))[kind]
        expected = contents(path)
    recording = RecordingStorage(BytesStorage(initial))
    heal(load_state(recording), recording)
    states = 0
    for state in crash_states(recording, initial, samples=6, seed=1):
        storage = state.storage()
        heal(load_state(storage), storage)
        states += 1
        if states % 8 == 0:
            path.write_bytes(storage.getvalue())
            assert_clean(path)
            assert contents(path) == expected
    assert states >= 15


def test_a_host_that_fails_while_healing_leaves_an_image_that_heals(tmp_path: Path) -> None:
    initial = dict(growing_images(tmp_path / "image.qcow2"))["an empty table of one cluster"]
    for call in range(1, 30, 4):
        inner = BytesStorage(initial)
        faulty = FaultyStorage(inner, [Fault("pwrite", call)])
        with pytest.raises(StorageError):
            heal(load_state(faulty), faulty)
        assert faulty.failures == 1
        references_hold(inner.getvalue(), tmp_path / "healed.qcow2")


@pytest.mark.parametrize(
    ("what", "rule"),
    [
        ("L2 entry beyond the end", "exceeding the end of the file"),
        ("L2 entry unaligned", "is not properly aligned"),
        ("L2 entry with reserved bits", "reserved bits"),
        ("L1 entry with reserved bits", "reserved bits"),
        ("L2 entry on the L1 table", "active L1 table and guest data"),
        ("refcount block beyond the end", "outside image"),
        ("refcount block unaligned", "not cluster aligned"),
    ],
)
def test_a_damaged_mapping_or_refcount_structure_is_left_alone(tmp_path: Path, what: str, rule: str) -> None:
    path = create(tmp_path / "image.qcow2", "cluster_size=4096")
    qemu_io(path, "write -P 1 0 1M")
    set_dirty(path)
    l1, table = field(path, 40), field(path, 48)
    l2 = field(path, l1) & 0x00FF_FFFF_FFFF_FE00
    place, value = {
        "L2 entry beyond the end": (l2, 1 << 63 | 1 << 40),
        "L2 entry unaligned": (l2, field(path, l2) + 512),
        "L2 entry with reserved bits": (l2, field(path, l2) | 1 << 57),
        "L1 entry with reserved bits": (l1, field(path, l1) | 1 << 58),
        "L2 entry on the L1 table": (l2, 1 << 63 | l1),
        "refcount block beyond the end": (table, 1 << 40),
        "refcount block unaligned": (table, field(path, table) + 512),
    }[what]
    patch(path, place, value.to_bytes(8, "big"))
    before = path.read_bytes()
    storage = RecordingStorage(BytesStorage(before))
    with pytest.raises(CorruptMetadata, match=rule):
        heal(load_state(storage), storage)
    assert [epoch for epoch in storage.epochs if epoch] == []


def test_a_refcount_that_the_width_cannot_hold_is_not_cut(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", "cluster_size=4096,refcount_bits=1")
    qemu_io(path, "write -P 1 0 64k")
    l2 = field(path, field(path, 40)) & 0x00FF_FFFF_FFFF_FE00
    patch(path, l2 + 8, field(path, l2).to_bytes(8, "big"))
    before = path.read_bytes()
    storage = BytesStorage(before)
    with pytest.raises(QcowError, match="overflow cluster"):
        heal(load_state(storage), storage)
    assert storage.getvalue() == before
