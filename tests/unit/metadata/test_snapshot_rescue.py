"""A damaged snapshot table: entries that can be used are kept, whatever is wrong with their neighbours."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from qcowlib.format.header import Header
from qcowlib.format.snapshot_table import SnapshotEntry, build_snapshot_table
from qcowlib.metadata.snapshot_rescue import RescuedSnapshots, needed_l1_entries, rescue_snapshots
from qcowlib.storage.buffer import BytesStorage

TABLE = 0x10000
FILE_END = 0x20000
HEADER = Header(3, 12, 1 << 20, 1, 0x3000, 0x1000, 1, nb_snapshots=3, snapshots_offset=TABLE)


def entry(number: int, **fields: object) -> SnapshotEntry:
    usual = SnapshotEntry(0x4000 + number * 0x1000, 1, str(number), f"name {number}", 5, 6, 7, 0, 1 << 20)
    return replace(usual, **fields)  # type: ignore[arg-type]


ENTRIES = [entry(1), entry(2), entry(3)]
LENGTH = len(ENTRIES[0].build())
STEP = LENGTH + -LENGTH % 8


def rescue(change: Callable[[bytearray], None] | None, header: Header = HEADER) -> RescuedSnapshots | None:
    data = bytearray(FILE_END)
    table = build_snapshot_table(ENTRIES)
    data[TABLE : TABLE + len(table)] = table
    if change is not None:
        change(data)
    return rescue_snapshots(BytesStorage(data), header, FILE_END)


def put(place: int, width: int, value: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[TABLE + place : TABLE + place + width] = value.to_bytes(width, "big")

    return change


def kept(found: RescuedSnapshots | None) -> list[tuple[str, str, int]]:
    assert found is not None
    return [(each.id, each.name, each.l1_table_offset) for each in found.entries]


ALL = [("1", "name 1", 0x5000), ("2", "name 2", 0x6000), ("3", "name 3", 0x7000)]


def test_a_sound_table_is_left_alone() -> None:
    found = rescue(None)
    assert kept(found) == ALL
    assert found is not None
    assert (found.repairs, found.rewrite, found.lost, found.length) == ([], False, [], 2 * STEP + LENGTH)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("field", ["id size", "name size"])
def test_a_wrong_length_hides_nothing(number: int, field: str) -> None:
    place = number * STEP + (12 if field == "id size" else 14)
    found = rescue(put(place, 2, 0xFFF0))
    assert kept(found) == ALL
    assert found is not None
    assert found.rewrite


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", ["", "name"])
def test_an_entry_without_an_id_is_kept(number: int, name: str) -> None:
    """As a reader of the table takes it; what has an L1 table has a disk to lose."""
    entries = [replace(each, id="", name=name) if at == number else each for at, each in enumerate(ENTRIES)]
    data = bytearray(FILE_END)
    table = build_snapshot_table(entries)
    data[TABLE : TABLE + len(table)] = table
    found = rescue_snapshots(BytesStorage(data), HEADER, FILE_END)
    assert kept(found) == [(each.id, each.name, each.l1_table_offset) for each in entries]
    assert found is not None
    assert (found.repairs, found.rewrite, found.lost) == ([], False, [])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_too_much_extra_data(number: int) -> None:
    found = rescue(put(number * STEP + 36, 4, 1 << 20))
    assert kept(found) == ALL
    assert found is not None
    assert found.repairs[0][1] == (
        f"Discarding too much extra metadata in snapshot table entry {number} (1048576 > 1024)"
    )


@pytest.mark.parametrize(("value", "code"), [(1 << 40, "reference-beyond-end"), (0x5200, "snapshot-l1-unaligned")])
def test_an_entry_without_l1_table_is_homeless(value: int, code: str) -> None:
    found = rescue(put(STEP, 8, value))
    assert kept(found) == [ALL[0], ALL[2]]
    assert found is not None
    assert [each[0] for each in found.repairs] == [code]
    assert found.lost == ["snapshot 2 (name 2)"]
    assert found.take_in(0x9000) == "snapshot 2 (name 2)"
    assert kept(found) == [ALL[0], ("2", "name 2", 0x9000), ALL[2]]
    assert found.lost == []


def test_an_l1_table_that_is_said_to_be_too_long_is_cut() -> None:
    found = rescue(put(STEP + 8, 4, 1 << 30))
    assert kept(found) == ALL
    assert found is not None
    assert found.entries[1].l1_size == needed_l1_entries(ENTRIES[1], HEADER) == 1


def test_needed_entries_count_the_vm_state() -> None:
    covered = HEADER.geometry.l2_coverage
    assert needed_l1_entries(entry(1, disk_size=covered + 1, vm_state_size=covered), HEADER) == 3


def test_more_entries_than_there_are() -> None:
    found = rescue(None, replace(HEADER, nb_snapshots=5))
    assert kept(found) == ALL
    assert found is not None
    assert found.repairs[-1][2] == 2


def test_more_entries_than_are_allowed() -> None:
    found = rescue(None, replace(HEADER, nb_snapshots=70000))
    assert kept(found) == ALL
    assert found is not None
    assert found.repairs[0] == ("snapshots-too-many", "Discarding 4464 overhanging snapshots", 4464)


@pytest.mark.parametrize("offset", [0, 0x10200, 1 << 40])
def test_a_table_elsewhere_is_none(offset: int) -> None:
    assert rescue(None, replace(HEADER, snapshots_offset=offset)) is None


def test_noise_is_no_table() -> None:
    def noise(data: bytearray) -> None:
        data[TABLE : TABLE + 0x1000] = bytes(range(7, 255)) * 16 + bytes(0x1000 - 248 * 16)

    assert rescue(noise) is None
