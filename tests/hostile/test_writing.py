"""Damaged images that somebody wants to change: what is refused leaves the file as it was, to the byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import QcowError
from tests.hostile.draft import COPIED, Draft, snapshot_entry, words
from tests.hostile.images import BUILDERS
from tests.oracle import assert_clean


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _create(image: qcowlib.WritableQcow2Image) -> None:
    qcowlib.create_snapshot(image, "taken")


def _apply(image: qcowlib.WritableQcow2Image) -> None:
    qcowlib.apply_snapshot(image, image.snapshots[0])


def _delete(image: qcowlib.WritableQcow2Image) -> None:
    qcowlib.delete_snapshot(image, image.snapshots[0])


def _write(image: qcowlib.WritableQcow2Image) -> None:
    image.write(0, b"written")


def _write_clusters(image: qcowlib.WritableQcow2Image) -> None:
    image.write(0, bytes(1 << 17))


def _write_last(image: qcowlib.WritableQcow2Image) -> None:
    image.write(image.size - 512, bytes(512))


def _discard(image: qcowlib.WritableQcow2Image) -> None:
    image.discard(0, 1 << 20)


OPERATIONS = {
    "create": _create, "apply": _apply, "delete": _delete, "write": _write, "discard": _discard,
    "write-clusters": _write_clusters, "write-last": _write_last,
}  # fmt: skip


def _l1(*entries: int) -> Draft:
    draft = Draft(fields={"l1_size": len(entries), "size": len(entries) << 29})
    draft.pieces[0x30000] = words(*entries)
    return draft


def _l2(*entries: int) -> Draft:
    draft = Draft()
    draft.pieces[0x40000] = words(*entries)
    return draft


def _snapshot(l1_offset: int, l1_size: int = 1, *, l1: bytes = b"") -> Draft:
    """One snapshot; refcounts as if its L1 table were a good one in cluster 7, the snapshot table in cluster 6."""
    draft = Draft(refcounts=[1, 1, 1, 1, 2, 2, 1, 1], fields={"nb_snapshots": 1, "snapshots_offset": 0x60000})
    draft.pieces[0x60000] = snapshot_entry(l1_offset, l1_size)
    draft.pieces[0x70000] = l1 or words(0x40000)
    draft.pieces[0x30000] = words(0x40000)
    draft.pieces[0x40000] = words(0x50000)
    return draft


def _active_l1(entry: int) -> Draft:
    """A good snapshot under a damaged active layer."""
    draft = _snapshot(0x70000)
    draft.pieces[0x30000] = words(entry)
    return draft


def _without_refcount(cluster: int) -> Draft:
    """Two good snapshots, but the refcounts call a cluster free that holds metadata."""
    draft = _snapshot(0x70000)
    draft.refcounts = [1, 1, 1, 1, 3, 3, 1, 1, 1]
    draft.refcounts[cluster] = 0
    draft.fields["nb_snapshots"] = 2
    draft.pieces[0x60000] = snapshot_entry(0x70000, 1) + snapshot_entry(0x80000, 1, number=b"2")
    draft.pieces[0x80000] = words(0x40000)
    return draft


REFUSED: dict[str, tuple[Callable[[], Draft], str]] = {
    "reserved bits in an L1 entry": (lambda: _l1(0x40000 | COPIED, 5), "create"),
    "unaligned L2 table": (lambda: _l1(0x40200 | COPIED), "create write discard"),
    "L2 table beyond the end": (lambda: _l1(1 << 40 | COPIED), "create write discard"),
    "L2 table is the refcount block": (lambda: _l1(0x20000 | COPIED), "write discard"),
    "cluster beyond the end": (lambda: _l2(1 << 40 | COPIED), "write write-clusters discard"),
    "cluster is the L1 table": (lambda: _l2(0x30000 | COPIED), "write write-clusters discard"),
    "cluster is the header": (lambda: _l2(0x10000 | COPIED), "write discard"),
    "reserved bits in an L2 entry": (lambda: _l2(0x50000 | COPIED | 1 << 58), "create"),
    "two references, refcount 1": (lambda: _l2(0x50000 | COPIED, 0x50000 | COPIED), "create"),
    "snapshot L1 beyond the end": (lambda: _snapshot(1 << 40), "apply delete"),
    "refcount 0 of the refcount table": (lambda: _without_refcount(1), "create apply delete"),
    "refcount 0 of the active L1 table": (lambda: _without_refcount(3), "create apply delete"),
    "snapshot L1 unaligned": (lambda: _snapshot(0x70200), "apply delete"),
    "snapshot L1 too large": (lambda: _snapshot(0x70000, (1 << 32) - 1), "apply delete"),
    "snapshot L1 too small": (lambda: _snapshot(0x70000, 0), "apply"),
    "snapshot L2 table beyond the end": (lambda: _snapshot(0x70000, l1=words(1 << 40)), "apply delete"),
    "snapshot L2 table unaligned": (lambda: _snapshot(0x70000, l1=words(0x40200)), "apply delete"),
    "active L2 table beyond the end": (lambda: _active_l1(1 << 40), "create apply delete"),
    "snapshot L1 is the header": (lambda: _snapshot(0), "apply delete"),
    "snapshot L1 is the refcount table": (lambda: _snapshot(0x10000), "apply delete"),
    "snapshot L1 is the refcount block": (lambda: _snapshot(0x20000), "apply delete"),
    "snapshot L1 is the snapshot table": (lambda: _snapshot(0x60000), "apply delete"),
    "snapshot L1 is an L2 table": (lambda: _snapshot(0x40000), "apply delete"),
}


@pytest.mark.parametrize(
    ("name", "operation"),
    [(name, operation) for name, (_, operations) in REFUSED.items() for operation in operations.split()],
)
def test_what_is_refused_leaves_the_file_unchanged(name: str, operation: str, tmp_path: Path) -> None:
    path = REFUSED[name][0]().write(tmp_path / "image.qcow2")
    before = _digest(path)
    with pytest.raises(QcowError):
        _run(path, operation)
    assert _digest(path) == before


def test_the_drafts_are_valid_images_where_nothing_is_broken(tmp_path: Path) -> None:
    """Or else the tests above would show nothing."""
    assert_clean(Draft().write(tmp_path / "plain.qcow2"))
    path = _snapshot(0x70000).write(tmp_path / "snapshot.qcow2")
    assert_clean(path)
    for operation in OPERATIONS.values():
        if operation is _delete:
            continue
        with qcowlib.open_image(path, format="qcow2", writable=True) as image:
            assert isinstance(image, qcowlib.WritableQcow2Image)
            operation(image)
        assert_clean(path)
    with qcowlib.open_image(path, format="qcow2", writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        _delete(image)
    assert_clean(path)


@pytest.mark.parametrize("operation", ["create", "write-last"])
def test_nothing_is_allocated_over_metadata(operation: str, tmp_path: Path) -> None:
    """All refcounts are zero: the allocator would take the header's cluster if the map of metadata did not refuse."""
    path = tmp_path / "image.qcow2"
    BUILDERS["refcounts-all-zero"](path)
    before = path.read_bytes()
    with pytest.raises(QcowError, match=r"would overlap the|the image needs a repair"):
        _run(path, operation)
    after = path.read_bytes()
    assert after[:8] == before[:8]
    assert after[0x40000:0x50200] == before[0x40000:0x50200]


