"""Formats by their first bytes."""

import pytest

from qcowlib.image.probe import probe_bytes, probe_format
from qcowlib.storage.buffer import BytesStorage

VMDK_TEXT = b"# Disk DescriptorFile\n# more\n  \nversion=1\nCID=1\n"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"", "raw"),
        (b"\0" * 512, "raw"),
        (b"QFI\xfb", "raw"),
        (b"QFI\xfb\0\0\0\0", "raw"),
        (b"QFI\xfb\0\0\0\1", "qcow"),
        (b"QFI\xfb\0\0\0\2", "qcow2"),
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"QFI\xfb\xff\xff\xff\xff", "qcow2"),
        (b"KDMV\1\0\0\0", "vmdk"),
        (b"COWD", "vmdk"),
        (VMDK_TEXT, "vmdk"),
        (VMDK_TEXT.replace(b"\n", b"\r\n"), "vmdk"),
        (b"version=3\n", "vmdk"),
        (b"version=4\n", "raw"),
        (b"text\nversion=1\n", "raw"),
        (b"\0" * 0x40 + b"\x7f\x10\xda\xbe", "vdi"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"QED\0", "qed"),
        (b"LUKS\xba\xbe\0\1", "luks"),
        (b"LUKS\xba\xbe\0\2", "raw"),
        (b"WithoutFreeSpace\2\0\0\0", "parallels"),
        (b"WithouFreSpacExt\2\0\0\0", "parallels"),
        (b"WithoutFreeSpace\3\0\0\0", "raw"),
        (b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing".ljust(16, b"\0")
         + b"\0\0\2\0", "bochs"),
        (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n", "cloop"),
    ],
)  # fmt: skip
def test_signatures(head: bytes, expected: str) -> None:
    assert probe_bytes(head) == expected
    assert probe_bytes(head + b"\0" * 1000 if head else head) == expected
    assert probe_format(BytesStorage(head)) == expected


def test_dmg_is_known_by_its_name_alone() -> None:
    assert probe_bytes(b"x" * 512, "disk.dmg") == "dmg"
    assert probe_bytes(b"x" * 512, ".dmg") == "raw"
    assert probe_bytes(b"QFI\xfb\0\0\0\3", "disk.dmg") == "qcow2"
