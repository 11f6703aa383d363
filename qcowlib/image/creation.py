"""Making images: `create_image` and `create_overlay`.

    options -> checked -> size (from the backing file if not given) -> layout -> file made and locked
            -> data area, tables -> flush -> header -> flush

Nothing is touched before everything that can be checked is checked. The header comes last: until then the file is no
image. A file that a failed creation has made is removed again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Unpack

from qcowlib.errors import OptionError, StorageError
from qcowlib.image.create_target import fit_device, fresh_file, lengthen, same_file
from qcowlib.image.creation_options import (
    PREALLOCATION_MODES,
    RAW_OPTIONS,
    CreationOptions,
    Encryption,
    checked_size,
    qcow2_options,
    refuse_unknown,
)
from qcowlib.image.policy import OpenPolicy
from qcowlib.image.references import data_file_path
from qcowlib.storage.local import LocalFile
from qcowlib.units import round_up

if TYPE_CHECKING:
    from qcowlib.image.create_backing import BackingFacts
    from qcowlib.image.create_layout import Layout

PathName = str | os.PathLike[str]


def create_image(
    path: PathName,
    size: int | None = None,
    *,
    format: str = "qcow2",
    backing_file: str | None = None,
    backing_fmt: str | None = None,
    check_backing: bool = True,
    policy: OpenPolicy | None = None,
    **options: Unpack[CreationOptions],
) -> None:
    """Create a disk image; an existing file is replaced unless somebody uses it.

        create_image("disk.qcow2", 10 << 30, cluster_size=131072, lazy_refcounts=True)

    Args:
        path: name of the file, or of a block device.
        size: size of the disk in bytes, rounded up to whole sectors; None takes that of the backing file.
        format: "qcow2", "raw", or "luks" for a LUKS volume (with `encrypt_passphrase`), which is not opened here.
        backing_file: name of the backing file as it shall stand in the header; a relative one starts at the directory
            of `path`.
        backing_fmt: its format; to be given with `backing_file`.
        check_backing: open the backing file, to see that it is there and to take its size; False as with `-u`.
        policy: decides about the files that the backing file names in turn; None leaves them alone.
        options: see `CreationOptions`.

    Raises:
        OptionError: an option or the size is invalid; nothing was touched.
        ChainError: the backing file cannot be used; nothing was touched.
        ImageLocked: somebody uses the file; nothing was touched.
        StorageError: the file cannot be made or written. A file that was made is removed; the content of an existing
            one is kept when the host's space does not suffice, and lost otherwise.
    """
    name = os.fspath(path)
    if format == "raw":
        _create_raw(name, size, backing_file, options)
    elif format == "qcow2":
        _create_qcow2(name, size, backing_file, backing_fmt, options, check_backing, policy)
    elif format == "luks":
        from qcowlib.image.create_luks import create_luks_volume

        create_luks_volume(name, size, options)
    else:
        raise OptionError(f"Unknown file format '{format}'")


def create_overlay(
    path: PathName,
    backing_file: str,
    *,
    backing_fmt: str,
    size: int | None = None,
    check_backing: bool = True,
    policy: OpenPolicy | None = None,
    **options: Unpack[CreationOptions],
) -> None:
    """Create a qcow2 image on a backing file: an external snapshot of it.

        create_overlay("after.qcow2", "base.qcow2", backing_fmt="qcow2")

    Arguments and errors are those of `create_image`; without a size the overlay is as large as its backing file.
    """
    create_image(
        path,
        size,
        backing_file=backing_file,
        backing_fmt=backing_fmt,
        check_backing=check_backing,
        policy=policy,
        **options,
    )


def _create_raw(path: str, size: int | None, backing_file: str | None, options: CreationOptions) -> None:
    refuse_unknown(options, RAW_OPTIONS)
    if backing_file is not None:
        raise OptionError("Backing file not supported for file format 'raw'")
    if size is None:
        raise OptionError("Image creation needs a size parameter")
    preallocation = options.get("preallocation", "off")
    if preallocation not in PREALLOCATION_MODES:
        raise OptionError(f"invalid parameter value: {preallocation}")
    if preallocation == "metadata":
        raise OptionError("Unsupported preallocation mode: metadata")
    size = checked_size(size)
    space = 0 if preallocation == "off" else size
    with _size_limits("raw"), fresh_file(path, space=space, nocow=options.get("nocow", False)) as storage:
        lengthen(storage, 0, size, preallocation)
        storage.flush()


def _create_qcow2(
    path: str,
    size: int | None,
    backing_file: str | None,
    backing_fmt: str | None,
    options: CreationOptions,
    check_backing: bool,
    policy: OpenPolicy | None,
) -> None:
    from qcowlib.image.create_header import build_header
    from qcowlib.image.create_layout import plan_layout

    checked = qcow2_options(options, backing_file, backing_fmt)
    backing = None if backing_file is None else _backing(path, backing_file, backing_fmt, check_backing, policy)
    if size is None:
        size = None if backing is None else backing.size
    if size is None:
        raise OptionError("Image creation needs a size parameter")
    size = checked_size(size)
    data_path = _data_file_path(path, checked.data_file, backing)
    luks_area = _luks_area(checked.encryption)
    layout = plan_layout(
        checked.geometry,
        size,
        preallocation=checked.preallocation,
        data_file=data_path is not None,
        crypto_length=len(luks_area),
    )
    header = build_header(checked, layout, len(luks_area))
    reserves = checked.preallocation in ("falloc", "full")
    with ExitStack() as files:
        files.enter_context(_size_limits("qcow2"))
        space = layout.file_size if reserves and data_path is None else layout.metadata_bytes + len(luks_area)
        storage = files.enter_context(fresh_file(path, space=space, nocow=checked.nocow))
        if data_path is not None:
            space = layout.data_file_size if reserves else 0
            data_storage = files.enter_context(fresh_file(data_path, space=space, nocow=checked.nocow))
            lengthen(data_storage, 0, layout.data_file_size, checked.preallocation if reserves else "off")
            data_storage.flush()
        _write_image(storage, layout, checked.preallocation, header, luks_area)


def _write_image(storage: LocalFile, layout: Layout, preallocation: str, header: bytes, luks_area: bytes) -> None:
    """Fill an empty file; the header last, when all that it points to is durable."""
    cluster_size = layout.geometry.cluster_size
    start, end = layout.data_range
    if storage.is_block_device:
        fit_device(storage, layout.file_size, preallocation if end else "off")
        storage.write_zeroes(0, cluster_size)  # what was there before must not look like an image meanwhile
    if end > start:
        lengthen(storage, start, end, preallocation)
    for offset, data in layout.metadata_writes():
        storage.pwrite(data, offset)
    if luks_area:
        storage.pwrite(luks_area.ljust(round_up(len(luks_area), cluster_size), b"\0"), layout.crypto_offset)
    lengthen(storage, layout.file_size, layout.file_size, "off")
    storage.flush()
    storage.pwrite(header.ljust(cluster_size, b"\0"), 0)
    storage.flush()


def _backing(
    path: str, backing_file: str, backing_fmt: str | None, check: bool, policy: OpenPolicy | None
) -> BackingFacts:
    """The backing file's path and, when it is to be opened, format and size."""
    from qcowlib.image.create_backing import backing_facts

    facts = backing_facts(path, backing_file, backing_fmt, check=check, policy=policy)
    if backing_fmt is None:
        detected = "" if facts.format is None else f"\nDetected format of {facts.format}."
        raise OptionError(f"Backing file specified without backing format{detected}")
    return facts


def _data_file_path(path: str, data_file: str | None, backing: BackingFacts | None) -> str | None:
    """Where the external data file is made: as for QEMU, a relative name starts at the process's directory."""
    if data_file is None:
        return None
    data_path = data_file_path(data_file, "")
    if same_file(path, data_path):
        raise OptionError("The data file and the image are the same file")
    if backing is not None and backing.path is not None and same_file(backing.path, data_path):
        raise OptionError("The data file and the backing file are the same file")
    return data_path


def _luks_area(encryption: Encryption | None) -> bytes:
    """A new LUKS header with its key material; empty without one (the outdated AES keeps nothing in the file)."""
    if encryption is None or encryption.format != "luks":
        return b""
    from qcowlib.codecs.luks import create_luks

    area, _ = create_luks(encryption.passphrase, **encryption.luks)
    return area


@contextmanager
def _size_limits(format_name: str) -> Iterator[None]:
    """A file longer than the host's file system admits is a matter of the size option."""
    try:
        yield
    except StorageError as error:
        if error.cause.errno == errno.EFBIG:
            raise OptionError(f"The image size is too large for file format '{format_name}'") from error
        raise
