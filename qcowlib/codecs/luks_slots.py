"""The key slots of a LUKS header in a file: one more passphrase, one less.

    add     slot's salt and iterations, its material -> flush -> the slot in use -> flush
    erase   the slot not in use -> flush -> its material overwritten -> flush -> salt and iterations cleared

Whether a slot is in use is one field inside one sector. A slot that is to hold another passphrase is taken out of use
first; when it is the only one, the new passphrase goes into a spare slot until the slot holds it. So after a crash
there is always a slot whose passphrase is known to fit, the old one or the new one.

Source: LUKS on-disk format 1.2.1; rules and texts of QEMU 7.2's amend.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Protocol

from qcowlib.codecs.luks import KeySlots, read_key_slots
from qcowlib.codecs.luks_header import SALT_LENGTH, SLOT_COUNT, SLOT_DISABLED, STRIPES, KeySlot
from qcowlib.codecs.sector_cipher import SECTOR_SIZE
from qcowlib.errors import EncryptionError, OptionError

DEFAULT_ITER_TIME_MS = 2000
_ERASE_PASSES = 3


class SlotFile(Protocol):
    """The header area in its file; offsets count from its start."""

    @property
    def length(self) -> int:
        """Bytes of the area."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`."""
        ...

    def flush(self) -> None:
        """Barrier."""
        ...


def add_passphrase(
    file: SlotFile,
    passphrase: bytes,
    new: bytes,
    *,
    slot: int | None = None,
    iter_time_ms: int = DEFAULT_ITER_TIME_MS,
    force: bool = False,
) -> int:
    """Put a passphrase into a key slot.

    Args:
        file: the header area.
        passphrase: one that fits a slot already.
        new: the new one.
        slot: 0 to 7; None takes the first that is free.
        iter_time_ms: time that trying it shall take on this machine, in milliseconds.
        force: overwrite a slot in use.

    Returns: the slot's number.

    Raises:
        OptionError: no such slot, none is free, or it is in use.
        EncryptionError: the passphrase fits no slot. In both cases nothing was changed.
        StorageError: the host file failed; the old or the new passphrase fits.
    """
    keys = _load(file)
    if slot is None:
        slot = _free_slot(keys)
        if slot is None:
            raise OptionError("Can't add a keyslot - all keyslots are in use")
    _require_number(slot, shown=slot % (1 << 32))
    in_use = keys.header.slots[slot].active
    if in_use and not force:
        raise OptionError(f"Refusing to overwrite active keyslot {slot} - please erase it first")
    master_key = keys.find(passphrase)
    filled = keys.filled(slot, new, master_key, iter_time_ms)
    spare = None
    if in_use and _active(keys) == 1:
        spare = _free_slot(keys)
        assert spare is not None
        _fill(file, spare, *keys.filled(spare, new, master_key, iter_time_ms))
    if in_use:
        _put(file, slot, replace(keys.header.slots[slot], state=SLOT_DISABLED))
        file.flush()
    _fill(file, slot, *filled)
    if spare is not None:
        _erase(file, [spare])
    return slot


def erase_passphrases(
    file: SlotFile, *, slot: int | None = None, passphrase: bytes | None = None, force: bool = False
) -> list[int]:
    """Take passphrases out of their key slots; the key material is overwritten.

    Args:
        file: the header area.
        slot: the slot to erase, 0 to 7; None erases all that the passphrase fits.
        passphrase: what the slot must hold; None with a slot does not look.
        force: also a slot that is not in use; also the last one: nothing can be read any more then.

    Returns: the numbers of the slots.

    Raises:
        OptionError, EncryptionError: it is not possible. Nothing was changed.
    """
    keys = _load(file)
    if slot is not None:
        _require_number(slot, shown=slot)
        if passphrase is not None and keys.key_in(slot, passphrase) is None:
            raise EncryptionError(f"Given keyslot {slot} doesn't contain the given old password for erase operation")
        if not force and not keys.header.slots[slot].active:
            raise OptionError(f"Given keyslot {slot} is already erased (inactive) ")
        if not force and _active(keys) == 1:
            raise OptionError(
                f"Attempt to erase the only active keyslot {slot} which will erase all the data in the image "
                "irreversibly - refusing operation"
            )
        chosen = [slot]
    elif passphrase is not None:
        chosen = [number for number in range(SLOT_COUNT) if keys.key_in(number, passphrase) is not None]
        if not chosen:
            raise EncryptionError("No keyslots match given (old) password for erase operation")
        if not force and len(chosen) == _active(keys):
            raise OptionError(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the "
                "data in the image irreversibly - refusing operation"
            )
    else:
        raise OptionError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be "
            "given"
        )
    _erase(file, chosen)
    return chosen


def _load(file: SlotFile) -> KeySlots:
    return read_key_slots(file.read, length=file.length)


def _require_number(slot: int, *, shown: int) -> None:
    if not 0 <= slot < SLOT_COUNT:
        raise OptionError(f"Invalid keyslot {shown} specified, must be between 0 and {SLOT_COUNT - 1}")


def _free_slot(keys: KeySlots) -> int | None:
    return next((number for number, slot in enumerate(keys.header.slots) if not slot.active), None)


def _active(keys: KeySlots) -> int:
    return sum(slot.active for slot in keys.header.slots)


def _fill(file: SlotFile, number: int, slot: KeySlot, material: bytes) -> None:
    """Fill a slot that is not in use, and put it into use."""
    _put(file, number, replace(slot, state=SLOT_DISABLED))
    file.write(slot.key_offset * SECTOR_SIZE, material)
    file.flush()  # the slot must be whole before it is in use
    _put(file, number, slot)
    file.flush()


def _erase(file: SlotFile, numbers: list[int]) -> None:
    keys = _load(file)
    slots = {number: replace(keys.header.slots[number], state=SLOT_DISABLED) for number in numbers}
    for number, slot in slots.items():
        _put(file, number, slot)
    file.flush()
    for _ in range(_ERASE_PASSES):
        for slot in slots.values():
            file.write(slot.key_offset * SECTOR_SIZE, os.urandom(keys.scheme.key_length * STRIPES))
        file.flush()
    for number, slot in slots.items():
        _put(file, number, replace(slot, salt=bytes(SALT_LENGTH), iterations=0))
    file.flush()


def _put(file: SlotFile, number: int, slot: KeySlot) -> None:
    """Write one slot's fields; where `state` alone changes, that is inside one sector."""
    header = _load(file).header
    slots = (*header.slots[:number], slot, *header.slots[number + 1 :])
    file.write(0, replace(header, slots=slots).build())
