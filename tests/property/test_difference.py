"""The difference of any two states against a comparison of their bytes: nothing that differs is left out, and with
`exact` nothing else is told."""

import contextlib
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcowlib
from qcowlib import ChangeKind, LocalFiles
from qcowlib.image.raw import RawImage, StorageWindow
from qcowlib.image.reader import ReadableImage
from qcowlib.storage.local import open_local

KIB = 1 << 10
SECTOR = 512
GEOMETRIES: tuple[dict[str, Any], ...] = (
    {"cluster_size": 512},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 65536},
)


def content(state: ReadableImage, size: int) -> bytes:
    return state.read(0, state.size).ljust(size, b"\0")


def sectors_told(old: ReadableImage, new: ReadableImage, *, exact: bool) -> np.ndarray:
    """Which sectors are told as changed."""
    told = np.zeros(max(old.size, new.size) // SECTOR, dtype=np.bool_)
    before = 0
    for table in qcowlib.difference(old, new, exact=exact):
        for start, length, kind in table.rows():
            assert kind is ChangeKind.CHANGED
            assert before <= start, "ranges are sorted and do not overlap"
            before = start + length
            told[start // SECTOR : -(-before // SECTOR)] = True
    assert before <= max(old.size, new.size)
    return told


def assert_told(old: ReadableImage, new: ReadableImage) -> int:
    """Compare with the bytes; returns the sectors that are told although they hold the same bytes."""
    size = max(old.size, new.size)
    one, other = (np.frombuffer(content(state, size), dtype=np.uint8).reshape(-1, SECTOR) for state in (old, new))
    differ = (one != other).any(axis=1)
    told = sectors_told(old, new, exact=False)
    assert not (differ & ~told).any(), "a changed sector is missing"
    assert (sectors_told(old, new, exact=True) == differ).all()
    return int((told & ~differ).sum())


def snapshots(image: qcowlib.Qcow2Image | qcowlib.RawImage) -> list[ReadableImage]:
    assert isinstance(image, qcowlib.Qcow2Image)
    return [image.open_snapshot(entry) for entry in image.snapshots]


def random_program(image: qcowlib.WritableQcow2Image, chance: random.Random) -> None:
    for number in range(chance.randrange(4, 12)):
        offset = chance.randrange(image.size)
        length = min(chance.choice([512, 3000, 70 * KIB]), image.size - offset)
        choice = chance.random()
        if choice < 0.5:
            image.write(offset, chance.randbytes(1) * length)
        elif choice < 0.65:
            image.write_zeroes(offset, length)
        elif choice < 0.8:
            image.discard(offset, length)
        elif choice < 0.85:
            with contextlib.suppress(qcowlib.OptionError):  # version 2 cannot, with snapshots
                qcowlib.resize(image, chance.randrange(200, 700) * KIB, shrink=True)
        elif choice < 0.93 and image.snapshots:
            qcowlib.apply_snapshot(image, chance.choice(image.snapshots).id)
        else:
            qcowlib.create_snapshot(image, f"s{number}-{chance.randrange(1 << 20)}")


@pytest.mark.parametrize("seed", range(16))
def test_every_pair_of_states(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    options = GEOMETRIES[seed % len(GEOMETRIES)]
    base, top, copy = (str(tmp_path / name) for name in ("base", "top", "copy.raw"))
    qcowlib.create_image(base, 300 * KIB, **options)
    with qcowlib.open_image(base, writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        random_program(image, chance)
    qcowlib.create_overlay(
        top, base, backing_fmt="qcow2", size=chance.choice([200, 300, 500]) * KIB, policy=LocalFiles(), **options
    )
    with qcowlib.open_image(top, writable=True, policy=LocalFiles()) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        random_program(image, chance)
    with qcowlib.open_image(top, policy=LocalFiles()) as image:
        Path(copy).write_bytes(image.read(0, image.size))
        below = qcowlib.open_image(base)
        flat = qcowlib.open_image(copy)
        states = [image, *snapshots(image), below, *snapshots(below)]
        for old, new in itertools.product([*states, flat], repeat=2):
            assert_told(old, new)
        for state in states:
            assert sectors_told(state, state, exact=False).sum() == 0, "a state does not differ from itself"
        below.close()
        flat.close()


def test_metadata_alone_tells_equal_states_apart_from_changed_ones(tmp_path: Path) -> None:
    path = str(tmp_path / "i")
    qcowlib.create_image(path, 64 << 20)
    with qcowlib.open_image(path, writable=True) as image:
        image.write(0, b"a" * (1 << 20))
        qcowlib.create_snapshot(image, "one")
        image.write(256 * KIB, b"b" * 100)
        image.write_zeroes(32 << 20, 1 << 20)  # it read as zeroes before
        one = image.open_snapshot("one")
        rows = [row for table in qcowlib.difference(one, image) for row in table.rows()]
        assert rows == [(256 * KIB, 64 * KIB, ChangeKind.CHANGED)]
        exact = [row for table in qcowlib.difference(one, image, exact=True) for row in table.rows()]
        assert exact == [(256 * KIB, 512, ChangeKind.CHANGED)]
        extents = [row for table in qcowlib.changed_extents(one, image) for row in table.rows()]
        assert [row[:3] for row in extents] == [(256 * KIB, 64 * KIB, 0)]


def test_a_raw_view_of_an_encrypted_file_is_another_content(tmp_path: Path) -> None:
    """Both states lie at the same place of one file; only one of them is decrypted."""
    path = str(tmp_path / "i")
    qcowlib.create_image(
        path, 1 << 20, encrypt_format="luks", encrypt_passphrase="x", encrypt_iter_time_ms=0, preallocation="full"
    )
    with qcowlib.open_image(path, writable=True, passphrase="x") as image:
        image.write(0, b"secret")
        host = next(iter(next(iter(image.extents())))).host_offset
    assert host is not None
    with qcowlib.open_image(path, passphrase="x") as image, open_local(path) as file:
        view = RawImage(StorageWindow(file, host, image.size))
        told = sectors_told(view, image, exact=False)
    assert told[0]
