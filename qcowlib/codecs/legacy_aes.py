"""Legacy AES of qcow2 (crypt_method 1): AES-128-CBC with the passphrase itself as the key.

There is no header: a wrong passphrase is not noticed, it yields other bytes. Sectors are counted in the guest's
address space (vmstate: behind the end of the disk), so data of one cluster shared by two guest offsets could not be
read; compressed clusters are not encrypted.

Source: qcow2.txt, header field "crypt_method"; QEMU's crypto/block-qcow.c.
"""

from __future__ import annotations

from qcowlib.codecs.ciphers import ALGORITHMS
from qcowlib.codecs.sector_cipher import SectorCipher, plain64_vectors

_KEY_LENGTH = 16


class LegacyAes(SectorCipher):
    """The cipher of an image with crypt_method 1.

    Args:
        passphrase: its first 16 bytes are the key, filled up with zeros; as for QEMU, it ends at a NUL byte.

    Raises:
        MissingDependency: the `cryptography` package is not installed.
    """

    def __init__(self, passphrase: bytes) -> None:
        key = passphrase.split(b"\0", 1)[0][:_KEY_LENGTH].ljust(_KEY_LENGTH, b"\0")
        super().__init__(ALGORITHMS["aes-128"], "cbc", key, plain64_vectors(16), by_guest_offset=True)
