"""convert and dd beside the stock tool: texts, exit codes, progress, and the content of what is written."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import oracle
from tests.cli.images import SECRET
from tests.cli.side_by_side import Pair, ours, pair, process, process_environment

__all__ = ["pair"]

LUKS = "driver=qcow2,encrypt.key-secret=s0,file.filename=luks"

WRITTEN = [
    "source out",
    "-l first source out",
    "-l snapshot.id=1 source out",
    "-l snapshot.name=first,snapshot.id=1 -O qcow2 source out",
    "-O qcow2 source out",
    "-O qcow2 -o cluster_size=4k source out",
    "-O qcow2 -o compat=0.10 -o cluster_size=512 source out",
    "-O qcow2 -o extended_l2=on source out",
    "-O qcow2 -o preallocation=metadata source out",
    "-O qcow2 -c source out",
    "-O qcow2 -c -m 1 source out",
    "-O qcow2 -c -o compression_type=zstd source out",
    "-O qcow2 -B base -F qcow2 overlay out",
    "-O qcow2 -o backing_file=base,backing_fmt=qcow2 overlay out",
    "-O qcow2 overlay out",
    "-m 2 -W source out",
    "-S 64k source out",
    "-S 0 source out",
    "-S 0 -O qcow2 source out",
    "-r 1G source out",
    "-t none -T none source out",
    "-t directsync -T writethrough source out",
    "-C source out",
    "-f raw source out",
    "-U source out",
    "file:source file:out",
    "odd out",
    "-O qcow2 odd out",
    "empty out",
    "source odd raw out",
    "-O qcow2 odd source out",
    "-O qcow2 -c odd source odd out",
    "-l snapshot.name=first source odd out",
    "--salvage source out",
    "--salvage -q -O qcow2 overlay out",
    "-C -O qcow2 source out",
    "-C -O qcow2 -W overlay out",
    "-C overlay out",
    "-W -m 16 overlay out",
    "-O qcow2 -o size=1G source out",
    "-O qcow2 -o preallocation=full odd out",
    "-O raw -o preallocation=falloc odd out",
    "-O qcow2 -t writethrough -S 1M source out",
    "source raw out",
]

INTO_EXISTING = [
    ("source raw", "raw"),
    ("-O qcow2 source used", "used"),
    ("-n source raw", "raw"),
    ("-n -O qcow2 source used", "used"),
    ("-n --target-is-zero source raw", "raw"),
    ("-n --target-image-opts source driver=raw,file.filename=raw", "raw"),
    ("-n --target-image-opts source driver=qcow2,file.filename=used", "used"),
    ("-n -C -O qcow2 source used", "used"),
    ("-n -O qcow2 odd source used", "used"),
    ("-n -B base -O qcow2 overlay other", "other"),
    ("-n -B base -F qcow2 -O qcow2 -c overlay other", "other"),
]

REFUSED = [
    "",
    "source",
    "-l x source out",
    "-l snapshot.id=9 source out",
    "-l snapshot.foo=9 source out",
    "-l snapshot.id=1,foo=2 source out",
    "-l x raw out",
    "nofile out",
    "-O foo source out",
    "-O bochs source out",
    "-O qcow2 -o foo=1 source out",
    "-O qcow2 -o cluster_size=7 source out",
    "-O qcow2 -o cluster_size=x source out",
    "-O qcow2 -B raw source out",
    "-O raw -B raw -F raw source out",
    "-O qcow2 -o backing_file=raw source out",
    "-n source nofile",
    "-n source small",
    "-c source out",
    "-c -O qcow2 -o preallocation=full source out",
    "-m 0 source out",
    "-m 17 source out",
    "-m x source out",
    "-S 100 source out",
    "-S foo source out",
    "-r foo source out",
    "-C -c source out",
    "-C -S 4k source out",
    "-C --salvage source out",
    "--target-is-zero source out",
    "--skip-broken-bitmaps source out",
    "-n -o x=1 source out",
    "--target-image-opts source out",
    "-t foo source out",
    "-T foo source out",
    "-O qcow2 -B nofile -F qcow2 source out",
    "-O qcow2 source nodir/x",
    "-O raw source /tmp",
    "luks out",
    "-p nofile out",
    "-p -O foo source out",
    "-O qcow2 -F qcow2 source out",
    "-O qcow2 -B base source odd out",
    "-n -O qcow2 -B base source odd used",
    "-l first source odd out",
    "--bitmaps -O qcow2 source odd out",
    "--bitmaps -O qcow2 raw out",
    "-n -c source raw",
    "-n -O foo source raw",
    "-O qcow2 -F foo -B base source out",
    "--image-opts driver=qcow2,file.filename=source driver=raw,file.filename=nofile out",
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that every test starts from, made once."""
    folder = tmp_path_factory.mktemp("originals")
    options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"
    for words in (
        "-f qcow2 source 10M",
        "raw 10M",
        "-f qcow2 used 12M",
        "small 100k",
        "-f qcow2 odd 1000000",
        "-f qcow2 empty 0",
        "-f qcow2 -b source -F qcow2 base",
        "-f qcow2 -b base -F qcow2 overlay",
        "-f qcow2 -b base -F qcow2 other",
    ):
        oracle.qemu_img("create", "-q", *words.split(), cwd=folder)
    oracle.qemu_img("create", "-q", *SECRET, "-f", "qcow2", "-o", options, "luks", "1M", cwd=folder)
    oracle.run("qemu-io", *SECRET, "-c", "write -P 4 0 100k", "--image-opts", LUKS, cwd=folder)
    oracle.qemu_io(folder / "source", "write -P 1 0 3M", "write -P 2 5M 100k", "write -z 6M 1M")
    oracle.qemu_img("snapshot", "-c", "first", "source", cwd=folder)
    oracle.qemu_io(folder / "source", "write -P 3 1M 200k")
    oracle.qemu_io(folder / "used", "write -P 9 0 12M")
    oracle.qemu_io(folder / "odd", "write -P 3 900k 10k")
    oracle.qemu_io(folder / "overlay", "write -P 4 2M 10k", "write -z 0 64k")
    return folder


