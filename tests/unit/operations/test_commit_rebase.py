"""Commit and rebase, against qemu-img: what a guest reads does not change, and every file stays clean."""

import os
import random
from pathlib import Path

import pytest

import qcowlib
from qcowlib.storage.recorder import FaultyStorage, RecordingStorage, crash_states
from tests import oracle

SIZE = 4 << 20
LOCAL = qcowlib.LocalFiles()


class Kept(qcowlib.BytesStorage):
    """Can be opened again."""

    def close(self) -> None:
        pass


def fill(path: Path, seed: int, *, zeroes: bool = False) -> None:
    """Some data, some zeroes, at places that are no multiple of anything."""
    rng = random.Random(seed)
    with qcowlib.open_image(path, format="qcow2", writable=True, policy=LOCAL) as image:
        for _ in range(12):
            length = rng.randrange(1, 150_000)
            offset = rng.randrange(0, image.size - length)
            if zeroes and rng.random() < 0.4:
                image.write_zeroes(offset, length)
            else:
                image.write(offset, rng.randbytes(length))


def chain(directory: Path, count: int, **options: object) -> list[Path]:
    """base <- o1 <- o2 ..., each with data of its own."""
    paths = [directory / f"l{number}.qcow2" for number in range(count)]
    for number, path in enumerate(paths):
        if number == 0:
            qcowlib.create_image(path, SIZE, **options)  # type: ignore[arg-type]
        else:
            qcowlib.create_overlay(path, paths[number - 1].name, backing_fmt="qcow2", **options)  # type: ignore[arg-type]
        fill(path, number, zeroes=number > 0)
    return paths


@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"extended_l2": True, "cluster_size": 131072}])
def test_commit_makes_the_base_read_as_the_overlay_did(tmp_path: Path, options: dict[str, object]) -> None:
    base, overlay = chain(tmp_path, 2, **options)
    wanted = oracle.content(overlay, tmp_path)
    with qcowlib.open_image(overlay, open_backing=False) as top:
        expected = qcowlib.allocated_bytes(top)
        with qcowlib.open_image(base, writable=True, policy=LOCAL) as bottom:
            calls: list[tuple[int, int]] = []
            moved = qcowlib.commit(top, bottom, progress=lambda done, total: calls.append((done, total)))
    assert moved == expected == calls[-1][0] == calls[-1][1]
    assert oracle.content(base, tmp_path) == wanted
    oracle.assert_clean(base)
    # Done again it changes nothing; the overlay reads as before.
    assert oracle.content(overlay, tmp_path) == wanted


def test_commit_to_a_raw_base_and_of_compressed_clusters(tmp_path: Path) -> None:
    raw, overlay = tmp_path / "base.raw", tmp_path / "o.qcow2"
    raw.write_bytes(os.urandom(SIZE))
    data = tmp_path / "data.qcow2"
    qcowlib.create_image(data, SIZE)
    fill(data, 5)
    oracle.qemu_img("create", "-f", "qcow2", "-b", raw, "-F", "raw", overlay)
    with qcowlib.open_image(overlay, writable=True, policy=LOCAL) as top:
        for cluster in range(0, 8):
            top.write_compressed(cluster << 16, bytes([cluster]) * 65536)
        top.write_zeroes(1 << 20, 70000)
    wanted = oracle.content(overlay, tmp_path)
    with (
        qcowlib.open_image(overlay, open_backing=False) as top,
        qcowlib.open_image(raw, format="raw", writable=True) as bottom,
    ):
        qcowlib.commit(top, bottom)
    assert raw.read_bytes() == wanted


def test_commit_refuses_a_larger_overlay_and_a_locked_base(tmp_path: Path) -> None:
    base = tmp_path / "b.qcow2"
    qcowlib.create_image(base, SIZE)
    overlay = tmp_path / "o.qcow2"
    qcowlib.create_overlay(overlay, "b.qcow2", backing_fmt="qcow2", size=SIZE * 2)
    before = base.read_bytes()
    with (
        qcowlib.open_image(overlay, open_backing=False) as top,
        qcowlib.open_image(base, writable=True) as bottom,
        pytest.raises(qcowlib.OptionError, match="enlarge"),
    ):
        qcowlib.commit(top, bottom)
    assert base.read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"extended_l2": True, "cluster_size": 131072}])
