"""Commit: merge an overlay into the image that it is based on, or into one further down its chain.

    overlay, and the layers between it and the base
        -> data read, zeroes -> written to the base, enlarged if need be -> base flushed
    make_empty: L1 table zeroed -> flushed -> clusters freed, file cut

The layers above the base are only read. Writing the same bytes again does no harm, so a commit that was cut off is
simply done again; until it is finished the overlay shows the right content, because it covers every byte that was
changed in the base. It may be removed or emptied after that: from then on the base has it all.

Other overlays on the same base see other content afterwards; so do the layers between, and what an internal snapshot
of the overlay leaves to its backing file. The caller must know that nobody uses them.

Source: QEMU 7.2, `qemu-img commit`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from qcowlib.errors import ImageStateError
from qcowlib.extents import ExtentKind
from qcowlib.image.chain import chain_layers
from qcowlib.image.probe import PROBE_BYTES, probe_bytes, probe_format
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.raw import WritableRawImage
from qcowlib.image.reader import ReadableImage
from qcowlib.image.references import Reference, backing_reference, has_protocol
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.metadata.heal import require_enough_refcounts
from qcowlib.metadata.trees import count_tree, release_tree, write_active_l1
from qcowlib.operations.resize import resize

_PIECE = 2 << 20


def commit(
    overlay: Qcow2Image,
    base: WritableQcow2Image | WritableRawImage,
    *,
    format_guessed: bool = False,
    known_raw: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write everything that an overlay has allocated to its base, which gets at least its size.

        with (
            qcowlib.open_image("overlay.qcow2", open_backing=False) as overlay,
            qcowlib.open_image("base.qcow2", writable=True, policy=qcowlib.LocalFiles()) as base,
        ):
            qcowlib.commit(overlay, base)

    Args:
        overlay: opened without the base, which cannot be locked twice: with `open_backing=False`, or with its backing
            chain, of which `leave_out_backing` of the layer above the base has given up the rest.
        base: the image that the lowest layer of the overlay names as its backing file; opened for writing.
        format_guessed: nothing but its content says that the base is raw: it must not become something else.
        known_raw: more than the overlay's header says that the base is raw (a domain's description): its content is
            its guest's then, and may look like an image.
        progress: called with (bytes done, bytes to do).

    Returns: bytes of data written to the base, zeroes not counted. All is durable.

    Raises:
        CorruptMetadata: the overlay's mapping is damaged. Nothing was changed.
        ImageStateError: what is written to a raw base would make it look like another format, or it does already.
            Nothing was changed.
        OptionError: the base cannot be enlarged. Nothing was changed.
        StorageError: a host file failed; the commit can be done again.
    """
    if isinstance(base, WritableRawImage) and not known_raw:
        _require_raw(overlay, base, format_guessed=format_guessed)
    total = sum(run.end - run.start for run in _runs(overlay) if not run.zero)
    if overlay.size > base.size:
        base.resize(overlay.size, "off") if isinstance(base, WritableRawImage) else resize(base, overlay.size)
    done = 0
    for run in _runs(overlay):
        if run.zero:
            _write_zeroes(base, run.start, run.end - run.start)
            continue
        for offset in range(run.start, run.end, _PIECE):
            piece = min(_PIECE, run.end - offset)
            base.write(offset, overlay.read(offset, piece))
            done += piece
            if progress is not None:
                progress(done, total)
    base.flush()
    return done


def make_empty(image: WritableQcow2Image) -> None:
    """Give up everything that an overlay holds itself, so that it shows its backing file; snapshots and bitmaps stay.

        qcowlib.commit(overlay, base)
        qcowlib.make_empty(overlay)

    Made for an overlay that was committed: it reads the same before, after, and after a crash in between.

    Args:
        image: opened for writing.

    Raises:
        CorruptMetadata: the mapping is damaged, or a refcount too low: it cannot be told what to free. Nothing was
            changed.
        StorageError: the host file failed; the next writable open frees what is left.
    """
    with image.exclusive() as transaction:
        state = transaction.state
        require_enough_refcounts(state)
        counts = count_tree(state, state.l1)
        with transaction.direct_writes():
            # In place: while a part of it is written, that part shows the backing file, which has the same content.
            state.l1[:] = 0
            write_active_l1(transaction)
            transaction.flush()  # references must be gone before their clusters are free
            release_tree(transaction, counts)
            state.tables.clear()
            state.refresh_regions()
            if state.header.has_data_file:
                transaction.data_storage.discard(0, transaction.data_storage.size())
        transaction.trim()