def _own_tree(entry: int) -> Draft:
    """A snapshot with an L2 table of its own in cluster 8, in which one entry is wrong."""
    draft = Draft(refcounts=[1] * 9, fields={"nb_snapshots": 1, "snapshots_offset": 0x60000})
    draft.pieces[0x60000] = snapshot_entry(0x70000, 1)
    draft.pieces[0x70000] = words(0x80000)
    draft.pieces[0x80000] = words(entry)
    return draft


def _snapshot_table_at(offset: int) -> Draft:
    """What lies there happens to be a valid snapshot table with one entry."""
    return Draft(fields={"nb_snapshots": 1, "snapshots_offset": offset})


#: Images in which something that is to be given up is also the header, the refcount structure or the active L1 table,
#: although the refcounts say that it has one reference.
SHARED = {
    "snapshot L1 is the active one": lambda: _snapshot(0x30000),
    "snapshot maps the refcount table": lambda: _own_tree(0x10000),
    "snapshot maps the refcount block": lambda: _own_tree(0x20000),
    "snapshot maps the active L1 table": lambda: _own_tree(0x30000),
    "snapshot table is the refcount table": lambda: _snapshot_table_at(0x10000),
    "snapshot table is the active L1 table": lambda: _snapshot_table_at(0x30000),
}


@pytest.mark.parametrize("operation", ["create", "apply", "delete"])
@pytest.mark.parametrize("name", SHARED)
def test_metadata_in_use_is_never_freed(name: str, operation: str, tmp_path: Path) -> None:
    path = SHARED[name]().write(tmp_path / "image.qcow2")
    with qcowlib.open_image(path, format="qcow2", open_backing=False) as image:
        content = image.read(0, 1 << 20)
    before = path.read_bytes()
    with suppress(QcowError):
        _run(path, operation)
    after = path.read_bytes()
    assert after[:4] == before[:4]
    assert after[0x10000:0x10008] == before[0x10000:0x10008]
    with qcowlib.open_image(path, format="qcow2", open_backing=False) as image:
        if operation != "apply":  # which may make the wrong mapping the active one
            assert image.read(0, 1 << 20) == content
        assert isinstance(image, qcowlib.Qcow2Image)
        l1 = image.header.l1_table_offset >> 16
    counts = [int.from_bytes(after[0x20000 + 2 * at : 0x20002 + 2 * at], "big") for at in (0, 1, 2, l1)]
    assert all(counts), counts


def _run(path: Path, operation: str) -> None:
    with qcowlib.open_image(path, format="qcow2", writable=True, open_backing=False) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        OPERATIONS[operation](image)