@pytest.mark.parametrize("target", [0, None])
def test_rebase_keeps_the_content(tmp_path: Path, options: dict[str, object], target: int | None) -> None:
    paths = chain(tmp_path, 3, **options)
    wanted = oracle.content(paths[2], tmp_path)
    with qcowlib.open_image(paths[2], writable=True, policy=LOCAL) as top:
        if target is None:
            qcowlib.rebase(top, None)
        else:
            with qcowlib.open_image(paths[0], policy=LOCAL) as new:
                copied = qcowlib.rebase(top, paths[0].name, "qcow2", new=new)
                assert 0 < copied < SIZE
    info = oracle.image_info(paths[2])
    assert info.get("backing-filename") == (None if target is None else paths[0].name)
    assert info.get("backing-filename-format") == (None if target is None else "qcow2")
    assert oracle.content(paths[2], tmp_path) == wanted
    oracle.assert_clean(paths[2])


def test_rebase_copies_where_the_new_backing_file_is_longer(tmp_path: Path) -> None:
    short, long, overlay = tmp_path / "s.raw", tmp_path / "l.raw", tmp_path / "o.qcow2"
    short.write_bytes(b"s" * (1 << 20))
    long.write_bytes(b"l" * SIZE)
    qcowlib.create_overlay(overlay, "s.raw", backing_fmt="raw", size=SIZE)
    wanted = oracle.content(overlay, tmp_path)
    with (
        qcowlib.open_image(overlay, writable=True, policy=LOCAL) as top,
        qcowlib.open_image(long, format="raw") as new,
    ):
        qcowlib.rebase(top, "l.raw", "raw", new=new)
    assert oracle.content(overlay, tmp_path) == wanted == b"s" * (1 << 20) + bytes(3 << 20)


def test_unsafe_rebase_changes_the_name_alone(tmp_path: Path) -> None:
    paths = chain(tmp_path, 2)
    moved = tmp_path / ("m" * 200)
    paths[0].rename(moved)
    with qcowlib.open_image(paths[1], writable=True, open_backing=False) as top:
        assert qcowlib.rebase(top, str(moved), "qcow2", unsafe=True) == 0
    assert oracle.image_info(paths[1])["backing-filename"] == str(moved)
    for name in ("short.qcow2", "n" * 900, "", None):
        with qcowlib.open_image(paths[1], writable=True, open_backing=False) as top:
            qcowlib.rebase(top, name or None, "qcow2" if name else None, unsafe=True)
        assert oracle.image_info(paths[1]).get("backing-filename") == (name or None)
    oracle.qemu_img("check", "-f", "qcow2", paths[1])


@pytest.mark.parametrize("long_name", [False, True])
def test_a_crash_in_a_rebase_leaves_the_old_or_the_new_backing_name(tmp_path: Path, long_name: bool) -> None:
    name = "n" * 700 if long_name else "new.qcow2"
    path = tmp_path / "o.qcow2"
    qcowlib.create_overlay(path, "o" * 600, backing_fmt="qcow2", size=SIZE, check_backing=False)
    initial = path.read_bytes()
    recording = RecordingStorage(qcowlib.BytesStorage(initial))
    with qcowlib.open_image(recording, writable=True, open_backing=False) as image:
        qcowlib.rebase(image, name, "raw", unsafe=True)
    seen = set()
    for state in crash_states(recording, initial, samples=4, seed=1):
        with qcowlib.open_image(state.storage(), open_backing=False) as image:
            seen.add((image.header.backing_file, image.header.backing_format))
    assert seen == {("o" * 600, "qcow2"), (name, "raw")}


def test_a_commit_cut_off_by_a_full_disk_can_be_done_again(tmp_path: Path) -> None:
    base, overlay = chain(tmp_path, 2)
    wanted = oracle.content(overlay, tmp_path)
    data = base.read_bytes()
    for spare in (0, 100_000, 400_000):
        storage = Kept(data)
        with qcowlib.open_image(overlay, open_backing=False) as top:
            with pytest.raises(qcowlib.StorageError, match="No space left"):  # noqa: SIM117 - close raises as well
                with qcowlib.open_image(
                    FaultyStorage(storage, capacity=len(data) + spare), format="qcow2", writable=True
                ) as bottom:
                    qcowlib.commit(top, bottom)
            with qcowlib.open_image(storage, format="qcow2", writable=True) as bottom:
                qcowlib.commit(top, bottom)
        again = tmp_path / "again.qcow2"
        again.write_bytes(storage.pread(storage.size(), 0))
        assert oracle.content(again, tmp_path) == wanted
        oracle.assert_clean(again)
    assert oracle.content(overlay, tmp_path) == wanted
