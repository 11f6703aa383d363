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


def commit_file(overlay: Path, base: Path, base_format: str = "qcow2", *, empty: bool = False) -> None:
    with qcowlib.open_image(overlay, writable=True, policy=LOCAL) as top:
        assert isinstance(top, qcowlib.WritableQcow2Image)
        top.leave_out_backing()
        with qcowlib.open_image(base, format=base_format, writable=True, policy=LOCAL) as bottom:
            qcowlib.commit(top, bottom)
        if empty:
            qcowlib.make_empty(top)


@pytest.mark.parametrize("below", [None, SIZE // 2, SIZE * 3])
def test_commit_enlarges_the_base(tmp_path: Path, below: int | None) -> None:
    """What the base gets is zero, also where its own backing file is longer."""
    base, overlay = tmp_path / "b.qcow2", tmp_path / "o.qcow2"
    if below is None:
        qcowlib.create_image(base, SIZE)
    else:
        (tmp_path / "r.raw").write_bytes(b"r" * below)
        qcowlib.create_overlay(base, "r.raw", backing_fmt="raw", size=SIZE)
    qcowlib.create_overlay(overlay, "b.qcow2", backing_fmt="qcow2", size=SIZE * 2)
    fill(overlay, 3, zeroes=True)
    wanted = oracle.content(overlay, tmp_path)
    commit_file(overlay, base)
    assert oracle.content(base, tmp_path) == wanted
    oracle.assert_clean(base)


def test_commit_through_layers_between(tmp_path: Path) -> None:
    """The layer between is shorter than both others: what it does not reach is zero in the base afterwards."""
    base, between, top = (tmp_path / f"{name}.qcow2" for name in "bmt")
    qcowlib.create_image(base, SIZE)
    qcowlib.create_overlay(between, "b.qcow2", backing_fmt="qcow2", size=SIZE // 2)
    qcowlib.create_overlay(top, "m.qcow2", backing_fmt="qcow2", size=SIZE)
    for number, path in enumerate((base, between, top)):
        fill(path, number, zeroes=True)
    wanted, mid = oracle.content(top, tmp_path), between.read_bytes()
    with qcowlib.open_image(top, policy=LOCAL) as overlay:
        layer = overlay.backing
        assert isinstance(overlay, qcowlib.Qcow2Image)
        assert isinstance(layer, qcowlib.Qcow2Image)
        layer.leave_out_backing()
        with qcowlib.open_image(base, writable=True) as bottom:
            qcowlib.commit(overlay, bottom)
    assert oracle.content(base, tmp_path) == wanted
    assert between.read_bytes() == mid
    oracle.assert_clean(base)


def test_zeroes_that_are_committed_to_a_raw_base_take_no_space(tmp_path: Path) -> None:
    raw, overlay = tmp_path / "b.raw", tmp_path / "o.qcow2"
    raw.write_bytes(b"r" * SIZE)
    qcowlib.create_overlay(overlay, "b.raw", backing_fmt="raw")
    with qcowlib.open_image(overlay, writable=True, policy=LOCAL) as top:
        top.write_zeroes(1 << 20, 2 << 20)
    commit_file(overlay, raw, "raw")
    assert raw.read_bytes() == b"r" * (1 << 20) + bytes(2 << 20) + b"r" * (1 << 20)
    assert raw.stat().st_blocks * 512 <= (2 << 20) + 65536


def test_commit_to_what_is_no_raw_image(tmp_path: Path) -> None:
    """A base that is said to be raw and is not; one that would not be raw any more and has nothing but its content."""
    base, overlay, raw = tmp_path / "b", tmp_path / "o.qcow2", tmp_path / "raw"
    qcowlib.create_image(base, SIZE)
    qcowlib.create_overlay(overlay, "b", backing_fmt="raw", size=SIZE)
    with qcowlib.open_image(overlay, writable=True, policy=LOCAL) as top:
        top.write(0, base.read_bytes()[:4096])
    before = base.read_bytes()
    with pytest.raises(qcowlib.ImageStateError, match="holds a qcow2 image"):
        commit_file(overlay, base, "raw")
    assert base.read_bytes() == before
    raw.write_bytes(before)
    with (
        qcowlib.open_image(overlay, open_backing=False) as top,
        qcowlib.open_image(raw, format="raw", writable=True) as bottom,
    ):
        top_data = top.read(0, 4096)
        qcowlib.commit(top, bottom, known_raw=True)
    assert raw.read_bytes() == (top_data + before[4096:]).ljust(SIZE, b"\0")
    raw.write_bytes(bytes(SIZE))
    with (
        qcowlib.open_image(overlay, open_backing=False) as top,
        qcowlib.open_image(raw, format="raw", writable=True) as bottom,
    ):
        with pytest.raises(qcowlib.ImageStateError, match="would look like a qcow2 image"):
            qcowlib.commit(top, bottom, format_guessed=True)
        assert raw.read_bytes() == bytes(SIZE)
        qcowlib.commit(top, bottom)
    assert raw.read_bytes()[:4096] == before[:4096]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"cluster_size": 512},
        {"cluster_size": 512, "compat": "0.10"},
        {"extended_l2": True, "cluster_size": 16384},
        {"refcount_bits": 64, "cluster_size": 4096},
        {"data_file": "data"},
        {"snapshot": True, "cluster_size": 4096},
        {"snapshot": True, "compat": "0.10"},
        {"bitmap": True},
    ],
)
def test_an_emptied_overlay(tmp_path: Path, options: dict[str, object]) -> None:
    """It shows the base, holds nothing, and is as small as a new one; snapshots and bitmaps stay."""
    options = dict(options)
    snapshot, bitmap = options.pop("snapshot", False), options.pop("bitmap", False)
    base, overlay = tmp_path / "b.qcow2", tmp_path / "o.qcow2"
    qcowlib.create_image(base, SIZE)
    if "data_file" in options:
        options["data_file"] = str(tmp_path / "data")
    qcowlib.create_overlay(overlay, "b.qcow2", backing_fmt="qcow2", **options)  # type: ignore[arg-type]
    fill(overlay, 1)
    if snapshot:
        with qcowlib.open_image(overlay, writable=True, open_backing=False) as image:
            qcowlib.create_snapshot(image, "kept")
    if bitmap:
        oracle.qemu_img("bitmap", "--add", overlay, "marks")
    fill(overlay, 2)
    wanted, saved = oracle.content(overlay, tmp_path), kept_clusters(overlay) if snapshot else None
    commit_file(overlay, base, empty=True)
    assert oracle.content(overlay, tmp_path) == wanted == oracle.content(base, tmp_path)
    oracle.assert_clean(overlay)
    with qcowlib.open_image(overlay, open_backing=False) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        assert qcowlib.allocated_bytes(image) == 0
        assert [entry.name for entry in image.snapshots] == (["kept"] if snapshot else [])
        assert [entry.name for entry in image.bitmaps] == (["marks"] if bitmap else [])
    if snapshot:
        assert kept_clusters(overlay) == saved
    elif not bitmap:  # its bits stay where they are
        empty = 4 + (7 if options.get("cluster_size") == 512 else 0)
        assert overlay.stat().st_size <= empty * int(str(options.get("cluster_size", 65536)))


