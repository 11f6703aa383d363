"""What format a file has, by its first bytes.

Only qcow2 and raw are read; the other formats that QEMU knows are recognised so that they are refused by name and
never read as if they were raw. The signatures are those that QEMU 7.2 probes for, in 512 bytes padded with zeroes.
"""

from __future__ import annotations

from qcowlib.storage.protocol import ReadStorage

PROBE_BYTES = 512
QCOW_MAGIC = b"QFI\xfb"

# QEMU's names of the formats that are recognised and refused.
FOREIGN_FORMATS = frozenset(
    ("qcow", "vmdk", "vdi", "vhdx", "vpc", "qed", "luks", "parallels", "bochs", "cloop", "dmg", "vvfat")
)

_CLOOP_SCRIPT = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
_VMDK_VERSIONS = (b"version=1", b"version=2", b"version=3")


def probe_format(storage: ReadStorage) -> str:
    """The format's name in QEMU's words: "qcow2", "raw" when nothing is recognised, or another ("vmdk", "qcow", ...).

    Args:
        storage: the file; one of length 0 is raw.
    """
    return probe_bytes(storage.pread(PROBE_BYTES, 0), storage.name)


def probe_bytes(head: bytes, name: str = "") -> str:
    """The format of a file that starts with these bytes; the name matters for dmg alone, which has no signature."""
    if not head:
        return "raw"
    head = head[:PROBE_BYTES].ljust(PROBE_BYTES, b"\0")
    if head.startswith(QCOW_MAGIC):
        return _qcow_version(head)
    for format_name, matches in (
        ("vmdk", _is_vmdk(head)),
        ("vdi", head[0x40:0x44] == b"\x7f\x10\xda\xbe"),
        ("vhdx", head.startswith(b"vhdxfile")),
        ("vpc", head.startswith(b"conectix")),
        ("qed", head.startswith(b"QED\0")),
        ("luks", head.startswith(b"LUKS\xba\xbe\x00\x01")),
        ("parallels", _is_parallels(head)),
        ("bochs", _is_bochs(head)),
        ("cloop", head.startswith(_CLOOP_SCRIPT)),
        ("dmg", len(name) > 4 and name.endswith(".dmg")),
    ):
        if matches:
            return format_name
    return "raw"


def _qcow_version(head: bytes) -> str:
    version = int.from_bytes(head[4:8], "big")
    if version >= 2:
        return "qcow2"
    return "qcow" if version == 1 else "raw"


def _is_parallels(head: bytes) -> bool:
    return head[:16] in (b"WithoutFreeSpace", b"WithouFreSpacExt") and head[16:20] == b"\x02\0\0\0"


def _is_bochs(head: bytes) -> bool:
    return (
        head.startswith(b"Bochs Virtual HD Image\0")
        and head[32:40] == b"Redolog\0"
        and head[48:56] == b"Growing\0"
        and head[64:68] in (b"\0\0\1\0", b"\0\0\2\0")
    )


def _is_vmdk(head: bytes) -> bool:
    """A sparse extent's magic, or a descriptor: comments and blank lines, then a version line."""
    if head[:4] in (b"COWD", b"KDMV"):
        return True
    for line in head.split(b"\n")[:-1]:
        text = line.rstrip(b"\r")
        if text.startswith(b"#") or (line.startswith(b" ") and not text.strip(b" ")):
            continue
        return text in _VMDK_VERSIONS
    return False
