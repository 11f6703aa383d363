"""Dirty bitmaps both ways: what we mark, the stock NBD server exports; what QEMU marks, we read."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.resize import resize
from tests.model import BitmapModel
from tests.oracle import assert_clean, image_info, qemu_img, qemu_io, run

MIB = 1 << 20
SIZE = 40 * MIB + 512
GRANULARITIES = {"fine": 512, "usual": 65536, "coarse": 4 * MIB}

_SOCKETS = itertools.count()

GEOMETRIES = [
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=2M",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=64,lazy_refcounts=on",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=64k,compression_type=zstd",
    "cluster_size=64k,data_file=data",
    "cluster_size=64k,data_file=data,data_file_raw=on",
]


def create(directory: Path, options: str, size: int = SIZE) -> Path:
    path = directory / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options.replace("=data", f"={directory / 'data'}"), path, str(size))
    return path


def opened(path: Path) -> WritableQcow2Image:
    image = qcowlib.open_image(path, writable=True, policy=qcowlib.LocalFiles())
    assert isinstance(image, WritableQcow2Image)
    return image


def ours(path: Path, name: str) -> list[tuple[int, int]]:
    """(offset, length) of what a bitmap has marked, as the library says."""
    with qcowlib.open_image(path, open_backing=False) as image:
        batches = qcowlib.dirty_extents(image, name)
        return [row for one in batches for row in zip(one.start.tolist(), one.length.tolist(), strict=True)]


def stock(path: Path, name: str) -> list[tuple[int, int]]:
    """The same by the stock NBD server and qemu-img map."""
    socket = path.parent / f"nbd{next(_SOCKETS)}"  # a server that ends removes its socket when the next one stands
    run("qemu-nbd", "-r", "-f", "qcow2", "-B", name, "-k", socket, "--fork", path)
    options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    rows: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", "--image-opts", options).stdout)
    return [(row["start"], row["length"]) for row in rows if not row["data"]]


def expected(model: BitmapModel, size: int = SIZE) -> list[tuple[int, int]]:
    """What the model has marked."""
    ranges: list[tuple[int, int]] = []
    for bit in sorted(model.bits):
        start, end = bit * model.granularity, min((bit + 1) * model.granularity, size)
        if ranges and sum(ranges[-1]) == start:
            ranges[-1] = (ranges[-1][0], end - ranges[-1][0])
        else:
            ranges.append((start, end - start))
    return ranges


def assert_marked(path: Path, models: dict[str, BitmapModel], size: int = SIZE) -> None:
    """Both readers say what the models say."""
    for name, model in models.items():
        assert ours(path, name) == expected(model, size), name
        assert stock(path, name) == expected(model, size), name
    assert_clean(path)


def flags(path: Path) -> dict[str, list[str]]:
    return {one["name"]: one["flags"] for one in image_info(path)["format-specific"]["data"].get("bitmaps", [])}


def writes(choose: random.Random, count: int) -> Iterable[tuple[str, int, int]]:
    """(kind, offset, length) of guest writes; whole sectors, as the stock tool's bitmaps round to them."""
    for _ in range(count):
        length = choose.choice((512, 4096, 70_144, 3 * MIB))
        offset = choose.randrange((SIZE - length) // 512) * 512
        yield choose.choice(("write", "write", "zero", "discard")), offset, length


def by_us(path: Path, choose: random.Random, models: dict[str, BitmapModel]) -> None:
    with opened(path) as image:
        for kind, offset, length in writes(choose, 4):
            if kind == "write":
                image.write(offset, choose.randbytes(length))
            elif kind == "zero":
                image.write_zeroes(offset, length)
            else:
                image.discard(offset, length)
            mark(models, offset, length)


def by_stock(path: Path, choose: random.Random, models: dict[str, BitmapModel]) -> None:
    commands = []
    for kind, offset, length in writes(choose, 4):
        commands.append(
            f"{ {'write': 'write -P 9', 'zero': 'write -z', 'discard': 'discard'}[kind] } {offset} {length}"
        )
        mark(models, offset, length)
    qemu_io(path, *commands)


def mark(models: dict[str, BitmapModel], offset: int, length: int) -> None:
    for model in models.values():
        if model.enabled:
            model.mark(offset, length)


@pytest.mark.parametrize("options", GEOMETRIES)
def test_writes_of_both_are_marked(options: str, tmp_path: Path) -> None:
    """Bitmaps made by one, written by the other, turn by turn."""
    path, choose = create(tmp_path, options), random.Random(options)
    models = {name: BitmapModel(granularity) for name, granularity in GRANULARITIES.items()}
    models["off"] = BitmapModel(4096, enabled=False)
    with opened(path) as image:
        qcowlib.add_bitmap(image, "fine", granularity=512)
        qcowlib.add_bitmap(image, "off", granularity=4096, disabled=True)
    qemu_img("bitmap", "--add", "-g", "64k", path, "usual")
    qemu_img("bitmap", "--add", "-g", "4M", path, "coarse")
    for turn in (by_us, by_stock, by_us):
        turn(path, choose, models)
    assert_marked(path, models)
    assert flags(path) == {"fine": ["auto"], "off": [], "usual": ["auto"], "coarse": ["auto"]}


def test_actions_of_both(tmp_path: Path) -> None:
    path, choose = create(tmp_path, "cluster_size=4k"), random.Random(3)
    models = {name: BitmapModel(granularity) for name, granularity in GRANULARITIES.items()}
    with opened(path) as image:
        for name, model in models.items():
            qcowlib.add_bitmap(image, name, granularity=model.granularity)
    by_us(path, choose, models)
    qemu_img("bitmap", "--clear", "--disable", path, "fine")
    models["fine"] = BitmapModel(512, enabled=False)
    by_us(path, choose, models)
    with opened(path) as image:
        qcowlib.merge_bitmap(image, "fine", "usual")
        qcowlib.enable_bitmap(image, "fine")
        qcowlib.clear_bitmap(image, "usual")
    models["fine"].merge(models["usual"], SIZE)
    models["fine"].enabled = True
    models["usual"].bits.clear()
    by_stock(path, choose, models)
    qemu_img("bitmap", "--merge", "fine", path, "coarse")
    models["coarse"].merge(models["fine"], SIZE)
    assert_marked(path, models)
    with opened(path) as image:
        qcowlib.remove_bitmap(image, "coarse")
        qcowlib.remove_bitmap(image, "fine")
    qemu_img("bitmap", "--remove", path, "usual")
    assert flags(path) == {}
    assert_clean(path)


def test_everything_is_marked(tmp_path: Path) -> None:
    """Whole clusters of set bits are said by the table alone; the stock tool reads it, and goes on."""
    path = create(tmp_path, "cluster_size=512")
    models = {name: BitmapModel(granularity) for name, granularity in GRANULARITIES.items()}
    with opened(path) as image:
        for name, model in models.items():
            qcowlib.add_bitmap(image, name, granularity=model.granularity)
        image.write_zeroes(512, SIZE - 512)
    mark(models, 512, SIZE - 512)
    assert_marked(path, models)
    by_stock(path, random.Random(1), models)
    assert_marked(path, models)


def test_an_interrupted_session_is_inconsistent_for_both(tmp_path: Path) -> None:
    path = create(tmp_path, "cluster_size=64k")
    qemu_img("bitmap", "--add", path, "auto")
    qemu_img("bitmap", "--add", "--disable", path, "off")
    image = opened(path)
    image.write(0, b"x")
    image.flush()
    interrupted = path.with_name("interrupted.qcow2")
    interrupted.write_bytes(path.read_bytes())
    image.close()
    assert flags(path) == {"auto": ["auto"], "off": []}
    assert flags(interrupted) == {"auto": ["in-use", "auto"], "off": []}
    with pytest.raises(qcowlib.BitmapError, match="Bitmap 'auto' is inconsistent and cannot be used"):
        ours(interrupted, "auto")
    with opened(interrupted) as image:
        image.write(1 << 20, b"more")
    assert flags(interrupted) == {"auto": ["in-use", "auto"], "off": []}
    assert_clean(interrupted)
    qemu_img("bitmap", "--remove", interrupted, "auto")
    assert ours(interrupted, "off") == stock(interrupted, "off") == []
    assert_clean(interrupted)


def test_what_a_killed_qemu_leaves(tmp_path: Path) -> None:
    path = create(tmp_path, "cluster_size=64k")
    qemu_img("bitmap", "--add", path, "auto")
    run("qemu-io", "-c", "write 0 1M", "-c", "abort", path, check=False)
    assert flags(path) == {"auto": ["in-use", "auto"]}
    with opened(path) as image:
        image.write(0, b"x")
        with pytest.raises(qcowlib.BitmapError, match="inconsistent"):
            qcowlib.clear_bitmap(image, "auto")
        qcowlib.remove_bitmap(image, "auto")
    assert flags(path) == {}
    assert_clean(path)


def test_a_program_without_bitmaps_has_written(tmp_path: Path) -> None:
    """The autoclear bit is off: no bitmap is believed, none is recorded in, and new ones can be made."""
    path = create(tmp_path, "cluster_size=64k")
    qemu_img("bitmap", "--add", path, "old")
    with path.open("r+b") as file:
        file.seek(88)
        file.write(bytes(8))
    with opened(path) as image:
        image.write(0, b"x")
        assert image.bitmaps == []
        qcowlib.add_bitmap(image, "new")
        image.write(MIB, b"y")
    assert flags(path) == {"new": ["auto"]}
    assert stock(path, "new") == ours(path, "new") == [(MIB, 65536)]
    assert qemu_img("check", path, check=False).returncode == 3, "what the lost bitmap had is leaked, as in QEMU"


@pytest.mark.parametrize("source_options", ["cluster_size=64k", "cluster_size=512"])
@pytest.mark.parametrize("target_options", ["cluster_size=2M", "cluster_size=4k,extended_l2=off"])
def test_convert_copies_bitmaps(source_options: str, target_options: str, tmp_path: Path) -> None:
    path, target = create(tmp_path, source_options), tmp_path / "target.qcow2"
    models = {"fine": BitmapModel(512), "usual": BitmapModel(65536)}
    with opened(path) as image:
        for name, model in models.items():
            qcowlib.add_bitmap(image, name, granularity=model.granularity)
    by_stock(path, random.Random(8), models)
    with opened(path) as image:
        qcowlib.disable_bitmap(image, "usual")
    with qcowlib.open_image(path) as image:
        qcowlib.convert(
            image, target, target_format="qcow2", bitmaps=True, cluster_size=2 * MIB if "2M" in target_options else 4096
        )
    assert_marked(target, models)
    assert flags(target) == {"fine": ["auto"], "usual": []}


@pytest.mark.parametrize("size", [10 * MIB + 512, 100 * MIB])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512"])
def test_bitmaps_follow_a_resize(size: int, options: str, tmp_path: Path) -> None:
    path, other = create(tmp_path, options), tmp_path / "other.qcow2"
    models = {name: BitmapModel(granularity) for name, granularity in GRANULARITIES.items()}
    models["full"] = BitmapModel(8192)
    with opened(path) as image:
        for name, model in models.items():
            qcowlib.add_bitmap(image, name, granularity=model.granularity)
    by_us(path, random.Random(11), models)
    with opened(path) as image:
        image.write_zeroes(0, SIZE)
    mark(models, 0, SIZE)
    other.write_bytes(path.read_bytes())
    with opened(path) as image:
        resize(image, size, shrink=True)
    qemu_img("resize", "-q", "--shrink", "-f", "qcow2", other, str(size))
    for model in models.values():
        model.bits = {bit for bit in model.bits if bit * model.granularity < size}
    for name, model in models.items():
        assert stock(path, name) == ours(path, name) == stock(other, name) == ours(other, name)
        # A bit that reaches beyond the old end now means a part of the new disk, too.
        assert ours(path, name) == expected(model, size), name
    assert_clean(path)


def test_inconsistent_bitmaps_prevent_a_resize(tmp_path: Path) -> None:
    path = create(tmp_path, "cluster_size=64k")
    qemu_img("bitmap", "--add", path, "auto")
    run("qemu-io", "-c", "abort", path, check=False)
    with opened(path) as image, pytest.raises(qcowlib.BitmapError, match="'auto' is inconsistent"):
        resize(image, 2 * SIZE - 512)
    assert image_info(path)["virtual-size"] == SIZE


def test_snapshots_beside_bitmaps(tmp_path: Path) -> None:
    """A snapshot is taken and deleted in the middle of a session that records; to apply one is refused."""
    path = create(tmp_path, "cluster_size=64k")
    models = {"auto": BitmapModel(65536)}
    qemu_img("bitmap", "--add", path, "auto")
    with opened(path) as image:
        image.write(0, b"x" * 4096)
        qcowlib.create_snapshot(image, "one")
        image.write(5 * MIB, b"y" * 4096)
        with pytest.raises(qcowlib.SnapshotError, match="dirty bitmaps"):
            qcowlib.apply_snapshot(image, "one")
        qcowlib.delete_snapshot(image, "one")
        image.write(9 * MIB, b"z" * 4096)
    for offset in (0, 5 * MIB, 9 * MIB):
        mark(models, offset, 4096)
    assert_marked(path, models)


def test_size_for_measure(tmp_path: Path) -> None:
    """QEMU's rule: all bits, all tables, one directory."""
    path = create(tmp_path, "cluster_size=64k", 1 << 40)
    qemu_img("bitmap", "--add", "-g", "4k", path, "a")
    qemu_img("bitmap", "--add", "-g", "1M", path, "b")
    with qcowlib.open_image(path) as image:
        for size, option in ((65536, "64k"), (4096, "4k"), (2 * MIB, "2M")):
            measured = qemu_img("measure", "--output=json", "-O", "qcow2", "-o", f"cluster_size={option}", path)
            assert qcowlib.bitmaps_size(image, size) == json.loads(measured.stdout)["bitmaps"]
