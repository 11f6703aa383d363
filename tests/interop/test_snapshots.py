"""Internal snapshots: what we make, the stock tools read; what they make, we work on."""

import hashlib
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from tests.oracle import assert_clean, content, image_info, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
SIZE = 2 * MIB


def create(path: Path, options: str = "", size: int = SIZE) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *(("-o", options) if options else ()), path, str(size))
    return path


def guest_bytes(path: Path, snapshot_id: str | None = None) -> bytes:
    """Guest content as qemu-img reads it."""
    return content(path, path.parent, snapshot=f"snapshot.id={snapshot_id}" if snapshot_id else None)


def stock_list(path: Path) -> list[dict[str, Any]]:
    """The snapshots that qemu-img lists."""
    return list(image_info(path).get("snapshots", []))


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=2",
        "refcount_bits=4,cluster_size=4k",
        "refcount_bits=64,cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "preallocation=metadata,cluster_size=4k",
        "lazy_refcounts=on",
    ],
)
def test_three_states_and_back(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "disk.qcow2", options)
    rng = random.Random(options)
    states: dict[str, bytes] = {}
    model = bytearray(SIZE)
    with qcowlib.open_image(path, writable=True) as image:
        for name in ("one", "two"):
            for _ in range(6):
                start = rng.randrange(SIZE - 90 * KIB)
                data = rng.randbytes(rng.choice([1, 512, 5000, 80 * KIB]))
                image.write(start, data)
                model[start : start + len(data)] = data
            states[qcowlib.create_snapshot(image, name).id] = bytes(model)
        image.write_zeroes(100 * KIB, 300 * KIB)
        model[100 * KIB : 400 * KIB] = bytes(300 * KIB)
    assert_clean(path)
    assert list(states) == ["1", "2"]
    assert guest_bytes(path) == model
    for number, state in states.items():
        assert guest_bytes(path, number) == state
    with qcowlib.open_image(path, writable=True) as image:
        qcowlib.apply_snapshot(image, "1")
        assert image.read(0, SIZE) == states["1"]
        image.write(0, b"after the revert")
        qcowlib.delete_snapshot(image, "one")
        assert image.open_snapshot("two").read(0, SIZE) == states["2"]
    assert_clean(path)
    assert guest_bytes(path) == b"after the revert" + states["1"][16:]
    assert guest_bytes(path, "2") == states["2"]
    with qcowlib.open_image(path, writable=True) as image:
        qcowlib.delete_snapshot(image, "2")
    assert_clean(path)
    assert stock_list(path) == []
    assert guest_bytes(path) == b"after the revert" + states["1"][16:]


