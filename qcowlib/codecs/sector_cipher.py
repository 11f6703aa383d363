"""Encryption of 512-byte sectors: block cipher modes and initialisation vectors, vectorised over sectors.

A buffer is an array of shape (sectors, blocks in a sector, 8-byte words in a block), little-endian. Every mode is a
handful of array operations around one pass of the block cipher over the whole buffer (CBC encryption, which is serial
inside a sector: one pass for each block of all sectors at a time).

Source: IEEE 1619 for XTS; initialisation vectors as in QEMU's crypto/ivgen-*.c and Linux' dm-crypt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qcowlib.codecs.ciphers import SLACK, BlockCipher, Bytes, CipherAlgorithm
from qcowlib.errors import EncryptionError, OutOfRange

Words = npt.NDArray[np.uint64]

#: (buffer, initialisation vector of each sector (sectors, words), where the result goes with `SLACK` bytes behind it)
SectorPass = Callable[[Words, Words, Bytes], None]
#: sector numbers -> (sectors, words)
VectorGenerator = Callable[[Words], Words]

SECTOR_SIZE = 512
CIPHER_MODES = ("ecb", "cbc", "xts", "ctr")

# So many sectors at a time that the temporary arrays stay in the second-level cache.
_CHUNK_SECTORS = 256


class ClusterCipher(Protocol):
    """Encryption of the guest data of an image.

    Attributes:
        by_guest_offset: whether `offset` is the guest offset of the data (legacy AES) or the host offset (LUKS).
    """

    by_guest_offset: bool

    def decrypt(self, data: bytes | bytearray | memoryview, offset: int) -> bytes:
        """The plain bytes of whole sectors; `offset` in bytes, a multiple of 512."""
        ...

    def encrypt(self, data: bytes | bytearray | memoryview, offset: int) -> bytes:
        """The bytes to store for whole sectors; `offset` in bytes, a multiple of 512."""
        ...


class SectorCipher:
    """A mode around a block cipher: the `ClusterCipher` of LUKS and of legacy AES.

    Args:
        algorithm: the block cipher.
        mode: one of `CIPHER_MODES`.
        key: as long as the cipher's key, twice as long for XTS.
        vectors: initialisation vector of a sector.
        by_guest_offset: whether sectors are counted in the guest's or in the host file's address space.

    Raises:
        EncryptionError: the cipher is not available, or does not go with the mode.
        MissingDependency: the `cryptography` package is not installed.
    """

    def __init__(
        self,
        algorithm: CipherAlgorithm,
        mode: str,
        key: bytes,
        vectors: VectorGenerator,
        *,
        by_guest_offset: bool = False,
    ) -> None:
        self.by_guest_offset = by_guest_offset
        self._words = algorithm.block_length // 8
        self._vectors = vectors
        self._encrypt, self._decrypt = _mode_passes(algorithm, mode, key)

    def decrypt(self, data: bytes | bytearray | memoryview, offset: int) -> bytes:
        """The plain bytes of whole sectors.

        Args:
            data: a multiple of 512 bytes.
            offset: where the data lies, in bytes, a multiple of 512; guest or host offset as `by_guest_offset` says.

        Raises:
            OutOfRange: not whole sectors.
        """
        return self._process(self._decrypt, data, offset)

    def encrypt(self, data: bytes | bytearray | memoryview, offset: int) -> bytes:
        """The bytes to store for whole sectors; arguments and errors as of `decrypt`."""
        return self._process(self._encrypt, data, offset)

    def _process(self, run: SectorPass, data: bytes | bytearray | memoryview, offset: int) -> bytes:
        length = len(data)
        if length % SECTOR_SIZE or offset % SECTOR_SIZE or offset < 0:
            raise OutOfRange(f"encrypted data is in sectors of {SECTOR_SIZE} bytes, not {length} bytes at {offset}")
        source = np.frombuffer(data, dtype="<u8").reshape(-1, SECTOR_SIZE // (8 * self._words), self._words)
        result = np.empty(length + SLACK, dtype=np.uint8)
        first = offset // SECTOR_SIZE
        for start in range(0, len(source), _CHUNK_SECTORS):
            chunk = source[start : start + _CHUNK_SECTORS]
            numbers = np.arange(first + start, first + start + len(chunk), dtype=np.uint64)
            position = start * SECTOR_SIZE
            run(chunk, self._vectors(numbers), result[position : position + chunk.nbytes + SLACK])
        return result[:length].tobytes()


def plain_vectors(block_length: int) -> VectorGenerator:
    """ "plain": the low 32 bits of the sector number, little-endian."""
    wide = plain64_vectors(block_length)
    return lambda sectors: wide(sectors & np.uint64(0xFFFFFFFF))


def plain64_vectors(block_length: int) -> VectorGenerator:
    """ "plain64": the sector number, little-endian."""

    def generate(sectors: Words) -> Words:
        vectors = np.zeros((len(sectors), block_length // 8), dtype="<u8")
        vectors[:, 0] = sectors
        return vectors

    return generate


def essiv_vectors(salt_cipher: BlockCipher) -> VectorGenerator:
    """ "essiv": the sector number encrypted with a cipher whose key is a hash of the master key."""
    plain = plain64_vectors(salt_cipher.block_length)
    return lambda sectors: _through(salt_cipher.encrypt_into, plain(sectors))


def _mode_passes(algorithm: CipherAlgorithm, mode: str, key: bytes) -> tuple[SectorPass, SectorPass]:
    """Encryption and decryption of sectors in a mode."""
    if mode == "xts":
        if algorithm.block_length != 16:
            raise EncryptionError("Unsupported cipher mode xts")
        half = algorithm.key_length
        cipher, tweak_cipher = BlockCipher(algorithm, key[:half]), BlockCipher(algorithm, key[half:])
        return _xts(cipher.encrypt_into, tweak_cipher), _xts(cipher.decrypt_into, tweak_cipher)
    cipher = BlockCipher(algorithm, key)
    if mode == "cbc":
        return _cbc_encrypt(cipher), _cbc_decrypt(cipher)
    if mode == "ctr":
        return _ctr(cipher), _ctr(cipher)
    if mode == "ecb":
        return _ecb(cipher.encrypt_into), _ecb(cipher.decrypt_into)
    raise EncryptionError(f"Cipher mode '{mode}' not supported")


CodebookPass = Callable[[Bytes, Bytes], None]


def _ecb(codebook: CodebookPass) -> SectorPass:
    return lambda source, _vectors, target: codebook(_as_bytes(source), target)


def _xts(codebook: CodebookPass, tweak_cipher: BlockCipher) -> SectorPass:
    def run(source: Words, vectors: Words, target: Bytes) -> None:
        tweaks = _xts_tweaks(_through(tweak_cipher.encrypt_into, vectors))
        codebook(_as_bytes(source ^ tweaks), target)
        result = _as_words(target, source.shape)
        np.bitwise_xor(result, tweaks, out=result)

    return run


_SHIFT = np.arange(SECTOR_SIZE // 16, dtype=np.uint64)
# Two steps, because a shift by all 64 bits at once is not defined.
_ONE, _REST = np.uint64(1), np.uint64(63) - _SHIFT


def _xts_tweaks(encrypted: Words) -> Words:
    """Tweak j of a sector: its encrypted sector number times x**j in GF(2**128), for all j at once.

    A product with x**j is a shift by j bits; the at most 31 bits shifted out are worth x**7 + x**2 + x + 1 each.
    """
    low, high = encrypted[:, 0:1], encrypted[:, 1:2]
    out = (high >> _ONE) >> _REST
    tweaks = np.empty((len(encrypted), len(_SHIFT), 2), dtype="<u8")
    tweaks[:, :, 0] = (low << _SHIFT) ^ out ^ (out << _ONE) ^ (out << np.uint64(2)) ^ (out << np.uint64(7))
    tweaks[:, :, 1] = (high << _SHIFT) | ((low >> _ONE) >> _REST)
    return tweaks


def _cbc_decrypt(cipher: BlockCipher) -> SectorPass:
    def run(source: Words, vectors: Words, target: Bytes) -> None:
        cipher.decrypt_into(_as_bytes(source), target)
        result = _as_words(target, source.shape)
        result[:, 0] ^= vectors
        result[:, 1:] ^= source[:, :-1]

    return run


def _cbc_encrypt(cipher: BlockCipher) -> SectorPass:
    def run(source: Words, vectors: Words, target: Bytes) -> None:
        result = _as_words(target, source.shape)
        mixed = np.empty(vectors.shape, dtype="<u8")
        mixed_bytes = _as_bytes(mixed)
        column = np.empty(vectors.nbytes + SLACK, dtype=np.uint8)
        previous = _as_words(column, vectors.shape)
        previous[:] = vectors
        for block in range(source.shape[1]):
            np.bitwise_xor(source[:, block], previous, out=mixed)
            cipher.encrypt_into(mixed_bytes, column)
            result[:, block] = previous

    return run


def _ctr(cipher: BlockCipher) -> SectorPass:
    """Counter mode: the vector is a big-endian number that grows by one with each block."""

    def run(source: Words, vectors: Words, target: Bytes) -> None:
        numbers = vectors.astype("<u8").view(">u8").astype(np.uint64)
        counters = np.empty(source.shape, dtype=">u8")
        last = numbers[:, -1:] + np.arange(source.shape[1], dtype=np.uint64)
        counters[:, :, -1] = last
        if source.shape[2] == 2:
            counters[:, :, 0] = numbers[:, 0:1] + (last < numbers[:, -1:]).astype(np.uint64)
        cipher.encrypt_into(_as_bytes(counters), target)
        result = _as_words(target, source.shape)
        np.bitwise_xor(result, source, out=result)

    return run


def _through(codebook: CodebookPass, words: Words) -> Words:
    """A small array through the block cipher, as a new array of the same shape."""
    target = np.empty(words.nbytes + SLACK, dtype=np.uint8)
    codebook(_as_bytes(words), target)
    return _as_words(target, words.shape)


def _as_bytes(words: Words) -> Bytes:
    return np.ascontiguousarray(words).reshape(-1).view(np.uint8)


def _as_words(target: Bytes, shape: tuple[int, ...]) -> Words:
    """The result part of a target with slack."""
    return target[: 8 * int(np.prod(shape))].view("<u8").reshape(shape)
