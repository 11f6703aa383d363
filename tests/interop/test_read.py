"""What stock QEMU writes reads back equal here: content in odd ranges, maps, snapshots, chains."""

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qcowlib import LocalFiles, open_image
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.raw import RawImage
from qcowlib.image.reader import ReadableImage, read_pieces, read_range
from qcowlib.operations.map import map_image
from tests import oracle

MIB = 1 << 20
SIZE = 3 * MIB + 512

#: Image options that change how guest data is found, each combined with each base.
GRID = [
    ["compat=0.10"],
    ["compat=1.1"],
    ["cluster_size=512"],
    ["cluster_size=4096", "refcount_bits=1"],
    ["cluster_size=2M", "refcount_bits=64"],
    ["extended_l2=on"],
    ["extended_l2=on", "cluster_size=16k"],
    ["extended_l2=on", "cluster_size=2M"],
    ["compression_type=zstd"],
    ["preallocation=metadata"],
    ["lazy_refcounts=on", "cluster_size=128k"],
]
BASES = ["none", "raw", "qcow2 shorter", "qcow2 longer"]


def scribble(path: Path, seed: int, *, size: int = SIZE, zero: bool = True, compressed: bool = False) -> None:
    """Random writes, zeroes, discards and compressed clusters by qemu-io."""
    choose = random.Random(seed)
    # QEMU writes compressed clusters only where nothing is allocated: first of all.
    commands = [f"write -q -c -P 7 0 {2 * MIB}"] if compressed else []
    for _ in range(25):
        offset = choose.randrange(0, size // 512) * 512
        length = min(choose.choice([512, 1536, 4096, 20480, 65536, 200 * 1024]), size - offset)
        kind = choose.choice(["write", "write", "write", "zero", "unmap"])
        if kind == "write":
            commands.append(f"write -q -P {choose.randrange(1, 255)} {offset} {length}")
        elif zero:
            commands.append(f"write -q -z {'-u ' if kind == 'unmap' else ''}{offset} {length}")
    oracle.qemu_io(path, *commands)


def make_base(kind: str, directory: Path) -> list[str]:
    """Arguments of qemu-img create for a backing file of this kind."""
    if kind == "none":
        return []
    name, *variant = kind.split()
    base = directory / f"base.{name}"
    size = {"shorter": MIB + 1536, "longer": SIZE + MIB}.get(variant[0] if variant else "", 2 * MIB)
    if name == "raw":
        data = random.Random(5).randbytes(size - 300)
        base.write_bytes(data[: size // 2] + bytes(65536) + data[size // 2 + 65536 :])
    else:
        oracle.qemu_img("create", "-q", "-f", "qcow2", base, str(size))
        scribble(base, 99, size=size)
    return ["-b", base.name, "-F", name]


def assert_reads_equal(image: ReadableImage, expected: bytes, seed: int = 1) -> None:
    """Whole content, odd ranges, and both ways to read agree with the expected bytes."""
    assert image.size == len(expected)
    assert image.read(0, image.size) == expected
    choose = random.Random(seed)
    for _ in range(60):
        offset = choose.randrange(0, image.size)
        length = min(choose.choice([1, 7, 512, 4096, 70_000, 400_000]), image.size - offset)
        part = expected[offset : offset + length]
        assert image.read(offset, length) == part
        for read in (read_pieces, read_range):
            buffer = bytearray(b"\xa5" * length)
            read(image, offset, memoryview(buffer))
            assert buffer == part


def assert_map_equal(image: ReadableImage, path: Path) -> None:
    theirs = oracle.image_map(path, "-f", image.format)
    ours = [
        {
            "start": row.start, "length": row.length, "depth": row.depth, "present": row.present, "zero": row.zero,
            "data": row.data, **({} if row.offset is None else {"offset": row.offset}),
        }
        for row in map_image(image)
    ]  # fmt: skip
    assert ours == theirs


@pytest.mark.parametrize(("number", "options"), list(enumerate(GRID)), ids=str)
@pytest.mark.parametrize("base", BASES)
def test_grid(number: int, options: list[str], base: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    if base != "none" and any("preallocation" in option for option in options):
        options = ["extended_l2=on", "preallocation=metadata"]
    oracle.qemu_img("create", "-q", "-f", "qcow2", *make_base(base, tmp_path), "-o", ",".join(options), path, str(SIZE))
    compressed = not any("preallocation" in option for option in options)
    scribble(path, number, zero="compat=0.10" not in options or base == "none", compressed=compressed)
    expected = oracle.content(path, tmp_path)
    with open_image(path, policy=LocalFiles()) as image:
        assert isinstance(image, Qcow2Image)
        assert_reads_equal(image, expected, number)
        assert_map_equal(image, path)


@pytest.mark.parametrize("options", [["data_file_raw=off"], ["data_file_raw=on"], ["extended_l2=on"]], ids=str)
def test_external_data_file(options: list[str], tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join([f"data_file={data}", *options]), path, str(SIZE))
    scribble(path, 3)
    expected = oracle.content(path, tmp_path)
    with open_image(path, policy=LocalFiles()) as image:
        assert_reads_equal(image, expected)
        assert_map_equal(image, path)
    if options == ["data_file_raw=on"]:
        assert data.read_bytes()[: len(expected)] == expected  # QEMU ends it at a cluster


@pytest.mark.parametrize("options", [[], ["cluster_size=4096"], ["extended_l2=on"]], ids=str)
def test_snapshots_with_their_own_size(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(["compat=1.1", *options]), path, str(SIZE))
    expected = []
    for number, size in enumerate((SIZE, SIZE + 2 * MIB, MIB)):
        oracle.qemu_img("resize", "-q", "--shrink", "-f", "qcow2", path, str(size))
        scribble(path, number, size=size)
        expected.append(oracle.content(path, tmp_path))
        oracle.qemu_img("snapshot", "-q", "-c", f"s{number}", path)
    scribble(path, 77, size=MIB)
    with open_image(path) as image:
        assert [entry.name for entry in image.snapshots] == ["s0", "s1", "s2"]
        for number, content in enumerate(expected):
            with image.open_snapshot(f"s{number}") as snapshot:
                assert snapshot.name == str(path)
                assert_reads_equal(snapshot, content, number)
                assert snapshot.vmstate.size == 0
        assert image.open_snapshot("2").entry.name == "s1"
        assert image.read(0, image.size) == oracle.content(path, tmp_path)


def test_json_and_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "inner.qcow2"
    oracle.qemu_img("create", "-q", "-f", "qcow2", inner, str(SIZE))
    scribble(inner, 8)
    data = inner.read_bytes()
    (tmp_path / "container").write_bytes(b"\xee" * 1536 + data + b"\xee" * 512)
    name = {
        "driver": "qcow2",
        "file": {
            "driver": "raw",
            "offset": 1024,
            "size": len(data),
            "file": {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "container"}},
        },
    }
    top = tmp_path / "top.qcow2"
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", "json:" + json.dumps(name), "-F", "qcow2", top)
    scribble(top, 9)
    expected = oracle.content(top, tmp_path)
    with open_image(top, policy=LocalFiles()) as image:
        assert_reads_equal(image, expected)
        assert image.backing is not None
        assert image.backing.format == "qcow2"
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", 'json:{"driver":"raw","offset":1536,"file.driver":"file",'
                    '"file.filename":"container"}', "-F", "raw", top)  # fmt: skip
    with open_image(top, policy=LocalFiles()) as image:
        assert isinstance(image.backing, RawImage)
        assert_reads_equal(image, oracle.content(top, tmp_path))
        assert_map_equal(image, top)


def test_a_long_chain(tmp_path: Path) -> None:
    """60 layers, each with one cluster of its own."""
    previous: list[str] = []
    for number in range(60):
        path = tmp_path / f"{number}.qcow2"
        oracle.qemu_img("create", "-q", "-u", "-f", "qcow2", *previous, path, str(8 * MIB))
        previous = ["-b", path.name, "-F", "qcow2"]
        with open_image(path, writable=True, open_backing=False) as image:
            image.write(number * 65536, bytes([number + 1]) * 65536)
    with open_image(path, policy=LocalFiles()) as image:
        for number in (0, 1, 30, 59):
            assert image.read(number * 65536 + 10, 100) == bytes([number + 1]) * 100
        layers = [row.layer for table in image.extents() for row in table]
        assert layers == [*range(59, -1, -1), 59]
        assert image.read(0, image.size) == b"".join(bytes([number + 1]) * 65536 for number in range(60)) + bytes(
            68 * 65536
        )


@pytest.mark.parametrize("make", ["plain", "compressed"])
def test_threads_read_the_same(make: str, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(b"".join(bytes([n % 251]) * 3000 + random.Random(n).randbytes(1096) for n in range(1024)))
    path = tmp_path / "disk.qcow2"
    oracle.qemu_img("convert", *(["-c"] if make == "compressed" else []), "-O", "qcow2", source, path)
    expected = source.read_bytes()
    with open_image(path) as image, ThreadPoolExecutor(8) as pool:

        def work(seed: int) -> bool:
            choose = random.Random(seed)
            for _ in range(150):
                offset = choose.randrange(0, len(expected) - 9000)
                length = choose.randrange(1, 9000)
                if image.read(offset, length) != expected[offset : offset + length]:
                    return False
            return True

        assert all(pool.map(work, range(16)))


def encrypted(path: Path, kind: str) -> list[str]:
    """Create an encrypted image; returns the qemu arguments that open it."""
    secret = ["--object", "secret,id=s,data=open sesame"]
    options = {"luks": "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=200"}.get(
        kind, "encrypt.format=aes,encrypt.key-secret=s"
    )
    oracle.qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, path, str(SIZE))
    return [*secret, "--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"]


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_encrypted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    *secret, _, options = encrypted(path, kind)
    commands = itertools.chain.from_iterable(
        ("-c", f"write -q -P {n + 1} {offset} {length}")
        for n, (offset, length) in enumerate([(0, 512), (65536 - 512, 1024), (MIB, 300 * 1024), (SIZE - 512, 512)])
    )
    oracle.run("qemu-io", *secret, "--image-opts", *commands, options)
    raw = tmp_path / "plain.raw"
    oracle.qemu_img("convert", *secret, "--image-opts", "-O", "raw", options, raw)
    with open_image(path, passphrase="open sesame") as image:
        assert_reads_equal(image, raw.read_bytes())
        ours = [row for row in map_image(image) if row.data]
    theirs = json.loads(oracle.qemu_img("map", "--output=json", *secret, "--image-opts", options).stdout)
    assert [(row.start, row.length, row.offset) for row in ours] == [
        (row["start"], row["length"], row.get("offset")) for row in theirs if row["data"]
    ]
