"""What a transaction holds in memory is in the file afterwards: all changed entries, all refcounts, all free space."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcowlib
from tests.oracle import assert_clean, content, qemu_img


def _image(path: Path, options: str, size: str = "8M") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size)
    return path


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=16k,extended_l2=on"])
def test_changes_to_one_table_in_any_order(options: str, tmp_path: Path) -> None:
    """Of an L2 table that is in the file already, the range from the first to the last changed entry is written."""
    path = _image(tmp_path / "image.qcow2", options)
    with qcowlib.open_image(path, writable=True) as image:
        image.write(0, b"\1" * 512)
    places = [20 << 14, 3 << 14, 40 << 14, 10 << 14]
    with qcowlib.open_image(path, writable=True) as image:
        for place in places:
            image.write(place, b"\2" * 512)
    found = content(path, tmp_path)
    assert [found[place : place + 512] for place in places] == [b"\2" * 512] * len(places)
    assert_clean(path)


@pytest.mark.parametrize("options", ["cluster_size=512,refcount_bits=64", "cluster_size=512,refcount_bits=16"])
def test_a_larger_refcount_table_counts_itself(options: str, tmp_path: Path) -> None:
    """512 bytes of refcount table reach for 2 MiB (64 bits) or 8 MiB (16 bits) of file."""
    path = _image(tmp_path / "image.qcow2", options, "20M")
    data = bytes(range(256)) * (36 << 10)
    with qcowlib.open_image(path, writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        before = image.header.refcount_table_offset
        image.write(0, data)
        image.flush()
        assert image.header.refcount_table_offset != before
    assert_clean(path)
    assert content(path, tmp_path)[: len(data)] == data


def test_a_gap_too_small_for_a_long_run_is_used_later(tmp_path: Path) -> None:
    path = _image(tmp_path / "image.qcow2", "cluster_size=4k")
    with qcowlib.open_image(path, writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        refcounts = image.transaction.refcounts
        gap, _ = refcounts.allocate(1)
        wall, _ = refcounts.allocate(1)
        assert wall == gap + 1
        refcounts.give_back(gap, 1)
        run, count = refcounts.allocate(4, 4)
        assert (run, count) == (wall + 1, 4)
        refcounts.rescan()
        assert refcounts.allocate(3) == (gap, 1)
