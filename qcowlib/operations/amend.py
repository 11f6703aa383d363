"""Amend: change what an image says about itself, without changing what a guest reads.

    version 2 -> 3         snapshot table with sizes -> header swung
    key slots              in the LUKS header's own order of writes
    refcount width         new refcount structure -> header swung
    data file, raw bit     header swung
    lazy refcounts         one bit of the header
    size                   a resize
    version 3 -> 2         bitmaps removed, zero clusters expanded -> header swung

The steps come in this order, each whole before the next; a step that is refused leaves those before it done.

Source: the rules, order and texts of QEMU 7.2's amend.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qcowlib.errors import CorruptMetadata, EncryptionError, FormatError, OptionError
from qcowlib.extents import ExtentKind
from qcowlib.format import constants as k
from qcowlib.format.extensions import HeaderExtension, new_extensions
from qcowlib.format.features import Autoclear, Compatible, Incompatible
from qcowlib.image.creation_options import VERSIONS
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.metadata.header_swing import laid_out, swing_header
from qcowlib.metadata.refcount_width import change_refcount_width
from qcowlib.metadata.transaction import MetadataTransaction
from qcowlib.metadata.zero_expansion import expand_zeroes
from qcowlib.operations.bitmaps import remove_all_bitmaps
from qcowlib.operations.resize import resize
from qcowlib.operations.snapshots import write_snapshot_table

Progress = Callable[[int, int], None]

_MAX_UINT32 = (1 << 32) - 1
_MIN_EXTRA_DATA = 16  # bytes of a snapshot table entry that version 3 demands: vm state size, disk size


@dataclass(frozen=True)
class KeySlotChange:
    """A change of the key slots of a LUKS encrypted image.

    Attributes:
        active: True puts a passphrase into a slot, False erases slots.
        passphrase: one that fits the image now; to put another one in.
        new_secret: the passphrase to put in.
        old_secret: erase the slots that this passphrase fits.
        keyslot: a slot's number, 0 to 7; None takes a free one, or all that `old_secret` fits.
        iter_time_ms: time that trying the new passphrase shall take on this machine; None takes 2000.
    """

    active: bool
    passphrase: bytes | None = None
    new_secret: bytes | None = None
    old_secret: bytes | None = None
    keyslot: int | None = None
    iter_time_ms: int | None = None


def amend(
    image: WritableQcow2Image,
    *,
    compat: str | None = None,
    size: int | None = None,
    backing_file: str | None = None,
    backing_fmt: str | None = None,
    data_file: str | None = None,
    data_file_raw: bool | None = None,
    lazy_refcounts: bool | None = None,
    refcount_bits: int | None = None,
    key_slots: KeySlotChange | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Change options that an image was created with.

        with qcowlib.open_image("disk.qcow2", writable=True, policy=qcowlib.LocalFiles()) as image:
            qcowlib.amend(image, compat="0.10")

    Args:
        image: opened for writing, with its chain.
        compat: "1.1" (version 3) or "0.10" (version 2). Version 2 has no bitmaps: they are removed; zero clusters take
            space above a backing file.
        size: new size of the disk in bytes; what lies behind a smaller one is lost.
        backing_file, backing_fmt: can only be what they are; `rebase` changes them.
        data_file: another name for the external data file; empty to say none.
        data_file_raw: False: the data file need not be a raw image of the disk any more.
        lazy_refcounts: refcounts may be written late, under the dirty bit.
        refcount_bits: width of a refcount, a power of two up to 64.
        key_slots: change of the passphrases of a LUKS encrypted image.
        force: overwrite a key slot in use; erase the last one: nothing can be read any more then.
        progress: called with (work done, work to do).

    Raises:
        OptionError: a value, or a change that is not possible.
        EncryptionError: a passphrase fits no slot.
        CorruptMetadata: the image is damaged.
        StorageError: the host file failed: each step is done wholly or not at all.
    """
    header, geometry = image.header, image.state.geometry
    version = header.version if compat is None else _version(compat)
    width = geometry.refcount_bits if refcount_bits is None else refcount_bits
    lazy = bool(header.compatible_features & Compatible.LAZY_REFCOUNTS)
    changes_width, changes_lazy = width != geometry.refcount_bits, lazy_refcounts not in (None, lazy)
    if key_slots is not None:
        _require_luks(image)
    _require_possible_data_file(image, data_file, data_file_raw)
    _require_possible_width(width if changes_width else 16, version)
    _require_same_backing(image, backing_file, backing_fmt)
    if changes_lazy and lazy_refcounts and version < 3:
        raise OptionError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        )
    steps = _Steps(progress, (version != header.version) + changes_width + (key_slots is not None))
    if version > header.version:
        _upgrade(image, steps.next())
    if key_slots is not None:
        steps.next()
        _change_key_slots(image, key_slots, force=force)
    if changes_width:
        with image.exclusive() as transaction:
            change_refcount_width(transaction, width.bit_length() - 1, steps.next())
            image.reload()
    _change_header(image, data_file, data_file_raw, lazy_refcounts if changes_lazy else None)
    if size is not None and size != 0:
        resize(image, size, shrink=True)
    if version < header.version:
        _downgrade(image, steps.next())


