"""LUKS headers by themselves: round trip, every rule, hostile values, budgets, creation options."""

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qcowlib.codecs import key_derivation, luks
from qcowlib.codecs.ciphers import ALGORITHMS
from qcowlib.codecs.key_derivation import merge, split
from qcowlib.codecs.luks import DEFAULT_BUDGET, create_luks, luks_area_length, open_luks
from qcowlib.codecs.luks_header import LUKS_HEADER_SIZE, SLOT_ENABLED, STRIPES, LuksHeader, parse_header
from qcowlib.codecs.luks_info import inspect_luks
from qcowlib.codecs.luks_scheme import parse_scheme
from qcowlib.codecs.sector_cipher import ClusterCipher
from qcowlib.errors import (
    CorruptMetadata,
    EncryptionError,
    MissingDependency,
    OptionError,
    QcowError,
    UnsupportedFeature,
)

AREA, CIPHER = create_luks(b"secret", cipher_alg="aes-128", cipher_mode="cbc", iter_time_ms=0)
HEADER = parse_header(AREA)


def unlock(
    area: bytes,
    passphrase: bytes = b"secret",
    *,
    length: int | None = None,
    host_offset: int | None = None,
    budget: int = DEFAULT_BUDGET,
) -> ClusterCipher:
    length = len(area) if length is None else length
    return open_luks(
        lambda offset, size: area[offset : offset + size],
        passphrase,
        length=length,
        host_offset=host_offset,
        budget=budget,
    )


def with_header(header: LuksHeader) -> bytes:
    return header.build() + AREA[LUKS_HEADER_SIZE:]


def with_slot(number: int = 0, **changes: int) -> LuksHeader:
    slots = list(HEADER.slots)
    slots[number] = replace(slots[number], **changes)  # type: ignore[arg-type]
    return replace(HEADER, slots=tuple(slots))


def test_opens_what_it_creates() -> None:
    data = bytes(range(256)) * 8
    assert unlock(AREA).decrypt(CIPHER.encrypt(data, 8192), 8192) == data
    assert CIPHER.encrypt(data, 0) != CIPHER.encrypt(data, 8192)
    for wrong in (b"", b"secre", b"secret ", b"\0secret"):
        with pytest.raises(EncryptionError, match=r"^Invalid password, cannot unlock any keyslot$"):
            unlock(AREA, wrong)
    assert unlock(AREA, b"secret\0rest").by_guest_offset is False


def test_keys_and_salts_are_new_each_time() -> None:
    other, _ = create_luks(b"secret", cipher_alg="aes-128", cipher_mode="cbc", iter_time_ms=0)
    header = parse_header(other)
    assert header.uuid != HEADER.uuid
    assert header.master_key_salt != HEADER.master_key_salt
    assert header.master_key_digest != HEADER.master_key_digest
    assert header.slots[0].salt != HEADER.slots[0].salt


def test_layout() -> None:
    area, _ = create_luks(b"secret", iter_time_ms=0)
    assert len(area) == luks_area_length() == 2068480
    assert len(AREA) == luks_area_length("aes-128", "cbc") == 528384
    info = inspect_luks(area[:LUKS_HEADER_SIZE])
    assert (info.cipher_alg, info.cipher_mode, info.ivgen_alg, info.hash_alg) == ("aes-256", "xts", "plain64", "sha256")
    assert info.payload_offset == 2068480
    assert [slot.key_offset for slot in info.slots] == [4096 + number * 258048 for number in range(8)]
    assert [slot.active for slot in info.slots] == [True] + [False] * 7
    assert (info.slots[0].iters, info.slots[0].stripes) == (1000, 4000)
    assert (info.slots[1].iters, info.slots[1].stripes) == (None, None)
    assert info.master_key_iters == 1000
    assert area[262144:] == bytes(len(area) - 262144), "unused key slots are zero"


def test_header_keeps_every_byte() -> None:
    data = bytearray(AREA[:LUKS_HEADER_SIZE])
    data[20:40] = hashlib.shake_128(b"w").digest(20)  # behind the NUL of the cipher name
    data[90:104] = hashlib.shake_128(b"x").digest(14)  # behind that of the hash
    data[256 + 8 : 256 + 40] = hashlib.shake_128(b"y").digest(32)  # salt of an unused slot
    assert parse_header(bytes(data)).build() == bytes(data)


