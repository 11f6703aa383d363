"""LUKS1 inside qcow2 (crypt_method 2): unlock a header with a passphrase, or make a new one.

Unlike in a LUKS volume the sectors are counted from the start of the host file, whatever the header's payload offset
says: the initialisation vector of a cluster belongs to its host offset.

    open_luks:   passphrase -PBKDF2-> slot key -decrypt-> key material -merge-> master key -PBKDF2-> digest equal?
    create_luks: the same way back.

Source: qcow2.txt, "Full disk encryption header pointer"; LUKS on-disk format 1.2.1; QEMU's crypto/block-luks.c.
"""

from __future__ import annotations

import hmac
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from qcowlib.codecs.ciphers import ALGORITHMS, BlockCipher
from qcowlib.codecs.key_derivation import (
    DIGEST_LENGTHS,
    digest,
    iterations_per_second,
    merge,
    pbkdf2,
    pbkdf2_cost,
    split,
)
from qcowlib.codecs.luks_header import (
    DIGEST_LENGTH,
    HEADER_AREA,
    LUKS_HEADER_SIZE,
    LUKS_VERSION,
    SALT_LENGTH,
    SLOT_COUNT,
    SLOT_DISABLED,
    SLOT_ENABLED,
    STRIPES,
    KeySlot,
    LuksHeader,
    parse_header,
    slot_sectors,
)
from qcowlib.codecs.luks_scheme import IVGEN_ALGORITHMS, LuksScheme, make_scheme, parse_scheme
from qcowlib.codecs.sector_cipher import (
    CIPHER_MODES,
    SECTOR_SIZE,
    ClusterCipher,
    SectorCipher,
    VectorGenerator,
    essiv_vectors,
    plain64_vectors,
    plain_vectors,
)
from qcowlib.errors import CorruptMetadata, EncryptionError, OptionError

#: (offset in the header area, length) -> that many bytes, or fewer at the end of the file
HeaderReader = Callable[[int, int], bytes]

#: HMAC computations that unlocking may take: about a minute. A header asks for up to 2**32 iterations a slot.
DEFAULT_BUDGET = 100_000_000

_MIN_ITERATIONS = 1000
_MAX_ITERATIONS = 0xFFFFFFFF


def open_luks(
    read: HeaderReader,
    passphrase: bytes,
    *,
    length: int,
    host_offset: int | None = None,
    budget: int = DEFAULT_BUDGET,
) -> ClusterCipher:
    """Unlock the master key with a passphrase that fits any of the key slots.

    Args:
        read: reads from the header area.
        passphrase: as for QEMU, it ends at a NUL byte.
        length: bytes of the header area, as the header extension says.
        host_offset: where the area lies in the file, for errors.
        budget: HMAC computations to spend at most.

    Raises:
        EncryptionError: the passphrase fits no slot, an algorithm is not available, or the budget is too small.
        CorruptMetadata, UnsupportedFeature: the header is damaged or of another version.
        MissingDependency: the `cryptography` package is not installed.
    """

    keys = read_key_slots(read, length=length, host_offset=host_offset)
    return _sector_cipher(keys.scheme, keys.find(passphrase, budget))


@dataclass(frozen=True)
class KeySlots:
    """The key slots of a LUKS header area.

    Attributes:
        header: as it is in the file.
        scheme: its algorithms.
        area: (offset in the header area, length) -> exactly that many bytes.
    """

    header: LuksHeader
    scheme: LuksScheme
    area: HeaderReader

    def key_in(self, number: int, passphrase: bytes) -> bytes | None:
        """The master key, if a slot is in use and the passphrase fits it."""
        slot, scheme = self.header.slots[number], self.scheme
        if not slot.active:
            return None
        material = self.area(slot.key_offset * SECTOR_SIZE, scheme.key_length * STRIPES)
        slot_key = pbkdf2(scheme.hash, _until_nul(passphrase), slot.salt, slot.iterations, scheme.key_length)
        material = _crypt_material(scheme, slot_key, material, decrypt=True)
        master_key = merge(scheme.hash, material, STRIPES)
        fits = hmac.compare_digest(_master_digest(self.header, scheme, master_key), self.header.master_key_digest)
        return master_key if fits else None

    def find(self, passphrase: bytes, budget: int = DEFAULT_BUDGET) -> bytes:
        """The master key, by a passphrase that fits any slot.

        Raises:
            EncryptionError: it fits none, or the budget is too small.
        """
        for number, slot in enumerate(self.header.slots):
            if not slot.active:
                continue
            budget -= pbkdf2_cost(self.scheme.hash, slot.iterations, self.scheme.key_length)
            budget -= pbkdf2_cost(self.scheme.hash, self.header.master_key_iterations, DIGEST_LENGTH)
            if budget < 0:
                raise EncryptionError(
                    f"Keyslot {number} asks for too many iterations "
                    f"({slot.iterations} for the passphrase, {self.header.master_key_iterations} for the master key)"
                )
            master_key = self.key_in(number, passphrase)
            if master_key is not None:
                return master_key
        raise EncryptionError("Invalid password, cannot unlock any keyslot")

    def filled(self, number: int, passphrase: bytes, master_key: bytes, iter_time_ms: int) -> tuple[KeySlot, bytes]:
        """A slot with a new passphrase, and its key material.

        Raises:
            OptionError: the time asks for too many iterations.
        """
        return _fill_slot(self.scheme, self.header.slots[number], passphrase, master_key, iter_time_ms)