@pytest.fixture
def images(pair: Pair, originals: Path) -> Pair:
    """The same images on both sides."""
    for path in originals.iterdir():
        pair.copy(path, path.name)
    return pair


def assert_equal_content(pair: Pair, name: str) -> None:
    """Both sides' images are of the same kind and size and hold the same bytes."""
    formats = [oracle.image_info(directory / name) for directory in (pair.theirs, pair.ours)]
    for fact in ("format", "virtual-size", "cluster-size"):
        assert formats[0].get(fact) == formats[1].get(fact), fact
    kind = formats[0]["format"]
    contents = [oracle.content(directory / name, directory, format=kind) for directory in (pair.theirs, pair.ours)]
    assert contents[1] == contents[0]
    if kind == "qcow2":
        oracle.assert_clean(pair.ours / name)


@pytest.mark.parametrize("line", WRITTEN)
def test_written(images: Pair, line: str) -> None:
    assert images.same("convert", *line.split()).code == 0
    assert_equal_content(images, "out")


@pytest.mark.parametrize(("line", "name"), INTO_EXISTING)
def test_written_into_an_existing_image(images: Pair, line: str, name: str) -> None:
    assert images.same("convert", *line.split()).code == 0
    assert_equal_content(images, name)


@pytest.mark.parametrize("line", REFUSED)
def test_refused(images: Pair, line: str) -> None:
    assert images.same("convert", *line.split()).code == 1


@pytest.mark.parametrize("line", ["-o help", "-O qcow2 -o help source out", "-O qcow2 -o cluster_size=4k,help"])
def test_option_help(images: Pair, line: str) -> None:
    images.same("convert", *line.split())


@pytest.mark.parametrize("line", ["-p source out", "-p -O qcow2 source out", "-pq source out", "-p empty out"])
def test_progress_in_a_pipe(images: Pair, line: str) -> None:
    """The first and the last state are those of the stock tool; the steps between follow the pieces of the work."""
    steps = r"(?<=\(0\.00/100%\)\n)(.*\n)*(?=    \(100\.00/100%\)\n$)"
    assert images.same("convert", *line.split(), mask=steps).code == 0


def test_progress_line_is_rewritten_in_place(images: Pair) -> None:
    said = process(images.ours, "convert", "-p", "source", "out").stdout
    assert said.startswith(b"    (0.00/100%)\r    (")
    assert said.endswith(b"    (100.00/100%)\r\n")


def test_progress_on_a_terminal(images: Pair) -> None:
    """A bar, and without the package rich the stock tool's line."""
    for words, expected in (
        ([], b"100%"),
        (["-c", "import sys; sys.modules['rich'] = None; from qcowlib.cli.main import main; main()"], b"(100.00/100%)"),
    ):
        assert expected in on_terminal(images.ours, [*(words or ["-m", "qcowlib"]), "convert", "-p", "source", "out"])


