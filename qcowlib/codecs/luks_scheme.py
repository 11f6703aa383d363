"""The algorithms of a LUKS header: from the names in it, or from creation options.

Source: LUKS on-disk format 1.2.1, "Cipher and hash specification registry"; names, rules and error texts as in QEMU's
crypto/block-luks.c.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcowlib.codecs.ciphers import ALGORITHMS, CipherAlgorithm
from qcowlib.codecs.key_derivation import DIGEST_LENGTHS
from qcowlib.codecs.luks_header import LuksHeader, text_of
from qcowlib.codecs.sector_cipher import CIPHER_MODES
from qcowlib.errors import EncryptionError

IVGEN_ALGORITHMS = ("plain", "plain64", "essiv")


@dataclass(frozen=True)
class LuksScheme:
    """The algorithms that a header names.

    Attributes:
        cipher: block cipher.
        cipher_mode: "xts", "cbc", "ecb" or "ctr".
        ivgen: "plain64", "plain" or "essiv".
        ivgen_hash: hash function of the initialisation vectors; None unless the header names one.
        essiv_cipher: cipher of the initialisation vectors; None unless `ivgen` is "essiv".
        hash: hash function of PBKDF2 and of the anti-forensic splitter.
    """

    cipher: CipherAlgorithm
    cipher_mode: str
    ivgen: str
    ivgen_hash: str | None
    essiv_cipher: CipherAlgorithm | None
    hash: str

    @property
    def key_length(self) -> int:
        """Bytes of the master key."""
        return self.cipher.key_length * (2 if self.cipher_mode == "xts" else 1)


def parse_scheme(header: LuksHeader) -> LuksScheme:
    """The algorithms that a header names.

    Raises:
        EncryptionError: a name or a combination that QEMU does not know; the text is QEMU's.
    """
    spec = text_of(header.cipher_mode)
    mode, dash, vectors = spec.partition("-")
    if not dash:
        raise EncryptionError(f"Unexpected cipher mode string format '{spec}'")
    ivgen, colon, vector_hash = vectors.partition(":")
    ivgen_hash = _known(vector_hash, DIGEST_LENGTHS, "Hash algorithm") if colon else None
    cipher_mode = _known(mode, CIPHER_MODES, "Cipher mode")
    key_length = header.master_key_length // (2 if cipher_mode == "xts" else 1)
    family = text_of(header.cipher_name)
    cipher = _find_cipher(family, key_length)
    if cipher is None:
        raise EncryptionError(f"Algorithm '{family}' with key size {key_length} bytes not supported")
    hash_name = _known(text_of(header.hash_spec), DIGEST_LENGTHS, "Hash algorithm")
    scheme = make_scheme(cipher, cipher_mode, _known(ivgen, IVGEN_ALGORITHMS, "IV generator"), ivgen_hash, hash_name)
    if scheme.key_length != header.master_key_length:
        raise EncryptionError("XTS cipher key length should be a multiple of 2")
    return scheme


def make_scheme(
    cipher: CipherAlgorithm, cipher_mode: str, ivgen: str, ivgen_hash: str | None, hash_name: str
) -> LuksScheme:
    """Put known algorithms together; the hash of the vectors decides on the cipher of "essiv".

    Raises:
        EncryptionError: the hash does not go with the cipher, or is missing; the text is QEMU's.
    """
    essiv_cipher = None
    if ivgen == "essiv":
        if ivgen_hash is None:
            raise EncryptionError("Missing IV generator hash specification")
        # As dm-crypt does it: the digest is the key, so its length chooses among the ciphers of the family.
        length = DIGEST_LENGTHS[ivgen_hash]
        essiv_cipher = _find_cipher(cipher.family, length)
        if essiv_cipher is None and cipher.family == "cast5":
            raise EncryptionError(f"Cipher {cipher.name} not supported with essiv")
        if essiv_cipher is None:
            family = {"aes": "AES", "serpent": "Serpent", "twofish": "Twofish"}[cipher.family]
            raise EncryptionError(f"No {family} cipher with key size {length} available")
    return LuksScheme(cipher, cipher_mode, ivgen, ivgen_hash, essiv_cipher, hash_name)


def _find_cipher(family: str, key_length: int) -> CipherAlgorithm | None:
    matches = (a for a in ALGORITHMS.values() if (a.family, a.key_length) == (family, key_length))
    return next(matches, None)


def _known(name: str, names: dict[str, int] | tuple[str, ...], kind: str) -> str:
    if name not in names:
        raise EncryptionError(f"{kind} '{name}' not supported")
    return name