@pytest.mark.parametrize(
    ("header", "rule"),
    [
        (replace(HEADER, cipher_name=b"x" * 32), "LUKS header cipher name is not NUL terminated"),
        (replace(HEADER, cipher_mode=b"x" * 32), "LUKS header cipher mode is not NUL terminated"),
        (replace(HEADER, hash_spec=b"x" * 32), "LUKS header hash spec is not NUL terminated"),
        (replace(HEADER, payload_offset=7), "LUKS payload is overlapping with the header"),
        (replace(HEADER, master_key_iterations=0), "LUKS key iteration count is zero"),
        (with_slot(stripes=4001), "Keyslot 0 is corrupted (stripes 4001 != 4000)"),
        (with_slot(7, stripes=0xFFFFFFFF), "Keyslot 7 is corrupted (stripes 4294967295 != 4000)"),
        (with_slot(1, state=1), "Keyslot 1 state (active/disable) is corrupted"),
        (with_slot(iterations=0), "Keyslot 0 iteration count is zero"),
        (with_slot(3, key_offset=7), "Keyslot 3 is overlapping with the LUKS header"),
        (with_slot(3, key_offset=0xFFFFFFFF), "Keyslot 3 is overlapping with the encrypted payload"),
        (with_slot(1, key_offset=9), "Keyslots 0 and 1 are overlapping in the header"),
        (replace(HEADER, master_key_length=0xFFFFFFFF), "Keyslot 0 is overlapping with the encrypted payload"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_rule(header: LuksHeader, rule: str) -> None:
    for call in (inspect_luks, unlock):
        with pytest.raises(CorruptMetadata) as caught:
            call(with_header(header))
        assert caught.value.rule == rule
    with pytest.raises(CorruptMetadata, match="LUKS header at host offset 0x50000: "):
        unlock(with_header(header), host_offset=0x50000)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cipher_mode": b"xts"}, "Unexpected cipher mode string format 'xts'"),
        ({"cipher_mode": b"gcm-plain64"}, "Cipher mode 'gcm' not supported"),
        ({"cipher_mode": b"cbc-random"}, "IV generator 'random' not supported"),
        ({"cipher_mode": b"cbc-plain64:crc32"}, "Hash algorithm 'crc32' not supported"),
        ({"cipher_mode": b"cbc-essiv"}, "Missing IV generator hash specification"),
        ({"cipher_mode": b"cbc-essiv:sha512"}, "No AES cipher with key size 64 available"),
        ({"cipher_mode": b"\xff-plain"}, "Cipher mode '\\xff' not supported"),
        ({"cipher_name": b"aes2"}, "Algorithm 'aes2' with key size 16 bytes not supported"),
        ({"master_key_length": 15}, "Algorithm 'aes' with key size 15 bytes not supported"),
        ({"master_key_length": 0}, "Algorithm 'aes' with key size 0 bytes not supported"),
        ({"cipher_mode": b"xts-plain64"}, "Algorithm 'aes' with key size 8 bytes not supported"),
        ({"hash_spec": b"whirlpool"}, "Hash algorithm 'whirlpool' not supported"),
        ({"cipher_name": b"cast5", "cipher_mode": b"cbc-essiv:sha256"}, "Cipher cast5-128 not supported with essiv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unknown_algorithms(changes: dict[str, Any], text: str) -> None:
    padded: dict[str, Any] = {
        name: value.ljust(32, b"\0") if isinstance(value, bytes) else value for name, value in changes.items()
    }
    header = replace(HEADER, **padded)
    for call in (inspect_luks, unlock):
        with pytest.raises(EncryptionError) as caught:
            call(with_header(header))
        assert str(caught.value) == text


def test_odd_xts_key() -> None:
    header = parse_header(create_luks(b"", cipher_alg="aes-128", iter_time_ms=0)[0])
    with pytest.raises(EncryptionError, match="multiple of 2"):
        parse_scheme(replace(header, master_key_length=33))


def test_other_containers() -> None:
    with pytest.raises(UnsupportedFeature, match="LUKS version 2 is not supported"):
        unlock(AREA[:6] + b"\0\2" + AREA[8:])
    for data in (b"", b"LUKS", bytes(4096), AREA[1:]):
        with pytest.raises(CorruptMetadata):
            inspect_luks(data)
    with pytest.raises(CorruptMetadata, match="Request for data outside of extension header"):
        inspect_luks(AREA[: LUKS_HEADER_SIZE - 1])


def test_the_extension_bounds_every_access() -> None:
    for length in (0, LUKS_HEADER_SIZE - 1, LUKS_HEADER_SIZE, 4096 + 16 * STRIPES - 1):
        with pytest.raises(CorruptMetadata, match="Request for data outside of extension header"):
            unlock(AREA, length=length)
    unlock(AREA, length=4096 + 16 * STRIPES)
    with pytest.raises(CorruptMetadata, match="Could not read encryption header"):
        unlock(AREA[:10000], length=len(AREA))


@pytest.mark.parametrize(
    "header",
    [
        with_slot(iterations=0xFFFFFFFF),
        replace(HEADER, master_key_iterations=0xFFFFFFFF),
        replace(HEADER, slots=tuple(replace(slot, state=SLOT_ENABLED, iterations=30_000_000) for slot in HEADER.slots)),
    ],
)
def test_iterations_have_a_budget(header: LuksHeader) -> None:
    start = time.monotonic()
    with pytest.raises(EncryptionError, match="asks for too many iterations"):
        unlock(with_header(header), budget=10_000_000)
    assert time.monotonic() - start < 2


def test_budget_is_for_all_slots_together() -> None:
    slots = tuple(replace(slot, state=SLOT_ENABLED, iterations=1000) for slot in HEADER.slots)
    area = with_header(replace(HEADER, slots=slots))
    with pytest.raises(EncryptionError, match="Invalid password"):
        unlock(area, b"wrong", budget=16000)
    with pytest.raises(EncryptionError, match="Keyslot 7 asks for too many iterations"):
        unlock(area, b"wrong", budget=15999)
    assert unlock(area, b"secret", budget=2000)


def test_mutated_headers_give_errors_of_the_library() -> None:
    rounds = hashlib.shake_128(b"mutations").digest(3 * 150)
    for at in range(0, len(rounds), 3):
        data = bytearray(AREA)
        data[int.from_bytes(rounds[at : at + 2], "big") % LUKS_HEADER_SIZE] ^= rounds[at + 2] or 1
        for call in (lambda area: unlock(area, budget=20_000), inspect_luks):
            # Any other exception fails the test; some bytes (salts, texts behind a NUL) may change freely.
            with contextlib.suppress(QcowError):
                call(bytes(data))


@pytest.mark.parametrize(("name", "length"), [("sha256", 64), ("sha256", 48), ("sha1", 32), ("sha512", 16)])
def test_splitter(name: str, length: int) -> None:
    key = hashlib.shake_128(b"key").digest(length)
    material = split(name, key, 100)
    assert len(material) == 100 * length
    assert merge(name, material, 100) == key
    damaged = bytes([material[0] ^ 1]) + material[1:]
    assert merge(name, damaged, 100) != key


def test_iteration_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks, "iterations_per_second", lambda _name, length: 80_000 if length == 20 else 20_000)
    area, _ = create_luks(b"secret", iter_time_ms=500)
    info = inspect_luks(area)
    assert (info.slots[0].iters, info.master_key_iters) == (10_000, 5_000)
    area, _ = create_luks(b"secret", iter_time_ms=1)
    assert (inspect_luks(area).slots[0].iters, inspect_luks(area).master_key_iters) == (1000, 1000)
    with pytest.raises(OptionError, match="larger than 4294967295"):
        create_luks(b"secret", iter_time_ms=10**12)
    with pytest.raises(OptionError, match="iter-time"):
        create_luks(b"secret", iter_time_ms=-1)


def test_benchmark_measures_this_machine() -> None:
    rate = key_derivation.iterations_per_second("sha256", 64)
    start = time.thread_time()
    key_derivation.pbkdf2("sha256", b"x", bytes(32), rate // 4, 64)
    assert 0.05 < time.thread_time() - start < 1.25


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cipher_alg": "aes"}, "Parameter 'cipher-alg' does not accept value 'aes'"),
        ({"cipher_alg": "des"}, "Algorithm 'des' not supported"),
        ({"cipher_mode": "gcm"}, "Parameter 'cipher-mode' does not accept value 'gcm'"),
        ({"ivgen_alg": "null"}, "Parameter 'ivgen-alg' does not accept value 'null'"),
        ({"ivgen_hash_alg": "sha"}, "Parameter 'ivgen-hash-alg' does not accept value 'sha'"),
        ({"hash_alg": ""}, "Parameter 'hash-alg' does not accept value ''"),
        ({"cipher_alg": "cast5-128"}, "Unsupported cipher mode xts"),
        ({"ivgen_alg": "essiv", "ivgen_hash_alg": "sha1"}, "No AES cipher with key size 20 available"),
        ({"cipher_alg": "aes-192", "cipher_mode": "cbc"}, "Algorithm 'aes-192' can only be used with cipher mode xts"),
    ],
)
def test_options_that_qemu_refuses(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        create_luks(b"secret", **options)
    assert str(caught.value) == text


def test_available_ciphers_can_all_be_created() -> None:
    for name, algorithm in ALGORITHMS.items():
        call: Callable[[], object] = lambda: create_luks(b"x", cipher_alg=name, iter_time_ms=0)  # noqa: B023,E731
        if algorithm.family == "aes":
            call()
        elif algorithm.family != "cast5":
            with pytest.raises(EncryptionError, match=name):
                call()


def test_without_the_cryptography_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    assert inspect_luks(AREA).cipher_alg == "aes-128"
    with pytest.raises(MissingDependency, match=r"pip install 'qcowlib\[crypto\]'"):
        unlock(AREA)


def test_hash_that_this_python_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> bytes:
        raise ValueError("unsupported hash type")

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", refuse)
    with pytest.raises(EncryptionError, match="Hash algorithm 'sha256' is not available"):
        unlock(AREA)
