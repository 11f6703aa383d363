"""A header read for a repair: fields that can be had otherwise are put right where they are unusable.

refcount table, bitmaps     taken as empty: the one is made anew, the others are dropped
size of the L1 table        what the disk size needs
place of the L1 table       0: it is looked for
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

from qcowlib.addresses import Geometry
from qcowlib.errors import FormatError, UnsupportedFeature
from qcowlib.format.constants import MAX_CLUSTER_BITS, MAX_INT64, MIN_CLUSTER_BITS
from qcowlib.format.features import Autoclear, Incompatible
from qcowlib.format.header import Header, header_span, parse_header
from qcowlib.storage.protocol import ReadStorage

_SECTOR = 512


def rescue_header(storage: ReadStorage) -> Header:
    """The header of a qcow2 file, with as few fields put right as it takes.

    Raises:
        FormatError, UnsupportedFeature: the header is damaged beyond that.
        StorageError: the file cannot be read.
    """
    data = storage.pread(header_span(storage.pread(_SECTOR, 0)), 0)
    try:
        return parse_header(data, storage.size(), for_check=True)
    except UnsupportedFeature:
        raise
    except FormatError:
        for number in range(1, len(_REMEDIES) + 1):
            for remedies in combinations(_REMEDIES, number):
                changed = bytearray(data.ljust(_SECTOR, b"\0"))
                for remedy in remedies:
                    remedy(changed)
                try:
                    return parse_header(bytes(changed), storage.size(), for_check=True)
                except FormatError:
                    continue
        raise


def _without_refcounts(header: bytearray) -> None:
    header[48:60] = bytes(12)


def _without_bitmaps(header: bytearray) -> None:
    if header[7] >= 3:
        header[95] &= ~Autoclear.BITMAPS & 0xFF


def _with_l1_size(header: bytearray) -> None:
    cluster_bits, size = int.from_bytes(header[20:24], "big"), int.from_bytes(header[24:32], "big")
    if MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS and size <= MAX_INT64:
        extended_l2 = header[7] >= 3 and bool(header[79] & Incompatible.EXTENDED_L2)
        geometry = Geometry(cluster_bits, extended_l2=extended_l2)
        needed, said = geometry.l1_entries_for(size), int.from_bytes(header[36:40], "big")
        # Were the disk size the wrong one, a longer table would reach into what lies behind it.
        if geometry.clusters_for(8 * needed) <= max(1, geometry.clusters_for(8 * said)):
            header[36:40] = needed.to_bytes(4, "big")


def _without_l1_place(header: bytearray) -> None:
    header[40:48] = bytes(8)


_REMEDIES: tuple[Callable[[bytearray], None], ...] = (
    _without_refcounts,
    _without_bitmaps,
    _with_l1_size,
    _without_l1_place,
)
