"""qcow info: what an image is, as text or JSON, alone or with its backing chain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qcowlib.cli.common import FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, CommandFailed, one_filename, wants_json
from qcowlib.cli.opening import ImageName, image_name, not_opened, open_image_name
from qcowlib.cli.options import Arguments, Option, Syntax
from qcowlib.cli.qapi import Value, dumps, ordered
from qcowlib.cli.snapshot_text import print_snapshot_table, snapshot_members
from qcowlib.errors import QcowError
from qcowlib.units import format_size

if TYPE_CHECKING:
    from qcowlib.codecs.luks_info import LuksInfo, LuksSlotInfo
    from qcowlib.format.bitmap_directory import BitmapEntry
    from qcowlib.operations.info import ImageInfo, Qcow2Info

SYNTAX = Syntax(
    "info",
    "[--object OBJECT] [--image-opts] [-f FMT] [--output=human|json] [--backing-chain] [-U] FILENAME",
    (
        FORMAT,
        OUTPUT,
        Option("backing-chain", "", "backing-chain", None, "show the backing files as well, from the top down"),
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "No file that the image names is opened, unless --backing-chain asks for it.\n"
    "Exit codes: 0 shown, 1 an image could not be opened.",
)


def run(arguments: Arguments) -> int:
    """Show one image or its chain."""
    filename = one_filename(arguments)
    as_json = wants_json(arguments)
    chain = arguments.has("backing-chain")
    top = image_name(arguments, filename)
    found = list(_chain_info(top, force_share=arguments.has("force-share"), follow=chain))
    if as_json:
        members = [_info_members(info) for info in found]
        print(dumps(members if chain else members[0]))
    else:
        for place, info in enumerate(found):
            if place:
                print()
            _print_info(info)
    return 0


def _chain_info(name: ImageName, *, force_share: bool, follow: bool) -> Iterator[ImageInfo]:
    """Facts of an image, then of the images below it; every layer is closed before the next is opened."""
    from qcowlib.operations.info import image_info

    seen: set[str] = set()
    while True:
        if name.text in seen:
            raise CommandFailed(f"Backing file '{name.text}' creates an infinite loop.")
        seen.add(name.text)
        with open_image_name(name, force_share=force_share, open_backing=False) as image:
            try:
                info = image_info(image, name.shown)
            except QcowError as error:  # a damaged snapshot table or bitmap directory
                raise not_opened(name, error) from error
        yield info
        if not follow or info.full_backing_filename is None:
            return
        name = ImageName.of_file(info.full_backing_filename, info.backing_format)


def _info_members(info: ImageInfo) -> dict[str, Value]:
    members: dict[str, Value] = {
        "filename": info.filename,
        "format": info.format,
        "dirty-flag": info.dirty,
        "virtual-size": info.virtual_size,
    }
    if info.actual_size is not None:
        members["actual-size"] = info.actual_size
    if info.cluster_size is not None:
        members["cluster-size"] = info.cluster_size
    if info.encrypted:
        members["encrypted"] = True
    if info.backing_filename is not None:
        members["backing-filename"] = info.backing_filename
    if info.full_backing_filename is not None:
        members["full-backing-filename"] = info.full_backing_filename
    if info.backing_format is not None:
        members["backing-filename-format"] = info.backing_format
    if info.snapshots:
        members["snapshots"] = [snapshot_members(entry) for entry in info.snapshots]
    if info.qcow2 is not None:
        members["format-specific"] = {"type": "qcow2", "data": _qcow2_members(info.qcow2)}
    return members


def _qcow2_members(info: Qcow2Info) -> dict[str, Value]:
    members: dict[str, Value] = {"compat": "0.10" if info.version == 2 else "1.1"}
    if info.data_file is not None:
        members["data-file"] = info.data_file
    if info.data_file_raw is not None:
        members["data-file-raw"] = info.data_file_raw
    if info.version >= 3:
        members["extended-l2"] = info.extended_l2
        members["lazy-refcounts"] = info.lazy_refcounts
        members["corrupt"] = info.corrupt
    members["refcount-bits"] = info.refcount_bits
    if info.luks is not None:
        members["encrypt"] = _luks_members(info.luks)
    elif info.encryption is not None:
        members["encrypt"] = {"format": info.encryption}
    if info.bitmaps:
        members["bitmaps"] = [_bitmap_members(entry) for entry in info.bitmaps]
    members["compression-type"] = info.compression_type
    return members


def _bitmap_members(entry: BitmapEntry) -> dict[str, Value]:
    flags = [name for bit, name in enumerate(("in-use", "auto")) if entry.flags >> bit & 1]
    return {"name": entry.name, "granularity": 1 << entry.granularity_bits, "flags": flags}


def _print_info(info: ImageInfo) -> None:
    print(f"image: {info.filename}")
    print(f"file format: {info.format}")
    print(f"virtual size: {format_size(info.virtual_size)} ({info.virtual_size} bytes)")
    print(f"disk size: {'unavailable' if info.actual_size is None else format_size(info.actual_size)}")
    if info.encrypted:
        print("encrypted: yes")
    if info.cluster_size is not None:
        print(f"cluster_size: {info.cluster_size}")
    if info.dirty:
        print("cleanly shut down: no")
    if info.backing_filename is not None:
        print(f"backing file: {info.backing_filename}{_actual_path(info)}")
        if info.backing_format is not None:
            print(f"backing file format: {info.backing_format}")
    if info.snapshots:
        print_snapshot_table(info.snapshots)
    if info.qcow2 is not None:
        print("Format specific information:")
        _print_members(_qcow2_members(info.qcow2), 1)


def _actual_path(info: ImageInfo) -> str:
    if info.full_backing_filename is None:
        return " (cannot determine actual path)"
    if info.full_backing_filename != info.backing_filename:
        return f" (actual path: {info.full_backing_filename})"
    return ""


def _print_members(value: Mapping[str, Value] | Sequence[Value], depth: int) -> None:
    """Nested values as indented lines; dashes in names become blanks, elements of lists are numbered."""
    if isinstance(value, Mapping):
        members = [(name.replace("-", " "), member) for name, member in ordered(value)]
    else:
        members = [(f"[{place}]", member) for place, member in enumerate(value)]
    for name, member in members:
        if isinstance(member, bool):
            member = "true" if member else "false"  # noqa: PLW2901 - shown as the word
        if isinstance(member, int | str):
            print(f"{'    ' * depth}{name}: {member}")
        else:
            print(f"{'    ' * depth}{name}:")
            _print_members(member, depth + 1)


def _luks_members(info: LuksInfo) -> dict[str, Value]:
    members: dict[str, Value] = {
        "format": "luks",
        "cipher-alg": info.cipher_alg,
        "cipher-mode": info.cipher_mode,
        "ivgen-alg": info.ivgen_alg,
        "hash-alg": info.hash_alg,
        "payload-offset": info.payload_offset,
        "master-key-iters": info.master_key_iters,
        "uuid": info.uuid,
    }
    if info.ivgen_hash_alg is not None:
        members["ivgen-hash-alg"] = info.ivgen_hash_alg
    members["slots"] = [_slot_members(slot) for slot in info.slots]
    return members


def _slot_members(slot: LuksSlotInfo) -> dict[str, Value]:
    members: dict[str, Value] = {"active": slot.active}
    if slot.iters is not None:
        members["iters"] = slot.iters
    if slot.stripes is not None:
        members["stripes"] = slot.stripes
    members["key-offset"] = slot.key_offset
    return members
