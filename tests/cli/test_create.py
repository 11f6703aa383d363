"""create: text, exit codes and the image, as the stock tool has them."""

from __future__ import annotations

import pytest

from tests import oracle
from tests.cli.side_by_side import Pair, pair

__all__ = ["pair"]

SECRET = ("--object", "secret,id=s0,data=secret")

ACCEPTED = [
    "-f qcow2 x 1M",
    "-q -f qcow2 x 1M",
    "x 1M",
    "-f raw x 1025",
    "-f raw -o preallocation=full x 1M",
    "-f raw -o preallocation=falloc,nocow=off x 1M",
    "-f qcow2 x 1025",
    "-f qcow2 x 1.5G",
    "x -f qcow2 1M",
    "-fqcow2 x 1M",
    "-qfqcow2 x 1M",
    "-f qcow2 -- x 1M",
    "-f qcow2 -o size=2M x",
    "-f qcow2 -o lazy_refcounts x 1M",
    "-f qcow2 -o nolazy_refcounts x 1M",
    "-f qcow2 -o refcount_bits=0x10 x 1M",
    "-f qcow2 -o refcount_bits=1 x 1M",
    "-f qcow2 -o refcount_bits=64 x 1M",
    "-f qcow2 -o cluster_size=512 x 1M",
    "-f qcow2 -o cluster_size=2M x 1G",
    "-f qcow2 -o cluster_size=4k,cluster_size=8k x 1M",
    "-f qcow2 -o cluster_size=4k -o compat=0.10 x 1M",
    "-f qcow2 -o compat=v3,nocow=on,data_file=dd.raw,data_file_raw=on x 1M",
    "-f qcow2 -o data_file=dd.raw x 1M",
    "-f qcow2 -o extended_l2=on,cluster_size=16k x 1M",
    "-f qcow2 -o compression_type=zstd x 1M",
    "-f qcow2 -o preallocation=metadata x 10M",
    "-f qcow2 -o preallocation=falloc x 1M",
    "-f qcow2 -o preallocation=full x 1M",
    "-f qcow2 -b base -F qcow2 x",
    "-f qcow2 -b base -F qcow2 x 5M",
    "-f qcow2 -b base -F raw x",
    "-f qcow2 -o backing_file=base,backing_fmt=qcow2 x",
    "-f qcow2 -u -b nofile -F qcow2 x 1M",
    "-f qcow2 -b base -F qcow2 -o extended_l2=on,preallocation=metadata x",
    "-f qcow2 -o id=foo x 1M",
    "-f qcow2 a,b 1M",
    "-f qcow2 file:x 1M",
]

REFUSED = [
    "-f raw x 8P",
    "",
    "-f qcow2 x",
    "-f qcow2 x 1M foo",
    "-f qcow2 x -1",
    "-f qcow2 -- x -1",
    "-f qcow2 x 9E",
    "-f qcow2 x 3P",
    "-f qcow2 x 1kk",
    "-f qcow2 -o backing_file=foo x 1M",
    "-f qcow2 -b nofile -F qcow2 x 1M",
    "-f qcow2 -b base x",
    "-f qcow2 -u -b nofile -F raw x",
    "-f qcow2 -u -b nofile x 1M",
    "-f raw -b base -F qcow2 x",
    "-f raw -F qcow2 x",
    "-f qcow2 -F raw x 1M",
    "-f qcow2 -b x -F raw x",
    "-f qcow2 -o backing_file= x",
    "-f qcow2 -o preallocation=metadata -b base -F qcow2 x",
    "-f foo x 1M",
    "-f bochs x 1M",
    "-f qcow2 foo:x 1M",
    "-f qcow2 -o size=2M x 1M",
    "-f qcow2 -o size=foo x",
    "-f qcow2 -o lazy_refcounts=foo x 1M",
    "-f qcow2 -o refcount_bits=foo x 1M",
    "-f qcow2 -o refcount_bits=7 x 1M",
    "-f qcow2 -o refcount_bits=128 x 1M",
    "-f qcow2 -o cluster_size=4M x 1M",
    "-f qcow2 -o cluster_size=1000 x 1M",
    "-f qcow2 -o foo=bar x 1M",
    "-f qcow2 -o ,x=1 x 1M",
    "-f qcow2 -o x, x 1M",
    "-f qcow2 -o compat=0.42 x 1M",
    "-f qcow2 -o compat=0.10,lazy_refcounts=on x 1M",
    "-f qcow2 -o compat=0.10,refcount_bits=8 x 1M",
    "-f qcow2 -o compat=0.10,compression_type=zstd x 1M",
    "-f qcow2 -o extended_l2=on,cluster_size=8k x 1M",
    "-f qcow2 -o extended_l2=on,compat=0.10 x 1M",
    "-f qcow2 -o compression_type=zst x 1M",
    "-f qcow2 -o data_file_raw=on x 1M",
    "-f qcow2 -o preallocation=foo x 1M",
    "-f raw -o preallocation=metadata x 1M",
    "-f raw -o cluster_size=4k x 1M",
    "-f qcow2 -o encryption=on x 1M",
    "-f qcow2 -o encrypt.format=luks x 1M",
    "-f qcow2 nodir/x 1M",
    "-f qcow2 adir 1M",
    "-f",
    "-f qcow2 --objec",
    "-zq",
    "-qz",
    "--foo",
    "--help=1",
]

