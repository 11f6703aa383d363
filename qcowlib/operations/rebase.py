"""Rebase: give an image another backing file, without changing what a guest reads.

    where the image has nothing of its own: old backing content != new one -> copied into the image -> flush
    new backing file name into a free place of the first cluster -> flush
    the first sector, which points to the name -> flush

Until the last write the image shows the old chain, from then on the new one; both read alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from qcowlib.errors import OptionError
from qcowlib.extents import ExtentKind
from qcowlib.format import constants as k
from qcowlib.format.extensions import HeaderExtension
from qcowlib.format.header import Header
from qcowlib.image.reader import ReadableImage
from qcowlib.image.writable import WritableQcow2Image

_PIECE = 2 << 20  # a multiple of every cluster size
_SECTOR = 512


def rebase(
    image: WritableQcow2Image,
    backing_file: str | None,
    backing_fmt: str | None = None,
    *,
    new: ReadableImage | None = None,
    unsafe: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Change the backing file of an image.

        with (
            qcowlib.open_image("overlay.qcow2", writable=True, policy=qcowlib.LocalFiles()) as overlay,
            qcowlib.open_image("older.qcow2", policy=qcowlib.LocalFiles()) as older,
        ):
            qcowlib.rebase(overlay, "older.qcow2", "qcow2", new=older)

    The open image goes on reading through its old backing file: close it afterwards.

    Args:
        image: opened for writing; with its backing file unless `unsafe`.
        backing_file: name of the new backing file as it shall stand in the header; None for none.
        backing_fmt: its format; to be given with `backing_file`.
        new: the new backing file, opened; None when there is none, or with `unsafe`.
        unsafe: change the name alone: for a backing file that was moved, or whose content is known to be the same.
        progress: called with (bytes looked at, bytes to look at).

    Returns: bytes copied into the image. All is durable.

    Raises:
        OptionError: the name or format is missing or does not fit. Nothing was changed.
        CorruptMetadata, StorageError: as for reads and writes; the image still has its old backing file.
    """
    if (backing_file is None) != (backing_fmt is None):
        raise OptionError("a backing file and its format go together")
    if not unsafe:
        if image.backing_left_out:
            raise OptionError("the old backing file must be opened to rebase safely")
        if (backing_file is None) != (new is None):
            raise OptionError("the new backing file must be opened to rebase safely")
    header = _new_header(image.header, backing_file, backing_fmt)
    copied = 0 if unsafe else _copy_differences(image, new, progress)
    image.flush()
    with image.exclusive() as transaction:
        offset, name = _name_place(header)
        if offset + len(name) > _SECTOR:
            transaction.storage.pwrite(name, offset)
            transaction.storage.flush()
        changes = {name: getattr(header, name) for name in ("backing_file", "extensions", "layout")}
        transaction.write_header(**changes)
        transaction.storage.flush()
    return copied


def _new_header(header: Header, backing_file: str | None, backing_fmt: str | None) -> Header:
    """The header with another backing name, such that one write of the first sector swings it."""
    extension = None if backing_fmt is None else HeaderExtension(k.EXTENSION_BACKING_FORMAT, backing_fmt.encode())
    extensions = header.with_extension(k.EXTENSION_BACKING_FORMAT, extension)
    changed = replace(header, backing_file=backing_file, extensions=extensions, layout=None)
    if len(changed.build()) <= _SECTOR:
        return changed
    old_offset, old_name = _name_place(header)
    for candidate in (changed, _without_names(changed)):
        fixed = len(replace(candidate, backing_file=None, layout=None).build())
        if fixed > _SECTOR:
            continue
        if backing_file is None or len(candidate.build()) <= _SECTOR:
            return candidate
        length = len(backing_file.encode("utf-8", "surrogateescape"))
        old_end = old_offset + len(old_name)
        # The old name stays whole until the first sector points elsewhere.
        for offset in (_SECTOR, -(-max(_SECTOR, old_end) // 8) * 8):
            if offset + length <= header.cluster_size and (offset >= old_end or offset + length <= old_offset):
                return candidate.with_backing_name_at(offset)
    raise OptionError("the header has no room for the new backing file name beside the old one")


def _without_names(header: Header) -> Header:
    """The header without its feature name table, which serves messages only."""
    return replace(header, extensions=header.with_extension(k.EXTENSION_FEATURE_NAMES, None), layout=None)


def _name_place(header: Header) -> tuple[int, bytes]:
    """(host offset, bytes) of the backing file name; (0, empty) without one."""
    built = header.build()
    offset, length = int.from_bytes(built[8:16], "big"), int.from_bytes(built[16:20], "big")
    return offset, built[offset : offset + length]


def _copy_differences(
    image: WritableQcow2Image, new: ReadableImage | None, progress: Callable[[int, int], None] | None
) -> int:
    """Give the image of its own what the new backing file would show differently."""
    old, cluster, copied = image.backing, image.cluster_size, 0
    # What is written while the mapping is walked would be walked as well.
    gaps = list(_gaps(image))
    total, done = sum(end - start for start, end in gaps), 0
    for start, end in gaps:
        for offset in range(start, end, _PIECE):
            length = min(_PIECE, end - offset)
            before, after = _content(old, offset, length), _content(new, offset, length)
            if before != after:
                copied += _write_differing(image, offset, before, after, cluster)
            done += length
            if progress is not None:
                progress(done, total)
    return copied


def _gaps(image: WritableQcow2Image) -> Iterator[tuple[int, int]]:
    """The guest ranges (start, end) that the image leaves to its backing file."""
    for table in image.layer_extents(0, image.size):
        chosen = np.flatnonzero(table.kind == ExtentKind.UNALLOCATED)
        for row in chosen.tolist():
            start = int(table.start[row])
            yield start, start + int(table.length[row])


def _content(image: ReadableImage | None, offset: int, length: int) -> bytes:
    """Guest bytes of a backing file as they show through: zeroes behind its end."""
    inside = 0 if image is None else max(0, min(length, image.size - offset))
    data = image.read(offset, inside) if image is not None and inside else b""
    return data.ljust(length, b"\0")


def _write_differing(image: WritableQcow2Image, offset: int, before: bytes, after: bytes, cluster: int) -> int:
    """Write the clusters of a piece that differ; returns the bytes written."""
    written, position = 0, 0
    while position < len(before):
        # Pieces begin inside a cluster where the image has a part of it (subclusters).
        end = min(len(before), position + cluster - (offset + position) % cluster)
        if before[position:end] != after[position:end]:
            piece = before[position:end]
            if any(piece):
                image.write(offset + position, piece)
            else:
                image.write_zeroes(offset + position, len(piece))
            written += len(piece)
        position = end
    return written
