"""The header's pointer to the bitmap directory, swung so that a crash leaves the old directory or the new one.

The bitmaps extension is 32 bytes long and may lie anywhere in the first cluster, where QEMU writes it behind 392 bytes
of feature names: in most images it is in the second sector. A sector is written as a whole or not at all, so:

    replace   its 24 bytes of data are in one sector   one write of that sector
              they are in two                          autoclear bit off, write, autoclear bit on
    add       the header fits into a sector            one write
              it does not                              everything behind the first 8 bytes, these 8, the autoclear bit
    remove                                             autoclear bit off; then the extension becomes the end marker

Without its autoclear bit the extension means nothing: no bitmaps, which is true before the first one is added and after
the last one is removed, and the safe side in between.

Source: qcow2.txt, "Bitmaps extension" and the autoclear bit that belongs to it.
"""

from __future__ import annotations

from dataclasses import replace

from qcowlib.errors import OptionError
from qcowlib.format import constants as k
from qcowlib.format.extensions import BitmapsExtension, HeaderExtension
from qcowlib.format.features import Autoclear
from qcowlib.format.header import Header, parse_header
from qcowlib.storage.protocol import Storage

_SECTOR = 512
_HEAD = 8  # type and length of an extension
_AUTOCLEAR_AT = 88
_END_MARKER = bytes(8)


def swing_bitmap_pointer(storage: Storage, header: Header, extension: BitmapsExtension | None) -> Header:
    """Let the header name another bitmap directory, or none. What it names must be durable; this is when it returns.

    Args:
        storage: the qcow2 file.
        header: its header as it is on disk.
        extension: where the new directory is; None removes all bitmaps.

    Returns: the header as it is now.

    Raises:
        OptionError: the first cluster has no room for the extension; nothing was changed.
        StorageError: the host file failed.
    """
    pointer = _Pointer(storage, header)
    if extension is None:
        pointer.remove()
    elif pointer.place is not None:
        pointer.replace(extension.build())
    else:
        pointer.add(extension)
    storage.flush()
    return parse_header(storage.pread(header.cluster_size, 0), storage.size())


class _Pointer:
    """The bitmaps extension in the first cluster of a file.

    Attributes:
        place: host offset of the extension, None when there is none.
    """

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._header = header
        self._sector = bytearray(header.build()[:_SECTOR].ljust(_SECTOR, b"\0"))
        self.place = header.extension_place(k.EXTENSION_BITMAPS)

    @property
    def _live(self) -> bool:
        return bool(self._header.autoclear_features & Autoclear.BITMAPS)

    def remove(self) -> None:
        end = self._header.extensions_end
        if self.place is None:
            if self._live:
                self._put_first_sector(live=False)
            return
        last = self.place + _HEAD + k.BITMAPS_EXTENSION_SIZE == end
        without = replace(self._header, extensions=self._header.with_extension(k.EXTENSION_BITMAPS, None))
        if not last and len(without.build()) <= _SECTOR:
            self._sector[: len(without.build())] = without.build()
        elif last:
            self._patch(self.place, _END_MARKER)
        self._put_first_sector(live=False)
        if last and self.place >= _SECTOR:
            self._storage.flush()
            self._storage.pwrite(_END_MARKER, self.place)
        # In front of other extensions it stays: to move those is not one write, and without its bit it does no harm.

    def replace(self, extension: HeaderExtension) -> None:
        assert self.place is not None
        data_at = self.place + _HEAD
        in_one_sector = data_at // _SECTOR == (data_at + len(extension.data) - 1) // _SECTOR
        if self._live and in_one_sector and data_at >= _SECTOR:
            self._storage.pwrite(extension.data, data_at)
            return
        if self._live and not in_one_sector:
            self._put_first_sector(live=False)
            self._storage.flush()
        self._patch(data_at, extension.data)
        self._put_behind(data_at, extension.data)
        self._put_first_sector(live=True)

    def add(self, extension: BitmapsExtension) -> None:
        whole, name_place = _in_one_sector(self._header, extension), require_pointer_room(self._header)
        if whole is not None:
            self._sector[: len(whole)] = whole
            self._put_first_sector(live=True)
            return
        if name_place is not None:
            self._move_name(name_place)
        place, written = self._header.extensions_end, extension.build().build() + _END_MARKER
        self._patch(place, written)
        self._put_behind(place + _HEAD, written[_HEAD:])
        self._put_behind(place, written[:_HEAD])
        self._put_first_sector(live=True)

    def _move_name(self, place: int) -> None:
        """The old name stays whole until the first sector points to the new one."""
        start, length = _name(self._header)
        name = self._header.build()[start : start + length]
        self._patch(place, name)
        self._put_behind(place, name)
        self._sector[8:16] = place.to_bytes(8, "big")
        self._put_first_sector(live=False)
        self._storage.flush()

    def _patch(self, place: int, data: bytes) -> None:
        """Change the first sector in memory, as far as `data` lies in it."""
        inside = data[: max(0, _SECTOR - place)]
        self._sector[place : place + len(inside)] = inside

    def _put_behind(self, place: int, data: bytes) -> None:
        """Write what lies behind the first sector; durable afterwards."""
        behind = data[max(0, _SECTOR - place) :]
        if behind:
            self._storage.pwrite(behind, max(place, _SECTOR))
            self._storage.flush()

    def _put_first_sector(self, *, live: bool) -> None:
        bits = self._header.autoclear_features & ~Autoclear.BITMAPS | (Autoclear.BITMAPS if live else 0)
        self._sector[_AUTOCLEAR_AT : _AUTOCLEAR_AT + 8] = int(bits).to_bytes(8, "big")
        self._storage.pwrite(bytes(self._sector), 0)


def require_pointer_room(header: Header) -> int | None:
    """Make sure that the header can name a bitmap directory, before anything is written.

    Returns: where the backing file name has to go first; None where it may stay.

    Raises:
        OptionError: the first cluster has no room for the extension.
    """
    if header.extension_place(k.EXTENSION_BITMAPS) is not None or _in_one_sector(header, BitmapsExtension(1, 0, 0)):
        return None
    end = header.extensions_end + _HEAD + k.BITMAPS_EXTENSION_SIZE + len(_END_MARKER)
    start, length = _name(header)
    place = -(-max(end, start + length) // 8) * 8 if 0 < start < end else None
    if (end if place is None else place + length) > header.cluster_size:
        raise OptionError("the first cluster has no room for the header extension of bitmaps")
    return place


def _in_one_sector(header: Header, extension: BitmapsExtension) -> bytes | None:
    """The header with the extension, if all of it fits into the first sector."""
    extensions = header.with_extension(k.EXTENSION_BITMAPS, extension.build())
    try:
        built = replace(header, extensions=extensions).build()
    except OptionError:
        return None
    return built if len(built) <= _SECTOR else None


def _name(header: Header) -> tuple[int, int]:
    """Host offset and length of the backing file name; (0, 0) without one."""
    built = header.build()
    return int.from_bytes(built[8:16], "big"), int.from_bytes(built[16:20], "big")
