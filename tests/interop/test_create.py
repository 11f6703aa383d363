"""Creation against the stock tool: the same options give the same file, byte for byte, or the same error text.

A refcount table that had to grow leaves its old clusters behind with a refcount of 0; what bytes are in such free
clusters is nobody's business, and all others are compared.
"""

import contextlib
import itertools
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcowlib import create_image, create_overlay, open_image
from qcowlib.errors import ChainError, ImageLocked, OptionError, QcowError
from qcowlib.format.constants import CRYPT_AES, CRYPT_LUKS
from qcowlib.format.entries import offsets
from qcowlib.format.header import Header, parse_header
from qcowlib.format.refcount_block import decode_refcounts
from tests.oracle import assert_clean, environment, image_info, qemu_img, qemu_io, tool

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tools work in the same directory with the same relative names."""
    for side in ("stock", "ours"):
        (tmp_path / side).mkdir()
    monkeypatch.chdir(tmp_path)


def stock_arguments(options: Options) -> list[str]:
    """Keyword options as qemu-img's -o argument."""
    texts = []
    for key, value in options.items():
        name = f"encrypt.{key.removeprefix('encrypt_').replace('_', '-')}" if key.startswith("encrypt_") else key
        texts.append(f"{name}={value if not isinstance(value, bool) else 'on' if value else 'off'}")
    return ["-o", ",".join(texts)] if texts else []


def create_both(size: int, options: Options, backing: str | None = None) -> tuple[Path, Path]:
    """One image by each side, in its own directory and under the same relative name."""
    link = [] if backing is None else ["-u", "-b", backing, "-F", "raw"]
    base = Path.cwd()
    qemu_img("create", "-q", "-f", "qcow2", *link, *stock_arguments(options), "t.qcow2", str(size), cwd=base / "stock")
    backing_fmt = None if backing is None else "raw"
    with contextlib.chdir(base / "ours"):
        create_image("t.qcow2", size, backing_file=backing, backing_fmt=backing_fmt, check_backing=False, **options)
    return base / "stock" / "t.qcow2", base / "ours" / "t.qcow2"


