"""Differences between the states of the corpus' images: against their bytes where they are intact, and damaged ranges
told as unknown where they are not."""

import contextlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcowlib
from qcowlib import ChangeKind, ExtentKind, LocalFiles, Qcow2Image, QcowError
from qcowlib.image.reader import ReadableImage
from qcowlib.operations.compact import _Compaction
from qcowlib.storage.local import open_local
from tests.corpus import archives
from tests.property.test_space import assert_space

pytestmark = [pytest.mark.corpus, pytest.mark.timeout(120)]

LARGEST = 80 << 20  # bytes of a file that is looked at as a whole
PIECE = 8 << 20
SECTOR = 512

ALL = [image for image in archives.manifest()["images"] if not image.get("info_only") and not image.get("place")]


def is_intact(image: dict[str, Any]) -> bool:
    """Whether the stock tools read all of it and find at most leaks; 63: the format has no check."""
    answers = image["answers"]
    if image["group"] == "corrupt":
        return False
    return answers.get("content", {}).get("rc") == 0 and answers.get("check", {}).get("rc") in (0, 3, 63)


def cases(images: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(image, id=image["id"]) for image in images] or [pytest.param(None, id="no-corpus")]


def open_states(image: dict[str, Any], stack: contextlib.ExitStack) -> list[ReadableImage]:
    """The active layer, the layers below it, and the snapshots of all of them."""
    opened = qcowlib.open_image(
        image["file"], format=image.get("open_format"), policy=LocalFiles(), passphrase=image.get("secret")
    )
    states: list[ReadableImage] = []
    layer: ReadableImage | None = stack.enter_context(opened)
    while layer is not None:
        states.append(layer)
        if isinstance(layer, Qcow2Image):
            for entry in layer.snapshots:
                with contextlib.suppress(qcowlib.CorruptMetadata):  # it has no usable L1 table
                    states.append(layer.open_snapshot(entry))
        layer = layer.backing
    return states


