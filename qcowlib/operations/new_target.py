"""The images that conversions write: made anew, or taken as they are.

    NewTarget -> created() -> made and filled under the name of something unfinished -> renamed
                 taken()   -> an existing image, written in place

Before: no file of the source may be written. After a failure the error says what has become of the target.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from qcowlib.errors import ImageStateError, OptionError, QcowError, StorageError
from qcowlib.image.chain import chain_layers
from qcowlib.image.create_target import same_file
from qcowlib.image.creation import create_image
from qcowlib.image.creation_options import CreationOptions
from qcowlib.image.opening import open_image
from qcowlib.image.policy import DenyReferences, FileRequest, OpenPolicy
from qcowlib.image.qcow2 import MappedLayer
from qcowlib.image.raw import RawImage
from qcowlib.image.reader import ReadableImage
from qcowlib.image.references import Reference, data_file_path
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.copying import NEVER, WritableImage
from qcowlib.operations.offload import host_file
from qcowlib.operations.unfinished import UnfinishedFile
from qcowlib.storage.local import LocalFile
from qcowlib.storage.protocol import ReadStorage


@dataclass(frozen=True)
class NewTarget:
    """An image to be made.

    Attributes:
        path: its name.
        size: of the disk in bytes.
        format: "raw" or "qcow2".
        options: see `CreationOptions`.
        backing_file, backing_fmt: of the new image.
        passphrase: of an encrypted one; by default that of `options`.
        policy: which files that it names may be opened (its backing file).
        durable: it is on disk at the end; False does not wait for that.
    """

    path: str
    size: int
    format: str
    options: CreationOptions
    backing_file: str | None = None
    backing_fmt: str | None = None
    passphrase: str | bytes | None = None
    policy: OpenPolicy | None = None
    durable: bool = True

    def zero_from(self, image: WritableImage) -> int:
        """The guest offset from which on the new image reads as zeroes."""
        if self.sees_old_bytes(image):
            return NEVER
        if self.backing_file is None:
            return 0
        return NEVER if image.backing is None else image.backing.size

    def sees_old_bytes(self, image: WritableImage) -> bool:
        """Whether guest bytes that were never written may be what the host had there before."""
        if not isinstance(image, WritableQcow2Image):
            return is_device(image.storage)
        mapped = self.options.get("preallocation", "off") != "off" or image.header.has_data_file
        return mapped and (image.cipher is not None or is_device(image.state.data_storage))


@contextmanager
def created(new: NewTarget) -> Iterator[WritableImage]:
    """A new image, open for writing; it has its name when the block is left.

    Raises: as `create_image` and `open_image`. Nothing is left of a new file when the block fails, and an existing one
        has lost its content; the error says so.
    """
    data_path = _data_path(new)
    data_existed = data_path is not None and os.path.lexists(data_path)
    file = UnfinishedFile(new.path)
    try:
        _create(new, file.name)
    except QcowError:
        file.restore()
        raise
    except BaseException as error:
        if file.untouched:
            file.restore()
        else:
            file.give_up(error)
        raise
    try:
        passphrase = new.passphrase or new.options.get("encrypt_passphrase")
        policy = new.policy if data_path is None else _WithDataFile(new.policy or DenyReferences(), data_path)
        with open_image(file.name, format=new.format, writable=True, policy=policy, passphrase=passphrase) as image:
            for host_file in local_files(image):
                host_file.durable = new.durable
                if host_file.name == file.name:
                    host_file.name = new.path
            yield image
        file.finish(durable=new.durable)
    except BaseException as error:
        file.give_up(error)
        if data_path is not None and not data_existed:
            with suppress(OSError):
                os.unlink(data_path)
        raise


class _WithDataFile:
    """The caller's policy, and the data file that the caller has named.

    Args:
        policy: the caller's.
        path: of the data file.
    """

    def __init__(self, policy: OpenPolicy, path: str) -> None:
        self._policy = policy
        self._path = path

    def admit(self, request: FileRequest) -> None:
        """Allow the data file; leave all else to the policy."""
        if request.role != "data file" or not same_file(request.path, self._path):
            self._policy.admit(request)


@contextmanager
def taken(
    target: str | os.PathLike[str] | Reference,
    image_format: str,
    check: Callable[[WritableImage], None],
    *,
    policy: OpenPolicy | None,
    passphrase: str | bytes | None,
    durable: bool,
) -> Iterator[WritableImage]:
    """An existing image, open for writing, once `check` has admitted it. Later errors say that it is incomplete.

    Raises: as `open_image`.
    """
    begun = False
    try:
        with open_image(target, format=image_format, writable=True, policy=policy, passphrase=passphrase) as image:
            check(image)
            for file in local_files(image):
                file.durable = durable
            begun = True
            yield image
    except BaseException as error:
        if begun:
            path = target.path if isinstance(target, Reference) else os.fspath(target)
            error.add_note(f"'{path}' is incomplete")
        raise


def refuse_own_source(images: Sequence[ReadableImage], *paths: str | None) -> None:
    """Raise when one of the files to be written is a file that the images are read from.

    Raises:
        ImageStateError: it is.
    """
    for path in paths:
        try:
            target = None if path is None else os.stat(path)
        except (OSError, ValueError):
            continue
        for image in images:
            for file in chain_files(image):
                if target is not None and os.path.samestat(os.fstat(file.fileno()), target):
                    raise ImageStateError(f"'{path}' is the source or a file of its chain; it was not changed")


def chain_files(image: ReadableImage) -> list[LocalFile]:
    """The host files that an image and the chain below it are read from."""
    return [file for layer in chain_layers(image) for file in local_files(layer)]


def local_files(layer: object) -> list[LocalFile]:
    """The host files of one image, without those below it."""
    storages: list[ReadStorage] = []
    if isinstance(layer, MappedLayer):
        storages = [layer.state.storage, layer.state.data_storage]
    elif isinstance(layer, RawImage):
        storages = [layer.storage]
    files: list[LocalFile] = []
    for file in map(host_file, storages):
        if file is not None and file not in files:
            files.append(file)
    return files


def _data_path(new: NewTarget) -> str | None:
    name = new.options.get("data_file")
    if name is None or new.format == "raw":
        return None
    path = data_file_path(name, "")
    if same_file(path, new.path):
        raise OptionError("The data file and the image are the same file")
    return path


def _create(new: NewTarget, path: str) -> None:
    """Make the image under the name `path`; errors name the target."""
    try:
        create_image(
            path,
            new.size,
            format=new.format,
            backing_file=new.backing_file,
            backing_fmt=new.backing_fmt,
            policy=new.policy,
            **new.options,
        )
    except StorageError as error:
        if error.name != path or path == new.path:
            raise
        told = StorageError(new.path, error.action, error.cause)
        for note in getattr(error, "__notes__", ()):
            told.add_note(note.replace(path, new.path))
        raise told from None


def is_device(storage: ReadStorage) -> bool:
    """Whether a storage is a block device: what nobody wrote is not zero there."""
    return isinstance(storage, LocalFile) and storage.is_block_device
