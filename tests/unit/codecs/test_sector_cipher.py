"""The vectorised sector modes against OpenSSL's, one sector at a time."""

import hashlib
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from qcowlib.codecs.ciphers import ALGORITHMS, BlockCipher
from qcowlib.codecs.legacy_aes import LegacyAes
from qcowlib.codecs.sector_cipher import (
    CIPHER_MODES,
    SectorCipher,
    VectorGenerator,
    essiv_vectors,
    plain64_vectors,
    plain_vectors,
)
from qcowlib.errors import EncryptionError, OutOfRange

SALT = hashlib.sha256(b"salt").digest()
# Sector numbers around 2**32, so that plain and plain64 differ inside one call.
OFFSET = (2**32 - 3) * 512


def plain(sector: int, size: int) -> bytes:
    return (sector & 0xFFFFFFFF).to_bytes(size, "little")


def plain64(sector: int, size: int) -> bytes:
    return sector.to_bytes(size, "little")


def essiv(sector: int, size: int) -> bytes:
    assert size == 16
    return Cipher(AES(SALT), modes.ECB()).encryptor().update(plain64(sector, 16))


VECTORS: dict[str, tuple[Callable[[int], VectorGenerator], Callable[[int, int], bytes]]] = {
    "plain": (plain_vectors, plain),
    "plain64": (plain64_vectors, plain64),
    "essiv": (lambda _size: essiv_vectors(BlockCipher(ALGORITHMS["aes-256"], SALT)), essiv),
}


def sector_by_sector(name: str, mode: str, key: bytes, vector: Callable[[int, int], bytes], data: bytes) -> bytes:
    """What OpenSSL makes of the data when it is asked for every sector anew."""
    result = b""
    for start in range(0, len(data), 512):
        size = ALGORITHMS[name].block_length
        iv = vector((OFFSET + start) // 512, size)
        one = {"ecb": modes.ECB, "cbc": modes.CBC, "ctr": modes.CTR, "xts": modes.XTS}[mode]
        instance = one() if mode == "ecb" else one(iv)
        encryptor = Cipher(CAST5(key) if name == "cast5-128" else AES(key), instance).encryptor()
        result += encryptor.update(data[start : start + 512]) + encryptor.finalize()
    return result


@pytest.mark.parametrize("mode", CIPHER_MODES)
@pytest.mark.parametrize("name", ["aes-128", "aes-192", "aes-256", "cast5-128"])
@pytest.mark.parametrize("ivgen", ["plain", "plain64", "essiv"])
def test_equals_openssl(name: str, mode: str, ivgen: str) -> None:
    if name == "cast5-128" and (mode not in {"ecb", "cbc"} or ivgen == "essiv"):
        return  # 8-byte blocks: no XTS, no AES vectors; OpenSSL's package has no CTR for it
    if name == "aes-192" and mode == "xts":
        return  # OpenSSL has none; the interop test has QEMU's
    algorithm = ALGORITHMS[name]
    key = hashlib.shake_128(b"key").digest(algorithm.key_length * (2 if mode == "xts" else 1))
    generator, vector = VECTORS[ivgen]
    cipher = SectorCipher(algorithm, mode, key, generator(algorithm.block_length))
    assert cipher.by_guest_offset is False
    data = hashlib.shake_128(b"data").digest(512 * 300)  # more than one chunk
    stored = sector_by_sector(name, mode, key, vector, data)
    assert cipher.encrypt(data, OFFSET) == stored
    assert cipher.decrypt(stored, OFFSET) == data
    assert cipher.decrypt(memoryview(bytearray(stored))[512:1536], OFFSET + 512) == data[512:1536]


def test_xts_vector_of_the_standard() -> None:
    # IEEE 1619-2007, annex B, vector 10: AES-256, data unit 0xff, 512 bytes 00 01 02 ... ff twice.
    key = bytes.fromhex(
        "2718281828459045235360287471352662497757247093699959574966967627"
        "3141592653589793238462643383279502884197169399375105820974944592"
    )
    cipher = SectorCipher(ALGORITHMS["aes-256"], "xts", key, plain64_vectors(16))
    stored = cipher.encrypt(bytes(range(256)) * 2, 0xFF * 512)
    assert stored[:16].hex() == "1c3b3a102f770386e4836c99e370cf9b"
    assert stored[-16:].hex() == "c4f36ffda9fcea70b9c6e693e148c151"
    assert cipher.decrypt(stored, 0xFF * 512) == bytes(range(256)) * 2


def test_ctr_carries_into_the_upper_half() -> None:
    start = bytes.fromhex("00000000000000ffffffffffffffffff")

    def vectors(sectors: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return np.tile(np.frombuffer(start, dtype="<u8"), (len(sectors), 1))

    cipher = SectorCipher(ALGORITHMS["aes-128"], "ctr", bytes(16), vectors)
    keystream = Cipher(AES(bytes(16)), modes.CTR(start)).encryptor().update(bytes(512))
    assert cipher.encrypt(bytes(1024), 0) == keystream * 2


@pytest.mark.parametrize(("length", "offset"), [(511, 0), (513, 512), (512, 1), (512, -512)])
def test_whole_sectors_only(length: int, offset: int) -> None:
    cipher = LegacyAes(b"secret")
    with pytest.raises(OutOfRange):
        cipher.decrypt(bytes(length), offset)
    with pytest.raises(OutOfRange):
        cipher.encrypt(bytes(length), offset)


def test_nothing_is_nothing() -> None:
    assert LegacyAes(b"secret").decrypt(b"", 0) == b""
    assert LegacyAes(b"secret").encrypt(memoryview(b""), 512) == b""


def test_legacy_aes_key() -> None:
    assert LegacyAes(b"").by_guest_offset is True
    data = bytes(range(256)) * 2
    for passphrase, key in [
        (b"", bytes(16)),
        (b"secret", b"secret" + bytes(10)),
        (b"0123456789abcdefXYZ", b"0123456789abcdef"),
        (b"cut\0rest", b"cut" + bytes(13)),
    ]:
        encryptor = Cipher(AES(key), modes.CBC((7).to_bytes(16, "little"))).encryptor()
        assert LegacyAes(passphrase).encrypt(data, 7 * 512) == encryptor.update(data)


def test_unavailable_ciphers_are_named() -> None:
    for name in ("serpent-256", "twofish-128"):
        algorithm = ALGORITHMS[name]
        with pytest.raises(EncryptionError, match=f"Cipher '{name}' is not available"):
            SectorCipher(algorithm, "cbc", bytes(algorithm.key_length), plain64_vectors(16))
    with pytest.raises(EncryptionError, match="Unsupported cipher mode xts"):
        SectorCipher(ALGORITHMS["cast5-128"], "xts", bytes(32), plain64_vectors(8))
    with pytest.raises(EncryptionError, match="Cipher mode 'gcm' not supported"):
        SectorCipher(ALGORITHMS["aes-128"], "gcm", bytes(16), plain64_vectors(16))


def test_many_threads_share_one_cipher() -> None:
    cipher = SectorCipher(ALGORITHMS["aes-256"], "xts", bytes(range(64)), plain64_vectors(16))
    data = hashlib.shake_128(b"data").digest(1 << 18)
    stored = cipher.encrypt(data, 0)
    wrong = []

    def work() -> None:
        for _ in range(30):
            if cipher.decrypt(stored, 0) != data or cipher.encrypt(data, 0) != stored:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
