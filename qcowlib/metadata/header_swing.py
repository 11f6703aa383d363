"""A header whose extensions or backing file name change, swung in by one write of the first sector.

    new name into a free place of the first cluster -> flush -> the first sector, which points to it -> flush

Until the last write the image has its old header, whole. Where extensions and name do not fit into the sector, the name
goes behind it, beside the old one; the feature name table, which serves messages only, gives way if need be.

Source: qcow2.txt, "Header", "Header extensions".
"""

from __future__ import annotations

from dataclasses import replace
from errno import ENOSPC

from qcowlib.errors import OptionError
from qcowlib.format import constants as k
from qcowlib.format.header import Header
from qcowlib.metadata.transaction import MetadataTransaction

_SECTOR = 512


def laid_out(old: Header, changed: Header) -> Header:
    """A changed header, laid out such that one write of the first sector swings it.

    Args:
        old: the header as it is in the file.
        changed: what it shall be.

    Raises:
        OptionError: the first cluster has no room for it beside the old one.
    """
    changed = replace(changed, layout=None)
    if len(changed.build()) <= _SECTOR:
        return changed
    old_offset, old_name = _name_place(old)
    for candidate in (changed, _without_feature_names(changed)):
        fixed = len(replace(candidate, backing_file=None, layout=None).build())
        if fixed > _SECTOR:
            continue
        if candidate.backing_file is None or len(candidate.build()) <= _SECTOR:
            return candidate
        length = len(candidate.backing_file.encode("utf-8", "surrogateescape"))
        old_end = old_offset + len(old_name)
        # The old name stays whole until the first sector points elsewhere.
        for offset in (_SECTOR, -(-max(_SECTOR, old_end) // 8) * 8):
            if offset + length <= old.cluster_size and (offset >= old_end or offset + length <= old_offset):
                return candidate.with_backing_name_at(offset)
    message = "the header has no room for the new backing file name beside the old one"
    raise OptionError(message, stock="No space left in the file header", errno=ENOSPC)


def swing_header(transaction: MetadataTransaction, header: Header) -> None:
    """Make a header that `laid_out` gave the one of the image; durable on return."""
    offset, name = _name_place(header)
    if offset + len(name) > _SECTOR:
        transaction.storage.pwrite(name, offset)
        transaction.storage.flush()
    transaction.storage.pwrite(header.build()[:_SECTOR], 0)
    transaction.state.header = header
    transaction.storage.flush()


def _without_feature_names(header: Header) -> Header:
    return replace(header, extensions=header.with_extension(k.EXTENSION_FEATURE_NAMES, None), layout=None)


def _name_place(header: Header) -> tuple[int, bytes]:
    """(host offset, bytes) of the backing file name; (0, empty) without one."""
    built = header.build()
    offset, length = int.from_bytes(built[8:16], "big"), int.from_bytes(built[16:20], "big")
    return offset, built[offset : offset + length]
