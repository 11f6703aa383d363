"""Converted images: stock QEMU finds the same content, and nothing wrong."""

import errno
import os
import random
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qcowlib import (
    CorruptMetadata,
    ImageStateError,
    LocalFiles,
    OptionError,
    QcowError,
    ReferenceDenied,
    convert,
    open_image,
)
from qcowlib.operations.copy_source import Loss
from qcowlib.operations.dd import dd, dd_range
from qcowlib.operations.unfinished import UnfinishedFile
from qcowlib.storage.local import LocalFile
from tests import oracle

MIB = 1 << 20
SIZE = 9 * MIB + 1536

TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("raw", {}),
    ("raw", {"sparse_size": 0}),
    ("raw", {"sparse_size": 1 << 20}),
    ("raw", {"preallocation": "full"}),
    ("qcow2", {}),
    ("qcow2", {"sparse_size": 0}),
    ("qcow2", {"compat": "0.10"}),
    ("qcow2", {"cluster_size": 512}),
    ("qcow2", {"cluster_size": 2 * MIB, "extended_l2": True}),
    ("qcow2", {"compressed": True}),
    ("qcow2", {"compressed": True, "compression_type": "zstd", "cluster_size": 4096}),
    ("qcow2", {"compressed": True, "sparse_size": 0, "cluster_size": 2 * MIB}),
    ("qcow2", {"preallocation": "metadata"}),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with data, zero clusters and unallocated parts, some of it compressed; text compresses, noise does not."""
    directory = tmp_path_factory.mktemp("source")
    noise = directory / "noise"
    noise.write_bytes(random.Random(1).randbytes(200 * 1024))
    path = directory / "source.qcow2"
    oracle.qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    oracle.qemu_io(
        path,
        "write -q -c -P 9 4M 256k",
        f"write -q -s {noise} 100k 200k",
        "write -q -P 3 1M 700k",
        "write -q -z 1200k 64k",
        "write -q -P 0 2M 256k",
        "write -q -P 4 5000704 512",
        f"write -q -P 5 {SIZE - 512} 512",
    )
    return path


@pytest.fixture(params=[None, 2], ids=["alone", "executor"])
def executor(request: pytest.FixtureRequest) -> Executor | None:
    return None if request.param is None else ThreadPoolExecutor(request.param)


def assert_same(source: Path, target: Path, target_format: str) -> None:
    oracle.qemu_img("compare", "-f", "qcow2", "-F", target_format, source, target)
    if target_format == "qcow2":
        oracle.assert_clean(target)


@pytest.mark.parametrize(("target_format", "options"), TARGETS, ids=str)
def test_targets(
    source: Path, tmp_path: Path, target_format: str, options: dict[str, Any], executor: Executor | None
) -> None:
    target = tmp_path / "target"
    reports: list[tuple[int, int]] = []
    with open_image(source) as image:
        convert(
            image,
            target,
            target_format=target_format,
            executor=executor,
            progress=lambda done, total: reports.append((done, total)),
            **options,
        )
    assert_same(source, target, target_format)
    assert reports[-1][0] == reports[-1][1] > 0
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


def test_what_the_target_occupies(source: Path, tmp_path: Path) -> None:
    """Zeroes are left out: as small as qemu-img's targets, a cluster or two aside."""
    for target_format, options, arguments in (
        ("raw", {}, []),
        ("qcow2", {}, []),
        ("qcow2", {"compressed": True}, ["-c"]),
        ("raw", {"sparse_size": 0}, ["-S", "0"]),
    ):
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        with open_image(source) as image:
            convert(image, ours, target_format=target_format, **options)
        oracle.qemu_img("convert", "-O", target_format, *arguments, source, theirs)
        space = [path.stat().st_blocks * 512 for path in (ours, theirs)]
        assert space[0] <= space[1] + 2 * 65536, (target_format, options, space)


