"""Bitmap operations where the stock tools cannot be asked: damage, limits, large disks, what a session writes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import BitmapError, CorruptMetadata, ImageStateError, NoSuchBitmap, QcowError
from qcowlib.format.bitmap_directory import BitmapFlags
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.bitmap_changes import change_bitmaps
from tests.oracle import assert_clean, qemu_img

MIB = 1 << 20


def create(path: Path, size: int = 8 * MIB, **options: object) -> Path:
    qcowlib.create_image(path, size, **options)  # type: ignore[arg-type]
    return path


def opened(path: Path) -> WritableQcow2Image:
    image = qcowlib.open_image(path, writable=True)
    assert isinstance(image, WritableQcow2Image)
    return image


def marked(path: Path, name: str) -> list[tuple[int, int]]:
    with qcowlib.open_image(path) as image:
        batches = qcowlib.dirty_extents(image, name)
        return [row for one in batches for row in zip(one.start.tolist(), one.length.tolist(), strict=True)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image_path = create(tmp_path / "image.qcow2")
    with opened(image_path) as image:
        qcowlib.add_bitmap(image, "auto", granularity=4096)
        qcowlib.add_bitmap(image, "off", granularity=4096, disabled=True)
        image.write(MIB, b"x" * 5000)
    return image_path


def corrupt(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def table_offset(path: Path, name: str) -> int:
    with qcowlib.open_image(path) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        return next(entry.table_offset for entry in image.bitmaps if entry.name == name)


def test_a_session_without_writes_leaves_the_file_alone(path: Path) -> None:
    before = path.read_bytes()
    opened(path).close()
    assert path.read_bytes() == before


def test_in_use_from_before_the_first_write_until_close(path: Path) -> None:
    def flags() -> dict[str, int]:
        with qcowlib.open_image(path.read_bytes()) as image:
            assert isinstance(image, qcowlib.Qcow2Image)
            return {entry.name: int(entry.flags) for entry in image.bitmaps}

    image = opened(path)
    assert flags() == {"off": 0, "auto": BitmapFlags.AUTO}
    image.write(0, b"y")
    assert flags() == {"off": 0, "auto": BitmapFlags.AUTO | BitmapFlags.IN_USE}
    image.flush()
    assert flags() == {"off": 0, "auto": BitmapFlags.AUTO | BitmapFlags.IN_USE}
    image.close()
    assert flags() == {"off": 0, "auto": BitmapFlags.AUTO}
    assert marked(path, "auto") == [(0, 4096), (MIB, 8192)]
    assert marked(path, "off") == []
    assert_clean(path)


def test_reading_in_the_session_that_writes(path: Path) -> None:
    with opened(path) as image:
        image.write(4 * MIB, b"y")
        found = [row for one in qcowlib.dirty_extents(image, "auto") for row in zip(*one, strict=True)]
        assert found == [(MIB, 8192), (4 * MIB, 4096)]
        image.write(6 * MIB, b"z")
    assert marked(path, "auto") == [(MIB, 8192), (4 * MIB, 4096), (6 * MIB, 4096)]


def test_changes_before_one_that_fails_are_stored(path: Path) -> None:
    def change(image: WritableQcow2Image) -> None:
        with change_bitmaps(image) as changes:
            changes.add("new")
            changes.clear("auto")
            changes.clear("nothere")

    with opened(path) as image, pytest.raises(NoSuchBitmap):
        change(image)
    assert marked(path, "new") == marked(path, "auto") == []
    assert_clean(path)


def test_removed_and_added_again_in_one_go(path: Path) -> None:
    with opened(path) as image, change_bitmaps(image) as changes:
        changes.remove("auto")
        changes.add("auto", 512)
        changes.add("gone")
        changes.merge("gone", "auto")
        changes.remove("gone")
    with qcowlib.open_image(path) as image:
        assert [entry.name for entry in image.bitmaps] == ["off", "auto"]
        assert image.bitmaps[1].granularity_bits == 9
    assert marked(path, "auto") == []
    assert_clean(path)


def test_a_failed_action_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    with opened(path) as image:
        for action in (
            lambda: qcowlib.add_bitmap(image, "auto"),
            lambda: qcowlib.add_bitmap(image, "new", granularity=1000),
            lambda: qcowlib.add_bitmap(image, "n" * 1024),
            lambda: qcowlib.add_bitmap(image, ""),
            lambda: qcowlib.remove_bitmap(image, "nothere"),
            lambda: qcowlib.merge_bitmap(image, "auto", "nothere"),
        ):
            with pytest.raises(BitmapError):
                action()
    assert path.read_bytes() == before


def test_read_only_and_raw(path: Path, tmp_path: Path) -> None:
    with qcowlib.open_image(path) as image, pytest.raises(ImageStateError, match="not open for writing"):
        qcowlib.clear_bitmap(image, "auto")
    (tmp_path / "raw").write_bytes(bytes(MIB))
    with qcowlib.open_image(tmp_path / "raw", format="raw", writable=True) as image:
        with pytest.raises(BitmapError, match="Operation not supported"):
            qcowlib.add_bitmap(image, "new")
        with pytest.raises(NoSuchBitmap):
            list(qcowlib.dirty_extents(image, "auto"))
        assert qcowlib.bitmaps_size(image, 65536) == 0


@pytest.mark.parametrize("entry", [b"\xff" * 8, (1 << 40).to_bytes(8, "big"), (3).to_bytes(8, "big")])
def test_a_damaged_table_is_never_read_nor_written(path: Path, entry: bytes) -> None:
    """No guest write is done either: the bitmap would miss it."""
    corrupt(path, table_offset(path, "auto"), entry)
    before = path.read_bytes()
    with pytest.raises(CorruptMetadata):
        marked(path, "auto")
    with opened(path) as image:
        for action in (
            lambda: image.write(0, b"x"),
            lambda: image.write_zeroes(0, 4096),
            lambda: qcowlib.clear_bitmap(image, "auto"),
            lambda: qcowlib.merge_bitmap(image, "off", "auto"),
            lambda: qcowlib.add_bitmap(image, "new"),
        ):
            with pytest.raises(QcowError):
                action()
    assert path.read_bytes() == before


def test_a_damaged_bitmap_can_be_removed(path: Path) -> None:
    """What it had is left over: nobody knows any more what that was."""
    corrupt(path, table_offset(path, "auto"), b"\xff" * 8)
    with opened(path) as image:
        qcowlib.remove_bitmap(image, "auto")
        image.write(0, b"x")
    with qcowlib.open_image(path) as image:
        assert image.read(0, 1) == b"x"
        report = qcowlib.check(image)
        assert {finding.code for finding in report.findings} == {"leak"}


def test_a_bitmap_on_a_cluster_of_the_guest_is_not_freed(path: Path) -> None:
    """The refcount of the cluster says one: to free it with the bitmap would lose data."""
    with qcowlib.open_image(path) as image:
        host = next(row.host_offset for table in image.extents() for row in table if row.host_offset)
    corrupt(path, table_offset(path, "auto"), host.to_bytes(8, "big"))
    with opened(path) as image:
        for action in (lambda: image.write(0, b"y"), lambda: qcowlib.clear_bitmap(image, "auto")):
            with pytest.raises(CorruptMetadata):
                action()
        qcowlib.remove_bitmap(image, "auto")
        assert image.read(MIB, 5000) == b"x" * 5000
    assert path.read_bytes()[host : host + 5000] == b"x" * 5000


def test_a_large_disk_with_small_granularity(tmp_path: Path) -> None:
    """1 TiB with a bit for 512 bytes: 256 MiB of bits, of which a few are in memory at a time."""
    path = create(tmp_path / "large.qcow2", 1 << 40)
    places = sorted({(number * 2_654_435_761 % (1 << 31)) << 9 for number in range(1500)})
    with opened(path) as image:
        qcowlib.add_bitmap(image, "fine", granularity=512)
        qcowlib.add_bitmap(image, "usual")
        tracemalloc.start()
        for place in places:
            image.discard(place, 512)  # no whole cluster: nothing but the bitmaps changes
        image.close()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert marked(path, "fine") == [(place, 512) for place in places]
    with opened(path) as image:
        qcowlib.merge_bitmap(image, "usual", "fine")
        qcowlib.clear_bitmap(image, "fine")
        qcowlib.merge_bitmap(image, "fine", "usual")
    assert peak < 64 * MIB, f"{peak >> 20} MiB"
    assert marked(path, "fine") == marked(path, "usual")
    assert_clean(path)


def test_too_many_tables_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "image.qcow2", 64 * MIB, cluster_size=512)
    with opened(path) as image:
        qcowlib.add_bitmap(image, "fine", granularity=512)
    monkeypatch.setattr("qcowlib.metadata.bitmaps._MAX_TABLE_ENTRIES", 31)
    with opened(path) as image, pytest.raises(ImageStateError, match="too large to be held in memory"):
        image.write(0, b"x")
    monkeypatch.undo()
    with opened(path) as image:
        image.write(0, b"x")
    assert marked(path, "fine") == [(0, 512)]


def test_no_room_in_the_header(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "raw", tmp_path / "base", "1M")
    path = tmp_path / "image.qcow2"
    name = "./" * 180 + "base"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", name, "-F", "raw", path, "1M", cwd=tmp_path)
    before = path.read_bytes()
    with qcowlib.open_image(path, writable=True, policy=qcowlib.LocalFiles()) as image:
        with pytest.raises(qcowlib.OptionError, match="no room"):
            qcowlib.add_bitmap(image, "new")
        assert image.read(0, 512) == bytes(512)
    assert path.read_bytes() == before
