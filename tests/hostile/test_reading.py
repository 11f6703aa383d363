"""Damaged mappings: the range that needs them cannot be read, in any way of reading; what lies beside it can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import CorruptMetadata
from tests.hostile.draft import COPIED, Draft, words

_TABLE_BYTES = 512 << 20


def _one(image: qcowlib.BlockImage, offset: int) -> None:
    image.read(offset, 512)


def _many(image: qcowlib.BlockImage, offset: int) -> None:
    image.read(offset, 1 << 20)


def _across(image: qcowlib.BlockImage, offset: int) -> None:
    image.read(offset - (1 << 20), 2 << 20)


def _extents(image: qcowlib.BlockImage, offset: int) -> None:
    for _ in image.extents(offset, 1 << 20):
        pass


WAYS: list[Callable[[qcowlib.BlockImage, int], None]] = [_one, _many, _across, _extents]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [1 << 40, 0x60000, 0x50000 + 0x8000, 0x10000, 0x20000, 0x30000])
def test_an_l2_table_that_cannot_be_one(
    offset: int, way: Callable[[qcowlib.BlockImage, int], None], tmp_path: Path
) -> None:
    """Behind the end, at the end, unaligned, the refcount table, a refcount block, the L1 table."""
    draft = Draft(fields={"l1_size": 3, "size": 3 * _TABLE_BYTES})
    draft.pieces[0x30000] = words(0x40000 | COPIED, offset | COPIED, 0)
    with qcowlib.open_image(draft.write(tmp_path / "image.qcow2")) as image:
        with pytest.raises(CorruptMetadata):
            way(image, _TABLE_BYTES)
        assert image.read(0, 512) == draft.payload
        assert image.read(2 * _TABLE_BYTES, 1 << 20) == bytes(1 << 20)


@pytest.mark.parametrize("way", WAYS)
def test_an_l2_table_that_the_end_of_the_file_cuts(
    way: Callable[[qcowlib.BlockImage, int], None], tmp_path: Path
) -> None:
    """Its second half is not there: nobody knows what it said."""
    draft = Draft(fields={"l1_size": 2, "size": 2 * _TABLE_BYTES}, file_size=0x68000)
    draft.pieces[0x30000] = words(0x40000 | COPIED, 0x60000 | COPIED)
    draft.pieces[0x60000] = words(0)
    with qcowlib.open_image(draft.write(tmp_path / "image.qcow2")) as image:
        with pytest.raises(CorruptMetadata):
            way(image, _TABLE_BYTES)
        assert image.read(0, 512) == draft.payload
