"""A new LUKS volume: header, key material, and a disk of zeroes that nobody has encrypted yet.

Such volumes are made for others, as `create -f luks` of qemu-img does; they are not opened here.
"""

from __future__ import annotations

from qcowlib.errors import EncryptionError, OptionError
from qcowlib.image.create_target import fresh_file, lengthen
from qcowlib.image.creation_options import (
    PREALLOCATION_MODES,
    CreationOptions,
    checked_size,
    encryption_of,
    refuse_unknown,
)


def create_luks_volume(path: str, size: int | None, options: CreationOptions) -> None:
    """Make a file, or fill a block device.

    Args:
        path: name of the file.
        size: bytes of the disk, which follows the header.
        options: preallocation, nocow and those that begin with "encrypt_".

    Raises:
        OptionError, EncryptionError: an option is invalid or missing; nothing was touched.
        ImageLocked, StorageError: as for `create_image`.
    """
    from qcowlib.codecs.luks import create_luks

    known = {name for name in CreationOptions.__annotations__ if name.startswith("encrypt_")}
    refuse_unknown(options, frozenset(known | {"preallocation", "nocow"}))
    if size is None:
        raise OptionError("Image creation needs a size parameter")
    if options.get("encrypt_passphrase") is None:
        raise EncryptionError("Parameter 'key-secret' is required for cipher")
    preallocation = options.get("preallocation", "off")
    if preallocation not in PREALLOCATION_MODES:
        raise OptionError(f"invalid parameter value: {preallocation}")
    encryption = encryption_of({**options, "encrypt_format": "luks"})
    assert encryption is not None
    checked_size(size)  # for its limits: as in QEMU the volume is not rounded up to whole sectors
    area, _ = create_luks(encryption.passphrase, **encryption.luks)
    reserved = preallocation in ("falloc", "full")
    space = len(area) + (size if reserved else 0)
    with fresh_file(path, space=space, nocow=options.get("nocow", False)) as storage:
        lengthen(storage, 0, len(area) + size, preallocation if reserved else "off")
        storage.pwrite(area, 0)
        storage.flush()
