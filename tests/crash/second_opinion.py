"""A second reader of qcow2 images, for proofs: nothing but struct and zlib, nothing shared with the library.

    bytes of an image -> SecondOpinion: references to every host cluster, stored refcounts, COPIED flags,
                                        content of the active layer and of each snapshot

Slow and plain on purpose. It knows versions 2 and 3, all refcount widths, compressed and zero clusters, subclusters,
bitmaps and a backing file given as bytes; no encryption or external data files. It trusts nothing: a structure beyond
the end of the file raises.

Source: QEMU's docs/interop/qcow2.txt.
"""

import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FF_FFFF_FFFF_FE00


@dataclass(frozen=True)
class Saved:
    """One entry of the snapshot table."""

    id: str
    name: str
    l1_offset: int
    l1_size: int
    disk_size: int
    vm_state_size: int


class Marked(NamedTuple):
    """One bitmap: its flags (1: in use, 2: records writes), log2 of its granularity, the numbers of its set bits."""

    flags: int
    granularity_bits: int
    bits: frozenset[int]


class SecondOpinion:
    """What the bytes of an image say.

    Args:
        data: the file.
        backing: content of the backing file.

    Attributes:
        references: how often each host cluster is referred to; by cluster index.
        refcounts: stored refcounts that are not 0.
        too_low: clusters whose refcount is below the number of references (breaks I1).
        shared_copied: clusters that are referred to more than once, by an entry with COPIED in the active layer too
            (breaks I2).
        leaks: clusters whose refcount is too high.
        wrong_copied: entries of the active layer whose COPIED flag is not what the refcount says.
        snapshots: the snapshot table.
        bitmaps: the bitmaps by name; None where the image says that they are not to be trusted.
        dirty: whether the image says that its refcounts may be wrong.
    """

    def __init__(self, data: bytes, backing: bytes | None = None) -> None:
        self.data = data
        self.backing = backing
        self._header()
        self.snapshots = list(self._snapshot_table())
        self.references: Counter[int] = Counter()
        self._copied_clusters: set[int] = set()
        self._flags: list[tuple[int, bool]] = []
        self._l2_tables: dict[int, list[tuple[int, int, int]]] = {}
        self.bitmaps: dict[str, Marked] | None = None
        self._count()
        self._read_bitmaps()
        self.refcounts = self._stored_refcounts()
        everything = set(self.references) | set(self.refcounts)
        stored, counted = self.refcounts, self.references
        self.too_low = sorted(index for index in everything if stored.get(index, 0) < counted[index])
        self.leaks = sorted(index for index in everything if stored.get(index, 0) > counted[index])
        self.shared_copied = sorted(index for index in self._copied_clusters if counted[index] > 1)
        self.wrong_copied = sum(flag != (stored.get(index, 0) == 1) for index, flag in self._flags)

    @property
    def clean(self) -> bool:
        """Whether every refcount and every COPIED flag is exactly right."""
        return not (self.too_low or self.leaks or self.wrong_copied)

    def content(self) -> bytes:
        """The active layer."""
        return self._content(self._active_l1, self.size)

    def snapshot_content(self, saved: Saved) -> bytes:
        """What a snapshot holds."""
        return self._content(self._table(saved.l1_offset, saved.l1_size), saved.disk_size)

    def vm_state(self, saved: Saved) -> bytes:
        """The vm state of a snapshot; it lies behind what the disk takes of the L1 table."""
        per_table = self.cluster_size // (16 if self._extended else 8) * self.cluster_size
        start = -(-saved.disk_size // per_table) * per_table
        return self._content(self._table(saved.l1_offset, saved.l1_size), saved.vm_state_size, start)

    def _header(self) -> None:
        fields = struct.unpack_from(">IIQIIQIIQQIIQ", self.data)
        magic, self.version, _, _, bits, self.size, crypt, l1_size, l1_offset, table, clusters, saved, at = fields
        assert magic == 0x514649FB, "the magic is gone"
        assert crypt == 0
        incompatible, order = 0, 4
        if self.version == 3:
            incompatible, order = struct.unpack_from(">Q16xI", self.data, 72)
        assert incompatible & ~0b10001 == 0, f"incompatible features {incompatible:#x}"
        self.dirty = bool(incompatible & 1)
        self._extended = bool(incompatible & 16)
        self.cluster_bits, self.cluster_size, self._refcount_bits = bits, 1 << bits, 1 << order
        self._l1_place = l1_offset, l1_size
        self._active_l1 = self._table(l1_offset, l1_size)
        self._refcount_table_place = table, clusters << bits
        self._snapshots_place = at, saved

    def _bytes(self, offset: int, length: int) -> bytes:
        assert offset + length <= len(self.data), f"{length} bytes at {offset:#x} are not in the file"
        return self.data[offset : offset + length]

    def _table(self, offset: int, entries: int) -> tuple[int, ...]:
        return struct.unpack(f">{entries}Q", self._bytes(offset, entries * 8))

    def _snapshot_table(self) -> Iterator[Saved]:
        position, number = self._snapshots_place
        for _ in range(number):
            l1_offset, l1_size, id_length, name_length, _, _, _, vm_state, extra = struct.unpack_from(
                ">QIHHIIQII", self.data, position
            )
            if extra >= 8:
                (vm_state,) = struct.unpack_from(">Q", self.data, position + 40)
            size = struct.unpack_from(">Q", self.data, position + 48)[0] if extra >= 16 else self.size
            strings = position + 40 + extra
            identity = self._bytes(strings, id_length).decode()
            name = self._bytes(strings + id_length, name_length).decode()
            yield Saved(identity, name, l1_offset, l1_size, size, vm_state)
            position = (strings + id_length + name_length + 7) & ~7
        self._snapshots_end = position

    def _count(self) -> None:
        size = self.cluster_size
        self._refer(0, size)
        self._refer(*self._refcount_table_place)
        for (entry,) in struct.iter_unpack(">Q", self._bytes(*self._refcount_table_place)):
            if entry:
                self._refer(entry, size)
        if self.snapshots:
            start = self._snapshots_place[0]
            self._refer(start, self._snapshots_end - start)
        self._refer(self._l1_place[0], self._l1_place[1] * 8)
        self._count_tree(self._active_l1, True)
        for saved in self.snapshots:
            self._refer(saved.l1_offset, saved.l1_size * 8)
            self._count_tree(self._table(saved.l1_offset, saved.l1_size), False)

    def _read_bitmaps(self) -> None:
        """The bitmap directory, the tables and the bits."""
        if self.version < 3:
            return
        autoclear, header_length = struct.unpack_from(">Q4xI", self.data, 88)
        end = struct.unpack_from(">Q", self.data, 8)[0] or self.cluster_size
        position, pointer = header_length, None
        while position < end:
            magic, length = struct.unpack_from(">II", self.data, position)
            if not magic:
                break
            if magic == 0x23852875:
                pointer = struct.unpack_from(">I4xQQ", self.data, position + 8)
            position += 8 + length + -length % 8
        if pointer is None or not autoclear & 1:
            return
        count, size, position = pointer
        self._refer(position, size)
        self.bitmaps, end = {}, position + size
        while position < end:
            table, entries, flags, kind, bits, name_length, extra = struct.unpack_from(">QIIBBHI", self.data, position)
            assert (kind, extra, flags & ~3) == (1, 0, 0), "an entry of the bitmap directory is not valid"
            name = self._bytes(position + 24, name_length).decode()
            self._refer(table, entries * 8)
            self.bitmaps[name] = Marked(flags, bits, frozenset(self._set_bits(table, entries, bits, flags & 1)))
            position += 24 + name_length + -name_length % 8
        assert (position, len(self.bitmaps)) == (end, count), "the bitmap directory is not what the header says"

    def _set_bits(self, table: int, entries: int, granularity_bits: int, in_use: int) -> Iterator[int]:
        per_cluster, number = self.cluster_size * 8, -(-self.size >> granularity_bits)
        assert in_use or entries == -(-(-(-number // 64) * 8) // self.cluster_size), "a bitmap table has another length"
        for index, entry in enumerate(self._table(table, entries)):
            first = index * per_cluster
            if entry & OFFSET:
                assert entry & ~OFFSET == 0
                self._refer(entry & OFFSET, self.cluster_size)
                data = self._bytes(entry & OFFSET, self.cluster_size)
                used = (place for place, byte in enumerate(data) if byte)
                found = (first + 8 * place + bit for place in used for bit in range(8) if data[place] >> bit & 1)
            else:
                assert entry in (0, 1)
                found = iter(range(first, first + per_cluster) if entry else ())
            for bit in found:
                assert in_use or bit < number, f"bit {bit} of {number} is set"
                yield bit

    def _refer(self, offset: int, length: int) -> None:
        if length:
            self.references.update(range(offset >> self.cluster_bits, (offset + length - 1 >> self.cluster_bits) + 1))

    def _count_tree(self, l1: tuple[int, ...], active: bool) -> None:
        for l1_entry in l1:
            table = l1_entry & OFFSET
            if not table:
                continue
            self._refer(table, self.cluster_size)
            self._flag(l1_entry, active)
            for _, entry, _ in self._l2(table):
                if entry & COMPRESSED:
                    self._refer(*self._compressed(entry))
                elif entry & OFFSET:
                    self._refer(entry & OFFSET, self.cluster_size)
                    self._flag(entry, active)

    def _flag(self, entry: int, active: bool) -> None:
        index = (entry & OFFSET) >> self.cluster_bits
        if active:
            self._flags.append((index, bool(entry & COPIED)))
            if entry & COPIED:
                self._copied_clusters.add(index)

    def _l2(self, offset: int) -> list[tuple[int, int, int]]:
        """(index, entry, bitmap) of the L2 entries that are not 0; the bitmap is 0 without subclusters."""
        if offset not in self._l2_tables:
            words = struct.unpack(f">{self.cluster_size // 8}Q", self._bytes(offset, self.cluster_size))
            if self._extended:
                pairs = enumerate(zip(words[0::2], words[1::2], strict=True))
                self._l2_tables[offset] = [(index, *pair) for index, pair in pairs if any(pair)]
            else:
                self._l2_tables[offset] = [(index, entry, 0) for index, entry in enumerate(words) if entry]
        return self._l2_tables[offset]

    def _compressed(self, entry: int) -> tuple[int, int]:
        """Host offset and length of compressed data."""
        shift = 62 - (self.cluster_bits - 8)
        offset = entry & (1 << shift) - 1
        sectors = ((entry & COMPRESSED - 1) >> shift) + 1
        return offset, sectors * 512 - offset % 512

    def _stored_refcounts(self) -> dict[int, int]:
        width, found = self._refcount_bits, {}
        per_block = self.cluster_size * 8 // width
        table = struct.iter_unpack(">Q", self._bytes(*self._refcount_table_place))
        for number, (offset,) in enumerate(table):
            if not offset:
                continue
            block = self._bytes(offset, self.cluster_size)
            if width < 8:
                counts = [
                    block[index * width // 8] >> index * width % 8 & (1 << width) - 1 for index in range(per_block)
                ]
            else:
                letter = {8: "B", 16: "H", 32: "I", 64: "Q"}[width]
                counts = list(struct.unpack(f">{per_block}{letter}", block))
            found.update({number * per_block + index: count for index, count in enumerate(counts) if count})
        return found

    def _content(self, l1: tuple[int, ...], size: int, base: int = 0) -> bytes:
        """`size` bytes from guest offset `base` on, which is not 0 behind the disk, where nothing shows through."""
        content = bytearray((b"" if base else self.backing or b"")[:size].ljust(size, b"\0"))
        per_table = self.cluster_size // (16 if self._extended else 8)
        for l1_index, l1_entry in enumerate(l1):
            first = l1_index * per_table * self.cluster_size - base
            if not l1_entry & OFFSET or not 0 <= first < size:
                continue
            for index, entry, bitmap in self._l2(l1_entry & OFFSET):
                for start, data in self._cluster(entry, bitmap):
                    place = first + index * self.cluster_size + start
                    inside = data[: max(0, size - place)]
                    content[place : place + len(inside)] = inside
        return bytes(content)

    def _cluster(self, entry: int, bitmap: int) -> Iterator[tuple[int, bytes]]:
        """(offset in the cluster, bytes) of what an L2 entry says; nothing where the backing file shows."""
        size, host = self.cluster_size, entry & OFFSET
        if entry & COMPRESSED:
            offset, length = self._compressed(entry)
            # The last sector of the file may be cut short.
            packed = self.data[offset : offset + length]
            plain = zlib.decompressobj(-12).decompress(packed, size)
            assert len(plain) == size, f"compressed cluster at {offset:#x} has {len(plain)} bytes"
            yield 0, plain
        elif self._extended and bitmap == 0xFFFF_FFFF:
            yield 0, self._data(host, size)
        elif self._extended:
            step = size // 32
            for number in range(32):
                if bitmap >> number & 1:
                    yield number * step, self._data(host + number * step, step)
                elif bitmap >> 32 + number & 1:
                    yield number * step, bytes(step)
        elif entry & 1 and self.version == 3:
            yield 0, bytes(size)
        elif host:
            yield 0, self._data(host, size)

    def _data(self, offset: int, length: int) -> bytes:
        """Guest data; a cluster at the end of the file may reach beyond it."""
        assert offset < len(self.data), f"guest data at {offset:#x} is not in the file"
        return self.data[offset : offset + length].ljust(length, b"\0")
