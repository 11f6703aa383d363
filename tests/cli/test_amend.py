"""qcow amend beside the stock qemu-img: words, exit codes, and what info and check say afterwards."""

from __future__ import annotations

import pytest

from tests import oracle
from tests.cli.side_by_side import Pair, pair

__all__ = ["pair"]

VARYING = (
    r'"(actual-size|file-length|date-n?sec)": \d+|(\s*\(\d+\.\d+/100%\)\n)+|"(uuid|iters|master-key-iters)": [^,]*'
)
SECRETS = [word for number in range(3) for word in ("--object", f"secret,id=s{number},data=hunter{number}")]
LOCKED = ["--image-opts", "driver=qcow2,file.filename=l,encrypt.key-secret=s0"]

WORDS = """
b
-o help
-f qcow2 -o help
-o help b
-f raw -o help
-f foo -o help
-f vmdk -o help
-o compat=1.1
-o compat=1.1 b c
-f raw -o size=1 r
-o size=1 r
-o , b
-t foo -o compat=1.1 b
-o size=foo b
-o lazy_refcounts=foo b
-o refcount_bits=foo b
-o refcount_bits=7 b
-o refcount_bits=0 b
-o encrypt.state=active b
-o encrypt.state=foo b
-o encrypt.key-secret=x b
-o backing_file= b
-o backing_file=foo b
-o backing_fmt=qcow2 b
-o data_file=foo b
-o data_file_raw=on b
-o data_file_raw=off b
-o size=1000 b
--force -o compat=1.1 missing
-o compat=1.1,foo=on b
-o preallocation=off,foo=bar b
-o preallocation=off b
-o compat=0.42 b
"""

# Each goes on from where those before it led.
STEPS = """
-o size=512k b
-o size=0 b
-o size=2M -q b
-p -o compat=1.1 b
-q -p -o refcount_bits=32 b
-p -o size=3M b
-p -o refcount_bits=8,compat=1.1 b
-p -o compat=0.10 b
-p -o compat=0.10,refcount_bits=16 b
-p -o compat=0.10,lazy_refcounts=on b
-o refcount_bits=8 b
-o compat=v3,lazy_refcounts=on b
-o lazy_refcounts=off b
-o refcount_bits=1 b
-o refcount_bits=64,lazy_refcounts=on b
-o compat=v2,refcount_bits=16 b
-o compat=1.1 o
-o compat=0.10 o
-o backing_file=r,backing_fmt=raw o
-o compat=1.1 s
-o size=2M s
-o compat=0.10 s
-o compat=0.10,size=1M s
-o refcount_bits=1 s
-o compat=0.10 x
-o data_file_raw=on d
-o data_file_raw=off d
-o data_file_raw=on d
-o compat=0.10 d
-o data_file= d
-o compat=0.10 z
-o compat=0.10 n
"""

KEYS = """
-o encrypt.keyslot=1
-o encrypt.state=foo
-o encrypt.state=active
-o encrypt.state=active,encrypt.new-secret=s1,encrypt.old-secret=s0
-o encrypt.state=active,encrypt.new-secret=s9
-o encrypt.state=active,encrypt.new-secret=s1,encrypt.keyslot=8
-o encrypt.state=active,encrypt.new-secret=s1,encrypt.keyslot=-1
-o encrypt.state=active,encrypt.new-secret=s1,encrypt.keyslot=0
-o encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=10,encrypt.keyslot=3
-o encrypt.state=active,encrypt.new-secret=s2,encrypt.iter-time=10
-o encrypt.state=inactive
-o encrypt.state=inactive,encrypt.new-secret=s1
-o encrypt.state=inactive,encrypt.iter-time=4
-o encrypt.state=inactive,encrypt.old-secret=s9
-o encrypt.state=inactive,encrypt.keyslot=9
-o encrypt.state=inactive,encrypt.keyslot=5
-o encrypt.state=inactive,encrypt.keyslot=3,encrypt.old-secret=s2
-o encrypt.state=inactive,encrypt.keyslot=3,encrypt.old-secret=s1
-o encrypt.state=inactive,encrypt.old-secret=s2
-o encrypt.state=inactive,encrypt.old-secret=s2
-o encrypt.state=inactive,encrypt.keyslot=0
-o encrypt.state=inactive,encrypt.old-secret=s0
-o encrypt.state=active,encrypt.new-secret=s0,encrypt.iter-time=10,encrypt.keyslot=0 --force
-p -o compat=0.10
-o encrypt.state=inactive,encrypt.keyslot=0 --force
"""


def make_images(pair: Pair) -> None:
    for directory in (pair.theirs, pair.ours):
        (directory / "r").write_bytes(b"raw!" * 250_000)
    for words in (
        ["-f", "qcow2", "b", "1M"],
        ["-f", "qcow2", "-o", "compat=0.10", "-b", "r", "-F", "raw", "o", "1M"],
        ["-f", "qcow2", "-o", "compat=0.10", "s", "1M"],
        ["-f", "qcow2", "-o", "extended_l2=on", "x", "1M"],
        ["-f", "qcow2", "-o", "data_file=data,data_file_raw=on", "d", "1M"],
        ["-f", "qcow2", "-o", "compression_type=zstd", "z", "1M"],
        ["-f", "qcow2", "-o", "compression_type=zstd", "n", "1M"],
    ):
        pair.prepare("create", "-q", *words)
    pair.prepare("snapshot", "-c", "kept", "s")
    for directory in (pair.theirs, pair.ours):
        oracle.qemu_io(directory / "b", "write 0 300k", "write -z 200k 200k")
        oracle.qemu_io(directory / "s", "write 0 300k")
        oracle.qemu_io(directory / "z", "write -c 0 64k")


@pytest.mark.parametrize("words", WORDS.strip().split("\n"))
def test_arguments(pair: Pair, words: str) -> None:
    pair.prepare("create", "-q", "-f", "qcow2", "b", "1M")
    for directory in (pair.theirs, pair.ours):
        (directory / "r").write_bytes(b"raw!" * 1000)
    pair.same("amend", *words.split())


def test_steps(pair: Pair) -> None:
    """Options one after the other: the same words, the same facts about the image, the same content."""
    make_images(pair)
    for words in STEPS.strip().split("\n"):
        name = words[-1]
        content = b"" if name == "d" else oracle.content(pair.ours / name, pair.ours)
        pair.same("amend", *words.split(), mask=VARYING)
        if words != "-o data_file= d":
            pair.same("info", "--output=json", name, mask=VARYING)
        if name == "d":  # its data file is found from its own directory alone
            continue
        oracle.assert_clean(pair.ours / name)
        if "size" not in words:
            assert oracle.content(pair.ours / name, pair.ours) == content, words


def test_key_slots(pair: Pair) -> None:
    """The stock tool can use every passphrase that we put in, and none that we erased."""
    pair.prepare(
        "create", "-q", *SECRETS, "-f", "qcow2", "-o",
        "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10", "l", "1M",
    )  # fmt: skip
    for words in KEYS.strip().split("\n"):
        said = pair.same("amend", *SECRETS, *words.split(), *LOCKED, mask=VARYING)
        if said.code != 0:
            continue
        pair.same("info", "--output=json", "l", mask=VARYING)
        for number in range(3):
            opened = [
                oracle.qemu_img(
                    "map", *SECRETS, "--image-opts", f"driver=qcow2,file.filename=l,encrypt.key-secret=s{number}",
                    check=False, cwd=directory,
                ).returncode
                for directory in (pair.theirs, pair.ours)
            ]  # fmt: skip
            assert opened[0] == opened[1], (words, number)