def test_snapshots_of_the_stock_tool_are_applied_and_deleted(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    qemu_io(path, "write -P 1 0 256k", "write -z 256k 64k", "write -c -P 2 512k 64k")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write -P 3 64k 512k")
    qemu_img("snapshot", "-c", "second", path)
    qemu_io(path, "discard 0 1M")
    first, second = guest_bytes(path, "1"), guest_bytes(path, "2")
    with qcowlib.open_image(path, writable=True) as image:
        qcowlib.apply_snapshot(image, "first")
        qcowlib.delete_snapshot(image, "first")
    assert_clean(path)
    assert guest_bytes(path) == first
    assert guest_bytes(path, "2") == second
    qemu_img("snapshot", "-a", "second", path)
    assert guest_bytes(path) == second
    assert_clean(path)


def test_entry_fields_and_ids(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    with qcowlib.open_image(path, writable=True) as image:
        entry = qcowlib.create_snapshot(
            image, "Müller 1", date_ns=1_700_000_000_123_456_789, vm_clock_ns=3_661_000_000_007, icount=42
        )
        assert entry.id == "1"
        # Ids go on from the largest number; names may repeat and may look like numbers.
        assert [qcowlib.create_snapshot(image, name).id for name in ("7", "7")] == ["2", "3"]
        qcowlib.delete_snapshot(image, "2")
        assert qcowlib.create_snapshot(image, "last").id == "4"
    listed = stock_list(path)
    assert [(s["id"], s["name"]) for s in listed] == [("1", "Müller 1"), ("3", "7"), ("4", "last")]
    first = listed[0]
    assert (first["date-sec"], first["date-nsec"]) == (1_700_000_000, 123_456_789)
    assert (first["vm-clock-sec"], first["vm-clock-nsec"]) == (3661, 7)
    assert (first["icount"], first["vm-state-size"]) == (42, 0)


def test_an_id_is_found_before_a_name(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    with qcowlib.open_image(path, writable=True) as image:
        qcowlib.create_snapshot(image, "2")  # id 1, name 2
        image.write(0, b"second")
        qcowlib.create_snapshot(image, "other")  # id 2
        image.write(0, b"active")
        qcowlib.apply_snapshot(image, "2")
        assert image.read(0, 6) == b"second"
        with pytest.raises(qcowlib.NoSuchSnapshot):
            qcowlib.apply_snapshot(image, "3")
        with pytest.raises(qcowlib.NoSuchSnapshot):
            qcowlib.delete_snapshot(image, "")


def test_the_disk_size_comes_back(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", "cluster_size=512", size=MIB)
    qemu_io(path, "write -P 5 1023k 1k")
    with qcowlib.open_image(path, writable=True) as image:
        qcowlib.create_snapshot(image, "small")
    qemu_img("resize", path, "8M")
    qemu_io(path, "write -P 6 7M 64k", "write -P 7 0 64k")
    with qcowlib.open_image(path, writable=True) as image:
        assert image.open_snapshot("small").size == MIB
        qcowlib.create_snapshot(image, "large")
        qcowlib.apply_snapshot(image, "small")
        assert image.size == MIB
        image.write(MIB - 3, b"end")
    assert_clean(path)
    assert guest_bytes(path) == bytes(1023 * KIB) + b"\x05" * 1021 + b"end"
    with qcowlib.open_image(path, writable=True) as image:
        qcowlib.apply_snapshot(image, "large")
        assert image.size == 8 * MIB
        assert image.read(7 * MIB, 64 * KIB) == b"\x06" * 64 * KIB
    assert_clean(path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("width", "possible"), [(1, 0), (2, 2), (4, 14)])
def test_a_width_too_small_for_another_reference_changes_nothing(tmp_path: Path, width: int, possible: int) -> None:
    path = create(tmp_path / "disk.qcow2", f"refcount_bits={width},cluster_size=4k")
    qemu_io(path, "write -P 1 0 64k")
    with qcowlib.open_image(path, writable=True) as image:
        for number in range(possible):
            qcowlib.create_snapshot(image, f"s{number}")
    before = digest(path)
    with (
        qcowlib.open_image(path, writable=True) as image,
        pytest.raises(qcowlib.SnapshotError, match=f"width of {width} bits"),
    ):
        qcowlib.create_snapshot(image, "one too many")
    assert digest(path) == before
    assert_clean(path)
    # Applying one needs no additional reference for what both have.
    if possible:
        with qcowlib.open_image(path, writable=True) as image:
            qcowlib.apply_snapshot(image, "s0")
            image.write(0, b"changed")
            qcowlib.apply_snapshot(image, "s1")
        assert_clean(path)
        assert guest_bytes(path)[: 64 * KIB] == b"\x01" * 64 * KIB


def test_bitmaps_survive_create_and_delete_and_refuse_apply(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    qemu_io(path, "write -P 1 0 64k")
    qemu_img("bitmap", "--add", path, "changes")
    qemu_io(path, "write -P 2 128k 64k")
    before = image_info(path)["format-specific"]
    with qcowlib.open_image(path, writable=True) as image:
        qcowlib.create_snapshot(image, "a")
        with pytest.raises(qcowlib.SnapshotError, match="Device has active dirty bitmaps"):
            qcowlib.apply_snapshot(image, "a")
        qcowlib.create_snapshot(image, "b")
        qcowlib.delete_snapshot(image, "a")
    assert_clean(path)
    assert image_info(path)["format-specific"] == before
    assert [s["name"] for s in stock_list(path)] == ["b"]


def test_an_external_data_file_has_no_snapshots(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", f"data_file={tmp_path / 'data'}")
    with (
        qcowlib.open_image(path, writable=True, policy=qcowlib.LocalFiles()) as image,
        pytest.raises(qcowlib.SnapshotError, match="external data file"),
    ):
        qcowlib.create_snapshot(image, "a")


def test_a_damaged_mapping_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    qemu_io(path, "write -P 1 0 256k")
    with qcowlib.open_image(path) as image:
        l2_offset = int(image.state.l1[0]) & 0x00FF_FFFF_FFFF_FE00
    with open(path, "r+b") as file:
        file.seek(l2_offset + 8)
        file.write((1 << 40 | 1 << 63).to_bytes(8, "big"))  # an entry behind the end of the file
    before = digest(path)
    with qcowlib.open_image(path, writable=True) as image, pytest.raises(qcowlib.CorruptMetadata):
        qcowlib.create_snapshot(image, "a")
    assert digest(path) == before


@pytest.mark.parametrize("options", ["", "cluster_size=512", "compat=0.10", "extended_l2=on,cluster_size=16k"])
def test_vm_states(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "disk.qcow2", options)
    state = random.Random(1).randbytes(3 * MIB + 1)
    with qcowlib.open_image(path, writable=True) as image:
        image.write(0, b"one")
        qcowlib.create_snapshot(image, "disk only")
        image.write(0, b"two")
        qcowlib.create_snapshot(image, "with vm state", vmstate=io.BytesIO(state))
        attached = qcowlib.attach_vmstate(image, "disk only", io.BytesIO(state[:70_000]))
        assert attached.vm_state_size == 70_000
        with pytest.raises(qcowlib.SnapshotError, match="has a vm state already"):
            qcowlib.attach_vmstate(image, "disk only", io.BytesIO(b"again"))
    assert_clean(path)
    assert [s["vm-state-size"] for s in stock_list(path)] == [70_000, len(state)]
    with qcowlib.open_image(path, writable=True) as image:
        for name, saved, start in (("disk only", state[:70_000], b"one"), ("with vm state", state, b"two")):
            view = image.open_snapshot(name)
            assert view.vmstate.read(0, view.vmstate.size) == saved
            assert view.read(0, 3) == start
        qcowlib.apply_snapshot(image, "with vm state")
        # The vm state of the applied snapshot does not become one of the next.
        assert qcowlib.create_snapshot(image, "later").vm_state_size == 0
        qcowlib.delete_snapshot(image, "with vm state")
        qcowlib.delete_snapshot(image, "disk only")
    assert_clean(path)


def test_space_is_given_back(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", size=16 * MIB)
    with qcowlib.open_image(path, writable=True) as image:
        image.write(0, os.urandom(8 * MIB))
        qcowlib.create_snapshot(image, "a")
        image.write(0, os.urandom(8 * MIB))
        image.flush()
        full = os.stat(path).st_blocks * 512
        qcowlib.delete_snapshot(image, "a")
    assert full >= 16 * MIB
    assert os.stat(path).st_blocks * 512 < full - 7 * MIB
    assert_clean(path)


def test_raw_and_read_only_images_are_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(SIZE))
    with qcowlib.open_image(path) as image:
        with pytest.raises(qcowlib.ImageStateError, match="not open for writing"):
            qcowlib.create_snapshot(image, "a")
        with pytest.raises(qcowlib.ImageStateError, match="not open for writing"):
            qcowlib.delete_snapshot(image, "a")
    with (
        qcowlib.open_image(raw, format="raw", writable=True) as image,
        pytest.raises(qcowlib.SnapshotError, match="raw image"),
    ):
        qcowlib.apply_snapshot(image, "a")


def shared_cluster_with_refcount_one(path: Path) -> Path:
    """An image whose active layer and snapshots share clusters, one of which has refcount 1 on disk."""
    create(path, "cluster_size=4k")
    qemu_io(path, "write -P 1 0 64k")
    for name in ("a", "b"):
        qemu_img("snapshot", "-c", name, path)
    with qcowlib.open_image(path) as image:
        host = image.state.mapping.lookup(8 * KIB)[1]
        block = int.from_bytes(image.state.storage.pread(8, image.header.refcount_table_offset), "big")
    with open(path, "r+b") as file:
        file.seek(block + (host >> 12) * 2)
        file.write((1).to_bytes(2, "big"))
    return path


def test_nothing_is_freed_while_a_refcount_is_too_low(tmp_path: Path) -> None:
    path = shared_cluster_with_refcount_one(tmp_path / "disk.qcow2")
    before = digest(path)
    for operation in (qcowlib.delete_snapshot, qcowlib.apply_snapshot):
        with (
            qcowlib.open_image(path, writable=True) as image,
            pytest.raises(qcowlib.CorruptMetadata, match="refcount 1 of a cluster with"),
        ):
            operation(image, "a")
        assert digest(path) == before


def test_a_write_does_not_free_what_its_entry_calls_shared(tmp_path: Path) -> None:
    path = shared_cluster_with_refcount_one(tmp_path / "disk.qcow2")
    with qcowlib.open_image(path, writable=True) as image:
        image.write(0, b"\x02" * 64 * KIB)
        image.flush()
        image.write(64 * KIB, b"\x03" * 256 * KIB)  # would take the freed cluster
    for number in ("1", "2"):
        assert guest_bytes(path, number)[: 64 * KIB] == b"\x01" * 64 * KIB
