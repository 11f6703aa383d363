"""What a migration stream says about itself: machine type, RAM blocks, devices; and whether it is whole.

    file object -> read_facts -> StreamFacts

A memory file and the vm state of an internal snapshot are the same: "QEVM", version 3, the machine type, a list of RAM
blocks, pages, devices, and at the very end a description of the devices in JSON. Source: QEMU's migration/savevm.c and
ram.c; facts only.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Protocol

from snapshot.errors import MemoryFileError

MAGIC = b"QEVM\0\0\0\3"

_CONFIGURATION, _SECTION_START, _VM_DESCRIPTION = 0x07, 0x01, 0x06
_MEMORY_SIZE = 0x04  # flag beside the size of all RAM blocks
_MAX_TAIL = 4 << 20  # the description of an ordinary machine has some 100 KiB
_MAX_BLOCKS = 10_000
_LIBVIRT = b"LibvirtQemudSave"
_LIBVIRT_PARTIAL = b"LibvirtQemudPart"
_LIBVIRT_HEADER = 92


class Seekable(Protocol):
    """A binary file object."""

    def read(self, size: int = -1, /) -> bytes | None:
        """At most so many bytes; empty at the end."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to an offset."""
        ...


@dataclass(frozen=True)
class StreamFacts:
    """What a stream says about itself.

    Attributes:
        size: bytes of the stream.
        machine: the resolved machine type ("pc-i440fx-7.2"); None when the stream does not say it.
        ram_blocks: name and bytes of each block of memory, ROMs and video memory included.
        devices: names of the saved devices, with "#instance" where it is not 0; empty when not described.
        complete: whether the stream ends as a whole one does. False: cut off, or made without a description.
    """

    size: int
    machine: str | None
    ram_blocks: tuple[tuple[str, int], ...]
    devices: tuple[str, ...]
    complete: bool


class Window:
    """A part of a file object as one of its own, from 0 to `size`.

    Args:
        file: the whole.
        start: offset of the part.
        size: its length.
    """

    def __init__(self, file: Seekable, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self.size = size
        self._position = 0

    def read(self, size: int = -1, /) -> bytes:
        """At most so many bytes; empty at the end."""
        left = max(self.size - self._position, 0)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left)) or b""
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to an offset."""
        self._position = max(offset + (0, self._position, self.size)[whence], 0)
        return self._position


def migration_stream(file: Seekable, name: str) -> Window:
    """The migration stream in a memory file: the whole file, or what follows the header that libvirt writes.

    Args:
        file: the memory file.
        name: for messages.

    Raises: MemoryFileError: neither, or compressed, or unfinished.
    """
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(_LIBVIRT_HEADER) or b""
    start = 0
    if head.startswith(_LIBVIRT_PARTIAL):
        raise MemoryFileError(f"{name}: libvirt did not finish this memory file")
    if head.startswith(_LIBVIRT) and len(head) == _LIBVIRT_HEADER:
        version, length, _, compressed = struct.unpack_from("<4I", head, len(_LIBVIRT))
        if version not in (1, 2) or compressed:
            raise MemoryFileError(f"{name}: libvirt's memory file is compressed, or of an unknown version")
        start = _LIBVIRT_HEADER + length
    window = Window(file, start, max(size - start, 0))
    if window.read(8) != MAGIC:
        raise MemoryFileError(f"{name}: not a migration stream of QEMU")
    window.seek(0)
    return window


def read_facts(stream: Window, name: str) -> StreamFacts:
    """What a stream says about itself; reads its start and its end only.

    Args:
        stream: the migration stream.
        name: for messages.

    Raises: MemoryFileError: it is none, or its start is damaged.
    """
    stream.seek(0)
    head = _Head(stream.read(1 << 20), name)
    if head.take(8) != MAGIC:
        raise MemoryFileError(f"{name}: not a migration stream of QEMU")
    machine = None
    if head.peek() == _CONFIGURATION:
        head.take(1)
        machine = head.text(head.number(4))
    devices = _devices(stream)
    return StreamFacts(stream.size, machine, _ram_blocks(head), devices or (), complete=devices is not None)


class _Head:
    def __init__(self, data: bytes, name: str) -> None:
        self._data = data
        self._name = name
        self._position = 0

    def peek(self) -> int:
        """The next byte; -1 at the end."""
        return self._data[self._position] if self._position < len(self._data) else -1

    def take(self, length: int) -> bytes:
        """The next bytes; an error when there are too few."""
        part = self._data[self._position : self._position + length]
        if len(part) != length:
            raise MemoryFileError(f"{self._name}: the migration stream is cut off")
        self._position += length
        return part

    def number(self, length: int) -> int:
        """The next big-endian number."""
        return int.from_bytes(self.take(length), "big")

    def text(self, length: int) -> str:
        """The next bytes as a name."""
        if length > 255:
            raise MemoryFileError(f"{self._name}: a name in the migration stream is too long")
        return self.take(length).decode("utf-8", "replace")


def _ram_blocks(head: _Head) -> tuple[tuple[str, int], ...]:
    """The list at the start of the section "ram", which is the first one; empty when another comes first."""
    if head.peek() != _SECTION_START:
        return ()
    head.take(5)
    if head.text(head.number(1)) != "ram":
        return ()
    head.take(8)
    total = head.number(8)
    if not total & _MEMORY_SIZE:
        return ()
    left = total & ~0xFFF
    blocks: list[tuple[str, int]] = []
    while left > 0 and len(blocks) < _MAX_BLOCKS:
        name = head.text(head.number(1))
        size = head.number(8)
        blocks.append((name, size))
        left -= max(size, 1)
    return tuple(blocks)


def _devices(stream: Window) -> tuple[str, ...] | None:
    """Names in the description that ends the stream; None when it does not end with one."""
    length = min(stream.size, _MAX_TAIL)
    stream.seek(stream.size - length)
    tail = b"".join(iter(lambda: stream.read(1 << 20), b""))
    # The end of the machine's state (0) stands before it, and its length before its text.
    start = b"\0" + bytes([_VM_DESCRIPTION])
    at = tail.find(start)
    while at >= 0:
        text_at = at + 6
        if tail[at + 2 : text_at + 1] == (len(tail) - text_at).to_bytes(4, "big", signed=True) + b"{":
            return _names(tail[text_at:])
        at = tail.find(start, at + 1)
    return None


def _names(text: bytes) -> tuple[str, ...] | None:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError):
        return None
    devices = description.get("devices") if isinstance(description, dict) else None
    names = []
    for device in devices if isinstance(devices, list) else []:
        if not isinstance(device, dict) or not isinstance(device.get("name"), str):
            return None
        instance = device.get("instance_id", 0)
        names.append(f"{device['name']}#{instance}" if instance else device["name"])
    return tuple(names)
