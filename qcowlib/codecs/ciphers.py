"""Block ciphers by QEMU's names, on whole buffers of blocks.

Everything above works with electronic-codebook passes over large buffers: AES on a buffer runs at gigabytes per second,
where one cipher object for each 512-byte sector costs microseconds a sector.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qcowlib.errors import EncryptionError, MissingDependency

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm, CipherContext

Bytes = npt.NDArray[np.uint8]

# OpenSSL's interface wants room for one block more than it writes.
SLACK = 16


@dataclass(frozen=True)
class CipherAlgorithm:
    """A cipher with a key length.

    Attributes:
        name: QEMU's name ("aes-256"), as in `encrypt.cipher-alg`.
        family: name in a LUKS header ("aes").
        key_length: bytes of key.
        block_length: bytes in a block, 16 or 8.
    """

    name: str
    family: str
    key_length: int
    block_length: int = 16


#: The ciphers that a LUKS header of QEMU can name (crypto/block-luks.c).
ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        CipherAlgorithm("aes-128", "aes", 16),
        CipherAlgorithm("aes-192", "aes", 24),
        CipherAlgorithm("aes-256", "aes", 32),
        CipherAlgorithm("cast5-128", "cast5", 16, 8),
        CipherAlgorithm("serpent-128", "serpent", 16),
        CipherAlgorithm("serpent-192", "serpent", 24),
        CipherAlgorithm("serpent-256", "serpent", 32),
        CipherAlgorithm("twofish-128", "twofish", 16),
        CipherAlgorithm("twofish-192", "twofish", 24),
        CipherAlgorithm("twofish-256", "twofish", 32),
    )
}


class BlockCipher:
    """One keyed block cipher; may be used by several threads at once.

    Args:
        algorithm: which cipher.
        key: `algorithm.key_length` bytes.

    Raises:
        EncryptionError: the `cryptography` package has no such cipher.
        MissingDependency: the `cryptography` package is not installed.
    """

    def __init__(self, algorithm: CipherAlgorithm, key: bytes) -> None:
        try:
            from cryptography.exceptions import UnsupportedAlgorithm
            from cryptography.hazmat.primitives.ciphers import Cipher, modes
        except ImportError as error:
            raise MissingDependency("cryptography", "crypto", "an encrypted image") from error
        self.block_length = algorithm.block_length
        self._cipher = Cipher(_primitive(algorithm, key), modes.ECB())
        # A context is a mutable object of OpenSSL's, so every thread has its own.
        self._contexts = threading.local()
        try:
            self._cipher.encryptor()
        except UnsupportedAlgorithm as error:
            raise _unsupported(algorithm) from error

    def encrypt_into(self, blocks: Bytes, target: Bytes) -> None:
        """Encrypt every block by itself.

        Args:
            blocks: contiguous, a multiple of the block length.
            target: at least `SLACK` bytes longer than `blocks`; what lies behind the result is not defined.
        """
        context: CipherContext | None = getattr(self._contexts, "encryptor", None)
        if context is None:
            context = self._contexts.encryptor = self._cipher.encryptor()
        context.update_into(blocks.data, target.data)

    def decrypt_into(self, blocks: Bytes, target: Bytes) -> None:
        """Decrypt every block by itself; arguments as of `encrypt_into`."""
        context: CipherContext | None = getattr(self._contexts, "decryptor", None)
        if context is None:
            context = self._contexts.decryptor = self._cipher.decryptor()
        context.update_into(blocks.data, target.data)


def _primitive(algorithm: CipherAlgorithm, key: bytes) -> BlockCipherAlgorithm:
    """The keyed cipher of the `cryptography` package."""
    if algorithm.family == "aes":
        from cryptography.hazmat.primitives.ciphers.algorithms import AES

        return AES(key)
    if algorithm.family == "cast5":
        try:
            from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
        except ImportError as error:
            raise _unsupported(algorithm) from error
        return CAST5(key)
    raise _unsupported(algorithm)


def _unsupported(algorithm: CipherAlgorithm) -> EncryptionError:
    return EncryptionError(f"Cipher '{algorithm.name}' is not available in the cryptography package")
