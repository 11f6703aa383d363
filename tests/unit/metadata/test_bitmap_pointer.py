"""The header's pointer to the bitmap directory: every layout of the first cluster, and every power cut in between."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcowlib.errors import OptionError
from qcowlib.format import constants as k
from qcowlib.format.extensions import BitmapsExtension, HeaderExtension, new_extensions
from qcowlib.format.features import Autoclear
from qcowlib.format.header import Header, parse_header
from qcowlib.metadata.bitmap_pointer import require_pointer_room, swing_bitmap_pointer
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import RecordingStorage, crash_states

OLD, NEW = BitmapsExtension(2, 96, 0x30000), BitmapsExtension(3, 144, 0x70000)
UNKNOWN = 0x12345678


def header(cluster_bits: int = 16, *, name: str | None = None, filler: int | None = None) -> Header:
    """A header as QEMU writes it; `filler` bytes of an unknown extension in front of what follows."""
    extensions = new_extensions(3, 1 << cluster_bits, backing_format="raw" if name else None)
    if filler is not None:
        extensions = (HeaderExtension(UNKNOWN, bytes(filler)), *extensions)
    return Header(
        version=3,
        cluster_bits=cluster_bits,
        size=1 << 20,
        l1_size=64,
        l1_table_offset=3 << cluster_bits,
        refcount_table_offset=1 << cluster_bits,
        refcount_table_clusters=1,
        backing_file=name,
        extensions=extensions,
    )


def with_bitmaps(plain: Header, *, live: bool = True) -> Header:
    """The header with OLD behind its other extensions."""
    bits = Autoclear.BITMAPS if live else 0
    return replace(plain, extensions=(*plain.extensions, OLD.build()), autoclear_features=bits)


def place(plain: Header) -> int:
    found = with_bitmaps(plain).extension_place(k.EXTENSION_BITMAPS)
    assert found is not None
    return found


PLAIN = {
    "in the first sector": header(12),
    "512 bytes in a cluster": header(9),
    "data begin with the second sector": header(),
    "in the second sector": header(name="/images/base"),
    "behind a long name": header(name="/" + "n" * 300),
    "behind the longest name": header(name="/" + "n" * 1022),
    "first sector, with a name": header(12, name="/" + "n" * 280),
    "name across the border": header(12, name="/" + "n" * 380),
    "data across a border": header(12, filler=368),
    "the extension across a border": header(12, filler=376),
    "the end marker across a border": header(12, filler=344),
}


def disk(of: Header) -> bytes:
    return of.build().ljust(4 << of.cluster_bits, b"\xee")


def swing(start: Header, to: BitmapsExtension | None) -> tuple[Header, RecordingStorage]:
    """The header afterwards, as returned, and what was written."""
    recording = RecordingStorage(BytesStorage(disk(start)))
    return swing_bitmap_pointer(recording, start, to), recording


def bare(of: Header) -> tuple[object, ...]:
    """All that must not change."""
    rest = tuple(extension for extension in of.extensions if extension.magic != k.EXTENSION_BITMAPS)
    return replace(of, extensions=(), layout=None, autoclear_features=of.autoclear_features & ~1), set(rest)


def outcomes(start: Header, recording: RecordingStorage) -> set[BitmapsExtension | None]:
    """What the headers say that a power cut may leave; all else is as before."""
    found = set()
    for state in crash_states(recording, disk(start), samples=30, seed=2):
        left = parse_header(state.storage().getvalue())
        assert bare(left) == bare(start), state.text
        found.add(left.bitmaps_extension)
    return found


@pytest.mark.parametrize("name", PLAIN)
def test_add(name: str) -> None:
    plain = parse_header(disk(PLAIN[name]))
    after, recording = swing(plain, NEW)
    assert after == parse_header(recording.pread(1 << 20, 0))
    assert after.bitmaps_extension == NEW
    assert bare(after) == bare(plain)
    assert outcomes(plain, recording) <= {None, NEW}


@pytest.mark.parametrize("name", PLAIN)
def test_replace(name: str) -> None:
    start = parse_header(disk(with_bitmaps(PLAIN[name])))
    after, recording = swing(start, NEW)
    assert after.bitmaps_extension == NEW
    assert bare(after) == bare(start)
    across = name in ("data across a border", "the extension across a border")
    between = {None} if across else set()  # they are dropped rather than mixed
    assert outcomes(start, recording) - between == {OLD, NEW}


@pytest.mark.parametrize("name", PLAIN)
def test_remove(name: str) -> None:
    start = parse_header(disk(with_bitmaps(PLAIN[name])))
    after, recording = swing(start, None)
    assert after.bitmaps_extension is None
    assert after.extension(k.EXTENSION_BITMAPS) is None, "QEMU would warn of it"
    assert bare(after) == bare(start)
    assert outcomes(start, recording) == {OLD, None}


@pytest.mark.parametrize("name", PLAIN)
def test_revive(name: str) -> None:
    """An extension that a program without bitmaps has left behind is used again."""
    start = parse_header(disk(with_bitmaps(PLAIN[name], live=False)))
    after, recording = swing(start, NEW)
    assert after.bitmaps_extension == NEW
    assert outcomes(start, recording) == {None, NEW}
    assert [each.magic for each in after.extensions].count(k.EXTENSION_BITMAPS) == 1


@pytest.mark.parametrize("name", PLAIN)
def test_add_and_remove_again(name: str) -> None:
    plain = parse_header(disk(PLAIN[name]))
    storage = BytesStorage(disk(plain))
    now = plain
    for extension in (NEW, None, OLD, NEW, None, OLD):
        now = swing_bitmap_pointer(storage, now, extension)
        assert (now.bitmaps_extension, bare(now)) == (extension, bare(plain))


def test_in_front_of_another_extension() -> None:
    """It is replaced in place; removed, it stays without its autoclear bit: to move what follows is not one write."""
    extensions = (*header().extensions, OLD.build(), HeaderExtension(UNKNOWN, bytes(600)))
    start = parse_header(disk(replace(header(), extensions=extensions, autoclear_features=Autoclear.BITMAPS)))
    after, recording = swing(start, NEW)
    assert after.extensions == (*header().extensions, NEW.build(), HeaderExtension(UNKNOWN, bytes(600)))
    assert outcomes(start, recording) == {OLD, NEW}
    after, recording = swing(start, None)
    assert after.bitmaps_extension is None
    assert after.extensions == start.extensions
    assert outcomes(start, recording) == {OLD, None}


def test_in_front_of_another_extension_in_the_first_sector() -> None:
    extensions = (OLD.build(), HeaderExtension(UNKNOWN, bytes(104)))
    start = parse_header(disk(replace(header(12), extensions=extensions, autoclear_features=Autoclear.BITMAPS)))
    after, recording = swing(start, None)
    assert after.extensions == extensions[1:]
    assert outcomes(start, recording) == {OLD, None}


@pytest.mark.parametrize("full", [header(9, filler=360), header(10, name="/" + "n" * 800), header(9, name="n" * 350)])
def test_no_room(full: Header) -> None:
    with pytest.raises(OptionError, match="no room"):
        require_pointer_room(full)
    recording = RecordingStorage(BytesStorage(disk(full)))
    with pytest.raises(OptionError, match="no room"):
        swing_bitmap_pointer(recording, full, NEW)
    assert recording.epochs == [[]], "something was written"


def test_room_where_it_is_enough() -> None:
    """Two kilobytes of cluster, a long name: it goes behind its old place."""
    plain = header(11, name="/" + "n" * 500)
    assert require_pointer_room(plain) is not None
    after, _ = swing(plain, NEW)
    assert (after.bitmaps_extension, after.backing_file) == (NEW, plain.backing_file)
