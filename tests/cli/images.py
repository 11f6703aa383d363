"""Images of many kinds, made by the stock tools, for commands that only read."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tests.oracle import qemu_img, run

SECRET = ("--object", "secret,id=s0,data=secret")
ENCRYPTED = ("luks", "aes128")
BROKEN = ("no-magic", "cut", "empty", "directory")


class Create(Protocol):
    """Make an image of these -o options and remember its name."""

    def __call__(self, name: str, options: str, size: str = "2M", *arguments: str) -> None: ...


def make_images(folder: Path) -> list[str]:
    """Fill a folder with images and return their names; those in `ENCRYPTED` hold data that needs the secret."""
    names = []

    def create(name: str, options: str, size: str = "2M", *arguments: str) -> None:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, *arguments, name, size, cwd=folder)
        names.append(name)

    create("plain", "compat=1.1")
    create("v2", "compat=0.10")
    create("small-clusters", "cluster_size=512")
    create("large-clusters", "cluster_size=2M", "5M")
    create("wide-refcounts", "refcount_bits=64")
    create("lazy", "lazy_refcounts=on")
    create("subclusters", "extended_l2=on")
    create("zstd", "compression_type=zstd")
    create("preallocated", "preallocation=metadata")
    create("odd-size", "compat=1.1", "1000000")
    create("zero-size", "compat=1.1", "0")
    create("data-file", "data_file=data.raw")
    create("data-file-raw", "data_file=data2.raw,data_file_raw=on")
    for name in names:
        if name != "zero-size":
            qemu_io(folder, name, "write -P 1 0 70k", "write -z 128k 200k", "write -P 3 500k 1k")
    qemu_io(folder, "zstd", "write -c -P 5 1M 64k")
    qemu_io(folder, "subclusters", "discard 0 4k", "write -P 7 1100k 2k")
    _snapshots(folder, create)
    _overlays(folder, create)
    _bitmaps(folder, create)
    _encrypted(folder, names)
    qemu_img("create", "-q", "-f", "raw", "raw", "1M", cwd=folder)
    qemu_io(folder, "raw", "write -P 1 64k 64k")
    return [*names, "raw"]


def make_broken(folder: Path) -> None:
    """The names in `BROKEN`."""
    (folder / "no-magic").write_bytes(b"\0" * 70000)
    (folder / "cut").write_bytes(b"QFI\xfb\0\0\0\3\0\0")
    (folder / "empty").write_bytes(b"")
    (folder / "directory").mkdir()


def _snapshots(folder: Path, create: Create) -> None:
    create("snapshots", "compat=1.1")
    for place, name in enumerate(["first", "two words", "ünïcode-name-that-is-longer-than-the-column", "first"]):
        qemu_io(folder, "snapshots", f"write -P {place + 1} {place * 100}k 100k")
        qemu_img("snapshot", "-c", name, "snapshots", cwd=folder)


def _overlays(folder: Path, create: Create) -> None:
    create("overlay", "compat=1.1", "3M", "-b", "plain", "-F", "qcow2")
    qemu_io(folder, "overlay", "write -P 9 64k 10k", "write -z 1M 64k", "write -P 8 2500k 3k")
    create("top", "compat=1.1", "1M", "-b", "overlay", "-F", "qcow2")
    create("on-raw", "compat=1.1", "1M", "-u", "-b", "raw", "-F", "raw")
    (folder / "sub").mkdir()
    create("sub/relative", "compat=1.1", "1M", "-b", "../plain", "-F", "qcow2")
    create("absolute", "compat=1.1", "1M", "-b", str(folder / "plain"), "-F", "qcow2")
    create("missing", "compat=1.1", "1M", "-u", "-b", "nowhere", "-F", "qcow2")
    json_name = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"plain"}}'
    create("json", "compat=1.1", "1M", "-b", json_name, "-F", "qcow2")
    slice_name = 'json:{"driver":"raw","offset":65536,"size":65536,"file":{"driver":"file","filename":"raw"}}'
    create("json-slice", "compat=1.1", "1M", "-u", "-b", slice_name, "-F", "raw")


def _bitmaps(folder: Path, create: Create) -> None:
    create("bitmaps", "compat=1.1")
    qemu_img("bitmap", "--add", "bitmaps", "b0", cwd=folder)
    qemu_img("bitmap", "--add", "--disable", "-g", "128k", "bitmaps", "b1", cwd=folder)
    qemu_io(folder, "bitmaps", "write -P 1 0 64k")


def _encrypted(folder: Path, names: list[str]) -> None:
    for name, alg in (("luks", "aes-256"), ("aes128", "aes-128")):
        options = f"encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,encrypt.cipher-alg={alg}"
        qemu_img("create", "-q", *SECRET, "-f", "qcow2", "-o", options, name, "2M", cwd=folder)
        image = f"driver=qcow2,encrypt.key-secret=s0,file.filename={name}"
        run("qemu-io", *SECRET, "-c", "write -P 1 0 70k", "--image-opts", image, cwd=folder)
        names.append(name)


def qemu_io(folder: Path, name: str, *commands: str) -> None:
    """Commands of qemu-io on one image, run in the folder: data files are found from there."""
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "raw" if name == "raw" else "qcow2", *words, name, cwd=folder)