def allocated_bytes(image: Qcow2Image) -> int:
    """Guest bytes that an image's own layer holds as data: what a commit of it has to move.

    Raises:
        CorruptMetadata: the mapping is damaged.
    """
    total = 0
    for table in image.layer_extents(0, image.size):
        stored = (table.kind == ExtentKind.DATA) | (table.kind == ExtentKind.COMPRESSED)
        total += int(np.sum(table.length[stored]))
    return total


class BackingLayer(NamedTuple):
    """An image of a chain.

    Attributes:
        above: the layer whose backing file it is.
        image: the image, as it is opened.
        reference: what it was opened from; its format is None when it was found by its content.
    """

    above: Qcow2Image
    image: ReadableImage
    reference: Reference


def find_backing(image: ReadableImage, reference: Reference, name: str | None = None) -> BackingLayer | None:
    """The image of a chain that a name stands for; None when there is none.

    Args:
        image: the top, opened with its backing chain.
        reference: what the top was opened from.
        name: a path, where a relative one starts at each image's own directory; None takes the first backing file.

    Source: QEMU 7.2; where protocols are involved names are compared as texts, else as files.
    """
    above = image
    while isinstance(above, Qcow2Image) and above.backing is not None and above.header.backing_file is not None:
        stated = above.header.backing_file
        if reference.backing is not None:
            stated = ""
            below = reference.backing.reference
            assert below is not None  # it is open
        else:
            below = backing_reference(stated, above.header.backing_format, reference.path)
        if name is None or _stands_for(name, stated, reference.path, below.path):
            return BackingLayer(above, above.backing, below)
        above, reference = above.backing, below
    return None


def _stands_for(name: str, stated: str, image_path: str, backing_path: str) -> bool:
    """Whether a name means the backing file of an image, whose header states it so (empty: it was overridden)."""
    if not stated:
        return name == backing_path
    if has_protocol(name) or has_protocol(stated):
        return name in (stated, backing_path)
    path = os.path.realpath(os.path.join(os.path.dirname(image_path), name))
    return os.path.exists(path) and path == os.path.realpath(backing_path)


class _Run(NamedTuple):
    """Guest bytes that the layers above the base have allocated: data, or zeroes."""

    start: int
    end: int
    zero: bool


_BASE, _DATA, _ZERO = 0, 1, 2


def _runs(overlay: Qcow2Image) -> Iterator[_Run]:
    """What the layers above the base have, equal neighbours of a batch joined."""
    lowest = len(chain_layers(overlay)) - 1
    for table in overlay.extents():
        unallocated = table.kind == ExtentKind.UNALLOCATED
        # What a layer in between does not reach is zero, whatever the base has there.
        content = np.where(unallocated | (table.kind == ExtentKind.ZERO), _ZERO, _DATA)
        content[unallocated & (table.layer == lowest)] = _BASE
        heads = np.flatnonzero(np.concatenate(([True], content[1:] != content[:-1])))
        starts = table.start[heads].tolist()
        ends = [*starts[1:], int(table.start[-1] + table.length[-1])]
        for start, end, kind in zip(starts, ends, content[heads].tolist(), strict=True):
            if kind != _BASE:
                yield _Run(start, end, kind == _ZERO)


def _require_raw(overlay: Qcow2Image, base: WritableRawImage, *, format_guessed: bool) -> None:
    """A raw base must not look like another format, nor begin to if it has no other sign of being raw."""
    detected = probe_format(base.storage)
    if detected != "raw":
        raise ImageStateError(f"'{base.name}' holds a {detected} image: as a raw image nothing is committed to it")
    if not format_guessed:
        return
    for run in _runs(overlay):
        if run.start >= PROBE_BYTES:
            return
        head = bytearray(base.read(0, min(PROBE_BYTES, base.size)).ljust(PROBE_BYTES, b"\0"))
        end = min(run.end, PROBE_BYTES)
        head[run.start : end] = bytes(end - run.start) if run.zero else overlay.read(run.start, end - run.start)
        future = probe_bytes(bytes(head), base.name)
        if future != "raw":
            rule = f"'{base.name}' would look like a {future} image afterwards; state its format in the overlay"
            raise ImageStateError(rule, errno=errno.EPERM)


def _write_zeroes(base: WritableQcow2Image | WritableRawImage, start: int, length: int) -> None:
    """Make a range zero, without its space where that is possible."""
    if isinstance(base, WritableQcow2Image):
        base.write_zeroes(start, length)
        return
    base.discard(start, length)
    for position, count, is_data in base.storage.data_ranges(start, length):
        if is_data:
            base.write_zeroes(position, count)