HELP = [
    "-f qcow2 -o help",
    "-f qcow2 -o help x",
    "-f qcow2 -o ? x",
    "-f qcow2 -o cluster_size=4k,help x 1M",
    "-f qcow2 -o cluster_size=4k -o help x",
    "-f raw -o help",
    "-f raw -o help x",
    "-f foo -o help",
    "-f bochs -o help",
]


@pytest.fixture
def with_base(pair: Pair) -> Pair:
    pair.prepare("create", "-q", "-f", "qcow2", "base", "3M")
    for directory in (pair.theirs, pair.ours):
        (directory / "adir").mkdir()
    return pair


@pytest.mark.parametrize("line", ACCEPTED)
def test_made(with_base: Pair, line: str) -> None:
    """Both print the same; the image passes the stock check and the stock info finds the same facts."""
    said = with_base.same("create", *line.split())
    assert said.code == 0
    image = "a,b" if "a,b" in line else "x"
    facts = []
    for directory in (with_base.theirs, with_base.ours):
        info = oracle.image_info(directory / image, "-f", "qcow2" if "qcow2 " in line else "raw")
        facts.append(
            {
                name: fact
                for name, fact in info.items()
                if name not in {"actual-size", "filename", "full-backing-filename"}
            }
        )
    assert facts[1] == facts[0]
    if facts[0]["format"] == "qcow2" and "nofile" not in line:
        oracle.qemu_img("check", "-f", "qcow2", image, cwd=with_base.ours)


@pytest.mark.parametrize("line", REFUSED)
def test_refused(with_base: Pair, line: str) -> None:
    """Both say the same and leave nothing behind."""
    said = with_base.same("create", *line.split())
    assert said.code == 1


@pytest.mark.parametrize("line", HELP)
def test_option_help(with_base: Pair, line: str) -> None:
    with_base.same("create", *line.split())


def test_empty_option_list(pair: Pair) -> None:
    assert pair.same("create", "-f", "qcow2", "-o", "", "x", "1M").code == 1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10", 0),
        ("encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,encrypt.cipher-alg=aes-128", 0),
        ("encrypt.format=luks,encrypt.key-secret=s1", 1),
        ("encrypt.format=foo,encrypt.key-secret=s0", 1),
        ("encrypt.key-secret=s0", 1),
        ("encrypt.format=luks,encrypt.key-secret=s0,encrypt.cipher-alg=foo", 1),
        ("encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=foo", 1),
    ],
)
def test_encrypted(pair: Pair, options: str, code: int) -> None:
    assert pair.same("create", *SECRET, "-f", "qcow2", "-o", options, "x", "1M").code == code
    if code == 0:
        image = "driver=qcow2,encrypt.key-secret=s0,file.filename=x"
        oracle.qemu_img("check", *SECRET, "--image-opts", image, cwd=pair.ours)


def test_backing_name_of_driver_options(pair: Pair) -> None:
    pair.prepare("create", "-q", "-f", "qcow2", "base", "3M")
    name = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}'
    pair.same("create", "-f", "qcow2", "-b", name, "-F", "qcow2", "x")
    assert oracle.image_info(pair.ours / "x")["backing-filename"] == name
