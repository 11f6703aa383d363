"""The memory of a snapshot from one place to the other, offline.

    export: qcow2 file, internal snapshot -> migration stream -> memory file, which `-incoming` loads
    import: memory file -> migration stream -> vm state of an internal snapshot, which `snapshot-load` loads

Both are the same bytes. Nothing but the image is opened; its locks keep a running guest's image safe.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import qcowlib
from snapshot.errors import MemoryFileError
from snapshot.stream import Seekable, StreamFacts, Window, migration_stream, read_facts

Progress = Callable[[int, int], None]

_CHUNK = 1 << 20


def memory_file_facts(path: str | os.PathLike[str]) -> StreamFacts:
    """What a memory file says about itself, QEMU's or libvirt's. Raises MemoryFileError."""
    name = os.fspath(path)
    with _reading(name) as file:
        return read_facts(migration_stream(file, name), name)


def vmstate_facts(image_path: str, snapshot: str) -> StreamFacts:
    """What the vm state of an internal snapshot says about itself.

    Args:
        image_path: the qcow2 file; it may be in use.
        snapshot: id or name.

    Raises: MemoryFileError: it has none, or it is damaged. QcowError: the image cannot be read.
    """
    with _vmstate(image_path, snapshot, force_share=True) as (stream, name):
        return read_facts(stream, name)


def export_memory(
    image_path: str, snapshot: str, output: str | os.PathLike[str], *, progress: Progress | None = None
) -> StreamFacts:
    """Write the vm state of an internal snapshot into a new memory file.

    Args:
        image_path: the qcow2 file; it must not be in use.
        snapshot: id or name in it.
        output: the memory file; it must not exist. It is readable by its owner alone: it is all the guest's memory.
        progress: called with the bytes written and the bytes in all.

    Returns: what the stream says about itself.
    Raises: MemoryFileError: no vm state, or one that is no whole migration stream; the file cannot be written. No file
        is left then. QcowError: the image cannot be read.
    """
    target = os.path.abspath(os.fspath(output))
    with _vmstate(image_path, snapshot, force_share=False) as (stream, name):
        facts = _whole(stream, name)
        stream.seek(0)
        with _new_file(target) as file:
            _copy(stream, file, facts.size, progress)
    return facts


def copy_vmstate(image: int | str, snapshot: str, target: BinaryIO, progress: Progress) -> None:
    """Copy the vm state of an internal snapshot into a file that is open.

    Args:
        image: descriptor of the qcow2 file; or its path, and then others may have it in use.
        snapshot: id or name in it.
        target: the file; written from where it stands.
        progress: called with the bytes written and the bytes in all; what it raises ends the copy.

    Raises: MemoryFileError: no vm state, or one that is no whole migration stream. OSError: the file cannot be written.
    """
    with _vmstate(image, snapshot, force_share=isinstance(image, str)) as (stream, name):
        facts = _whole(stream, name)
        stream.seek(0)
        _copy(stream, target, facts.size, progress)


def import_memory(
    memory_file: str | os.PathLike[str], image_path: str, snapshot: str, *, machine: str | None = None
) -> StreamFacts:
    """Put a memory file into a qcow2 file as the vm state of an internal snapshot that has none.

    Args:
        memory_file: a whole migration stream, QEMU's memory file or libvirt's.
        image_path: the qcow2 file; it must not be in use.
        snapshot: id or name of the snapshot, whose disks must be those of the memory: nobody can check that.
        machine: machine type that the stream must be of; None takes any.

    Returns: what the stream says about itself.
    Raises: MemoryFileError: not a whole migration stream, or of another machine. QcowError: no such snapshot, it has a
        vm state already, the image is in use or cannot be written. Nothing was changed.
    """
    name = os.fspath(memory_file)
    with _reading(name) as file:
        stream = migration_stream(file, name)
        facts = _whole(stream, name)
        if machine is not None and facts.machine is not None and facts.machine != machine:
            raise MemoryFileError(f"{name}: the memory of a {facts.machine}, the snapshot is of a {machine}")
        stream.seek(0)
        with qcowlib.open_image(image_path, format="qcow2", writable=True, open_backing=False) as image:
            if not isinstance(image, qcowlib.WritableQcow2Image):
                raise MemoryFileError(f"{image_path}: not a qcow2 file")
            qcowlib.attach_vmstate(image, snapshot, stream)
            image.flush()
    return facts


def _whole(stream: Window, name: str) -> StreamFacts:
    facts = read_facts(stream, name)
    if not facts.complete:
        raise MemoryFileError(f"{name}: the migration stream does not end as a whole one does: it was cut off")
    return facts


@contextmanager
def _vmstate(source: str | int, snapshot: str, *, force_share: bool) -> Iterator[tuple[Window, str]]:
    with (
        qcowlib.open_image(source, format="qcow2", open_backing=False, force_share=force_share) as image,
        image.open_snapshot(snapshot) as view,
    ):
        vmstate = view.vmstate
        if not vmstate.size:
            raise MemoryFileError(f"the snapshot '{snapshot}' in '{source}' has no memory")
        with vmstate.open_stream() as stream:
            yield Window(stream, 0, vmstate.size), vmstate.name


@contextmanager
def _reading(path: str) -> Iterator[Seekable]:
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - the error of opening is not one of reading
    except OSError as error:
        raise MemoryFileError(f"{path}: {error.strerror}") from None
    with file:
        try:
            yield file
        except OSError as error:
            raise MemoryFileError(f"{path}: {error.strerror}") from None


@contextmanager
def _new_file(path: str) -> Iterator[BinaryIO]:
    """A file that is whole and durable at the end of the block, or not there."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MemoryFileError(f"{path}: {error.strerror}") from None
    try:
        with open(descriptor, "wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        _sync_directory(os.path.dirname(path))
    except BaseException as error:
        os.unlink(path)
        if isinstance(error, OSError):
            raise MemoryFileError(f"{path}: {error.strerror}") from None
        raise


def _copy(stream: Window, file: BinaryIO, size: int, progress: Progress | None) -> None:
    done = 0
    while done < size:
        data = stream.read(_CHUNK)
        if not data:
            raise OSError(errno.EIO, "the vm state ended early")
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        done += len(data)
        if progress is not None:
            progress(done, size)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
