"""Benchmarks of single functions; in an ordinary test run each runs once and only its result is looked at.

python3 tools/bench.py --only functions
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import qcowlib
from qcowlib.codecs.compression import compress, decompress
from qcowlib.format import entries
from qcowlib.format.refcount_block import decode_refcounts, encode_refcounts

MIB = 1 << 20
SIZE = 256 * MIB
PAGE = 4096


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with every other cluster written, so that no two rows of its map can be merged."""
    path = tmp_path_factory.mktemp("disk") / "disk.qcow2"
    qcowlib.create_image(path, SIZE)
    with qcowlib.open_image(path, format="qcow2", writable=True) as image:
        for offset in range(0, SIZE, 2 << 16):
            image.write(offset, offset.to_bytes(8, "big") * (PAGE // 8))
    return path


@pytest.fixture
def image(disk: Path) -> Iterator[qcowlib.BlockImage]:
    with qcowlib.open_image(disk, format="qcow2") as opened:
        yield opened


def table_of_entries(count: int) -> entries.Entries:
    numbers = np.arange(1, count + 1, dtype=np.uint64) << np.uint64(16)
    return (numbers | np.uint64(entries.OFLAG_COPIED)).astype(">u8")


def test_open(benchmark: BenchmarkFixture, disk: Path) -> None:
    def open_and_close() -> int:
        with qcowlib.open_image(disk, format="qcow2") as opened:
            return opened.size

    assert benchmark(open_and_close) == SIZE


def test_random_read_of_a_page(benchmark: BenchmarkFixture, image: qcowlib.BlockImage) -> None:
    order = random.Random(1)
    offsets = [order.randrange(SIZE // (2 << 16)) * (2 << 16) for _ in range(1000)]

    def read_all() -> bytes:
        last = b""
        for offset in offsets:
            last = image.read(offset, PAGE)
        return last

    assert benchmark(read_all)[:8] == offsets[-1].to_bytes(8, "big")


def test_sequential_read(benchmark: BenchmarkFixture, image: qcowlib.BlockImage) -> None:
    buffer = bytearray(16 * MIB)
    assert benchmark(image.readinto, 64 * MIB, buffer) == len(buffer)
    assert buffer[:8] == (64 * MIB).to_bytes(8, "big")


def test_extents_of_a_whole_disk(benchmark: BenchmarkFixture, image: qcowlib.BlockImage) -> None:
    def rows() -> int:
        return sum(len(table) for table in image.extents())

    assert benchmark(rows) == SIZE >> 16


def test_check(benchmark: BenchmarkFixture, disk: Path) -> None:
    def findings() -> int:
        with qcowlib.open_image(disk, format="qcow2", open_backing=False) as opened:
            return len(qcowlib.check(opened).findings)

    assert benchmark(findings) == 0


def test_classify_an_l2_table(benchmark: BenchmarkFixture) -> None:
    kinds = benchmark(entries.classify_many, table_of_entries(8192))
    assert (kinds == entries.ClusterType.NORMAL).all()


def test_offsets_of_an_l2_table(benchmark: BenchmarkFixture) -> None:
    found = benchmark(entries.offsets, table_of_entries(8192))
    assert found[-1] == 8192 << 16


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_a_block(benchmark: BenchmarkFixture, order: int) -> None:
    block = random.Random(order).randbytes(1 << 16)
    counts = benchmark(decode_refcounts, block, order)
    assert len(counts) == (8 << 16) >> order
    assert encode_refcounts(counts, order) == block


@pytest.mark.parametrize("kind", [0, 1], ids=["zlib", "zstd"])
def test_decompress_a_cluster(benchmark: BenchmarkFixture, kind: int) -> None:
    cluster = b"".join(number.to_bytes(4, "big") for number in range(1 << 14))
    packed = compress(kind, cluster)
    assert packed is not None
    assert benchmark(decompress, kind, packed, len(cluster)) == cluster


@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_snapshot(benchmark: BenchmarkFixture, disk: Path, tmp_path: Path, verb: str) -> None:
    verbs: dict[str, Callable[[qcowlib.BlockImage], object]] = {
        "create": lambda target: qcowlib.create_snapshot(target, "new"),  # type: ignore[arg-type]
        "apply": lambda target: qcowlib.apply_snapshot(target, "old"),  # type: ignore[arg-type]
        "delete": lambda target: qcowlib.delete_snapshot(target, "old"),  # type: ignore[arg-type]
    }
    path = tmp_path / "copy.qcow2"

    def fresh() -> tuple[tuple[()], dict[str, object]]:
        path.write_bytes(disk.read_bytes())
        with qcowlib.open_image(path, format="qcow2", writable=True) as target:
            qcowlib.create_snapshot(target, "old")  # type: ignore[arg-type]
        return (), {}

    def run() -> list[str]:
        with qcowlib.open_image(path, format="qcow2", writable=True) as target:
            verbs[verb](target)
            return [entry.name for entry in target.snapshots]

    names = {"create": ["old", "new"], "apply": ["old"], "delete": []}[verb]
    assert benchmark.pedantic(run, setup=fresh, rounds=5) == names
