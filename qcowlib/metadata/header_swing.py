"""A header whose extensions or backing file name change, swung in by one write of the first sector.

    what lies behind the first sector, into free places of the first cluster -> flush -> the first sector -> flush

Until the last write the image has its old header, whole. A header that is longer than a sector is reached in two such
steps: the first one leaves the feature name table out, which serves messages only, and so fits into the sector but for
the name, which goes where neither the old header nor the new one has anything: the rest of the new one finds its place.

Source: qcow2.txt, "Header", "Header extensions".
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from errno import ENOSPC

from qcowlib.errors import OptionError
from qcowlib.format import constants as k
from qcowlib.format.header import Header
from qcowlib.metadata.transaction import MetadataTransaction

_SECTOR = 512


def laid_out(old: Header, changed: Header) -> Header:
    """A changed header, laid out as QEMU does and such that it can be swung in.

    Args:
        old: the header as it is in the file.
        changed: what it shall be.

    Raises:
        OptionError: the first cluster has no room for it beside the old one.
    """
    for candidate in (replace(changed, layout=None), _without_feature_names(changed)):
        with suppress(OptionError):
            if len(candidate.build()) <= _SECTOR or _step(old, candidate) is not None:
                return candidate
    message = "the header has no room for the new backing file name beside the old one"
    raise OptionError(message, stock="No space left in the file header", errno=ENOSPC)


def swing_header(transaction: MetadataTransaction, header: Header) -> None:
    """Make a header that `laid_out` gave the one of the image; durable on return."""
    built = header.build()
    if len(built) > _SECTOR:
        step = _step(transaction.state.header, header)
        assert step is not None
        offset, name = _name_place(step)
        _swing(transaction, offset, name, step)
    _swing(transaction, _SECTOR, built[_SECTOR:], header)


def _swing(transaction: MetadataTransaction, offset: int, rest: bytes, header: Header) -> None:
    """Write what lies behind the first sector, then that."""
    if rest and offset >= _SECTOR:
        transaction.storage.pwrite(rest, offset)
        transaction.storage.flush()
    transaction.storage.pwrite(header.build()[:_SECTOR], 0)
    transaction.state.header = header
    transaction.storage.flush()


def _step(old: Header, new: Header) -> Header | None:
    """The header between: all of it but the name in the first sector, and nothing where `old` or `new` has its own.

    None where there is no place for it.
    """
    step = _without_feature_names(new)
    if len(replace(step, backing_file=None, layout=None).build()) > _SECTOR:
        return None
    if step.backing_file is None:
        return step
    try:
        end = max(_SECTOR, _end(old), len(new.build()))
        return step.with_backing_name_at(-(-end // 8) * 8)
    except OptionError:
        return None


def _end(header: Header) -> int:
    """Where the last byte of the header in the file ends."""
    offset, name = _name_place(header)
    return max(offset + len(name), len(replace(header, backing_file=None, layout=None).build()))


def _without_feature_names(header: Header) -> Header:
    return replace(header, extensions=header.with_extension(k.EXTENSION_FEATURE_NAMES, None), layout=None)


def _name_place(header: Header) -> tuple[int, bytes]:
    """(host offset, bytes) of the backing file name; (0, empty) without one."""
    built = header.build()
    offset, length = int.from_bytes(built[8:16], "big"), int.from_bytes(built[16:20], "big")
    return offset, built[offset : offset + length]