class _Steps:
    """Progress over several operations, of which the later ones are taken to be as long as the earlier ones.

    Args:
        progress: called with (work done, work to do); None for none.
        total: number of operations.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._begun = 0
        self._before = self._last = 0  # work of the operations before this one, and of this one

    def next(self) -> Progress | None:
        """What the next operation reports to."""
        self._before += self._last
        self._begun += 1
        self._last = 0
        return self._report if self._progress is not None else None

    def _report(self, done: int, total: int) -> None:
        self._last = total
        so_far = self._before + total
        rest = so_far * (self._total - self._begun) // self._begun
        assert self._progress is not None
        self._progress(self._before + done, so_far + rest)


def _version(compat: str) -> int:
    if compat not in VERSIONS:
        raise OptionError(f"Unknown compatibility level {compat}")
    return VERSIONS[compat]


def _require_luks(image: WritableQcow2Image) -> None:
    if image.header.crypt_method == k.CRYPT_NONE:
        raise OptionError("Can't amend encryption options - encryption not present")
    if image.header.crypt_method != k.CRYPT_LUKS:
        raise OptionError("Only LUKS encryption options can be amended")


def _require_possible_data_file(image: WritableQcow2Image, data_file: str | None, data_file_raw: bool | None) -> None:
    if data_file is not None and not image.header.has_data_file:
        raise OptionError("data-file can only be set for images that use an external data file")
    if data_file_raw and not image.header.has_raw_data_file:
        raise OptionError("data-file-raw cannot be set on existing images")


def _require_possible_width(width: int, version: int) -> None:
    if not 1 <= width <= 64 or width & (width - 1):
        raise OptionError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and width != 16:
        raise OptionError(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        )


def _require_same_backing(image: WritableQcow2Image, backing_file: str | None, backing_fmt: str | None) -> None:
    if (backing_file, backing_fmt) == (None, None):
        return
    if (backing_file, backing_fmt) != (image.header.backing_file, image.header.backing_format):
        raise OptionError(
            "Cannot amend the backing file",
            stock="Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.",
        )


def _change_header(
    image: WritableQcow2Image, data_file: str | None, data_file_raw: bool | None, lazy_refcounts: bool | None
) -> None:
    with image.exclusive() as transaction:
        header, fields = transaction.state.header, {}
        if data_file_raw is False and header.has_raw_data_file:
            fields["autoclear_features"] = int(header.autoclear_features & ~Autoclear.RAW_EXTERNAL)
        if lazy_refcounts is not None:
            features = header.compatible_features & ~Compatible.LAZY_REFCOUNTS
            fields["compatible_features"] = int(features | (Compatible.LAZY_REFCOUNTS if lazy_refcounts else 0))
        if fields:
            transaction.write_header(**fields)
            transaction.storage.flush()
        if data_file is not None and data_file != (header.data_file_name or ""):
            name = data_file.encode("utf-8", "surrogateescape")
            extension = HeaderExtension(k.EXTENSION_DATA_FILE, name) if name else None
            _swing(transaction, extensions=header.with_extension(k.EXTENSION_DATA_FILE, extension))


def _swing(transaction: MetadataTransaction, **changes: Any) -> None:  # noqa: ANN401 - the types are Header's
    with transaction.direct_writes():
        header = transaction.state.header
        swing_header(transaction, laid_out(header, replace(header, **changes)))


# Key slots


class _HeaderArea:
    """The LUKS header area of an image."""

    def __init__(self, transaction: MetadataTransaction) -> None:
        pointer = transaction.state.header.crypto_header
        assert pointer is not None
        self._storage = transaction.storage
        self._start = pointer.offset
        self.length = pointer.length

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes."""
        return self._storage.pread(length, self._start + offset)

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`."""
        self._storage.pwrite(data, self._start + offset)

    def flush(self) -> None:
        """Barrier."""
        self._storage.flush()


def _change_key_slots(image: WritableQcow2Image, change: KeySlotChange, *, force: bool) -> None:
    from qcowlib.codecs.luks_slots import DEFAULT_ITER_TIME_MS, add_passphrase, erase_passphrases

    if change.active:
        if change.new_secret is None:
            raise OptionError("'new-secret' is required to activate a keyslot")
        if change.old_secret is not None:
            raise OptionError("'old-secret' must not be given when activating keyslots")
        if change.passphrase is None:
            raise EncryptionError("the present passphrase is needed to put in another one")
    else:
        if change.new_secret is not None:
            raise OptionError("'new-secret' must not be given when erasing keyslots")
        if change.iter_time_ms is not None:
            raise OptionError("'iter-time' must not be given when erasing keyslots")
    with image.exclusive() as transaction:
        area = _HeaderArea(transaction)
        if not change.active:
            erase_passphrases(area, slot=change.keyslot, passphrase=change.old_secret, force=force)
            return
        assert change.passphrase is not None
        assert change.new_secret is not None
        add_passphrase(
            area,
            change.passphrase,
            change.new_secret,
            slot=change.keyslot,
            iter_time_ms=DEFAULT_ITER_TIME_MS if change.iter_time_ms is None else change.iter_time_ms,
            force=force,
        )


# Versions


def _upgrade(image: WritableQcow2Image, progress: Progress | None) -> None:
    """Version 3: each snapshot says its size, and the header has fields for features."""
    if progress is not None:
        progress(0, 2)
    with image.exclusive() as transaction:
        state = transaction.state
        if any(len(entry.extra_data) < _MIN_EXTRA_DATA or entry.disk_size is None for entry in state.snapshots):
            snapshots = [
                replace(
                    entry,
                    disk_size=state.header.size if entry.disk_size is None else entry.disk_size,
                    extra_data=entry.extra_data.ljust(k.SNAPSHOT_EXTRA_DATA_SIZE, b"\0"),
                )
                for entry in state.snapshots
            ]
            with transaction.direct_writes():
                write_snapshot_table(transaction, snapshots)
            transaction.commit()
            state.snapshots = snapshots
        if progress is not None:
            progress(1, 2)
        transaction.flush()  # without the dirty bit version 3 says that the refcounts on disk are exact
        names = next(iter(new_extensions(3, state.header.cluster_size)), None)
        _swing(
            transaction,
            version=3,
            header_length=k.V3_HEADER_LENGTH,
            incompatible_features=0,
            compatible_features=0,
            autoclear_features=0,
            refcount_order=k.V2_REFCOUNT_ORDER,
            compression_type=k.COMPRESSION_ZLIB,
            unknown_fields=b"",
            extensions=state.header.with_extension(k.EXTENSION_FEATURE_NAMES, names),
        )
        image.reload()
    if progress is not None:
        progress(2, 2)


def _downgrade(image: WritableQcow2Image, progress: Progress | None) -> None:
    """Version 2, where nothing of version 3 is needed to read the image."""
    header = image.header
    if image.state.geometry.refcount_bits != 16:
        raise OptionError("compat=0.10 requires refcount_bits=16")
    if header.has_data_file:
        raise OptionError("Cannot downgrade an image with a data file")
    if any(entry.vm_state_size > _MAX_UINT32 or entry.disk_size != image.size for entry in image.snapshots):
        raise OptionError("Internal snapshots prevent downgrade of image")
    features = header.incompatible_features & ~(Incompatible.COMPRESSION | Incompatible.DIRTY)
    if features:
        raise OptionError(f"Cannot downgrade an image with incompatible features {int(features):#x} set")
    if header.compression_type != k.COMPRESSION_ZLIB and _has_compressed(image):
        raise OptionError("Cannot downgrade an image with zstd compression type and existing compressed clusters")
    if image.bitmaps:
        remove_all_bitmaps(image)
    with image.exclusive() as transaction:
        try:
            expand_zeroes(
                transaction,
                image.store if image.cipher is not None else None,
                has_backing=header.backing_file is not None,
                progress=progress,
            )
        except FormatError as error:
            reason = os.strerror(errno.EIO if error.errno is None else error.errno)
            stock = f"{error.stock}\n{{program}}: Failed to turn zero into data clusters: {reason}"
            raise CorruptMetadata(error.structure, error.host_offset, error.rule, stock=stock) from error
        transaction.commit()
        transaction.flush()
        _swing(
            transaction,
            version=2,
            header_length=k.V2_HEADER_LENGTH,
            incompatible_features=0,
            compatible_features=0,
            autoclear_features=0,
            compression_type=k.COMPRESSION_ZLIB,
            unknown_fields=b"",
            extensions=header.with_extension(k.EXTENSION_FEATURE_NAMES, None),
        )
        image.reload()


def _has_compressed(image: WritableQcow2Image) -> bool:
    layers = [image, *(image.open_snapshot(entry) for entry in image.snapshots)]
    return any(
        bool((table.kind == ExtentKind.COMPRESSED).any())
        for layer in layers
        for table in layer.layer_extents(0, layer.size)
    )
