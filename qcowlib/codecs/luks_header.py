"""The LUKS1 header as it lies in a qcow2 file: the record and its rules.

    bytes -> parse_header -> LuksHeader (every byte kept, rules checked) -> build -> bytes

Source: LUKS on-disk format 1.2.1; rules and error texts as in QEMU's crypto/block-luks.c, which is stricter than the
format: every slot, used or not, has 4000 stripes and lies between header and payload without touching another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import NoReturn

import construct
from construct import Array, Bytes, Const, Int16ub, Int32ub, Struct

from qcowlib.codecs.sector_cipher import SECTOR_SIZE
from qcowlib.errors import CorruptMetadata, UnsupportedFeature

LUKS_MAGIC = b"LUKS\xba\xbe"
LUKS_VERSION = 1
LUKS_HEADER_SIZE = 592
SLOT_COUNT = 8
STRIPES = 4000
SLOT_ENABLED = 0x00AC71F3
SLOT_DISABLED = 0x0000DEAD
SALT_LENGTH = 32
DIGEST_LENGTH = 20
#: Bytes kept free for the header before the first key slot; key slots are aligned to it as well.
HEADER_AREA = 4096

_STRUCTURE = "LUKS header"
_HEADER_SECTORS = HEADER_AREA // SECTOR_SIZE

RAW_LUKS_HEADER = Struct(
    "magic" / Const(LUKS_MAGIC),
    "version" / Int16ub,
    "cipher_name" / Bytes(32),
    "cipher_mode" / Bytes(32),
    "hash_spec" / Bytes(32),
    "payload_offset" / Int32ub,
    "master_key_length" / Int32ub,
    "master_key_digest" / Bytes(DIGEST_LENGTH),
    "master_key_salt" / Bytes(SALT_LENGTH),
    "master_key_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "slots"
    / Array(
        SLOT_COUNT,
        Struct(
            "state" / Int32ub,
            "iterations" / Int32ub,
            "salt" / Bytes(SALT_LENGTH),
            "key_offset" / Int32ub,
            "stripes" / Int32ub,
        ),
    ),
)


@dataclass(frozen=True)
class KeySlot:
    """One of the eight places for the master key, encrypted with a passphrase.

    Attributes:
        state: `SLOT_ENABLED` or `SLOT_DISABLED`.
        iterations: of PBKDF2 over the passphrase.
        salt: 32 bytes.
        key_offset: start of the key material in the header area, in sectors.
        stripes: how often the key material is longer than the key.
    """

    state: int
    iterations: int
    salt: bytes
    key_offset: int
    stripes: int

    @property
    def active(self) -> bool:
        """Whether the slot holds a key."""
        return self.state == SLOT_ENABLED


@dataclass(frozen=True)
class LuksHeader:
    """The fields of a LUKS1 header; names are fixed-width fields with all their bytes.

    Attributes:
        cipher_name, cipher_mode, hash_spec: 32 bytes each, NUL-terminated: "aes", "xts-plain64", "sha256".
        payload_offset: where the data of a LUKS volume starts, in sectors. In a qcow2 file: the end of the header area.
        master_key_length: in bytes, both halves for XTS.
        master_key_digest, master_key_salt, master_key_iterations: to recognise the master key.
        uuid: 40 bytes, NUL-terminated.
    """

    version: int
    cipher_name: bytes
    cipher_mode: bytes
    hash_spec: bytes
    payload_offset: int
    master_key_length: int
    master_key_digest: bytes
    master_key_salt: bytes
    master_key_iterations: int
    uuid: bytes
    slots: tuple[KeySlot, ...]

    def build(self) -> bytes:
        """The 592 bytes of the header."""
        return RAW_LUKS_HEADER.build({**vars(self), "slots": [vars(slot) for slot in self.slots]})


def parse_header(data: bytes | memoryview, host_offset: int | None = None) -> LuksHeader:
    """Read and check a header.

    Args:
        data: at least the first 592 bytes of the header area.
        host_offset: where it lies in the file, for errors.

    Raises:
        CorruptMetadata: not a LUKS header, or one that breaks a rule.
        UnsupportedFeature: another version of LUKS.
    """
    if bytes(data[: len(LUKS_MAGIC)]) != LUKS_MAGIC:
        raise CorruptMetadata(_STRUCTURE, host_offset, "Volume is not in LUKS format")
    try:
        raw = RAW_LUKS_HEADER.parse(bytes(data[:LUKS_HEADER_SIZE]))
    except construct.ConstructError as error:
        raise CorruptMetadata(_STRUCTURE, host_offset, "Request for data outside of extension header") from error
    slots = tuple(KeySlot(**{name: slot[name] for name in KeySlot.__dataclass_fields__}) for slot in raw.slots)
    fields = {name: raw[name] for name in LuksHeader.__dataclass_fields__ if name != "slots"}
    header = LuksHeader(**fields, slots=slots)
    check_header(header, host_offset)
    return header


def check_header(header: LuksHeader, host_offset: int | None = None) -> None:
    """Check every rule that needs no knowledge of algorithms; errors as of `parse_header`."""

    def refuse(rule: str) -> NoReturn:
        raise CorruptMetadata(_STRUCTURE, host_offset, rule)

    if header.version != LUKS_VERSION:
        raise UnsupportedFeature(_STRUCTURE, host_offset, f"LUKS version {header.version} is not supported")
    for field, what in (
        (header.cipher_name, "cipher name"),
        (header.cipher_mode, "cipher mode"),
        (header.hash_spec, "hash spec"),
    ):
        if b"\0" not in field:
            refuse(f"LUKS header {what} is not NUL terminated")
    if header.payload_offset < _HEADER_SECTORS:
        refuse("LUKS payload is overlapping with the header")
    if header.master_key_iterations == 0:
        refuse("LUKS key iteration count is zero")
    _check_slots(header, refuse)


def _check_slots(header: LuksHeader, refuse: Callable[[str], NoReturn]) -> None:
    """The rules for key slots."""
    sectors = slot_sectors(header.master_key_length)
    for number, slot in enumerate(header.slots):
        if slot.stripes != STRIPES:
            refuse(f"Keyslot {number} is corrupted (stripes {slot.stripes} != {STRIPES})")
        if slot.state not in {SLOT_ENABLED, SLOT_DISABLED}:
            refuse(f"Keyslot {number} state (active/disable) is corrupted")
        if slot.active and slot.iterations == 0:
            refuse(f"Keyslot {number} iteration count is zero")
        if slot.key_offset < _HEADER_SECTORS:
            refuse(f"Keyslot {number} is overlapping with the LUKS header")
        if slot.key_offset + sectors > header.payload_offset:
            refuse(f"Keyslot {number} is overlapping with the encrypted payload")
    # All slots have the same length, so two of them overlap when they start too close to each other.
    for (first, one), (second, other) in combinations(enumerate(header.slots), 2):
        if abs(one.key_offset - other.key_offset) < sectors:
            refuse(f"Keyslots {first} and {second} are overlapping in the header")


def slot_sectors(master_key_length: int) -> int:
    """Sectors between two key slots: the key material, rounded up to the header area."""
    material = -(-master_key_length * STRIPES // SECTOR_SIZE)
    return -(-material // _HEADER_SECTORS) * _HEADER_SECTORS


def text_of(field: bytes) -> str:
    """A NUL-terminated field; bytes that are no ASCII are shown escaped."""
    return field.split(b"\0", 1)[0].decode("ascii", "backslashreplace")
