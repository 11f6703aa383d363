"""What damaged entries become, and that a mended table has nothing left that the census calls damage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.addresses import Geometry
from qcowlib.format.entries import ENTRY_DTYPE, Entries
from qcowlib.metadata.l2_scan import ScanRules, scan_tables
from qcowlib.metadata.mending import changed_spans, mend_bitmap_table, mend_l1, mend_l2

FILE_END = 1 << 20
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1


def rules(*, version: int = 3, extended: bool = False, data_file: bool = False) -> ScanRules:
    return ScanRules(Geometry(14 if extended else 12, 4, extended), version, data_file, FILE_END)


def table(*words: int) -> Entries:
    return np.array(words, dtype=ENTRY_DTYPE)


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        (COPIED | 0x5000, COPIED | 0x5000, False),
        (COPIED | 0x5000 | 1 << 57, COPIED | 0x5000, False),
        (COPIED | 0x5200, ZERO, True),
        (COPIED | FILE_END, ZERO, True),
        (COPIED | 0x5200 | ZERO, ZERO, False),
        (COPIED | 1 << 50 | ZERO, ZERO, False),
        (COMPRESSED | COPIED | 0x5000, COMPRESSED | 0x5000, False),
        (COMPRESSED | 1 << 40, ZERO, True),
        (0, 0, False),
    ],
)
def test_l2_entry(old: int, new: int, lost: bool) -> None:
    mended = mend_l2(table(old), rules())
    assert (mended.words.tolist(), mended.lost.tolist()) == ([new], [lost])


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        (COPIED | 0x5000 | ZERO, COPIED | 0x5000, False),  # version 2 has no zero flag
        (COPIED | FILE_END, 0, True),
    ],
)
def test_l2_entry_of_version_2(old: int, new: int, lost: bool) -> None:
    mended = mend_l2(table(old), rules(version=2))
    assert (mended.words.tolist(), mended.lost.tolist()) == ([new], [lost])


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ((COPIED | 0x8000, 0xF), (COPIED | 0x8000, 0xF), False),
        ((COPIED | 0x8000, 0xF | 0x3 << 32), (COPIED | 0x8000, 0xC | 0x3 << 32), True),
        ((0, 0xF), (0, 0xF << 32), True),
        ((COPIED | 0x8200, 0xF | 0x30 << 32), (0, 0x3F << 32), True),
        ((COPIED | 0x8200, 0x30 << 32), (0, 0x30 << 32), False),
        ((COMPRESSED | 0x8000, 0xFF), (COMPRESSED | 0x8000, 0), False),
    ],
)
def test_extended_entry(old: tuple[int, int], new: tuple[int, int], lost: bool) -> None:
    mended = mend_l2(table(*old), rules(extended=True))
    assert (tuple(mended.words.tolist()), mended.lost.tolist()) == (new, [lost])


def test_compressed_cluster_with_a_data_file_is_lost() -> None:
    mended = mend_l2(table(COMPRESSED | 0x5000, COPIED | 1 << 40), rules(data_file=True))
    assert mended.words.tolist() == [ZERO, COPIED | 1 << 40]
    assert mended.lost.tolist() == [True, False]


def test_l1_entries() -> None:
    old = table(COPIED | 0x4000, COPIED | 0x4000 | 0x3F << 57 & (1 << 63) - 1, 0x4200, FILE_END, COPIED, 0)
    mended = mend_l1(old, rules().geometry, FILE_END)
    assert mended.words.tolist() == [COPIED | 0x4000, COPIED | 0x4000, 0, 0, 0, 0]
    assert mended.lost.tolist() == [False, False, True, True, False, False]


def test_bitmap_table() -> None:
    assert mend_bitmap_table(table(0x4000, 0, 1, 1 << 40, 0x4200, 0x4002), 4096, FILE_END).tolist() == [
        0x4000, 0, 1, 1, 1, 1,
    ]  # fmt: skip


def test_changed_spans() -> None:
    assert changed_spans(table(1, 2, 3, 4, 5), table(1, 9, 9, 4, 9)) == [(1, 3), (4, 5)]
    assert changed_spans(table(1), table(1)) == []


words = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, FILE_END >> 12).map(lambda cluster: COPIED | cluster << 12),
    st.integers(0, 63).map(lambda bit: 1 << bit),
)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([2, 3]), st.booleans(), st.booleans())
def test_a_mended_table_has_no_damage(data: st.DataObject, version: int, extended: bool, data_file: bool) -> None:
    measure = rules(version=max(version, 3 if extended or data_file else 2), extended=extended, data_file=data_file)
    length = measure.geometry.cluster_size // 8
    old = np.zeros(length, dtype=ENTRY_DTYPE)
    for place, word in data.draw(st.lists(st.tuples(st.integers(0, length - 1), words), max_size=12)):
        old[place] = word
    mended = mend_l2(old, measure)
    scan = scan_tables(mended.words.astype(np.uint64).reshape(1, -1), measure, 100)
    assert scan.problems == []
    again = mend_l2(mended.words, measure)
    assert again.words.tolist() == mended.words.tolist()
    assert not again.lost.any()
