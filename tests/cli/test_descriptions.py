"""Images that are described (json: names, --image-opts, protocols) and requests of bench: qemu-img's words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qcowlib
from tests.cli.side_by_side import Pair, assert_same, ours, pair  # noqa: F401 - pair is a fixture
from tests.oracle import qemu_img, run

NAMES = [
    "json:",
    "json:[]",
    "json:{}",
    "json:nonsense",
    "json:{'driver':'qcow2'",
    "json:{'driver':qcow2}",
    "json:{'driver':'qcow2','driver':'raw'}",
    "json:{'driver':'qcow2'}x",
    "json:{'driver':'qcow2'}",
    "json:{'driver':'qcow2','file':'node'}",
    "json:{'driver':'qcow2','file':null}",
    "json:{'driver':'qcow2','file':{'driver':'nosuch','filename':'q'}}",
    "json:{'driver':'qcow2','file':{'driver':'file','filename':''}}",
    "json:{'driver':'qcow2','file':{'driver':'file','filename':'nosuch'}}",
    "json:{'driver':'nosuch'}",
    "json:{ 'driver' : \"qcow2\", 'file.driver':'file', 'file.filename':'q' }",
    'json:{"driver":"qcow2","foo":1,"file":{"driver":"file","filename":"q"}}',
    "nosuch:q",
    "file:q",
    "file:nosuch",
    "null-co://",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("descriptions")
    qemu_img("create", "-q", "-f", "qcow2", "q", "1M", cwd=path)
    (path / "raw").write_bytes(b"a" * 65536)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str, folder: Path) -> None:
    assert_same(folder, "info", name)


@pytest.mark.parametrize(
    "options",
    [
        "driver=null-co,read-zeroes=on",
        "driver=nosuch,file.filename=q",
        "driver=qcow2,file.driver=file,file.filename=q,foo=bar",
        "driver=raw,offset=4k,size=8k,file.filename=raw",
        "driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.align=4096",
        "force-share=off,driver=qcow2,file.filename=q",
    ],
)
def test_options(options: str, folder: Path) -> None:
    assert_same(folder, "map", "-U", "--output=json", "--image-opts", options)


def test_a_colon_in_a_plain_name(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "base", "-F", "raw", "file:a:b", "1M", cwd=tmp_path)
    assert "backing file: base (actual path: ./base)" in assert_same(tmp_path, "info", "file:a:b").out


def test_faults_on_demand_are_refused_where_data_is_read(folder: Path) -> None:
    said = ours(folder, "map", "blkdebug:rules:q")
    assert said.code == 1
    assert "faults on demand in 'q' (blkdebug) are not available" in said.err


def test_a_described_slice_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * 3072)
    (tmp_path / "in").write_bytes(b"b" * 1024)
    target = "driver=raw,offset=1024,size=1024,file.filename=file"
    said = ours(tmp_path, "bench", "-q", "-w", "-c", "1", "-s", "1k", "--pattern=98", "--image-opts", target)
    assert said.code == 0
    assert (tmp_path / "file").read_bytes() == b"a" * 1024 + b"b" * 1024 + b"a" * 1024
    assert ours(tmp_path, "bench", "-w", "-c", "1", "-s", "2k", "--image-opts", target).code == 1


def test_each_layer_has_its_passphrase(tmp_path: Path) -> None:
    secrets = ("--object", "secret,id=s0,data=below", "--object", "secret,id=s1,data=above")
    for name, secret, backing in (("base", "s0", ()), ("top", "s1", ("-b", "base", "-F", "qcow2"))):
        luks = f"encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret={secret}"
        qemu_img("create", "-q", *secrets, "-f", "qcow2", "-o", luks, *backing, name, "1M", cwd=tmp_path)
    below = "driver=qcow2,file.filename=base,encrypt.key-secret=s0"
    assert ours(tmp_path, "bench", "-w", "-c", "1", "--pattern=7", *secrets, "--image-opts", below).code == 0
    chain = f"driver=qcow2,file.filename=top,encrypt.key-secret=s1,{'backing.' + below.replace(',', ',backing.')}"
    assert_same(tmp_path, "map", "--output=json", *secrets, "--image-opts", chain)
    said = ours(tmp_path, "convert", *secrets, "--image-opts", "-O", "raw", chain, "out")
    assert said.code == 0, said
    assert (tmp_path / "out").read_bytes() == b"\7" * 4096 + bytes((1 << 20) - 4096)
    wrong = chain.replace("backing.encrypt.key-secret=s0", "backing.encrypt.key-secret=s2")
    assert "No secret with id 's2'" in ours(tmp_path, "map", *secrets, "--image-opts", wrong).err


BENCH = [
    "-c x q",
    "-d x q",
    "--pattern=256 q",
    "-i nosuch q",
    "-t nosuch q",
    "--flush-interval=2 q",
    "-w --flush-interval=2 q",
    "-w -U q",
    "-c 3 -s 2k -S 1k q",
    "-c 3 -d 2 -o 1020k -S 2k -s 2k q",
    "-c 1 -o 1M q",
    "-c 0 q",
    "-w nosuch",
    "",
]


@pytest.mark.parametrize("words", BENCH)
def test_bench(words: str, folder: Path) -> None:
    assert_same(folder, "bench", *words.split(), mask=r"in [0-9.]+ seconds")


def test_bench_writes(pair: Pair) -> None:  # noqa: F811
    pair.prepare("create", "-q", "-f", "qcow2", "image", "1M")
    words = ("-w", "-c", "5", "-d", "2", "-S", "3k", "--pattern=5", "--flush-interval=2", "--no-drain")
    pair.same("bench", *words, "image", mask=r"in [0-9.]+ seconds")
    contents = []
    for directory in (pair.theirs, pair.ours):
        qemu_img("convert", "-O", "raw", "image", "raw", cwd=directory)
        contents.append((directory / "raw").read_bytes())
    assert contents[0] == contents[1] == b"\5" * 16384 + bytes((1 << 20) - 16384)


@pytest.mark.parametrize("preallocation", ["off", "full"])
def test_a_new_luks_volume(preallocation: str, tmp_path: Path) -> None:
    secret = ("--object", "secret,id=s,data=word")
    options = f"key-secret=s,iter-time=10,preallocation={preallocation}"
    said = ours(tmp_path, "create", *secret, "-f", "luks", "-o", options, "volume", "1M")
    assert (said.code, said.err) == (0, "")
    volume = "driver=luks,key-secret=s,file.filename=volume"
    for command in ("write -P 9 0 1M", "read -P 9 0 1M"):
        assert "1 MiB" in run("qemu-io", *secret, "-c", command, "--image-opts", volume, cwd=tmp_path).stdout
    info = re.sub(r"\s+", " ", qemu_img("info", "volume", cwd=tmp_path).stdout)
    assert "file format: luks virtual size: 1 MiB (1048576 bytes)" in info


def test_a_raw_data_file_that_is_longer_than_the_disk(tmp_path: Path) -> None:
    """What it has there is seen after a resize, as it is in the data file."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data,data_file_raw=on", "image", "1M", cwd=tmp_path)
    with open(tmp_path / "data", "r+b") as data:
        data.truncate(2 << 20)
        data.seek(1 << 20)
        data.write(b"T" * 70000)
    assert ours(tmp_path, "resize", "image", "3M").code == 0
    expected = bytes(1 << 20) + b"T" * 70000 + bytes((2 << 20) - 70000)
    assert (tmp_path / "data").read_bytes() == expected
    qemu_img("convert", "-O", "raw", "image", "raw", cwd=tmp_path)
    assert (tmp_path / "raw").read_bytes() == expected
    qemu_img("check", "image", cwd=tmp_path)


@pytest.mark.parametrize("locking", ["on", "off", "maybe"])
def test_locks_can_be_declined(tmp_path: Path, locking: str) -> None:
    """An image that somebody writes is opened by who says locking=off, as by qemu-img; else it is refused."""
    qemu_img("create", "-q", "-f", "qcow2", "image", "1M", cwd=tmp_path)
    words = ["--image-opts", f"driver=qcow2,file.driver=file,file.filename=image,file.locking={locking}"]
    with qcowlib.open_image(tmp_path / "image", writable=True):
        said = assert_same(tmp_path, "info", *words)
    assert said.code == (0 if locking == "off" else 1)
