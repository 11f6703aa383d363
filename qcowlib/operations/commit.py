"""Commit: merge an overlay into the image that it is based on.

    overlay's own extents -> data read, zeroes -> written to the base, in order -> base flushed

The overlay is only read. Writing the same bytes again does no harm, so a commit that was cut off is simply done again;
until it is finished the overlay shows the right content, because it covers every byte that was changed in the base.
Removing or emptying the overlay is the caller's matter, after this has returned.

Other overlays on the same base see other content afterwards; so do users of a smaller or larger disk. The caller must
know that there are none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcowlib.errors import OptionError
from qcowlib.extents import ExtentKind
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.raw import WritableRawImage
from qcowlib.image.writable import WritableQcow2Image

_PIECE = 2 << 20


def commit(
    overlay: Qcow2Image,
    base: WritableQcow2Image | WritableRawImage,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write everything that an overlay has allocated to its base.

        with (
            qcowlib.open_image("overlay.qcow2", open_backing=False) as overlay,
            qcowlib.open_image("base.qcow2", writable=True, policy=qcowlib.LocalFiles()) as base,
        ):
            qcowlib.commit(overlay, base)

    Args:
        overlay: opened with `open_backing=False`, because the base cannot be locked twice.
        base: the image that the overlay names as its backing file; opened for writing.
        progress: called with (bytes done, bytes to do).

    Returns: bytes of data written to the base, zeroes not counted. All is durable.

    Raises:
        OptionError: the overlay's disk is larger than the base's. Nothing was changed.
        CorruptMetadata: the overlay's mapping is damaged. What was written to the base is what the overlay shows.
        ImageStateError: the base has bitmaps that record changes.
        StorageError: the host file failed; the commit can be done again.
    """
    if overlay.size > base.size:
        raise OptionError(
            f"'{overlay.name}' has a disk of {overlay.size} bytes, its base one of {base.size}: enlarge the base first"
        )
    total = allocated_bytes(overlay)  # walks all of the mapping: damage is found before anything is written
    done = 0
    for table in overlay.layer_extents(0, overlay.size):
        for start, length, kind, _host, _host_length, _layer in table.rows():
            if kind == ExtentKind.ZERO:
                base.write_zeroes(start, length)
            elif kind != ExtentKind.UNALLOCATED:
                for offset in range(start, start + length, _PIECE):
                    piece = min(_PIECE, start + length - offset)
                    base.write(offset, overlay.read(offset, piece))
                    done += piece
                    if progress is not None:
                        progress(done, total)
    base.flush()
    return done


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
