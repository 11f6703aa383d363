"""Creation by itself: what is refused before anything is touched, what a failure leaves behind, the planned space."""

import errno
import itertools
import os
import stat
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from qcowlib import LocalFiles, create_image, create_overlay, open_image
from qcowlib.addresses import Geometry
from qcowlib.errors import ChainError, ImageLocked, OptionError, ReferenceDenied, StorageError
from qcowlib.image import create_target
from qcowlib.image.create_layout import plan_layout
from qcowlib.image.create_space import ClusterIntervals
from qcowlib.image.policy import DenyReferences
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.storage.local import LocalFile, open_local

MIB = 1 << 20


def no_space(self: LocalFile, *_: object) -> None:
    raise StorageError(self.name, "write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def fail_nth(monkeypatch: pytest.MonkeyPatch, method: str, number: int) -> None:
    """The numbered call of a `LocalFile` method finds the disk full; later ones as well."""
    original = getattr(LocalFile, method)
    calls = 0

    def call(self: LocalFile, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return no_space(self) if calls >= number else original(self, *args)

    monkeypatch.setattr(LocalFile, method, call)


# Results


def test_size_is_rounded_up_to_sectors(tmp_path: Path) -> None:
    for size, expected in ((0, 0), (1, 512), (512, 512), (1025, 1536)):
        create_image(tmp_path / "t", size)
        with open_image(tmp_path / "t", format="qcow2") as image:
            assert image.size == expected
        create_image(tmp_path / "t", size, format="raw")
        assert (tmp_path / "t").stat().st_size == expected


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_fresh_image_reads_as_zeroes(tmp_path: Path, preallocation: str) -> None:
    create_image(tmp_path / "t", 3 * MIB + 512, preallocation=preallocation, cluster_size=4096)
    with open_image(tmp_path / "t") as image:
        assert image.read(0, image.size) == bytes(3 * MIB + 512)


def test_existing_file_is_replaced_in_place(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"x" * MIB)
    path.chmod(0o600)
    inode = path.stat().st_ino
    create_image(path, MIB)
    fresh = tmp_path / "u"
    create_image(fresh, MIB)
    assert path.read_bytes() == fresh.read_bytes()
    assert path.stat().st_ino == inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_new_file_gets_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        create_image(tmp_path / "t", MIB)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o640


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    create_image(tmp_path / "link", MIB)
    assert (tmp_path / "link").is_symlink()
    with open_image(tmp_path / "target") as image:
        assert image.size == MIB


def test_nocow_is_no_error_where_it_is_unknown(tmp_path: Path) -> None:
    create_image(tmp_path / "t", MIB, nocow=True)
    create_image(tmp_path / "u", MIB)
    assert (tmp_path / "t").read_bytes() == (tmp_path / "u").read_bytes()


def test_a_terabyte_is_planned_in_runs() -> None:
    layout = plan_layout(Geometry(16), 1 << 40, preallocation="metadata")
    assert layout.file_size == 1099679662080
    assert layout.metadata_bytes < 170 * MIB
    assert len(layout.space.used.clipped(0, 1 << 40)) == 1


# Refused before anything is touched


@pytest.mark.parametrize("bad", [{"cluster_size": 3}, {"encrypt_format": "luks"}, {"data_file_raw": True}, {"x": 1}])
def test_bad_options_leave_an_existing_file_alone(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"precious")
    with pytest.raises(OptionError):
        create_image(path, MIB, **bad)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("size", [-1, 1 << 63, 1 << 100, None])
def test_bad_sizes(tmp_path: Path, size: int | None) -> None:
    for format_name in ("raw", "qcow2"):
        with pytest.raises(OptionError, match="size"):
            create_image(tmp_path / "t", size, format=format_name)
    assert list(tmp_path.iterdir()) == []


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^Unknown file format 'vmdk'$"):
        create_image(tmp_path / "t", MIB, format="vmdk")


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, text in ((".", "Is a directory"), ("missing/t", "No such file or directory"), ("fifo", "regular file")):
        with pytest.raises(StorageError, match=f"Could not create.*{text}"):
            create_image(tmp_path / name, MIB)
    with pytest.raises(StorageError):
        create_image(f"{tmp_path}/nul\0byte", MIB)


def test_image_must_not_be_its_own_base_or_data_file(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    create_image(base, MIB)
    create_overlay(top, "base", backing_fmt="qcow2")
    before = base.read_bytes(), top.read_bytes()
    (tmp_path / "link").symlink_to("base")
    with pytest.raises(OptionError, match="same filename"):
        create_overlay(base, "./base", backing_fmt="qcow2")
    with pytest.raises(OptionError, match="same filename"):
        create_overlay(base, "link", backing_fmt="qcow2", size=MIB, check_backing=False)
    with pytest.raises(OptionError, match="chain"):
        create_overlay(base, "top", backing_fmt="qcow2", policy=LocalFiles())
    with pytest.raises(OptionError, match="same file"):
        create_image(base, MIB, data_file=str(tmp_path / "link"))
    with pytest.raises(OptionError, match="same file"):
        create_image(tmp_path / "new", MIB, backing_file="base", backing_fmt="qcow2", data_file=str(base))
    assert (base.read_bytes(), top.read_bytes()) == before
    assert not (tmp_path / "new").exists()


def test_files_behind_the_backing_file_follow_the_policy(tmp_path: Path) -> None:
    create_image(tmp_path / "base", MIB)
    create_overlay(tmp_path / "middle", "base", backing_fmt="qcow2")
    (tmp_path / "base").unlink()
    create_overlay(tmp_path / "t", "middle", backing_fmt="qcow2")  # its header says all that is needed
    for policy, text in ((LocalFiles(), "No such file"), (DenyReferences(), "policy")):
        with pytest.raises((ChainError, ReferenceDenied), match=text):
            create_overlay(tmp_path / "u", "middle", backing_fmt="qcow2", policy=policy)
    assert not (tmp_path / "u").exists()


def test_backing_names_that_are_no_local_files(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match="protocol"):
        create_overlay(tmp_path / "t", "nbd://host/disk", backing_fmt="raw")
    with pytest.raises(OptionError, match=r"^Image creation needs a size parameter$"):
        create_overlay(tmp_path / "t", "nbd://host/disk", backing_fmt="raw", check_backing=False)
    create_overlay(tmp_path / "t", "nbd://host/disk", backing_fmt="raw", check_backing=False, size=MIB)
    with open_image(tmp_path / "t", open_backing=False) as image:
        assert isinstance(image, Qcow2Image)
        assert image.state.header.backing_file == "nbd://host/disk"


def test_backing_file_in_use_can_be_a_base(tmp_path: Path) -> None:
    create_image(tmp_path / "base", MIB)
    with open_local(tmp_path / "base", writable=True):
        create_overlay(tmp_path / "t", "base", backing_fmt="qcow2")
    with open_image(tmp_path / "t", policy=LocalFiles()) as image:
        assert image.size == MIB


def test_file_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t"
    create_image(path, MIB)
    before = path.read_bytes()
    for writable in (False, True):
        with open_local(path, writable=writable):
            with pytest.raises(ImageLocked):
                create_image(path, MIB)
            with pytest.raises(ImageLocked):
                create_image(path, MIB, format="raw")
            with pytest.raises(ImageLocked):
                create_image(tmp_path / "other", MIB, data_file=str(path))
    assert path.read_bytes() == before
    assert not (tmp_path / "other").exists()


# Failures on the way


@pytest.mark.parametrize("options", [{}, {"data_file": "d.raw"}, {"preallocation": "full"}], ids=str)
@pytest.mark.parametrize("method", ["pwrite", "truncate", "flush"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_failed_creation_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], method: str, number: int
) -> None:
    monkeypatch.chdir(tmp_path)
    fail_nth(monkeypatch, method, number)
    failed = False
    try:
        create_image("t", 16 * MIB, **options)
    except StorageError:
        failed = True
        assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    if not failed:
        assert number > 1  # fewer such calls were made
        assert open_image(tmp_path / "t", open_backing=False).size == 16 * MIB


def test_no_header_before_the_tables_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    flush, pwrite = LocalFile.flush, LocalFile.pwrite

    def log_flush(self: LocalFile) -> None:
        events.append("flush")
        flush(self)

    def log_write(self: LocalFile, data: bytes, offset: int) -> None:
        events.append("header" if offset == 0 else "table")
        pwrite(self, data, offset)

    monkeypatch.setattr(LocalFile, "flush", log_flush)
    monkeypatch.setattr(LocalFile, "pwrite", log_write)
    create_image(tmp_path / "t", MIB, preallocation="metadata")
    assert events[-3:] == ["flush", "header", "flush"]
    assert set(events[:-3]) == {"table"}


@pytest.mark.parametrize(
    "options", [{}, {"preallocation": "falloc"}, {"format": "raw", "preallocation": "full"}], ids=str
)
def test_existing_content_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"precious")
    monkeypatch.setattr(LocalFile, "allocate", no_space)
    with pytest.raises(StorageError, match="No space left"):
        create_image(path, 64 * MIB, **options)
    assert path.read_bytes() == b"precious"


def test_lost_content_is_said_to_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"precious")
    monkeypatch.setattr(LocalFile, "pwrite", no_space)
    with pytest.raises(StorageError) as caught:
        create_image(path, MIB)
    assert caught.value.__notes__ == [f"'{path}' existed before and has lost its content"]


def test_a_file_system_that_cannot_reserve_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(self: LocalFile, *_: int) -> None:
        raise StorageError(self.name, "allocate", OSError(errno.EOPNOTSUPP, "unsupported"))

    monkeypatch.setattr(LocalFile, "allocate", unsupported)
    (tmp_path / "t").write_bytes(b"old")
    create_image(tmp_path / "t", MIB)
    with open_image(tmp_path / "t") as image:
        assert image.size == MIB


def test_interrupt_removes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(create_target, "set_nocow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        create_image(tmp_path / "t", MIB, nocow=True)
    assert list(tmp_path.iterdir()) == []


# The intervals that a plan is made of


@hypothesis.given(strategies.lists(strategies.tuples(strategies.integers(0, 60), strategies.integers(1, 12))))
def test_intervals_are_a_set(steps: list[tuple[int, int]]) -> None:
    intervals, model = ClusterIntervals(), set[int]()
    for start, length in steps:
        wanted = set(range(start, start + length))
        if not wanted & model:
            intervals.add(start, start + length)
            model |= wanted
        elif wanted <= model:
            intervals.remove(start, start + length)
            model -= wanted
        found = intervals.clipped(0, 100)
        assert {i for a, b in found for i in range(a, b)} == model
        assert all(a < b for a, b in found)
        assert all(left[1] < right[0] for left, right in itertools.pairwise(found))
        assert intervals.end == max(model, default=-1) + 1
        gap = intervals.first_gap(start, length)
        assert gap == next(i for i in range(start, 200) if not model & set(range(i, i + length)))
        free = next((i for i in range(length) if start + i in model), length)
        assert intervals.gap_at(start, length) == free
