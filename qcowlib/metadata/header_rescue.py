"""A header read for a repair: fields that everything else can do without are taken as empty where they are unusable."""

from __future__ import annotations

from qcowlib.errors import FormatError, UnsupportedFeature
from qcowlib.format.features import Autoclear
from qcowlib.format.header import Header, header_span, parse_header
from qcowlib.storage.protocol import ReadStorage

_REFCOUNT_TABLE = slice(48, 60)  # offset and clusters
_AUTOCLEAR_LOW = 95  # the byte with the lowest autoclear bits, version 3
_SECTOR = 512


def rescue_header(storage: ReadStorage) -> Header:
    """The header of a qcow2 file; without a refcount table, or without bitmaps, where the header's are unusable.

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
        for candidate in (_without_refcounts(data), _without_bitmaps(data), _without_bitmaps(_without_refcounts(data))):
            try:
                return parse_header(candidate, storage.size(), for_check=True)
            except FormatError:
                continue
        raise


def _without_refcounts(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[_REFCOUNT_TABLE] = bytes(12)
    return bytes(changed)


def _without_bitmaps(data: bytes) -> bytes:
    changed = bytearray(data)
    if len(changed) > _AUTOCLEAR_LOW and changed[7] >= 3:
        changed[_AUTOCLEAR_LOW] &= ~Autoclear.BITMAPS & 0xFF
    return bytes(changed)
