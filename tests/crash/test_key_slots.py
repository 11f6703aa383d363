"""Power cuts and failures while key slots change: there is always a slot that the old or the new passphrase fits."""

from __future__ import annotations

import errno

import pytest

from qcowlib.codecs.luks import create_luks, read_key_slots
from qcowlib.codecs.luks_header import parse_header
from qcowlib.codecs.luks_slots import add_passphrase, erase_passphrases
from qcowlib.errors import EncryptionError, QcowError
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.protocol import Storage
from qcowlib.storage.recorder import Fault, FaultyStorage, RecordingStorage, crash_states

OLD, NEW, OTHER = b"old", b"new", b"other"
AREA, _ = create_luks(OLD, cipher_alg="aes-128", cipher_mode="cbc", iter_time_ms=0)


class Slots:
    """A header area that is all of a storage."""

    length = len(AREA)

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def read(self, offset: int, length: int) -> bytes:
        return self.storage.pread(length, offset)

    def write(self, offset: int, data: bytes) -> None:
        self.storage.pwrite(data, offset)

    def flush(self) -> None:
        self.storage.flush()


def fits(data: bytes, passphrase: bytes) -> list[int]:
    """The slots that a passphrase fits."""
    keys = read_key_slots(lambda offset, length: data[offset : offset + length], length=len(data))
    return [number for number in range(8) if keys.key_in(number, passphrase) is not None]


def prepared(*slots: tuple[bytes, int]) -> bytes:
    """The area with more passphrases in certain slots, beside OLD in slot 0."""
    storage = BytesStorage(AREA)
    for passphrase, slot in slots:
        add_passphrase(Slots(storage), OLD, passphrase, slot=slot, iter_time_ms=0)
    return storage.getvalue()


def overwrite_the_only_one(slots: Slots) -> None:
    add_passphrase(slots, OLD, NEW, slot=0, iter_time_ms=0, force=True)


def add_in_slot_6(slots: Slots) -> None:
    """Its fields lie in two sectors."""
    add_passphrase(slots, OLD, NEW, slot=6, iter_time_ms=0)


def overwrite_slot_6(slots: Slots) -> None:
    add_passphrase(slots, OLD, NEW, slot=6, iter_time_ms=0, force=True)


def erase_two(slots: Slots) -> None:
    erase_passphrases(slots, passphrase=OTHER)


CASES = {
    "overwrite-the-only-one": (prepared(), overwrite_the_only_one, {OLD: [], NEW: [0], OTHER: []}),
    "add-in-slot-6": (prepared(), add_in_slot_6, {OLD: [0], NEW: [6], OTHER: []}),
    "overwrite-slot-6": (prepared((OTHER, 6)), overwrite_slot_6, {OLD: [0], NEW: [6], OTHER: []}),
    "erase-two": (prepared((OTHER, 6), (OTHER, 7)), erase_two, {OLD: [0], NEW: [], OTHER: []}),
}


@pytest.mark.parametrize("name", CASES)
def test_power_cuts(name: str) -> None:
    """After a power cut the image can be opened, by what the user knows; whole afterwards."""
    initial, change, outcome = CASES[name]
    recording = RecordingStorage(BytesStorage(initial))
    change(Slots(recording))
    found = {passphrase: fits(recording.pread(len(AREA), 0), passphrase) for passphrase in outcome}
    assert found == outcome
    states = 0
    for state in crash_states(recording, initial, samples=2, seed=5):
        data = state.storage().getvalue()
        parse_header(data)
        states += 1
        assert fits(data, OLD) or fits(data, NEW), f"{state.text} in epoch {state.epoch}"
    assert states > 8


@pytest.mark.parametrize("name", CASES)
def test_failures(name: str) -> None:
    """The host fails at any one call: told, and the image can be opened."""
    initial, change, _ = CASES[name]
    number = 0
    while True:
        number += 1
        inner = BytesStorage(initial)
        storage = FaultyStorage(inner, [Fault("change", number, errno.EIO, lasting=True)])
        try:
            change(Slots(storage))
        except QcowError:
            assert storage.failures
        else:
            assert number > 4
            break
        data = inner.getvalue()
        assert fits(data, OLD) or fits(data, NEW), f"call {number}"


def test_erased_key_material_is_gone() -> None:
    """Neither salt nor material of an erased slot is left in the file."""
    initial = prepared((OTHER, 3))
    slot = parse_header(initial).slots[3]
    material = initial[slot.key_offset * 512 :][: 16 * 4000]
    storage = BytesStorage(initial)
    assert erase_passphrases(Slots(storage), slot=3) == [3]
    after = storage.getvalue()
    assert slot.salt not in after
    assert all(material[at : at + 512] not in after for at in range(0, len(material), 512 * 10))
    assert fits(after, OTHER) == []


def test_wrong_passphrase_changes_nothing() -> None:
    storage = BytesStorage(AREA)
    with pytest.raises(EncryptionError, match="cannot unlock any keyslot"):
        add_passphrase(Slots(storage), b"wrong", NEW, iter_time_ms=0)
    assert storage.getvalue() == AREA