def read_key_slots(read: HeaderReader, *, length: int, host_offset: int | None = None) -> KeySlots:
    """The key slots of a header area; arguments and errors as of `open_luks`."""

    def area(offset: int, size: int) -> bytes:
        if offset + size > length:
            raise CorruptMetadata("LUKS header", host_offset, "Request for data outside of extension header")
        data = read(offset, size)
        if len(data) != size:
            raise CorruptMetadata("LUKS header", host_offset, "Could not read encryption header")
        return data

    header = parse_header(area(0, LUKS_HEADER_SIZE), host_offset)
    return KeySlots(header, parse_scheme(header), area)


def create_luks(
    passphrase: bytes,
    *,
    cipher_alg: str = "aes-256",
    cipher_mode: str = "xts",
    ivgen_alg: str = "plain64",
    ivgen_hash_alg: str | None = None,
    hash_alg: str = "sha256",
    iter_time_ms: int = 2000,
) -> tuple[bytes, ClusterCipher]:
    """Make a header with a new random master key and the passphrase in its first key slot.

    Args:
        passphrase: as for QEMU, it ends at a NUL byte.
        cipher_alg, cipher_mode, ivgen_alg, ivgen_hash_alg, hash_alg: qemu-img's `encrypt.*` options of these names.
        iter_time_ms: time that trying a passphrase shall take on this machine (`encrypt.iter-time`), in milliseconds.

    Returns:
        The whole header area, as long as the header extension must say, and the cipher for the guest data.

    Raises:
        OptionError: an unknown name, or a combination that QEMU cannot open.
        EncryptionError: an algorithm is not available here.
        MissingDependency: the `cryptography` package is not installed.
    """
    scheme = _scheme_of_options(cipher_alg, cipher_mode, ivgen_alg, ivgen_hash_alg, hash_alg)
    if iter_time_ms < 0:
        raise OptionError(f"Parameter 'iter-time' does not accept value '{iter_time_ms}'")
    master_key = os.urandom(scheme.key_length)
    cipher = _sector_cipher(scheme, master_key)

    # An eighth for the master key, as cryptsetup and QEMU do it: it is derived once for each key slot tried.
    header = _empty_header(scheme, _iterations(scheme.hash, DIGEST_LENGTH, iter_time_ms, 8))
    slot, material = _fill_slot(scheme, header.slots[0], passphrase, master_key, iter_time_ms)
    header = replace(
        header,
        master_key_digest=_master_digest(header, scheme, master_key),
        slots=(slot, *header.slots[1:]),
    )
    area = bytearray(header.payload_offset * SECTOR_SIZE)
    area[:LUKS_HEADER_SIZE] = header.build()
    start = slot.key_offset * SECTOR_SIZE
    area[start : start + len(material)] = material
    return bytes(area), cipher


def luks_area_length(cipher_alg: str = "aes-256", cipher_mode: str = "xts") -> int:
    """Bytes of the header area that `create_luks` would make.

    Raises:
        OptionError: an unknown name, or a combination that QEMU cannot open.
    """
    scheme = _scheme_of_options(cipher_alg, cipher_mode, "plain64", None, "sha256")
    return HEADER_AREA + SLOT_COUNT * slot_sectors(scheme.key_length) * SECTOR_SIZE


def _scheme_of_options(
    cipher_alg: str, cipher_mode: str, ivgen_alg: str, ivgen_hash_alg: str | None, hash_alg: str
) -> LuksScheme:
    """The algorithms that creation options name; OptionError with qemu-img's text."""
    for name, value, known in (
        ("cipher-alg", cipher_alg, (*ALGORITHMS, "des", "3des")),
        ("cipher-mode", cipher_mode, CIPHER_MODES),
        ("ivgen-alg", ivgen_alg, IVGEN_ALGORITHMS),
        ("ivgen-hash-alg", ivgen_hash_alg, (None, *DIGEST_LENGTHS)),
        ("hash-alg", hash_alg, tuple(DIGEST_LENGTHS)),
    ):
        if value not in known:
            raise OptionError(f"Parameter '{name}' does not accept value '{value}'")
    cipher = ALGORITHMS.get(cipher_alg)
    if cipher is None:
        raise OptionError(f"Algorithm '{cipher_alg}' not supported")
    if cipher_mode == "xts" and cipher.block_length != 16:
        raise OptionError("Unsupported cipher mode xts")
    if ivgen_alg == "essiv" and ivgen_hash_alg is None:
        ivgen_hash_alg = "sha256"
    try:
        scheme = make_scheme(cipher, cipher_mode, ivgen_alg, ivgen_hash_alg, hash_alg)
    except EncryptionError as error:
        raise OptionError(str(error)) from error
    if scheme.key_length * STRIPES % SECTOR_SIZE:
        # QEMU aborts on key material that is no whole number of sectors.
        raise OptionError(f"Algorithm '{cipher_alg}' can only be used with cipher mode xts")
    return scheme


