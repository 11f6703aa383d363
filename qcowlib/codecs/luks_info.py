"""What a LUKS header tells without a passphrase: the "encrypt" part of `qemu-img info`."""

from __future__ import annotations

from dataclasses import dataclass

from qcowlib.codecs.luks_header import parse_header, text_of
from qcowlib.codecs.luks_scheme import parse_scheme
from qcowlib.codecs.sector_cipher import SECTOR_SIZE


@dataclass(frozen=True)
class LuksSlotInfo:
    """What `qemu-img info` tells about a key slot; `iters` and `stripes` are None for an unused one."""

    active: bool
    iters: int | None
    stripes: int | None
    key_offset: int


@dataclass(frozen=True)
class LuksInfo:
    """What `qemu-img info` tells about the encryption of an image, offsets in bytes from the header's start."""

    uuid: str
    cipher_alg: str
    cipher_mode: str
    ivgen_alg: str
    ivgen_hash_alg: str | None
    hash_alg: str
    payload_offset: int
    master_key_iters: int
    slots: tuple[LuksSlotInfo, ...]


def inspect_luks(data: bytes | memoryview, host_offset: int | None = None) -> LuksInfo:
    """What can be told about the encryption without a passphrase.

    Args:
        data: at least the first 592 bytes of the header area.
        host_offset: where it lies in the file, for errors.

    Raises:
        CorruptMetadata, UnsupportedFeature, EncryptionError: as of `parse_header` and `parse_scheme`.
    """
    header = parse_header(data, host_offset)
    scheme = parse_scheme(header)
    slots = tuple(
        LuksSlotInfo(
            active=slot.active,
            iters=slot.iterations if slot.active else None,
            stripes=slot.stripes if slot.active else None,
            key_offset=slot.key_offset * SECTOR_SIZE,
        )
        for slot in header.slots
    )
    return LuksInfo(
        uuid=text_of(header.uuid),
        cipher_alg=scheme.cipher.name,
        cipher_mode=scheme.cipher_mode,
        ivgen_alg=scheme.ivgen,
        ivgen_hash_alg=scheme.ivgen_hash if scheme.ivgen == "essiv" else None,
        hash_alg=scheme.hash,
        payload_offset=header.payload_offset * SECTOR_SIZE,
        master_key_iters=header.master_key_iterations,
        slots=slots,
    )
