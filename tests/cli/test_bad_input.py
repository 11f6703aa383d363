"""Bad input: each gives one clear line, exit code 1, and nothing is written."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import oracle
from tests.cli.side_by_side import Said, ours, process_environment
from tests.oracle import qemu_img, qemu_io

CLUSTER = 65536
READERS = [["info"], ["check"], ["map"], ["map", "--output=json"], ["snapshot", "-l"], ["convert", "image", "out"]]
WRITERS = [["snapshot", "-c", "x"], ["snapshot", "-a", "one"], ["snapshot", "-d", "one"]]


def good_image(folder: Path, *options: str) -> bytearray:
    """A small image with data and a snapshot."""
    qemu_img("create", "-q", "-f", "qcow2", *options, "image", "4M", cwd=folder)
    qemu_io(folder / "image", "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "one", "image", cwd=folder)
    qemu_io(folder / "image", "write -P 2 0 100k")
    return bytearray((folder / "image").read_bytes())


def put(offset: int, form: str, value: int) -> Callable[[bytearray], None]:
    """A change of one big-endian field."""

    def change(data: bytearray) -> None:
        struct.pack_into(f">{form}", data, offset, value)

    return change


def cut(length: int) -> Callable[[bytearray], None]:
    """A file that ends early."""

    def change(data: bytearray) -> None:
        del data[length:]

    return change


# What is done to a good image, and words that the message has.
HEADERS = {
    "truncated header": (cut(40), "header"),
    "L1 beyond the end": (put(40, "Q", 1 << 40), "L1 table"),
    "L1 of 2^31 entries": (put(36, "I", 1 << 31), "L1 table"),
    "cluster_bits 0": (put(20, "I", 0), "2^0"),
    "cluster_bits 63": (put(20, "I", 63), "2^63"),
    "snapshot table of 2^32-1 entries": (put(60, "I", (1 << 32) - 1), "napshot table"),
    "refcount order 7": (put(96, "I", 7), "64 bits"),
    "unknown incompatible bit": (put(72, "Q", 1 << 20), "Unknown incompatible feature: 100000"),
    "version 9": (put(4, "I", 9), "version 9"),
    "unknown encryption": (put(32, "I", 9), "encryption method 9"),
}
# These concern guest data alone: what does not read it has an answer, and check tells them as findings.
DAMAGED_MAPPING = {"L1 beyond the end"}
TOP_LEVEL = [["info"], ["check"], ["snapshot", "-l"]]


def assert_one_line(said: Said, *words: str) -> None:
    """Exit code 1, nothing on stdout (but the table's head), one line on stderr that has these words."""
    assert said.code == 1, said
    assert said.err.startswith("qemu-img: "), said
    assert said.err.count("\n") == 1, said
    for word in words:
        assert word in said.err
    assert "Traceback" not in said.err
    assert said.out in ("", "[", f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n"), said


@contextlib.contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """All files of a folder are afterwards as they were before."""
    before = contents(folder)
    yield
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def command_line(words: list[str]) -> list[str]:
    return words if words[0] == "convert" else [*words, "image"]


@pytest.mark.parametrize("words", [*READERS, *WRITERS], ids=" ".join)
@pytest.mark.parametrize("name", HEADERS)
def test_header(tmp_path: Path, name: str, words: list[str]) -> None:
    change, word = HEADERS[name]
    data = good_image(tmp_path)
    change(data)
    (tmp_path / "image").write_bytes(data)
    with nothing_written(tmp_path):
        said = ours(tmp_path, *command_line(words))
    if name.startswith("snapshot table") and words == ["check"]:
        assert said.code == 1
        assert said.err.endswith("qemu-img: Check failed: File too large\n"), said  # with a hint before it, as stock
    elif name in DAMAGED_MAPPING and words in TOP_LEVEL:
        assert "Traceback" not in said.err
        assert said.code == (2 if words == ["check"] else 0)
    else:
        assert_one_line(said, word)


@pytest.mark.parametrize(
    "words", [["info"], ["map"], ["check"], ["convert", "-f", "qcow2", "image", "out"]], ids=" ".join
)
@pytest.mark.parametrize(
    "data", [b"", b"QFI", b"not an image" * 100, bytes(70000)], ids=["empty", "QFI", "text", "zeroes"]
)
def test_not_an_image(tmp_path: Path, words: list[str], data: bytes) -> None:
    (tmp_path / "image").write_bytes(data)
    arguments = words if words[0] == "convert" else [words[0], "-f", "qcow2", "image"]
    with nothing_written(tmp_path):
        assert_one_line(ours(tmp_path, *arguments), "Could not open 'image'")


@pytest.mark.parametrize("words", [["map"], ["convert", "image", "out"], ["info", "--backing-chain"]], ids=" ".join)
def test_backing_file_loop(tmp_path: Path, words: list[str]) -> None:
    good_image(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", "b", cwd=tmp_path)
    qemu_img("rebase", "-u", "-b", "b", "-F", "qcow2", "image", cwd=tmp_path)
    with nothing_written(tmp_path):
        assert_one_line(ours(tmp_path, *command_line(words)), "loop")


@pytest.mark.parametrize("words", [["map"], ["convert", "image", "out"], ["info", "--backing-chain"]], ids=" ".join)
def test_backing_file_missing(tmp_path: Path, words: list[str]) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "nowhere", "-F", "qcow2", "image", "1M", cwd=tmp_path)
    with nothing_written(tmp_path):
        assert_one_line(ours(tmp_path, *command_line(words)), "nowhere", "No such file or directory")


@pytest.mark.parametrize("name", ["nbd://localhost/x", "ssh://host/x", "http://127.0.0.1/x", 'json:{"driver":"nbd"}'])
@pytest.mark.parametrize("words", [["map"], ["convert", "image", "out"], ["info", "--backing-chain"]], ids=" ".join)
def test_backing_file_denied(tmp_path: Path, name: str, words: list[str]) -> None:
    """Names that do not describe local files are data: nobody is called."""
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", "image", "1M", cwd=tmp_path)
    with nothing_written(tmp_path):
        said = ours(tmp_path, *command_line(words))
    if words[0] == "info":
        assert (said.code, said.out) == (1, "")
        assert said.err.count("\n") == 1
    else:
        assert_one_line(said, "only local files")


def compressed_entry(data: bytearray) -> int:
    """Host offset of the first compressed cluster's data."""
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ((1 << 56) - 512)
    entry = int.from_bytes(data[l2 : l2 + 8], "big")
    assert entry >> 62 & 1
    return entry & ((1 << 54) - 1)


@pytest.mark.parametrize("inflated", [CLUSTER + 1, CLUSTER - 1, 10 * CLUSTER, 0])
def test_compressed_cluster_of_the_wrong_size(tmp_path: Path, inflated: int) -> None:
    import zlib

    qemu_img("create", "-q", "-f", "qcow2", "image", "1M", cwd=tmp_path)
    qemu_io(tmp_path / "image", "write -c -P 1 0 64k")
    data = bytearray((tmp_path / "image").read_bytes())
    packer = zlib.compressobj(wbits=-12)
    payload = packer.compress(bytes([1]) * inflated) + packer.flush()
    host = compressed_entry(data)
    data[host : host + len(payload)] = payload
    data += bytes(-len(data) % 512)
    (tmp_path / "image").write_bytes(data)
    with nothing_written(tmp_path):
        assert_one_line(ours(tmp_path, "convert", "image", "out"), "compressed cluster")


@pytest.mark.parametrize("words", [*READERS, *WRITERS], ids=" ".join)
def test_directory(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "image").mkdir()
    with nothing_written(tmp_path):
        assert_one_line(ours(tmp_path, *command_line(words)), "regular file" if "-l" in words else "")


@pytest.mark.parametrize("words", READERS, ids=" ".join)
def test_fifo(tmp_path: Path, words: list[str]) -> None:
    os.mkfifo(tmp_path / "image")
    with nothing_written(tmp_path):
        assert_one_line(ours(tmp_path, *command_line(words)), "regular file")


@pytest.mark.parametrize("target", ["a-directory", "a-fifo"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_create_over_what_is_no_file(tmp_path: Path, target: str, image_format: str) -> None:
    (tmp_path / "a-directory").mkdir()
    os.mkfifo(tmp_path / "a-fifo")
    with nothing_written(tmp_path):
        assert_one_line(ours(tmp_path, "create", "-q", "-f", image_format, target, "1M"), target)


@pytest.mark.parametrize("words", [*READERS, *WRITERS, ["create", "-q", "-f", "qcow2", "image", "1M"]], ids=" ".join)
def test_no_permission(words: list[str], tmp_path: Path) -> None:
    """As a user who may look into the directory and not into the file."""
    good_image(tmp_path)
    arguments = words if words[0] == "create" else command_line(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(tmp_path / "image", folder)
        (folder / "image").chmod(0)
        before = (folder / "image").read_bytes()
        assert_one_line(as_nobody(folder, arguments, rehearsal=tmp_path), "Permission denied")
        assert [path.name for path in folder.iterdir()] == ["image"]
        assert (folder / "image").read_bytes() == before


def as_nobody(folder: Path, arguments: list[str], rehearsal: Path) -> Said:
    """Our command in a child process without the rights of root; first in a folder where it succeeds.

    The rehearsal imports all that is needed: afterwards even the interpreter's own files may be out of reach.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe, contextlib.suppress(BaseException):
            ours(rehearsal, *arguments)
            os.chdir(folder)
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            said = ours(folder, *arguments)
            pipe.write(f"{said.code}\0{said.out}\0{said.err}")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        code, out, err = pipe.read().split("\0")
    os.waitpid(child, 0)
    return Said(int(code), out, err)


# The host's space ends in the middle of a write: a limit on the file's size gives EFBIG where a full disk gives ENOSPC.

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv[0] = "qemu-img"
from qcowlib.cli.main import main
sys.exit(main({arguments!r}))
"""


def limited(folder: Path, limit: int, *arguments: str) -> Said:
    """Our command where no file may become larger than `limit` bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(limit=limit, arguments=list(arguments))],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=process_environment(),
    )
    return Said(done.returncode, done.stdout, done.stderr)


def test_the_limit_works(tmp_path: Path) -> None:
    assert limited(tmp_path, 1 << 20, "create", "-q", "-f", "qcow2", "new", "8M") == (0, "", "")
    assert limited(tmp_path, 1 << 10, "create", "-q", "-f", "qcow2", "other", "8M").code == 1


@pytest.mark.parametrize("clusters", [0, 1, 3])
def test_no_space_for_a_snapshot(tmp_path: Path, clusters: int) -> None:
    """The image stays valid, with its old content and its old snapshots."""
    good_image(tmp_path)
    size = (tmp_path / "image").stat().st_size
    states = [oracle.content(tmp_path / "image", tmp_path, snapshot=name) for name in (None, "one")]
    for words in (["-c", "two"], ["-a", "one"], ["-d", "one"]):
        said = limited(tmp_path, size + clusters * CLUSTER, "snapshot", *words, "image")
        if said.code == 0:
            continue  # it found room inside of the file
        assert said.code == 1
        assert said.err.startswith("qemu-img: Could not ")
        assert said.err.count("\n") == 1
        assert oracle.image_check(tmp_path / "image")["rc"] in (0, 3)
    if all(entry["name"] != "one" for entry in oracle.image_info(tmp_path / "image").get("snapshots", [])):
        return
    after = [oracle.content(tmp_path / "image", tmp_path, snapshot=name) for name in (None, "one")]
    assert after[1] == states[1]
    assert after[0] in states


def test_no_space_for_a_snapshot_at_all(tmp_path: Path) -> None:
    """Nothing can be written behind the end: content and snapshots are as before, at most clusters have leaked."""
    good_image(tmp_path)
    before = oracle.image_info(tmp_path / "image")["snapshots"]
    states = [oracle.content(tmp_path / "image", tmp_path, snapshot=name) for name in (None, "one")]
    said = limited(tmp_path, (tmp_path / "image").stat().st_size, "snapshot", "-c", "two", "image")
    assert_one_line(said, "Could not create snapshot 'two'")
    assert oracle.image_info(tmp_path / "image")["snapshots"] == before
    assert [oracle.content(tmp_path / "image", tmp_path, snapshot=name) for name in (None, "one")] == states
    assert oracle.image_check(tmp_path / "image")["rc"] in (0, 3)


@pytest.mark.parametrize("options", ["preallocation=full", "preallocation=metadata", "preallocation=off"])
def test_no_space_for_a_new_image(tmp_path: Path, options: str) -> None:
    said = limited(tmp_path, 100_000, "create", "-q", "-f", "qcow2", "-o", options, "new", "8M")
    assert_one_line(said, "new: ")
    assert not list(tmp_path.iterdir())


def test_no_space_for_a_converted_image(tmp_path: Path) -> None:
    good_image(tmp_path)
    for image_format in ("raw", "qcow2"):
        with nothing_written(tmp_path):
            assert_one_line(limited(tmp_path, 700_000, "convert", "-O", image_format, "image", "out"), "out")


def test_no_space_in_an_existing_target(tmp_path: Path) -> None:
    """What was written before the space ended stays, and the image is sound."""
    good_image(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "target", "4M", cwd=tmp_path)
    said = limited(tmp_path, 700_000, "convert", "-n", "-O", "qcow2", "image", "target")
    assert_one_line(said, "target")
    assert oracle.image_check(tmp_path / "target")["rc"] in (0, 3)
