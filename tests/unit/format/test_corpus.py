"""Every qcow2 image of the corpus: its structures parse where stock qemu-img opens it, and build to the same bytes."""

import os
from pathlib import Path
from typing import Any

import pytest

from qcowlib.errors import FormatError
from qcowlib.format.bitmap_directory import (
    BitmapEntry,
    build_bitmap_directory,
    check_bitmap_entry,
    parse_bitmap_directory,
)
from qcowlib.format.header import Header, parse_header
from qcowlib.format.snapshot_table import SnapshotEntry, build_snapshot_table, parse_snapshot_table
from tests.corpus import archives

pytestmark = pytest.mark.corpus

IMAGES = archives.manifest()["images"]
OPENED = [image for image in IMAGES if image["answers"]["info"].get("json", {}).get("format") == "qcow2"]
REFUSED = [image for image in IMAGES if image["answers"]["info"]["rc"] != 0]


def params(images: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(image, id=image["id"]) for image in images] or [pytest.param(None, id="no-corpus")]


class HostFile:
    """An image's host file, whose bytes behind the end read as zeroes."""

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self._path = path

    def read(self, offset: int, length: int) -> bytes:
        if offset >= self.size:
            return b""
        with open(self._path, "rb") as file:
            return os.pread(file.fileno(), length, offset)

    def read_padded(self, offset: int, length: int) -> bytes:
        return self.read(offset, length).ljust(length, b"\0")


def load(file: HostFile) -> tuple[Header, list[SnapshotEntry], list[BitmapEntry]]:
    """What qemu-img info looks at, with every structure built again and compared."""
    header = parse_header(file.read(0, 2 << 20), file.size)
    built = header.build()
    assert built == file.read_padded(0, len(built))

    snapshots = parse_snapshot_table(file.read, header, pad=True)
    built = build_snapshot_table(snapshots)
    assert built == file.read_padded(header.snapshots_offset, len(built))

    bitmaps: list[BitmapEntry] = []
    if header.bitmaps_extension is not None:
        extension = header.bitmaps_extension
        directory = file.read_padded(extension.directory_offset, extension.directory_size)
        bitmaps = parse_bitmap_directory(directory, extension)
        assert build_bitmap_directory(bitmaps) == directory
        for entry in bitmaps:
            check_bitmap_entry(entry, header.cluster_size, header.virtual_size)
    return header, snapshots, bitmaps


@pytest.mark.parametrize("image", params(OPENED))
def test_what_qemu_img_opens(image: dict[str, Any], corpus: Path) -> None:
    header, snapshots, bitmaps = load(HostFile(corpus / image["file"]))
    info = image["answers"]["info"]["json"]
    facts = info["format-specific"]["data"]
    assert header.virtual_size == info["virtual-size"]
    assert header.cluster_size == info["cluster-size"]
    assert header.dirty == info["dirty-flag"]
    assert header.corrupt == facts.get("corrupt", False)
    assert header.backing_file == info.get("backing-filename")
    assert header.backing_format == info.get("backing-filename-format")
    assert facts["compat"] == {2: "0.10", 3: "1.1"}[header.version]
    assert facts["refcount-bits"] == header.geometry.refcount_bits
    assert facts.get("extended-l2", False) == header.extended_l2
    assert facts["compression-type"] == ("zlib", "zstd")[header.compression_type]
    if header.has_data_file:
        assert facts.get("data-file") == header.data_file_name
        assert facts["data-file-raw"] == header.has_raw_data_file

    listed = info.get("snapshots", [])
    assert [(s.id, s.name, s.vm_state_size, s.icount) for s in snapshots[: len(listed)]] == [
        (row["id"], row["name"], row["vm-state-size"], row.get("icount")) for row in listed
    ]
    assert [(b.name, 1 << b.granularity_bits) for b in bitmaps] == [
        (row["name"], row["granularity"]) for row in facts.get("bitmaps", [])
    ]


@pytest.mark.parametrize("image", params(REFUSED))
def test_what_qemu_img_refuses(image: dict[str, Any], corpus: Path) -> None:
    with pytest.raises(FormatError):
        load(HostFile(corpus / image["file"]))
