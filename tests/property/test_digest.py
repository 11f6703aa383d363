"""Digests of all states against a digest of their bytes that is computed here; what is shared is read once."""

import hashlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import xxhash

import qcowlib
from qcowlib import LocalFiles, digest_states
from qcowlib.image.qcow2 import MappedLayer
from tests.oracle import qemu_img
from tests.property.test_difference import GEOMETRIES, random_program

KIB = 1 << 10
BLOCK = 64 * KIB
HASHES: dict[str, Callable[..., Any]] = {"sha256": hashlib.sha256, "xxh3-128": xxhash.xxh3_128}


def expected(content: bytes, algorithm: str) -> str:
    """The digest by its definition."""
    whole = HASHES[algorithm]()
    for offset in range(0, len(content), BLOCK):
        block = content[offset : offset + BLOCK].ljust(BLOCK, b"\0")
        if any(block):
            whole.update(offset.to_bytes(8, "big") + HASHES[algorithm](block).digest())
    whole.update(len(content).to_bytes(8, "big"))
    return str(whole.hexdigest())


def assert_digests(image: qcowlib.Qcow2Image | qcowlib.RawImage) -> None:
    snapshots = image.snapshots if isinstance(image, qcowlib.Qcow2Image) else []
    states = digest_states(image)
    assert [state.snapshot for state in states] == [None, *snapshots]
    for told in states:
        view = image if told.snapshot is None else image.open_snapshot(told.snapshot)  # type: ignore[arg-type]
        content = view.read(0, view.size)
        assert told.damage is None
        assert told.size == len(content)
        assert told.digests == {name: expected(content, name) for name in HASHES}


@pytest.mark.parametrize("seed", range(12))
def test_random_images(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    options: dict[str, Any] = GEOMETRIES[seed % len(GEOMETRIES)]
    base, top = (str(tmp_path / name) for name in ("base", "top"))
    qcowlib.create_image(base, 300 * KIB, **options)
    with qcowlib.open_image(base, writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        random_program(image, chance)
    size = chance.choice([200, 300, 500]) * KIB + 512
    qcowlib.create_overlay(top, base, backing_fmt="qcow2", size=size, policy=LocalFiles(), **options)
    with qcowlib.open_image(top, writable=True, policy=LocalFiles()) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        random_program(image, chance)
        image.write_compressed(0, b"z" * image.cluster_size)
        qcowlib.create_snapshot(image, "last")
    with qcowlib.open_image(top, policy=LocalFiles()) as image:
        assert_digests(image)
        with ThreadPoolExecutor(2) as executor:
            assert digest_states(image, executor=executor) == digest_states(image)


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    path = tmp_path / "i"
    qcowlib.create_image(path, 4 << 20, cluster_size=2 << 20)
    with qcowlib.open_image(path, writable=True) as image:
        image.write(70 * KIB, random.Random(1).randbytes(300 * KIB))
    told = []
    for options in (["-O", "raw"], ["-c", "-O", "qcow2"], ["-O", "qcow2", "-o", "cluster_size=512"]):
        qemu_img("convert", *options, path, tmp_path / "other")
        with qcowlib.open_image(tmp_path / "other") as image:
            told.append(digest_states(image)[0].digests)
    with qcowlib.open_image(path) as image:
        assert told == [digest_states(image)[0].digests] * 3


def test_what_states_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "i"
    blocks, changes = 200, 3
    qcowlib.create_image(path, blocks * BLOCK)
    with qcowlib.open_image(path, writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        image.write(0, b"a" * blocks * BLOCK)
        for number in range(10):
            qcowlib.create_snapshot(image, f"s{number}")
            image.write(number * 5 * BLOCK, bytes([number]) * changes * BLOCK)
        qcowlib.apply_snapshot(image, "s2")
    read = []
    original = MappedLayer.read_data

    def counting(self: MappedLayer, guest: int, host: int, view: memoryview) -> None:
        read.append(len(view))
        original(self, guest, host, view)

    monkeypatch.setattr(MappedLayer, "read_data", counting)
    with qcowlib.open_image(path) as reader:
        digest_states(reader, ["xxh3-128"])
    # Every cluster that holds data, once: those of the first state, and what was written between the snapshots. The
    # last write is in no state any more, and a block of zeroes ("s0" wrote them) is read to find that out.
    assert sum(read) == (blocks + 9 * changes) * BLOCK


def test_damage_is_told_with_the_states_that_have_it(tmp_path: Path) -> None:
    path = tmp_path / "i"
    qcowlib.create_image(path, 16 << 20)
    with qcowlib.open_image(path, writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        image.write(0, b"a" * BLOCK)
        qcowlib.create_snapshot(image, "whole")
        image.write_compressed(BLOCK, b"b" * BLOCK)
        host = image.lookup(BLOCK)[1]
    with open(path, "r+b") as file:
        file.seek(host)
        file.write(b"\xff" * 16)
    with qcowlib.open_image(path) as image:
        active, whole = digest_states(image)
    assert active.digests == {}
    assert active.damage is not None
    assert "compressed cluster" in active.damage
    assert whole.damage is None
    assert whole.digests["sha256"] == expected((b"a" * BLOCK).ljust(16 << 20, b"\0"), "sha256")