@pytest.mark.parametrize("name", ["raw", "qcow2"])
def test_into_an_existing_target(source: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    oracle.qemu_img("create", "-q", "-f", name, target, str(SIZE + MIB))
    oracle.qemu_io(target, f"write -q -P 255 0 {SIZE + MIB}", format=name)
    with open_image(source) as image:
        convert(image, target, target_format=name, create=False)
        with open_image(target, format=name) as result:
            assert result.size == SIZE + MIB
            assert result.read(0, SIZE) == image.read(0, SIZE)
            assert result.read(SIZE, MIB) == b"\xff" * MIB
        oracle.qemu_img("resize", "-q", "--shrink", "-f", name, target, str(MIB))
        with pytest.raises(OptionError, match="output file is smaller than input file"):
            convert(image, target, target_format=name, create=False)


def test_a_target_that_is_zero(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    oracle.qemu_img("create", "-q", "-f", "qcow2", target, str(SIZE))
    with open_image(source) as image:
        convert(image, target, target_format="qcow2", create=False, target_is_zero=True)
    assert_same(source, target, "qcow2")
    assert not any(row["zero"] and row["present"] for row in oracle.image_map(target))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("base_size", [4 * MIB, SIZE, SIZE + MIB])
def test_onto_a_backing_file(tmp_path: Path, compressed: bool, base_size: int) -> None:
    """What the source's own layer has not allocated stays with the target's backing file."""
    base, top, target = (tmp_path / name for name in ("base.qcow2", "top.qcow2", "target.qcow2"))
    oracle.qemu_img("create", "-q", "-f", "qcow2", base, str(base_size))
    oracle.qemu_io(base, f"write -q -P 1 0 {base_size}")
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top, str(SIZE))
    oracle.qemu_io(top, "write -q -P 2 1M 100k", "write -q -z 2M 128k", f"write -q -P 3 {SIZE - 512} 512")
    with open_image(top, policy=LocalFiles()) as image:
        convert(
            image,
            target,
            target_format="qcow2",
            backing_file="base.qcow2",
            backing_fmt="qcow2",
            policy=LocalFiles(),
            compressed=compressed,
        )
        with pytest.raises(ReferenceDenied):
            convert(image, tmp_path / "denied", target_format="qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
    assert not (tmp_path / "denied").exists()
    assert_same(top, target, "qcow2")
    inherited = [(row["start"], row["length"]) for row in oracle.image_map(target) if row["depth"] == 1]
    assert (0, MIB) in inherited, "nothing of the base was copied"


def test_snapshots_convert_at_their_own_size(source: Path, tmp_path: Path) -> None:
    disk, target = tmp_path / "disk.qcow2", tmp_path / "target.raw"
    disk.write_bytes(source.read_bytes())
    before = oracle.content(disk, tmp_path)
    oracle.qemu_img("snapshot", "-c", "before", disk)
    oracle.qemu_io(disk, "write -q -P 8 0 3M")
    oracle.qemu_img("resize", "-q", disk, str(SIZE + MIB))
    with open_image(disk) as image:
        convert(image.open_snapshot("before"), target)
    assert target.read_bytes() == before


def test_encrypted_target(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.qcow2"
    with open_image(source) as image:
        convert(
            image,
            target,
            target_format="qcow2",
            encrypt_format="luks",
            encrypt_passphrase="x",
            encrypt_iter_time_ms=10,
        )
    oracle.qemu_img(
        "compare", "--object", "secret,id=s,data=x", "--image-opts", f"driver=qcow2,file.filename={source}",
        f"driver=qcow2,encrypt.key-secret=s,file.filename={target}",
    )  # fmt: skip


def test_the_source_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    base.write_bytes(source.read_bytes())
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    (tmp_path / "link").symlink_to(base)
    kept = {path: path.read_bytes() for path in (base, top)}
    with open_image(top, policy=LocalFiles(), force_share=True) as image:
        for target in (base, top, tmp_path / "link"):
            for create in (True, False):
                with pytest.raises(ImageStateError, match="is the source"):
                    convert(image, target, target_format="qcow2", create=create)
            with pytest.raises(ImageStateError):
                dd(image, target)
    assert kept == {path: path.read_bytes() for path in kept}


def test_a_damaged_source_touches_nothing(source: Path, tmp_path: Path) -> None:
    damaged, target = tmp_path / "damaged.qcow2", tmp_path / "target.raw"
    data = bytearray(source.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ((1 << 56) - 512)
    data[l2 + 8 * 30 : l2 + 8 * 31] = (1 << 50).to_bytes(8, "big")
    damaged.write_bytes(data)
    target.write_bytes(b"precious")
    with open_image(damaged) as image, pytest.raises(CorruptMetadata):
        convert(image, target)
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("threads", [None, 2])
def test_a_target_that_was_made_is_removed_on_failure(source: Path, tmp_path: Path, threads: int | None) -> None:
    damaged, target = tmp_path / "damaged.qcow2", tmp_path / "target.raw"
    data = bytearray(source.read_bytes())
    with open_image(source) as image:
        host = next(row.host_offset for table in image.extents() for row in table if row.kind.name == "COMPRESSED")
    assert host is not None
    data[host : host + 40] = b"\xff" * 40
    damaged.write_bytes(data)
    pool = None if threads is None else ThreadPoolExecutor(threads)
    with open_image(damaged) as image, pytest.raises(QcowError):
        convert(image, target, executor=pool)
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_format": "vmdk"}, "Unknown file format 'vmdk'"),
        ({"compressed": True}, "Compression not supported for this file format"),
        ({"target_format": "qcow2", "compressed": True, "preallocation": "full"}, "preallocation"),
        ({"target_format": "qcow2", "compressed": True, "encrypt_format": "luks"}, "encryption"),
        ({"target_is_zero": True}, "-n"),
        ({"create": False, "target_format": "qcow2", "cluster_size": 4096}, "-o has no effect"),
        ({"target_format": "qcow2", "backing_file": "x"}, "Could not open"),
    ],
)
def test_arguments_that_do_not_fit(source: Path, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with open_image(source) as image, pytest.raises(QcowError, match=text):
        convert(image, tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("block_size", "count", "skip"),
    [(512, None, 0), (512, 3, 0), (512, 10, 4), (1000, 7, 2), (65536, None, 3), (1 << 20, 100, 0), (7, 1000, 999)],
)
@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
def test_dd(source: Path, tmp_path: Path, block_size: int, count: int | None, skip: int, target_format: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with open_image(source) as image:
        dd(image, ours, target_format=target_format, block_size=block_size, count=count, skip=skip)
    oracle.qemu_img(
        "dd", "-f", "qcow2", "-O", target_format, f"if={source}", f"of={theirs}", f"bs={block_size}", f"skip={skip}",
        *([] if count is None else [f"count={count}"]),
    )  # fmt: skip
    with open_image(ours, format=target_format) as left, open_image(theirs, format=target_format) as right:
        assert left.size == right.size
        assert left.read(0, left.size) == right.read(0, right.size)


def test_dd_range() -> None:
    assert dd_range(1000, block_size=100) == (0, 1000, False)
    assert dd_range(1000, block_size=100, count=4, skip=3) == (300, 400, False)
    assert dd_range(1000, block_size=100, skip=10) == (1000, 1000, False)
    assert dd_range(1000, block_size=100, skip=11) == (1000, 1000, True)
    assert dd_range(1000, block_size=100, count=1 << 60, skip=1 << 60) == (1000, 1000, True)


def test_several_sources_are_joined(source: Path, tmp_path: Path) -> None:
    """Also where a cluster of the target has bytes of two of them."""
    odd, raw, joined = tmp_path / "odd.raw", tmp_path / "raw.raw", tmp_path / "joined.raw"
    odd.write_bytes(random.Random(2).randbytes(100 * 1024 + 512))
    raw.write_bytes(bytes(300 * 1024) + b"\x05" * 70_144)
    with open_image(source) as first:
        joined.write_bytes(odd.read_bytes() + first.read(0, SIZE) + raw.read_bytes() + odd.read_bytes())
        with open_image(odd, format="raw") as second, open_image(raw, format="raw") as third:
            images = [second, first, third, second]
            for number, (target_format, options) in enumerate(TARGETS):
                target = tmp_path / f"target{number}"
                convert(images, target, target_format=target_format, **options)
                oracle.qemu_img("compare", "-f", "raw", "-F", target_format, joined, target)
            with pytest.raises(OptionError, match="concatenating"):
                convert(images, tmp_path / "none", target_format="qcow2", backing_file="x", backing_fmt="raw")


@pytest.mark.parametrize("compression_type", ["zlib", "zstd"])
def test_clusters_lie_in_guest_order(tmp_path: Path, compression_type: str) -> None:
    """Whatever the threads do: the same bytes each time."""
    raw = tmp_path / "source.raw"
    words = random.Random(3)
    raw.write_bytes(b"".join(words.randbytes(words.randrange(1, 3000)).ljust(4096, b"\1") for _ in range(2000)))
    for compressed in (True, False):
        files = []
        for threads in (None, 2, 7):
            pool = None if threads is None else ThreadPoolExecutor(threads)
            target = tmp_path / f"{compressed}-{threads}.qcow2"
            options: dict[str, Any] = {"compressed": compressed, "compression_type": compression_type}
            with open_image(raw, format="raw") as image:
                convert(image, target, target_format="qcow2", executor=pool, cluster_size=4096, **options)
            files.append(target.read_bytes())
            assert_rising(target)
        assert files[0] == files[1] == files[2]
        oracle.qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, target)
        oracle.assert_clean(target)


def assert_rising(path: Path) -> None:
    with open_image(path, format="qcow2") as image:
        hosts = [row.host_offset or 0 for table in image.extents() for row in table]
    assert hosts == sorted(hosts)


@pytest.mark.parametrize(("target_format", "options"), [*TARGETS, ("qcow2", {"offload": True})], ids=str)
def test_out_of_order_and_not_durable(
    source: Path, tmp_path: Path, target_format: str, options: dict[str, Any]
) -> None:
    target = tmp_path / "target"
    with open_image(source) as image, ThreadPoolExecutor(3) as pool:
        convert(image, target, target_format=target_format, out_of_order=True, durable=False, executor=pool, **options)
    assert_same(source, target, target_format)


@pytest.mark.parametrize(
    "options", [{}, {"cluster_size": 4096}, {"extended_l2": True}, {"data_file_raw": True}], ids=str
)
@pytest.mark.parametrize("kind", ["qcow2", "raw", "overlay"])
def test_the_host_copies(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    """Data goes from file to file; where the host refuses in the middle, the rest is copied by hand."""
    plain, made = tmp_path / "plain.qcow2", tmp_path / "source"
    oracle.qemu_img("convert", "-O", "qcow2", "-o", "cluster_size=4096", source, plain)
    if kind == "raw":
        oracle.qemu_img("convert", "-O", "raw", plain, made)
    else:
        oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", plain.name, "-F", "qcow2", made)
        oracle.qemu_io(made, *(["write -q -P 8 6M 300k"] if kind == "overlay" else []))
    allowed, copied, real = 0, 0, os.copy_file_range

    def copy_file_range(source: int, target: int, count: int, offset: int, to: int) -> int:
        nonlocal copied
        if copied >= allowed:
            raise OSError(errno.EXDEV, "another file system")
        done = real(source, target, min(count, 100_000), offset, to)
        copied += done
        return done

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    if options.get("data_file_raw"):
        options = {**options, "data_file": str(tmp_path / "data")}
    for allowed in (0, 300_000, 1 << 40):
        for target_format in ("raw", "qcow2"):
            copied = 0
            target = tmp_path / "target"
            with open_image(made, format="raw" if kind == "raw" else "qcow2", policy=LocalFiles()) as image:
                convert(
                    image,
                    target,
                    target_format=target_format,
                    offload=True,
                    policy=LocalFiles(),
                    **(options if target_format == "qcow2" else {}),
                )
            assert (copied > 0) == (allowed > 0)
            oracle.qemu_img("compare", "-F", target_format, made, target)
            if target_format == "qcow2":
                oracle.assert_clean(target)
                if "data_file" in options:
                    oracle.qemu_img("compare", "-F", "raw", made, tmp_path / "data")
            target.unlink()


def test_salvage(source: Path, tmp_path: Path) -> None:
    """A compressed cluster and a mapping that cannot be read: zeroes there, a report of each, all else as it was."""
    damaged, target = tmp_path / "damaged.qcow2", tmp_path / "target.raw"
    data = bytearray(source.read_bytes())
    with open_image(source) as image:
        before = image.read(0, SIZE)
        row = next(row for table in image.extents() for row in table if row.kind.name == "COMPRESSED")
    assert row.host_offset is not None
    data[row.host_offset : row.host_offset + 40] = b"\xff" * 40
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ((1 << 56) - 512)
    for cluster in (18, 19, 25):
        data[l2 + 8 * cluster : l2 + 8 * cluster + 8] = (1 << 63 | 1 << 50).to_bytes(8, "big")
    damaged.write_bytes(data)
    expected = bytearray(before)
    expected[row.start : row.start + 65536] = bytes(65536)
    for cluster in (18, 19, 25):
        expected[cluster << 16 : cluster + 1 << 16] = bytes(65536)
    for image_format in ("raw", "qcow2"):
        losses: list[Loss] = []
        with open_image(damaged) as image:
            convert(image, target, target_format=image_format, salvage=True, lost=losses.append)
        assert oracle.content(target, tmp_path, format=image_format) == bytes(expected)
        assert [loss.start >> 16 for loss in losses if loss.mapping] == [18, 19, 25]
        assert {loss.length for loss in losses if loss.mapping} == {65536}
        read = [loss for loss in losses if not loss.mapping]
        assert [loss.start for loss in read] == list(range(row.start, row.start + 65536, 512))


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_encrypted_and_preallocated(source: Path, tmp_path: Path, preallocation: str) -> None:
    """Zeroes of the source are written: those of the host would be deciphered to noise."""
    target = tmp_path / "target.qcow2"
    with open_image(source) as image:
        convert(
            image,
            target,
            target_format="qcow2",
            preallocation=preallocation,
            encrypt_format="luks",
            encrypt_passphrase="x",
            encrypt_iter_time_ms=10,
        )
    oracle.qemu_img(
        "compare", "--object", "secret,id=s,data=x", "--image-opts", f"driver=qcow2,file.filename={source}",
        f"driver=qcow2,encrypt.key-secret=s,file.filename={target}",
    )  # fmt: skip


@pytest.mark.parametrize("old", [b"", b"old" * 100])
def test_data_file(source: Path, tmp_path: Path, old: bytes) -> None:
    target, data = tmp_path / "target.qcow2", tmp_path / "data"
    with open_image(source) as image:
        for options in ({}, {"data_file_raw": True}, {"preallocation": "metadata"}):
            data.write_bytes(old)
            convert(image, target, target_format="qcow2", data_file=str(data), **options)
            assert_same(source, target, "qcow2")
            with open_image(target, policy=LocalFiles()) as made:
                convert(made, tmp_path / "again.qcow2", target_format="qcow2", compressed=True)
                with pytest.raises(ImageStateError, match="is the source"):
                    convert(made, data)
                with pytest.raises(ImageStateError, match="is the source"):
                    convert(made, tmp_path / "other", target_format="qcow2", data_file=str(data))
            assert_same(source, tmp_path / "again.qcow2", "qcow2")
        with pytest.raises(OptionError, match="same file"):
            convert(image, target, target_format="qcow2", data_file=str(target))
        with pytest.raises(OptionError, match="compressed"):
            convert(image, target, target_format="qcow2", data_file=str(data), compressed=True)


def test_into_an_overlay(tmp_path: Path) -> None:
    """-n with a backing file: what the source inherits is left to the target's backing file."""
    base, top, target = (tmp_path / name for name in ("base.qcow2", "top.qcow2", "target.qcow2"))
    oracle.qemu_img("create", "-q", "-f", "qcow2", base, "4M")
    oracle.qemu_io(base, "write -q -P 1 0 4M")
    for overlay in (top, target):
        oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", overlay)
    oracle.qemu_io(top, "write -q -P 2 1M 100k", "write -q -z 2M 128k")
    with open_image(top, policy=LocalFiles()) as image:
        convert(image, target, target_format="qcow2", create=False, backing_file="base.qcow2", policy=LocalFiles())
    assert_same(top, target, "qcow2")
    assert (0, MIB, 1) in [(row["start"], row["length"], row["depth"]) for row in oracle.image_map(target)]


def test_a_device_shows_old_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes itself for a block device: it cannot be emptied, and zeroes have to be written."""
    device, copy = tmp_path / "device", tmp_path / "copy"
    real = LocalFile.__init__

    def opened(self: LocalFile, descriptor: int, name: str, *, writable: bool) -> None:
        real(self, descriptor, name, writable=writable)
        self.is_block_device = os.path.samestat(os.fstat(descriptor), os.stat(device))

    for image_format in ("raw", "qcow2"):
        device.write_bytes(b"\xee" * 2 * SIZE)
        with monkeypatch.context() as patch, open_image(source) as image:
            patch.setattr(LocalFile, "__init__", opened)
            patch.setattr(UnfinishedFile, "_set_aside", lambda _self: False)
            convert(image, device, target_format=image_format)
        if image_format == "raw":
            copy.write_bytes(device.read_bytes()[:SIZE])
            oracle.qemu_img("compare", "-f", "qcow2", "-F", "raw", source, copy)
            assert device.read_bytes()[SIZE:] == b"\xee" * SIZE
        else:
            oracle.qemu_img("compare", "-f", "qcow2", "-F", "qcow2", source, device)