def kept_clusters(overlay: Path) -> list[tuple[int, bytes]]:
    """What the snapshot holds itself."""
    with qcowlib.open_image(overlay, open_backing=False) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        view = image.open_snapshot("kept")
        rows = [row for table in view.layer_extents(0, view.size) for row in table]
        return [(row.start, view.read(row.start, row.length)) for row in rows if row.kind is qcowlib.ExtentKind.DATA]


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


@pytest.mark.parametrize("options", [{}, {"extended_l2": True, "cluster_size": 131072}])
def test_a_rebase_does_not_change_internal_snapshots(tmp_path: Path, options: dict[str, object]) -> None:
    paths = chain(tmp_path, 3, **options)
    oracle.qemu_img("snapshot", "-c", "kept", paths[2])
    fill(paths[2], 9)
    files = {path: path.read_bytes() for path in paths}
    kept = oracle.content(paths[2], tmp_path, snapshot="kept")
    active = oracle.content(paths[2], tmp_path)
    for name, new in (("l0.qcow2", paths[0]), (None, None)):
        with qcowlib.open_image(paths[2], writable=True, policy=LOCAL) as top:
            below = None if new is None else qcowlib.open_image(new, policy=LOCAL)
            with pytest.raises(
                qcowlib.OptionError, match=r"at \d+ the internal snapshot 'kept' would read other bytes"
            ):
                qcowlib.rebase(top, name, name and "qcow2", new=below)
            if below is not None:
                below.close()
        assert {path: path.read_bytes() for path in paths} == files
    copy = tmp_path / "copy.qcow2"  # the same bytes in another file
    oracle.qemu_img("convert", "-O", "qcow2", paths[1], copy)
    with qcowlib.open_image(paths[2], writable=True, policy=LOCAL) as top, qcowlib.open_image(copy) as new_backing:
        assert qcowlib.rebase(top, copy.name, "qcow2", new=new_backing) == 0
    assert oracle.content(paths[2], tmp_path, snapshot="kept") == kept
    assert oracle.content(paths[2], tmp_path) == active
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


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_an_image_gets_its_first_backing_file(tmp_path: Path, compat: str) -> None:
    """What it left unallocated was zero and stays so."""
    base, image = tmp_path / "b.raw", tmp_path / "i.qcow2"
    base.write_bytes(b"b" * SIZE)
    qcowlib.create_image(image, SIZE, compat=compat)
    fill(image, 4)
    wanted = oracle.content(image, tmp_path)
    with (
        qcowlib.open_image(image, writable=True) as top,
        qcowlib.open_image(base, format="raw") as new,
    ):
        qcowlib.rebase(top, "b.raw", "raw", new=new)
    assert oracle.content(image, tmp_path) == wanted
    oracle.assert_clean(image)