def assert_told_in_pieces(old: ReadableImage, new: ReadableImage) -> None:
    """Compare with the bytes of disks of any size: where neither state has a cluster of data, both are zero."""
    told = {exact: told_rows(old, new, exact=exact) for exact in (False, True)}
    exact_sectors = 0
    for piece in pieces_with_data(old) | pieces_with_data(new):
        start, end = piece * PIECE, min((piece + 1) * PIECE, max(old.size, new.size))
        one, other = (piece_of(state, start, end) for state in (old, new))
        differ = (one != other).any(axis=1)
        assert not (differ & ~sectors(told[False], start, end)).any(), "a changed sector is missing"
        assert (sectors(told[True], start, end) == differ).all()
        exact_sectors += int(differ.sum())
    rows = told[True]
    assert int((-(-rows[:, 1] // SECTOR) - rows[:, 0] // SECTOR).sum()) == exact_sectors, "told where both are zero"


def told_rows(old: ReadableImage, new: ReadableImage, *, exact: bool) -> Any:
    """Start and end of every range that is told as changed."""
    rows = [row for table in qcowlib.difference(old, new, exact=exact) for row in table.rows()]
    assert all(kind is ChangeKind.CHANGED for _, _, kind in rows)
    return np.array([(start, start + length) for start, length, _ in rows], dtype=np.int64).reshape(-1, 2)


def pieces_with_data(state: ReadableImage) -> set[int]:
    found: set[int] = set()
    for table in state.extents(0, state.size):
        holes = np.isin(table.kind, (ExtentKind.ZERO, ExtentKind.UNALLOCATED))
        for start, length in zip(table.start[~holes].tolist(), table.length[~holes].tolist(), strict=True):
            found.update(range(start // PIECE, -(-(start + length) // PIECE)))
    return found


def piece_of(state: ReadableImage, start: int, end: int) -> Any:
    inside = max(0, min(end, state.size) - start)
    data = state.read(start, inside) if inside else b""
    return np.frombuffer(data.ljust(end - start, b"\0"), dtype=np.uint8).reshape(-1, SECTOR)


def sectors(rows: Any, start: int, end: int) -> Any:
    """Which sectors of a range the rows name."""
    told = np.zeros((end - start) // SECTOR, dtype=np.bool_)
    for first, last in rows[(rows[:, 1] > start) & (rows[:, 0] < end)].tolist():
        told[max(first - start, 0) // SECTOR : -(-(min(last, end) - start) // SECTOR)] = True
    return told


@pytest.mark.parametrize("image", cases([image for image in ALL if is_intact(image)]))
def test_every_pair_of_states(image: dict[str, Any] | None, corpus: Path) -> None:
    assert image is not None
    with contextlib.chdir(corpus), contextlib.ExitStack() as stack:
        try:
            states = open_states(image, stack)
        except qcowlib.UnsupportedFeature:
            return  # another container format: it is refused by name, which other tests look at
        for old, new in itertools.combinations_with_replacement(states, 2):
            assert_told_in_pieces(old, new)


@pytest.mark.parametrize("image", cases([image for image in ALL if image["group"] == "corrupt"]))
def test_damaged_ranges_are_unknown(image: dict[str, Any] | None, corpus: Path) -> None:
    assert image is not None
    with contextlib.chdir(corpus), contextlib.ExitStack() as stack:
        try:
            states = open_states(image, stack)
        except QcowError:
            return  # what cannot be opened has no states
        for old, new in itertools.combinations_with_replacement(states, 2):
            if max(old.size, new.size) <= LARGEST:
                assert_unknown_where_damaged(old, new)


@pytest.mark.parametrize("image", cases([image for image in ALL if is_intact(image)]))
def test_space(image: dict[str, Any] | None, corpus: Path) -> None:
    assert image is not None
    path = corpus / image["file"]
    if path.stat().st_size > LARGEST:
        return
    try:
        with qcowlib.open_image(path, format=image.get("open_format"), open_backing=False) as opened:
            if not isinstance(opened, Qcow2Image) or opened.header.has_data_file:
                return
            extended = opened.state.geometry.extended_l2
    except qcowlib.UnsupportedFeature:
        return
    assert_space(path, extended)


@pytest.mark.parametrize("image", cases([image for image in ALL if image["group"] == "corrupt"]))
def test_space_of_a_damaged_image_is_told_or_refused(image: dict[str, Any] | None, corpus: Path) -> None:
    assert image is not None
    with contextlib.suppress(QcowError), qcowlib.open_image(corpus / image["file"], open_backing=False) as opened:
        assert isinstance(opened, Qcow2Image)
        for state in qcowlib.image_space(opened).states:
            assert state.damage is None or state.exclusive == state.shared == 0


@pytest.mark.parametrize("image", cases([image for image in ALL if is_intact(image)]))
def test_compact(image: dict[str, Any] | None, corpus: Path, tmp_path: Path) -> None:
    assert image is not None
    target = tmp_path / "smaller"
    with contextlib.chdir(corpus), contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(open_one(image, image["file"]))
        except qcowlib.UnsupportedFeature:
            return
        if not isinstance(opened, Qcow2Image) or opened.header.has_data_file:
            return
        write_compact(opened, target)
        if opened.backing is not None:  # relative names are looked for beside the copy
            for entry in corpus.iterdir():
                (tmp_path / entry.name).symlink_to(entry)
        copy = stack.enter_context(open_one(image, str(target)))
        assert isinstance(copy, Qcow2Image)
        told = [(state.size, state.digests, state.damage) for state in qcowlib.digest_states(copy)]
        assert told == [(state.size, state.digests, state.damage) for state in qcowlib.digest_states(opened)]
        for old, new in zip(opened.snapshots, copy.snapshots, strict=True):
            before, after = (one.open_snapshot(entry).vmstate for one, entry in ((opened, old), (copy, new)))
            assert before.read(0, before.size) == after.read(0, after.size)
        assert qcowlib.check(copy).findings == []


def has_snapshots(image: dict[str, Any]) -> bool:
    return is_intact(image) and bool(image["answers"].get("snapshots"))


@pytest.mark.parametrize("image", cases([image for image in ALL if has_snapshots(image)]))
def test_export_and_import(image: dict[str, Any] | None, corpus: Path, tmp_path: Path) -> None:
    assert image is not None
    with contextlib.chdir(corpus), open_one(image, image["file"]) as opened:
        assert isinstance(opened, Qcow2Image)
        if opened.header.crypt_method:
            return
        wanted = [(state.size, state.digests) for state in qcowlib.digest_states(opened)]
        memory = [view.read(0, view.size) for view in vmstates(opened)]
        states = qcowlib.export_chain(opened, str(tmp_path / "chain"))
        for state, (size, digests) in zip(states, [*wanted[1:], wanted[0]], strict=True):
            with qcowlib.open_image(tmp_path / "chain" / state.file, policy=LocalFiles()) as layer:
                assert [(one.size, one.digests) for one in qcowlib.digest_states(layer)] == [(size, digests)]
    qcowlib.import_chain(str(tmp_path / "chain"), str(tmp_path / "folded"))
    with qcowlib.open_image(tmp_path / "folded", policy=LocalFiles()) as folded:
        assert isinstance(folded, Qcow2Image)
        assert [(state.size, state.digests) for state in qcowlib.digest_states(folded)] == wanted
        assert [view.read(0, view.size) for view in vmstates(folded)] == memory
        assert qcowlib.check(folded).findings == []


def vmstates(image: Qcow2Image) -> list[ReadableImage]:
    return [image.open_snapshot(entry).vmstate for entry in image.snapshots]


def write_compact(image: Qcow2Image, target: Path) -> None:
    with open_local(str(target), writable=True, create=True) as storage:
        _Compaction(image, None).write(storage)


def open_one(image: dict[str, Any], path: str) -> qcowlib.Qcow2Image | qcowlib.RawImage:
    return qcowlib.open_image(
        path, format=image.get("open_format"), policy=LocalFiles(), passphrase=image.get("secret")
    )


def assert_unknown_where_damaged(old: ReadableImage, new: ReadableImage) -> None:
    unit = 512
    unknown = np.zeros(max(old.size, new.size) // unit, dtype=np.bool_)
    try:
        for table in qcowlib.difference(old, new):
            for start, length, kind in table.rows():
                unknown[start // unit : (start + length) // unit] = kind is ChangeKind.UNKNOWN
    except qcowlib.CorruptMetadata:
        return  # nothing at all can be told: it says so
    for state in (old, new):
        step = state.cluster_size
        for offset in range(0, state.size, step):
            if cannot_be_followed(state, offset):
                told = unknown[offset // unit : min(offset + step, state.size) // unit]
                assert told.all(), f"{state.name}: the damage at {offset:#x} is not told"


def cannot_be_followed(state: ReadableImage, offset: int) -> bool:
    """Whether a look-up along the chain meets damage."""
    layer: ReadableImage | None = state
    try:
        while layer is not None and offset < layer.size:
            kind, _, _ = layer.lookup(offset)
            if kind != qcowlib.ExtentKind.UNALLOCATED:
                return False
            layer = layer.backing
    except qcowlib.CorruptMetadata:
        return True
    return False
