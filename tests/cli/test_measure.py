"""qcow measure beside the stock qemu-img: every answer to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import oracle
from tests.cli.side_by_side import assert_same

SECRET = ["--object", "secret,id=s,data=x"]
NEW = [
    [],
    ["--size", "2G", "t"],
    ["t", "a"],
    SECRET,
    ["--image-opts"],
    ["-f", "qcow2"],
    ["-l", "snap"],
    ["-o", ","],
    ["-l", "snapshot.foo=bar"],
    ["--output", "foo"],
    ["--size", "-1"],
    ["-O", "foo", "t"],
    ["-O", "vmdk", "--size", "1G"],
    ["-O", "bochs", "--size", "1G"],
    ["-O", "luks", "--size", "1G"],
    [*SECRET, "-O", "luks", "-o", "key-secret=s", "--size", "1G"],
    [*SECRET, "-O", "luks", "-o", "key-secret=s,cipher-alg=aes-128", "t"],
    ["-O", "qcow2", "-o", "help", "--size", "1G"],
    ["-l", "missing", "t"],
    ["missing"],
    ["-f", "raw", "-O", "qcow2", "t"],
    ["-O", "raw", "--size", "1000"],
    ["-O", "raw", "-o", "preallocation=foo", "--size", "1000"],
    ["-O", "raw", "-o", "size=5G", "t"],
    ["-O", "qcow2", "-o", "size=1G", "--size", "2G"],
    ["-U", "t"],
    *(
        ["-O", "qcow2", "-o", options, "--size", "1G"]
        for options in (
            "foo=bar", "cluster_size=3", "extended_l2=on,cluster_size=512", "compat=0.42", "preallocation=foo",
            "compat=0.10,refcount_bits=8", "encrypt.format=luks", "encrypt.format=luks,encrypt.cipher-alg=foo",
            "refcount_bits=0", "encrypt.format=foo", "encrypt.format=aes", "refcount_bits=128",
            "nocow=on,extent_size_hint=1M", "encrypt.format=luks,encrypt.key-secret=foo", "encryption=on",
        )
    ),
    *(["-O", "qcow2", "--size", size] for size in ("0", "1", "512", "2G", "64G", "256G", "1T", "2P", "7E")),
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all kinds, small."""
    path = tmp_path_factory.mktemp("measured")
    oracle.qemu_img("create", "-q", "-f", "qcow2", "t", "1G", cwd=path)
    (path / "base").write_bytes(b"base" * 200_000)
    for name, options in (("c64k", "cluster_size=64k"), ("c512", "cluster_size=512"), ("v2", "compat=0.10")):
        oracle.qemu_img("create", "-q", "-f", "qcow2", "-o", options, name, "5000k", cwd=path)
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "parts", "5000k", cwd=path)
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "over", "5000k", cwd=path)
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "reserved", "5000k", cwd=path)
    for name in ("c64k", "c512", "v2", "parts", "over"):
        oracle.qemu_io(
            path / name,
            "write 512 512", "write 200k 70k", "write -c 1M 64k", "write -z 1088k 128k", "write 2M 3000",
            "write 4999k 1k",
        )  # fmt: skip
    oracle.qemu_img("snapshot", "-c", "kept", "c64k", cwd=path)
    oracle.qemu_io(path / "c64k", "write 3M 300k")
    for granularity in ("512", "65536"):
        oracle.qemu_img("bitmap", "--add", "-g", granularity, "parts", "bitmap" + granularity, cwd=path)
    oracle.qemu_img("convert", "-O", "raw", "c64k", "raw", cwd=path)
    return path


@pytest.mark.parametrize("words", NEW)
def test_arguments(images: Path, words: list[str]) -> None:
    assert_same(images, "measure", *words)


@pytest.mark.parametrize("name", ["t", "c64k", "c512", "v2", "parts", "over", "reserved", "raw"])
def test_sources(images: Path, name: str) -> None:
    for target in (
        ["-O", "raw"],
        ["-O", "qcow2"],
        *(
            ["-O", "qcow2", "-o", options]
            for options in (
                "cluster_size=512,refcount_bits=64", "cluster_size=2M,refcount_bits=1", "extended_l2=on",
                "compat=0.10", "preallocation=full", "backing_file=x",
            )
        ),
        [*SECRET, "-O", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=aes-128"],
    ):  # fmt: skip
        assert_same(images, "measure", *target, name)
    assert_same(images, "measure", "-O", "qcow2", "--output=json", name)


@pytest.mark.parametrize("selection", ["kept", "1", "snapshot.name=kept", "snapshot.id=1"])
def test_snapshots(images: Path, selection: str) -> None:
    said = assert_same(images, "measure", "-l", selection, "-O", "qcow2", "c64k")
    assert said.out != assert_same(images, "measure", "-O", "qcow2", "c64k").out