def test_rebase_within_a_chain_reads_what_lies_between_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = chain(tmp_path, 3)
    with qcowlib.open_image(paths[1], open_backing=False) as between:
        assert isinstance(between, qcowlib.Qcow2Image)
        held = qcowlib.allocated_bytes(between)
    read: list[int] = []
    original = qcowlib.Qcow2Image.read
    monkeypatch.setattr(qcowlib.Qcow2Image, "read", lambda self, at, n: read.append(n) or original(self, at, n))
    with (
        qcowlib.open_image(paths[2], writable=True, policy=LOCAL) as top,
        qcowlib.open_image(paths[0], policy=LOCAL) as new,
    ):
        qcowlib.rebase(top, paths[0].name, "qcow2", new=new)
    assert 0 < sum(read) <= 4 * held  # from the old and from the new one, through the layers


def test_rebase_writes_only_units_that_differ(tmp_path: Path) -> None:
    """Subclusters; zeroes behind the end of the old backing file take no space, others are data as in QEMU."""
    old, new, image = tmp_path / "o.raw", tmp_path / "n.raw", tmp_path / "i.qcow2"
    old.write_bytes(b"a" * 65536 + bytes(65536))
    new.write_bytes(b"a" * 65536 + b"b" * 131072 + bytes(65536))
    with new.open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    qcowlib.create_overlay(image, "o.raw", backing_fmt="raw", size=262144, extended_l2=True, cluster_size=65536)
    wanted = oracle.content(image, tmp_path)
    with (
        qcowlib.open_image(image, writable=True, policy=LOCAL) as top,
        qcowlib.open_image(new, format="raw") as below,
    ):
        assert qcowlib.rebase(top, "n.raw", "raw", new=below) == 2048 + 131072
    assert oracle.content(image, tmp_path) == wanted
    with qcowlib.open_image(image, open_backing=False) as top:
        rows = [(row.start, row.length, row.kind.name) for table in top.layer_extents(0, top.size) for row in table]
    assert rows == [
        (0, 4096, "UNALLOCATED"),
        (4096, 2048, "DATA"),
        (6144, 59392, "UNALLOCATED"),
        (65536, 65536, "DATA"),
        (131072, 65536, "ZERO"),
        (196608, 65536, "UNALLOCATED"),
    ]


@pytest.mark.parametrize("options", [{}, {"compression_type": "zstd", "cluster_size": 4096}, {"compat": "0.10"}])
def test_compressed_rebase(tmp_path: Path, options: dict[str, object]) -> None:
    base, image = tmp_path / "b.raw", tmp_path / "i.qcow2"
    base.write_bytes(b"compressible " * 50_000)
    size = base.stat().st_size // 512 * 512
    qcowlib.create_overlay(image, "b.raw", backing_fmt="raw", size=size, **options)  # type: ignore[arg-type]
    with qcowlib.open_image(image, writable=True, policy=LOCAL) as top:
        top.write(100_000, b"own")
    wanted = oracle.content(image, tmp_path)
    with qcowlib.open_image(image, writable=True, policy=LOCAL) as top:
        qcowlib.rebase(top, None, compressed=True)
    assert oracle.content(image, tmp_path) == wanted
    oracle.assert_clean(image)
    with qcowlib.open_image(image) as top:
        kinds = [row.kind for table in top.layer_extents(0, top.size) for row in table]
    assert kinds.count(qcowlib.ExtentKind.COMPRESSED) == -(-size // top.cluster_size) - 1
    assert kinds.count(qcowlib.ExtentKind.DATA) == 1


def test_rebases_that_are_refused(tmp_path: Path) -> None:
    """Onto itself or what is based on it; without room; compressed where that is impossible. Nothing is changed."""
    paths = chain(tmp_path, 3)
    data, loop = tmp_path / "d.qcow2", paths[0]
    qcowlib.create_image(data, SIZE, data_file=str(tmp_path / "data"), data_file_raw=True)
    before = [path.read_bytes() for path in (*paths, data)]
    for name in (paths[0].name, paths[2].name):
        with (
            qcowlib.open_image(loop, writable=True) as bottom,
            qcowlib.open_image(tmp_path / name, policy=LOCAL, force_share=True) as new,
            pytest.raises(qcowlib.ChainError, match="loop"),
        ):
            qcowlib.rebase(bottom, name, "qcow2", new=new)
    for image, name, options, told in (
        (paths[1], "x" * 1024, {"unsafe": True}, "longer than 1023"),
        (data, "x", {"unsafe": True}, "no backing file is possible"),
        (data, None, {"compressed": True}, "not possible with"),
    ):
        with (
            qcowlib.open_image(image, writable=True, policy=LOCAL) as opened,
            pytest.raises(qcowlib.OptionError, match=told),
        ):
            qcowlib.rebase(opened, name, "raw" if name else None, **options)  # type: ignore[arg-type]
    assert [path.read_bytes() for path in (*paths, data)] == before


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
