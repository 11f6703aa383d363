"""L2 tables in batches: order, padding, and damage that is named before anything is read."""

import numpy as np
import pytest

from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata
from qcowlib.metadata.references import empty_words, l2_batches, l2_offsets, read_tables
from qcowlib.storage.buffer import BytesStorage

GEOMETRY = Geometry(cluster_bits=9)
CLUSTER = 512


def l1_table(*entries: int) -> np.ndarray:
    return np.array(entries, dtype=">u8")


def file_of_words(clusters: int) -> BytesStorage:
    """Every 64-bit word of the file holds its own offset."""
    return BytesStorage(np.arange(0, clusters * CLUSTER, 8).astype(">u8").tobytes())


def test_rows_come_in_the_order_of_the_l1_table_and_empty_entries_are_left_out() -> None:
    l1 = l1_table(5 * CLUSTER | 1 << 63, 0, 2 * CLUSTER, 3 * CLUSTER, 0)
    batches = list(l2_batches(file_of_words(8), GEOMETRY, l1))
    assert len(batches) == 1
    (batch,) = batches
    assert batch.l1_index.tolist() == [0, 2, 3]
    assert batch.host_offset.tolist() == [5 * CLUSTER, 2 * CLUSTER, 3 * CLUSTER]
    assert batch.l1_index.dtype == batch.host_offset.dtype == np.int64
    assert batch.entries.dtype == np.dtype(">u8")
    assert batch.entries.shape == (3, 64)
    assert batch.entries[1].tolist() == list(range(2 * CLUSTER, 3 * CLUSTER, 8))
    assert batch.entries[:, 0].tolist() == batch.host_offset.tolist()
    assert batch.bitmaps is None


@pytest.mark.parametrize(("batch_bytes", "sizes"), [(1, [1] * 5), (2 * CLUSTER, [2, 2, 1]), (1 << 20, [5])])
def test_batches_have_the_size_asked_for_and_at_least_one_table(batch_bytes: int, sizes: list[int]) -> None:
    l1 = l1_table(*(n * CLUSTER for n in (7, 6, 1, 2, 3)))
    batches = list(l2_batches(file_of_words(8), GEOMETRY, l1, batch_bytes=batch_bytes))
    assert [len(batch) for batch in batches] == sizes
    assert np.concatenate([batch.entries[:, 0] for batch in batches]).tolist() == [n * CLUSTER for n in (7, 6, 1, 2, 3)]


def test_a_table_named_twice_comes_twice() -> None:
    (batch,) = l2_batches(file_of_words(4), GEOMETRY, l1_table(CLUSTER, 3 * CLUSTER, CLUSTER))
    assert batch.entries[:, 1].tolist() == [CLUSTER + 8, 3 * CLUSTER + 8, CLUSTER + 8]


def test_extended_entries_are_split_into_entries_and_bitmaps() -> None:
    geometry = Geometry(cluster_bits=14, extended_l2=True)
    words = np.zeros(2 * 2048, dtype=">u8")
    words[2048::2] = np.arange(1024)
    words[2049::2] = np.arange(1024) + 5000
    (batch,) = l2_batches(BytesStorage(words.tobytes()), geometry, l1_table(1 << 14))
    assert batch.entries.shape == (1, 1024)
    assert batch.entries[0].tolist() == list(range(1024))
    assert batch.bitmaps is not None
    assert batch.bitmaps[0].tolist() == list(range(5000, 6024))


@pytest.mark.parametrize(
    ("entry", "rule", "offset"),
    [
        (CLUSTER | 1 << 56, "L1 table: entry 1 has reserved bits set", None),
        (2 << 61 | CLUSTER, "L1 table: entry 1 has reserved bits set", None),
        (8 * CLUSTER, "L2 table at host offset 0x1000: lies beyond the end of the file (L1 entry 1)", 0x1000),
        (0x00FF_FFFF_FFFF_FE00, "lies beyond the end of the file", 0x00FF_FFFF_FFFF_FE00),
    ],
)
def test_damage_is_raised_before_the_first_batch(entry: int, rule: str, offset: int | None) -> None:
    with pytest.raises(CorruptMetadata) as raised:
        next(l2_batches(file_of_words(8), GEOMETRY, l1_table(CLUSTER, entry), batch_bytes=CLUSTER))
    assert rule in str(raised.value)
    assert raised.value.host_offset == offset


def test_an_unaligned_table_is_raised() -> None:
    with pytest.raises(CorruptMetadata, match=r"0x600: is not cluster aligned \(L1 entry 0\)"):
        next(l2_batches(file_of_words(8), Geometry(cluster_bits=10), l1_table(0x600)))


def test_a_table_cut_off_by_the_end_of_the_file_is_raised() -> None:
    storage = BytesStorage(bytes(4 * CLUSTER - 1))
    assert len(next(l2_batches(storage, GEOMETRY, l1_table(2 * CLUSTER)))) == 1
    with pytest.raises(CorruptMetadata, match="lies beyond the end"):
        next(l2_batches(storage, GEOMETRY, l1_table(3 * CLUSTER)))


def test_read_tables_pads_with_zeroes_and_reads_any_offset() -> None:
    data = bytes(range(256)) * 6  # three clusters
    host = np.array([CLUSTER, 2 * CLUSTER, 3 * CLUSTER, 100, 2 * CLUSTER + 256, 1 << 55], dtype=np.int64)
    words = empty_words(len(host), GEOMETRY)
    words[:] = 0xFFFF_FFFF_FFFF_FFFF
    read_tables(BytesStorage(data), GEOMETRY, host, words)
    padded = data + bytes(CLUSTER)
    assert words[0].tobytes() == data[CLUSTER : 2 * CLUSTER]
    assert words[1].tobytes() == data[2 * CLUSTER :]
    assert words[2].tobytes() == words[5].tobytes() == bytes(CLUSTER)
    assert words[3].tobytes() == data[100 : 100 + CLUSTER]
    assert words[4].tobytes() == padded[2 * CLUSTER + 256 :][:CLUSTER]


def test_an_empty_l1_table_has_no_batches() -> None:
    assert list(l2_batches(file_of_words(1), GEOMETRY, l1_table())) == []
    assert list(l2_batches(file_of_words(1), GEOMETRY, l1_table(0, 0))) == []
    index, host = l2_offsets(l1_table(0, 1 << 63))
    assert index.tolist() == host.tolist() == []