def data_blocks(path: Path, block: int) -> set[int]:
    """Indices of the blocks that the host has data for."""
    found: set[int] = set()
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        position = 0
        while position < end:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.update(range(start // block, -(-position // block)))
    return found


def header_of(path: Path) -> Header:
    with path.open("rb") as file:
        return parse_header(file.read(2 * MIB))


def refcounts_of(path: Path) -> dict[int, Any]:
    """Refcount table index -> refcounts of that block."""
    import numpy as np

    header = header_of(path)
    with path.open("rb") as file:
        file.seek(header.refcount_table_offset)
        table = np.frombuffer(file.read(header.refcount_table_clusters << header.cluster_bits), dtype=">u8")
        found = {}
        for index, offset in enumerate(offsets(table).tolist()):
            if offset:
                file.seek(offset)
                found[index] = decode_refcounts(file.read(header.cluster_size), header.refcount_order)
    return found


def differing_clusters(first: Path, second: Path) -> list[int]:
    """Clusters that are not equal and in use."""
    cluster = header_of(first).cluster_size
    with first.open("rb") as a, second.open("rb") as b:
        different = []
        for index in sorted(data_blocks(first, cluster) | data_blocks(second, cluster)):
            a.seek(index * cluster)
            b.seek(index * cluster)
            if a.read(cluster) != b.read(cluster):
                different.append(index)
    if not different:
        return []
    counts = refcounts_of(first)
    entries = len(counts[0])
    return [i for i in different if counts[i // entries][i % entries] or i // entries not in counts]


def assert_same(stock: Path, ours: Path) -> None:
    assert ours.stat().st_size == stock.stat().st_size
    assert header_of(ours) == header_of(stock)
    assert differing_clusters(stock, ours) == []


CLUSTER_SIZES = [512, 1024, 2048, 4096, 8192, 16384, 65536, 1 << 18, 1 << 21]
REFCOUNT_BITS = [1, 2, 4, 8, 16, 32, 64]
SIZES = [0, 512, 1000, MIB, GIB + 512, 20 * GIB]


def grid() -> Iterator[tuple[int, Options, str | None]]:
    """Every pair of cluster size and refcount width, the other features dealt out over them."""
    deal = random.Random(72)
    for cluster_size, refcount_bits in itertools.product(CLUSTER_SIZES, REFCOUNT_BITS):
        options: Options = {"cluster_size": cluster_size, "refcount_bits": refcount_bits}
        if refcount_bits == 16 and deal.random() < 0.5:
            options["compat"] = "0.10"
        else:
            options["lazy_refcounts"] = deal.random() < 0.3
            options["compression_type"] = deal.choice(["zlib", "zstd"])
            options["extended_l2"] = cluster_size >= 16384 and deal.random() < 0.5
        yield deal.choice(SIZES), options, deal.choice([None, None, "base.raw", "dir/" + "n" * 120])
    for size, options in (
        (64 * TIB, {}),
        (64 * TIB, {"extended_l2": True}),
        (TIB, {"cluster_size": 4096}),
        (1 << 60, {"cluster_size": 1 << 21}),
        (8 * GIB, {"cluster_size": 512, "refcount_bits": 64}),
        (GIB, {"compat": "v2"}),
    ):
        yield size, options, None


def label(value: object) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)[:20]


@pytest.mark.parametrize(("size", "options", "backing"), list(grid()), ids=label)
def test_every_byte_is_the_stock_tools(size: int, options: Options, backing: str | None) -> None:
    stock, ours = create_both(size, options, backing)
    assert_same(stock, ours)
    if backing is None:
        assert_clean(ours)


PREALLOCATED: list[tuple[int, Options]] = [
    (0, {}),
    (512, {}),
    (GIB, {}),
    (3 * GIB // 2 + 512 * 7, {}),
    (5 * GIB, {"refcount_bits": 1}),
    (5 * GIB, {"refcount_bits": 64}),
    (4 * MIB, {"cluster_size": 512}),
    (4 * MIB + 512, {"cluster_size": 512, "refcount_bits": 64}),
    (256 * MIB + 512, {"cluster_size": 4096}),
    (128 * MIB, {"cluster_size": 4096, "refcount_bits": 64}),
    (9 * GIB, {"cluster_size": 1 << 20, "refcount_bits": 64}),
    (5 * GIB, {"cluster_size": 1 << 21}),
    (17 * GIB - 512, {"cluster_size": 1 << 18}),
    (GIB, {"lazy_refcounts": True}),
    (GIB, {"compat": "0.10"}),
    (GIB + 1024, {"extended_l2": True}),
    (40 * GIB, {"cluster_size": 1 << 21, "extended_l2": True}),
]


@pytest.mark.parametrize("mode", ["metadata", "falloc"])
@pytest.mark.parametrize(("size", "options"), PREALLOCATED, ids=label)
def test_preallocated_images_are_the_stock_tools(mode: str, size: int, options: Options) -> None:
    if mode == "falloc":
        size = min(size, 2 * GIB)
    stock, ours = create_both(size, {**options, "preallocation": mode})
    assert_same(stock, ours)
    assert_clean(ours)
    if mode == "falloc":
        assert ours.stat().st_blocks * 512 >= size


def assert_same_space(ours: os.stat_result, stock: os.stat_result) -> None:
    """A file that the host has put in more than four pieces has blocks more, which list them: up to 16 KiB here."""
    assert abs(ours.st_blocks - stock.st_blocks) * 512 <= (16 << 10 if stock.st_size > 16 << 10 else 0)


def test_full_preallocation_takes_the_space() -> None:
    stock, ours = create_both(24 * MIB, {"preallocation": "full"})
    assert_same(stock, ours)
    assert_same_space(ours.stat(), stock.stat())
    assert ours.stat().st_blocks * 512 >= 24 * MIB


def test_preallocated_overlay_needs_subclusters() -> None:
    for mode in ("metadata", "falloc"):
        stock, ours = create_both(64 * MIB, {"preallocation": mode, "extended_l2": True}, "base.raw")
        assert_same(stock, ours)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("size", [0, 1000, 64 * MIB, 64 * MIB + 512])
def test_external_data_file(raw: bool, mode: str, size: int) -> None:
    stock, ours = create_both(size, {"data_file": "d.raw", "data_file_raw": raw, "preallocation": mode})
    assert_same(stock, ours)
    stock_data, our_data = stock.parent / "d.raw", ours.parent / "d.raw"
    assert our_data.stat().st_size == stock_data.stat().st_size
    if mode in ("falloc", "full"):
        assert our_data.stat().st_blocks * 512 >= size
    with contextlib.chdir("ours"):  # a relative data file starts at the process's directory
        assert_clean("t.qcow2")


def test_data_file_that_exists_is_emptied() -> None:
    Path("d.raw").write_bytes(b"old content" * 1000)
    create_image("t.qcow2", MIB, data_file="d.raw")
    assert Path("d.raw").read_bytes() == bytes(MIB)


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512},
        {"compat": "0.10"},
        {"preallocation": "metadata"},
        {"preallocation": "falloc", "refcount_bits": 64},
        {"data_file": "d.raw"},
        {"encrypt_cipher_alg": "aes-128", "encrypt_cipher_mode": "cbc", "encrypt_ivgen_alg": "essiv"},
    ],
    ids=label,
)
def test_luks_places_its_header_as_the_stock_tool(options: Options) -> None:
    secret = ("--object", "secret,id=s,data=pass")
    luks = {"encrypt_format": "luks", "encrypt_iter_time": 10}
    arguments = stock_arguments({**options, **luks, "encrypt_key_secret": "s"})
    qemu_img("create", "-q", *secret, "-f", "qcow2", *arguments, "t.qcow2", "32M", cwd=Path.cwd() / "stock")
    ours = Path("ours") / "t.qcow2"
    ours_luks: Options = {"encrypt_format": "luks", "encrypt_passphrase": "pass", "encrypt_iter_time_ms": 10}
    create_image(ours, 32 * MIB, **ours_luks, **options)
    assert header_of(ours) == header_of(Path("stock") / "t.qcow2")
    assert header_of(ours).crypt_method == CRYPT_LUKS
    assert ours.stat().st_size == (Path("stock") / "t.qcow2").stat().st_size
    described = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={ours}"
    qemu_img("check", *secret, "--image-opts", described)
    run = ("write -P 7 1M 100k", "read -P 7 1M 100k")
    command = [tool("qemu-io"), *secret, *(word for text in run for word in ("-c", text)), "--image-opts", described]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    assert "Pattern verification failed" not in done.stdout


def test_legacy_aes_is_made_as_the_stock_tool_makes_it() -> None:
    secret = ("--object", "secret,id=s,data=pass")
    arguments = ["-o", "encrypt.format=aes,encrypt.key-secret=s"]
    qemu_img("create", "-q", *secret, "-f", "qcow2", *arguments, "t.qcow2", "1M", cwd=Path.cwd() / "stock")
    create_image("ours/t.qcow2", MIB, encrypt_format="aes", encrypt_passphrase="pass")
    assert header_of(Path("ours/t.qcow2")).crypt_method == CRYPT_AES
    assert Path("ours/t.qcow2").read_bytes() == Path("stock/t.qcow2").read_bytes()


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
@pytest.mark.parametrize("size", [0, 1, 512, 4095, 4096, 3 * MIB + 1])
def test_raw(mode: str, size: int) -> None:
    qemu_img("create", "-q", "-f", "raw", "-o", f"preallocation={mode}", "stock/t.raw", str(size))
    create_image("ours/t.raw", size, format="raw", preallocation=mode)
    stock, ours = Path("stock/t.raw").stat(), Path("ours/t.raw").stat()
    assert ours.st_size == stock.st_size
    assert_same_space(ours, stock)


REFUSED: list[Options] = [
    {"cluster_size": 1000},
    {"cluster_size": 256},
    {"cluster_size": 0},
    {"cluster_size": 4 * MIB},
    {"cluster_size": 8192, "extended_l2": True},
    {"compat": "0.10", "extended_l2": True},
    {"compat": "0.10", "lazy_refcounts": True},
    {"compat": "0.10", "refcount_bits": 8},
    {"compat": "0.10", "compression_type": "zstd"},
    {"compat": "0.10", "data_file": "d.raw"},
    {"compat": "2"},
    {"refcount_bits": 0},
    {"refcount_bits": 3},
    {"refcount_bits": 128},
    {"compression_type": "lz4"},
    {"preallocation": "foo"},
    {"data_file_raw": True},
    {"encrypt_format": "luks"},
    {"encrypt_format": "aes"},
    {"encrypt_format": "rot13"},
    {"cluster_size": 512, "data_file": "n" * 200 + "/" + "n" * 200},
]


def refusal(*arguments: str) -> str:
    """qemu-img's error text, without the names before it."""
    done = qemu_img("create", "-q", *arguments, check=False)
    assert done.returncode == 1
    return done.stderr.removeprefix("qemu-img: t.qcow2: ").rstrip("\n")


@pytest.mark.parametrize("options", REFUSED, ids=label)
def test_refused_options_have_the_stock_text(options: Options) -> None:
    Path("n" * 200).mkdir()
    expected = refusal("-f", "qcow2", *stock_arguments(options), "t.qcow2", "1M")
    with pytest.raises(OptionError) as caught:
        create_image("t.qcow2", MIB, **options)
    assert str(caught.value) == expected
    assert not Path("t.qcow2").exists()
    assert not Path("d.raw").exists()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((1 << 63) - 1, {}),
        ((1 << 63) - 512, {}),
        ((1 << 63) - (1 << 29), {}),
        (1 << 62, {}),
        (1 << 62, {"cluster_size": 1 << 21}),
        (129 * GIB, {"cluster_size": 512}),
    ],
)
def test_too_large_sizes_have_the_stock_text(size: int, options: Options) -> None:
    expected = refusal("-f", "qcow2", *stock_arguments(options), "t.qcow2", str(size))
    with pytest.raises(OptionError) as caught:
        create_image("t.qcow2", size, **options)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        (["-b", "base.raw"], {"backing_file": "base.raw"}),
        (["-b", "base.qcow2"], {"backing_file": "base.qcow2"}),
        (["-u", "-b", "base.raw"], {"backing_file": "base.raw", "check_backing": False}),
        (["-b", "missing", "-F", "raw"], {"backing_file": "missing", "backing_fmt": "raw"}),
        (["-b", "base.raw", "-F", "qcow2"], {"backing_file": "base.raw", "backing_fmt": "qcow2"}),
        (["-u", "-b", "x", "-F", "what"], {"backing_file": "x", "backing_fmt": "what", "check_backing": False}),
        (["-b", "t.qcow2", "-F", "qcow2"], {"backing_file": "t.qcow2", "backing_fmt": "qcow2"}),
        (["-b", "", "-F", "qcow2"], {"backing_file": "", "backing_fmt": "qcow2"}),
        (["-F", "raw"], {"backing_fmt": "raw"}),
        (
            ["-b", "base.raw", "-F", "raw", "-o", "preallocation=metadata"],
            {"backing_file": "base.raw", "backing_fmt": "raw", "preallocation": "metadata"},
        ),
        (
            ["-b", "base.raw", "-F", "raw", "-o", "data_file=d.raw,data_file_raw=on"],
            {"backing_file": "base.raw", "backing_fmt": "raw", "data_file": "d.raw", "data_file_raw": True},
        ),
        (
            ["-u", "-b", "n" * 377, "-F", "raw", "-o", "cluster_size=512"],
            {"backing_file": "n" * 377, "backing_fmt": "raw", "cluster_size": 512, "check_backing": False},
        ),
        (
            ["-u", "-b", "n" * 1024, "-F", "raw"],
            {"backing_file": "n" * 1024, "backing_fmt": "raw", "check_backing": False},
        ),
    ],
    ids=label,
)
def test_refused_backing_files_have_the_stock_text(arguments: list[str], keywords: Options) -> None:
    qemu_img("create", "-q", "-f", "raw", "base.raw", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", "1M")
    expected = refusal("-f", "qcow2", *arguments, "t.qcow2", "1M")
    with pytest.raises((OptionError, ChainError)) as caught:
        create_image("t.qcow2", MIB, **keywords)
    assert str(caught.value) == expected
    assert not Path("t.qcow2").exists()


def test_longest_backing_name_that_fits() -> None:
    for options, length in (({"cluster_size": 512}, 376), ({"cluster_size": 512, "compat": "0.10"}, 416), ({}, 1023)):
        assert_same(*create_both(MIB, options, "n" * length))


def test_raw_refusals_have_the_stock_text() -> None:
    Path("base.raw").write_bytes(bytes(512))
    assert refusal("-f", "raw", "-o", "cluster_size=1k", "t.qcow2", "1M") == "Invalid parameter 'cluster_size'"
    with pytest.raises(OptionError, match=r"^Invalid parameter 'cluster_size'$"):
        create_image("t.qcow2", MIB, format="raw", cluster_size=1024)
    for mode in ("metadata", "foo"):
        expected = refusal("-f", "raw", "-o", f"preallocation={mode}", "t.qcow2", "1M")
        with pytest.raises(OptionError) as caught:
            create_image("t.qcow2", MIB, format="raw", preallocation=mode)
        assert str(caught.value) == expected
    expected = refusal("-f", "raw", "-b", "base.raw", "-F", "raw", "t.qcow2", "1M")
    with pytest.raises(OptionError) as caught:
        create_image("t.qcow2", MIB, format="raw", backing_file="base.raw", backing_fmt="raw")
    assert str(caught.value) == expected


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_overlay_takes_the_backing_files_size(kind: str) -> None:
    if kind == "raw":
        Path("base").write_bytes(bytes(5 * MIB + 700))
    else:
        qemu_img("create", "-q", "-f", "qcow2", "base", "7M")
    for side in ("stock", "ours"):
        os.link("base", f"{side}/base")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", kind, "stock/t.qcow2")
    create_overlay("ours/t.qcow2", "base", backing_fmt=kind)
    assert Path("ours/t.qcow2").read_bytes() == Path("stock/t.qcow2").read_bytes()


def test_overlay_on_an_encrypted_base_needs_no_passphrase() -> None:
    create_image("base.qcow2", 3 * MIB, encrypt_format="luks", encrypt_passphrase="x", encrypt_iter_time_ms=1)
    create_overlay("t.qcow2", "base.qcow2", backing_fmt="qcow2")
    assert header_of(Path("t.qcow2")).size == 3 * MIB


def test_overlay_reads_through_to_its_base() -> None:
    create_image("base.qcow2", 2 * MIB, cluster_size=4096)
    qemu_io("base.qcow2", "write -P 9 100k 300k")
    create_overlay("t.qcow2", "base.qcow2", backing_fmt="qcow2", extended_l2=True)
    assert_clean("t.qcow2")
    info = image_info("t.qcow2")
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.qcow2", "qcow2")
    qemu_io("t.qcow2", "read -P 9 100k 300k", "read -P 0 400k 100k")


def test_what_is_created_can_be_used_by_the_stock_tool() -> None:
    for options in ({"preallocation": "metadata", "refcount_bits": 1}, {"cluster_size": 512}, {"compat": "0.10"}):
        create_image("t.qcow2", 8 * MIB, **options)
        qemu_io("t.qcow2", "write -P 5 0 8M", "read -P 5 0 8M")
        assert_clean("t.qcow2")
        with open_image("t.qcow2") as image:
            assert image.read(0, 8 * MIB) == b"\5" * (8 * MIB)


def test_an_image_in_use_is_left_alone() -> None:
    create_image("t.qcow2", MIB)
    qemu_io("t.qcow2", "write -P 5 0 64k")
    before = Path("t.qcow2").read_bytes()
    user = subprocess.Popen(
        [tool("qemu-io"), "-f", "qcow2", "t.qcow2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write("read 0 512\n")
        user.stdin.flush()
        assert "512" in user.stdout.readline()
        for format_name in ("qcow2", "raw"):
            with pytest.raises(ImageLocked) as caught:
                create_image("t.qcow2", 2 * MIB, format=format_name)
            expected = refusal("-f", format_name, "t.qcow2", "2M")
            assert str(caught.value) == expected
        with pytest.raises(QcowError):
            create_image("other.qcow2", MIB, data_file="t.qcow2")
        assert not Path("other.qcow2").exists()
        assert Path("t.qcow2").read_bytes() == before
    finally:
        user.communicate("quit\n")
    create_image("t.qcow2", 2 * MIB)
    assert header_of(Path("t.qcow2")).size == 2 * MIB