def on_terminal(directory: Path, words: list[str]) -> bytes:
    """What a Python program writes to a terminal."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, *words], cwd=directory, stdout=follower, env=process_environment() | {"TERM": "xterm"}
    ) as running:
        os.close(follower)
        shown = b""
        try:
            while piece := os.read(leader, 4096):
                shown += piece
        except OSError:  # the other end is closed
            pass
        assert running.wait(timeout=60) == 0
    os.close(leader)
    return shown


def test_rate_limit(images: Pair) -> None:
    """3.3 MB at 2 MiB a second take more than a second."""
    start = time.monotonic()
    assert ours(images.ours, "convert", "-r", "2M", "source", "out").code == 0
    assert time.monotonic() - start > 1.0


@pytest.mark.parametrize(
    "words",
    [
        [*SECRET, "--image-opts", LUKS, "out"],
        [*SECRET, "-O", "qcow2", "--image-opts", LUKS, "out"],
        ["--object", "secret,id=s0,data=wrong", "--image-opts", LUKS, "out"],
        ["--image-opts", LUKS, "out"],
    ],
)
def test_encrypted_source(images: Pair, words: list[str]) -> None:
    said = images.same("convert", *words)
    if said.code == 0:
        assert_equal_content(images, "out")


def test_encrypted_target(images: Pair) -> None:
    options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"
    assert images.same("convert", *SECRET, "-O", "qcow2", "-o", options, "source", "out").code == 0
    image = "driver=qcow2,encrypt.key-secret=s0,file.filename=out"
    for directory in (images.theirs, images.ours):
        oracle.qemu_img("convert", *SECRET, "--image-opts", image, "-O", "raw", "plain", cwd=directory)
    assert (images.ours / "plain").read_bytes() == (images.theirs / "plain").read_bytes()
    oracle.qemu_img("check", *SECRET, "--image-opts", image, cwd=images.ours)


@pytest.mark.parametrize("line", ["source source", "raw raw", "overlay base", "-n -O qcow2 overlay source"])
def test_source_is_never_overwritten(images: Pair, line: str) -> None:
    before = {path.name: path.read_bytes() for path in images.ours.iterdir()}
    said = ours(images.ours, "convert", *line.split())
    assert said.code == 1
    assert said.err.count("qemu-img: ") == 1
    assert {path.name: path.read_bytes() for path in images.ours.iterdir()} == before


def test_new_target_is_removed_after_a_failure(images: Pair) -> None:
    """A mapping that is damaged is found before the target is touched."""
    data = bytearray((images.ours / "source").read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ((1 << 56) - 512)
    data[l2 : l2 + 8] = (1 << 63 | 1 << 50).to_bytes(8, "big")
    (images.ours / "damaged").write_bytes(data)
    said = ours(images.ours, "convert", "damaged", "out")
    assert said.code == 1
    assert said.err.startswith("qemu-img: L2 table at host offset ")
    assert not (images.ours / "out").exists()


DD_WRITTEN = [
    "if=source of=out",
    "if=source of=out bs=1M count=2 skip=1",
    "if=source of=out bs=1M",
    "bs=100 count=7 skip=3 if=source of=out",
    "if=source of=out count=10",
    "if=source of=out count=0",
    "-O qcow2 if=source of=out bs=64k",
    "-f raw if=source of=out bs=64k",
    "-U if=overlay of=out bs=1k",
    "if=source of=out bs=1M skip=100",
    "if=odd of=out bs=4k",
]
DD_REFUSED = [
    "",
    "foo",
    "if=source",
    "of=out",
    "if=source of=out foo=1",
    "if=source of=out bs=0",
    "if=source of=out bs=3G",
    "if=source of=out bs=x",
    "if=source of=out count=-1",
    "if=source of=out skip=x",
    "-O foo if=source of=out",
    "-O bochs if=source of=out",
    "if=nofile of=out",
    "-f raw if=source of=nodir/out",
]


@pytest.mark.parametrize("line", DD_WRITTEN)
def test_dd(images: Pair, line: str) -> None:
    assert images.same("dd", *line.split()).code == 0
    assert_equal_content(images, "out")


@pytest.mark.parametrize("line", DD_REFUSED)
def test_dd_refused(images: Pair, line: str) -> None:
    assert images.same("dd", *line.split()).code == 1


def test_dd_of_an_encrypted_source(images: Pair) -> None:
    assert images.same("dd", *SECRET, "--image-opts", f"if={LUKS}", "of=out", "bs=64k").code == 0
    assert_equal_content(images, "out")


def test_works_as_a_process(images: Pair) -> None:
    done = process(images.ours, "convert", "-O", "qcow2", "-c", "source", "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    oracle.qemu_img("compare", "-s", "source", "source", cwd=images.ours)
    oracle.qemu_img("compare", "source", "out", cwd=images.ours)
