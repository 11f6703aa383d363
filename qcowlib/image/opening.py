"""Opening an image: from a path, bytes, a descriptor or a storage to an object that can be read.

    source -> storage (locked) -> format -> header -> data file -> cipher -> backing file (the same again) -> image

What an image names is opened only after the policy has admitted it. Every failure closes what was opened before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, overload

from qcowlib.errors import (
    ChainError,
    EncryptionError,
    FormatError,
    ImageStateError,
    MissingDependency,
    OptionError,
    QcowError,
    ReferenceDenied,
    UnsupportedFeature,
)
from qcowlib.format.constants import CRYPT_AES, CRYPT_NONE
from qcowlib.format.header import Header
from qcowlib.image.policy import DenyReferences, FileRequest, OpenPolicy
from qcowlib.image.probe import FOREIGN_FORMATS, probe_format
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.raw import RawImage, StorageWindow, WritableRawImage
from qcowlib.image.references import Reference, backing_reference, data_file_path
from qcowlib.image.window import WritableStorageWindow
from qcowlib.metadata.header_rescue import rescue_header
from qcowlib.metadata.state import Qcow2State, load_state
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.local import LocalFile, from_descriptor, open_local
from qcowlib.storage.null import NullStorage
from qcowlib.storage.protocol import Buffer, ReadStorage, Storage

if TYPE_CHECKING:
    from qcowlib.codecs.sector_cipher import ClusterCipher
    from qcowlib.image.writable import WritableQcow2Image

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | int | ReadStorage | Reference

MAX_CHAIN_LENGTH = 200

# Names of QEMU drivers that show a file as it is.
_RAW_FORMATS = ("raw", "file", "host_device", "null-co", "null-aio")


@dataclass(frozen=True)
class _Request:
    """How a chain is to be opened; the same for all its layers, but `writable`, `data_file` and `ancestors`.

    Attributes:
        for_check: take what only a check can make something of.
        for_repair: "all" takes also a header that only a repair can make something of.
        writes_file: open the top file for writing, though the image itself is not.
        ancestors: identity of each file above in the chain.
    """

    writable: bool
    policy: OpenPolicy
    force_share: bool
    passphrase: bytes | None
    open_backing: bool
    data_file: ReadStorage | None
    for_check: bool = False
    for_repair: str | None = None
    writes_file: bool = False
    ancestors: tuple[object, ...] = ()


@overload
def open_image(
    source: ImageSource,
    *,
    format: str | None = ...,
    writable: Literal[False] = ...,
    policy: OpenPolicy | None = ...,
    force_share: bool = ...,
    passphrase: str | bytes | None = ...,
    open_backing: bool = ...,
    data_file: ReadStorage | None = ...,
) -> Qcow2Image | RawImage: ...


@overload
def open_image(
    source: ImageSource,
    *,
    format: str | None = ...,
    writable: Literal[True],
    policy: OpenPolicy | None = ...,
    force_share: bool = ...,
    passphrase: str | bytes | None = ...,
    open_backing: bool = ...,
    data_file: ReadStorage | None = ...,
) -> WritableQcow2Image | WritableRawImage: ...


@overload
def open_image(
    source: ImageSource,
    *,
    format: str | None = ...,
    writable: bool,
    policy: OpenPolicy | None = ...,
    force_share: bool = ...,
    passphrase: str | bytes | None = ...,
    open_backing: bool = ...,
    data_file: ReadStorage | None = ...,
) -> Qcow2Image | RawImage: ...


def open_image(
    source: ImageSource,
    *,
    format: str | None = None,
    writable: bool = False,
    policy: OpenPolicy | None = None,
    force_share: bool = False,
    passphrase: str | bytes | None = None,
    open_backing: bool = True,
    data_file: ReadStorage | None = None,
) -> Qcow2Image | RawImage:
    """Open a disk image.

        with qcowlib.open_image("disk.qcow2", policy=qcowlib.LocalFiles()) as image:
            boot_sector = image.read(0, 512)

    Args:
        source: a path; the bytes of an image; a file descriptor (stays the caller's); an object that fulfils the
            storage contract (closed with the image); or a `Reference` from `parse_image_name`.
        format: "qcow2" or "raw"; None looks at the first bytes. Give it whenever it is known: a guest can write
            anything into a raw disk.
        writable: open for reading and writing; other processes are kept out.
        policy: which files named inside the image may be opened; None denies all.
        force_share: read although somebody else writes; what is read may be torn.
        passphrase: for encrypted images, of all layers; text is encoded as UTF-8.
        open_backing: False opens the top file alone (no backing file, no data file, no key): metadata can be used,
            reading what is elsewhere raises.
        data_file: the external data file, instead of the one that the header names; closed with the image.

    Returns: an image to be closed after use; a context manager.

    Raises:
        StorageError: the file cannot be opened or read.
        ImageLocked: another process uses it.
        FormatError, UnsupportedFeature: not a valid image, or of a format that is not supported.
        ReferenceDenied: the image names a file that the policy does not allow.
        ChainError: a backing or data file is missing, a loop, or cannot be used.
        EncryptionError: the passphrase is missing or wrong.
        ImageStateError: opened for writing although it is marked corrupt.
    """
    if writable and force_share:
        raise OptionError("an image cannot be opened for writing with force_share")
    request = _Request(
        writable=writable,
        policy=DenyReferences() if policy is None else policy,
        force_share=force_share,
        passphrase=passphrase.encode() if isinstance(passphrase, str) else passphrase,
        open_backing=open_backing,
        data_file=data_file,
    )
    return _open_source(source, format, request)


def open_for_check(
    source: ImageSource, *, format: str | None = None, force_share: bool = False
) -> Qcow2Image | RawImage:
    """Open the top file alone, to be checked: also one whose header has no refcount table.

    Args:
        source, format, force_share: as for `open_image`.

    Raises: as `open_image`.
    """
    request = _Request(
        writable=False,
        policy=DenyReferences(),
        force_share=force_share,
        passphrase=None,
        open_backing=False,
        data_file=None,
        for_check=True,
    )
    return _open_source(source, format, request)


def open_for_repair(
    source: ImageSource, mode: str, *, format: str | None = None, dry_run: bool = False, force_share: bool = False
) -> Qcow2Image | RawImage:
    """Open the top file alone, to be repaired: its storage is writable, and other processes are kept out.

    Args:
        source, format, force_share: as for `open_image`.
        mode: "leaks" or "all"; with "all" a header is taken whose refcount table or bitmaps cannot be used.
        dry_run: the repair will only be planned: open for reading.

    Raises: as `open_image`.
    """
    request = _Request(
        writable=False,
        policy=DenyReferences(),
        force_share=force_share,
        passphrase=None,
        open_backing=False,
        data_file=None,
        for_check=True,
        for_repair=mode,
        writes_file=not dry_run,
    )
    return _open_source(source, format, request)


def _open_source(source: ImageSource, image_format: str | None, request: _Request) -> Qcow2Image | RawImage:
    if isinstance(source, Reference):
        return _open_reference(source if image_format is None else replace(source, format=image_format), request)
    return _open_storage(_source_storage(source, request), image_format, request, Reference(_source_path(source)))


def _source_storage(source: ImageSource, request: _Request) -> ReadStorage:
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesStorage(source, writable=request.writable or request.writes_file)
    if isinstance(source, int):
        return from_descriptor(
            source, writable=request.writable or request.writes_file, force_share=request.force_share
        )
    if isinstance(source, str | os.PathLike):
        return open_local(
            os.fspath(source), writable=request.writable or request.writes_file, force_share=request.force_share
        )
    if isinstance(source, ReadStorage):
        return source
    raise OptionError(f"an image cannot be opened from {type(source).__name__}")


def _source_path(source: ImageSource) -> str:
    """The path that relative names in the header start from; empty when there is none."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return source.name if isinstance(source, LocalFile) and os.path.exists(source.name) else ""


def _open_reference(reference: Reference, request: _Request) -> Qcow2Image | RawImage:
    return _open_storage(_reference_storage(reference, request), reference.format, request, reference)


def _reference_storage(reference: Reference, request: _Request) -> ReadStorage:
    """The file of a reference, seen through its windows."""
    if reference.faulty and (request.open_backing or request.writable):
        raise ChainError(f"faults on demand in '{reference.path}' (blkdebug) are not available")
    if reference.zeroes is not None:
        storage: ReadStorage = NullStorage(reference.zeroes, reference.path)
    else:
        storage = open_local(
            reference.path,
            writable=request.writable or request.writes_file,
            force_share=request.force_share,
            lock=reference.locked,
        )
    with ExitStack() as undo:
        undo.callback(storage.close)
        for window in reference.windows:
            if isinstance(storage, Storage) and request.writable:
                storage = WritableStorageWindow(storage, window.offset, window.size)
            else:
                storage = StorageWindow(storage, window.offset, window.size)
        undo.pop_all()
    return storage


def _open_storage(
    storage: ReadStorage, image_format: str | None, request: _Request, reference: Reference
) -> Qcow2Image | RawImage:
    """The image in an opened storage, which is closed on failure."""
    with ExitStack() as undo:
        undo.callback(storage.close)
        chosen = image_format or probe_format(storage)
        identity = _identity(storage, chosen, reference)
        if identity in request.ancestors:
            raise ChainError(f"Backing file '{reference.path}' is a loop: it is already in the chain above")
        request = replace(request, ancestors=(*request.ancestors, identity))
        image: Qcow2Image | RawImage
        if chosen in _RAW_FORMATS:
            image = _raw_image(storage, request, image_format)
        elif chosen == "qcow2":
            image = _qcow2_image(storage, request, reference, undo)
        elif chosen in FOREIGN_FORMATS:
            rule = f"the image is in {chosen} format; only qcow2 and raw are supported"
            raise UnsupportedFeature(f"'{storage.name}'", None, rule)
        else:
            raise OptionError(f"Unknown driver '{chosen}'")
        undo.pop_all()
    return image


def _identity(storage: ReadStorage, image_format: str, reference: Reference) -> object:
    """Equal for two layers that are the same file looked at in the same way."""
    inner = storage
    while isinstance(inner, StorageWindow):
        inner = inner.inner
    if isinstance(inner, LocalFile):
        status = os.fstat(inner.fileno())
        return status.st_dev, status.st_ino, reference.windows, image_format
    return id(inner)


def _raw_image(storage: ReadStorage, request: _Request, image_format: str | None) -> RawImage:
    if not request.writable:
        return RawImage(storage, image_format or "raw")
    if image_format is None:
        raise OptionError(f"'{storage.name}' has no known format; give format='raw' to write it as a raw image")
    return WritableRawImage(_writable_storage(storage))


def _writable_storage(storage: ReadStorage) -> Storage:
    if not isinstance(storage, Storage):
        raise OptionError(f"'{storage.name}' can only be read")
    return storage


def _qcow2_image(storage: ReadStorage, request: _Request, reference: Reference, undo: ExitStack) -> Qcow2Image:
    if request.for_repair == "all":
        state = Qcow2State(storage, rescue_header(storage))
    else:
        state = load_state(storage, for_check=request.for_check)
    header = state.header
    if request.writable and header.corrupt:
        raise ImageStateError("qcow2: Image is corrupt; cannot be opened read/write")
    if request.open_backing:
        header.check_content_rules()
    if header.has_data_file:
        data_storage = _data_storage(header, storage.name, reference, request)
        undo.callback(data_storage.close)
        state = Qcow2State(storage, header, data_storage)
    elif reference.data_file is not None:
        raise OptionError("'data-file' can only be set for images with an external data file")
    cipher = _cipher(state, reference, request)
    backing = _backing_image(header, storage.name, reference, request)
    if backing is not None:
        undo.callback(backing.close)
    left_out = header.backing_file is not None and not request.open_backing
    image_class = Qcow2Image
    if request.writable:
        from qcowlib.image.writable import WritableQcow2Image

        _writable_storage(storage)
        image_class = WritableQcow2Image
    image = image_class(state, backing=backing, cipher=cipher, backing_left_out=left_out)
    if request.open_backing:
        _ = image.snapshots, image.bitmaps  # as for QEMU, an image with a damaged table is not a valid one
    return image


class _MissingDataFile:
    """Stands for an external data file that was not opened: any use of guest data raises."""

    def __init__(self, image_name: str, data_file_name: str | None) -> None:
        self.name = data_file_name or ""
        self._message = f"the data of '{image_name}' is in its data file '{self.name}', which was not opened"

    def size(self) -> int:
        """Large: no entry is called damaged for a file that was not looked at."""
        return 1 << 62

    def pread(self, length: int, offset: int) -> bytes:
        """Raise."""
        raise ChainError(f"{self._message} ({length} bytes at {offset})")

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Raise."""
        raise ChainError(f"{self._message} ({len(buffer)} bytes at {offset})")

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """All is data, for all that is known."""
        yield offset, length, True

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Raise."""
        raise ChainError(f"{self._message} ({len(data)} bytes at {offset})")

    def write_zeroes(self, offset: int, length: int) -> None:
        """Raise."""
        raise ChainError(f"{self._message} ({length} bytes at {offset})")

    def discard(self, offset: int, length: int) -> None:
        """Raise."""
        self.write_zeroes(offset, length)

    def allocate(self, offset: int, length: int) -> None:
        """Raise."""
        self.write_zeroes(offset, length)

    def truncate(self, size: int) -> None:
        """Raise."""
        self.write_zeroes(size, 0)

    def flush(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        """Nothing to release."""


def _data_storage(header: Header, image_name: str, reference: Reference, request: _Request) -> ReadStorage:
    if request.data_file is not None:
        return request.data_file
    if not request.open_backing:
        return _MissingDataFile(image_name, header.data_file_name)
    target = reference.data_file
    if target is None:
        if header.data_file_name is None:
            raise ChainError("'data-file' is required for this image")
        target = Reference(data_file_path(header.data_file_name, reference.path))
    request.policy.admit(FileRequest("data file", target.path, image_name))
    try:
        return _reference_storage(target, request)
    except QcowError as error:
        raise ChainError(str(error), stock=error.stock) from error


class _NoPassphrase:
    """The cipher of an encrypted image that was opened without a passphrase: any use of guest data raises."""

    by_guest_offset = False

    def decrypt(self, data: bytes | bytearray | memoryview, offset: int) -> bytes:
        """Raise."""
        raise EncryptionError(f"the data is encrypted and needs a passphrase ({len(data)} bytes at {offset:#x})")

    def encrypt(self, data: bytes | bytearray | memoryview, offset: int) -> bytes:
        """Raise."""
        return self.decrypt(data, offset)


def _cipher(state: Qcow2State, reference: Reference, request: _Request) -> ClusterCipher | None:
    header = state.header
    if header.crypt_method == CRYPT_NONE:
        return None
    passphrase = request.passphrase if reference.passphrase is None else reference.passphrase
    if passphrase is None:
        if request.open_backing and reference.key_secret is not None:
            raise EncryptionError(f"No secret with id '{reference.key_secret}'")
        if request.open_backing:
            raise EncryptionError("Parameter 'encrypt.key-secret' is required for cipher")
        return _NoPassphrase()
    if header.crypt_method == CRYPT_AES:
        from qcowlib.codecs.legacy_aes import LegacyAes

        return LegacyAes(passphrase)
    from qcowlib.codecs.luks import open_luks

    pointer = header.crypto_header
    if pointer is None:
        raise FormatError("header", 32, "the encryption method LUKS needs an encryption header pointer")

    def read(offset: int, length: int) -> bytes:
        return state.storage.pread(length, pointer.offset + offset)

    return open_luks(read, passphrase, length=pointer.length, host_offset=pointer.offset)


def _backing_image(
    header: Header, image_name: str, reference: Reference, request: _Request
) -> Qcow2Image | RawImage | None:
    """The backing image of a layer, opened; None when it has none or it is to be left out."""
    if header.backing_file is None or not request.open_backing:
        return None
    if reference.backing is not None:
        target = reference.backing.reference
        if target is None:
            return None
    else:
        target = backing_reference(header.backing_file, header.backing_format, reference.path)
    if len(request.ancestors) >= MAX_CHAIN_LENGTH:
        raise ChainError(f"the backing chain is longer than {MAX_CHAIN_LENGTH} images")
    request.policy.admit(FileRequest("backing file", target.path, image_name))
    try:
        return _open_reference(target, replace(request, writable=False, data_file=None))
    except (ReferenceDenied, MissingDependency):
        raise
    except QcowError as error:
        prefix = "Could not open backing file: "
        raise ChainError(prefix + str(error), stock=prefix + error.stock) from error