def _empty_header(scheme: LuksScheme, master_key_iterations: int) -> LuksHeader:
    """A header with all slots laid out and none in use, and no digest yet."""
    spec = f"{scheme.cipher_mode}-{scheme.ivgen}" + (f":{scheme.ivgen_hash}" if scheme.ivgen_hash else "")
    distance = slot_sectors(scheme.key_length)
    first = HEADER_AREA // SECTOR_SIZE
    return LuksHeader(
        version=LUKS_VERSION,
        cipher_name=scheme.cipher.family.encode().ljust(32, b"\0"),
        cipher_mode=spec.encode().ljust(32, b"\0"),
        hash_spec=scheme.hash.encode().ljust(32, b"\0"),
        payload_offset=first + SLOT_COUNT * distance,
        master_key_length=scheme.key_length,
        master_key_digest=bytes(DIGEST_LENGTH),
        master_key_salt=os.urandom(SALT_LENGTH),
        master_key_iterations=master_key_iterations,
        uuid=str(uuid.uuid4()).encode().ljust(40, b"\0"),
        slots=tuple(
            KeySlot(SLOT_DISABLED, 0, bytes(SALT_LENGTH), first + number * distance, STRIPES)
            for number in range(SLOT_COUNT)
        ),
    )


def _fill_slot(
    scheme: LuksScheme, slot: KeySlot, passphrase: bytes, master_key: bytes, iter_time_ms: int
) -> tuple[KeySlot, bytes]:
    """The slot in use with this passphrase, and its key material."""
    slot = replace(
        slot,
        state=SLOT_ENABLED,
        salt=os.urandom(SALT_LENGTH),
        iterations=_iterations(scheme.hash, scheme.key_length, iter_time_ms, 1),
    )
    slot_key = pbkdf2(scheme.hash, _until_nul(passphrase), slot.salt, slot.iterations, scheme.key_length)
    return slot, _crypt_material(scheme, slot_key, split(scheme.hash, master_key, STRIPES), decrypt=False)


def _iterations(hash_name: str, length: int, milliseconds: int, divisor: int) -> int:
    """PBKDF2 iterations that take that long on this machine, at least 1000."""
    if milliseconds == 0:
        return _MIN_ITERATIONS
    iterations = iterations_per_second(hash_name, length) * milliseconds // 1000 // divisor
    if iterations > _MAX_ITERATIONS:
        raise OptionError(f"PBKDF iterations {iterations} larger than {_MAX_ITERATIONS}")
    return max(iterations, _MIN_ITERATIONS)


def _master_digest(header: LuksHeader, scheme: LuksScheme, master_key: bytes) -> bytes:
    return pbkdf2(scheme.hash, master_key, header.master_key_salt, header.master_key_iterations, DIGEST_LENGTH)


def _crypt_material(scheme: LuksScheme, slot_key: bytes, material: bytes, *, decrypt: bool) -> bytes:
    """Key material through the slot's key, with sectors counted from the material's start."""
    cipher = _sector_cipher(scheme, slot_key)
    padded = material + bytes(-len(material) % SECTOR_SIZE)
    return (cipher.decrypt(padded, 0) if decrypt else cipher.encrypt(padded, 0))[: len(material)]


def _sector_cipher(scheme: LuksScheme, key: bytes) -> SectorCipher:
    return SectorCipher(scheme.cipher, scheme.cipher_mode, key, _vectors(scheme, key))


def _vectors(scheme: LuksScheme, key: bytes) -> VectorGenerator:
    if scheme.essiv_cipher is not None and scheme.ivgen_hash is not None:
        salt = digest(scheme.ivgen_hash, key)
        return essiv_vectors(BlockCipher(scheme.essiv_cipher, salt))
    generator = plain_vectors if scheme.ivgen == "plain" else plain64_vectors
    return generator(scheme.cipher.block_length)


def _until_nul(passphrase: bytes) -> bytes:
    """The part that QEMU takes: its secrets are C strings."""
    return passphrase.split(b"\0", 1)[0]
