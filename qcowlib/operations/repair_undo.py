"""The undo file of a repair: what it replaces, kept beside the image before the first byte is touched.

    bytes                    content
    0-15                     "qcow repair undo"
    16-19                    version of this shape, big-endian: 1
    20-27                    length of the description, big-endian
    description              JSON: "image" (its name), "size" (of the file, in bytes, before), "digest" (SHA-256 of its
                             metadata afterwards), "ranges" ([[offset, length], ...], all that is written), "epochs"
                             ([[[offset, length], ...], ...], the writes in their order)
    zlib                     the bytes of the ranges before; behind the end of the file there were none, here zeroes
    zlib                     the bytes of the writes
    last 32                  SHA-256 of everything before

The two zlib streams follow each other; "stored" in the description gives their lengths. With the writes at hand it can
be told from every state in which a repair may have been cut off whether somebody else has changed the image since.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcowlib.errors import FormatError, ImageStateError, QcowError, StorageError
from qcowlib.format.entries import ENTRY_DTYPE, Int64Array
from qcowlib.metadata.mapping_census import SCAN_BYTES
from qcowlib.metadata.references import empty_words, read_tables
from qcowlib.metadata.state import Qcow2State, load_state, table_offsets
from qcowlib.metadata.stored_refcounts import StoredRefcounts
from qcowlib.storage.helpers import read_padded
from qcowlib.storage.local import open_local
from qcowlib.storage.overlay import OverlayStorage
from qcowlib.storage.protocol import ReadStorage, Storage

MAGIC = b"qcow repair undo"
VERSION = 1
_HEAD = len(MAGIC) + 12
_DIGEST = 32
_MAX_FILE = 4 << 30
_SECTOR = 512

Range = tuple[int, int]


@dataclass(frozen=True)
class UndoFile:
    """What an undo file says.

    Attributes:
        image: name of the image's file, for messages.
        size: length of the image's file before the repair, in bytes.
        digest: of the metadata afterwards (see `metadata_digest`).
        ranges: (host offset, length) of all that was written, ascending.
        before: the bytes of each range before the repair.
        epochs: (host offset, bytes) of the writes in their order, a barrier between two lists.
    """

    image: str
    size: int
    digest: str
    ranges: list[Range]
    before: list[bytes]
    epochs: list[list[tuple[int, bytes]]]


def next_undo_path(image_path: str) -> str:
    """The name of an undo file that does not exist yet: IMAGE.repair-undo, IMAGE.repair-undo.1, and so on."""
    path, number = f"{image_path}.repair-undo", 0
    while os.path.lexists(path):
        number += 1
        path = f"{image_path}.repair-undo.{number}"
    return path


def write_undo_file(path: str, base: ReadStorage, overlay: OverlayStorage, last: bytes | None) -> None:
    """Write an undo file and make it durable, its name as well.

    Args:
        path: must not exist.
        base: the image's file, before the repair.
        overlay: over it, with the writes of the repair.
        last: what the header's first bytes become when the repair has been found good; None: they stay.

    Raises:
        StorageError: it cannot be written, or it exists; nothing of it remains then.
    """
    epochs = [epoch for epoch in overlay.epochs if epoch]
    if last is not None:
        epochs.append([(0, last)])
    ranges = _merged([(offset, len(data)) for epoch in epochs for offset, data in epoch])
    done = OverlayStorage(base)
    _apply(done, epochs)
    before = b"".join(read_padded(base, offset, length) for offset, length in ranges)
    writes = b"".join(data for epoch in epochs for _, data in epoch)
    streams = [zlib.compress(before, 1), zlib.compress(writes, 1)]
    description = {
        "image": os.path.basename(base.name),
        "size": base.size(),
        "digest": metadata_digest(done),
        "ranges": ranges,
        "epochs": [[(offset, len(data)) for offset, data in epoch] for epoch in epochs],
        "stored": [len(stream) for stream in streams],
    }
    text = json.dumps(description).encode()
    content = MAGIC + VERSION.to_bytes(4, "big") + len(text).to_bytes(8, "big") + text + b"".join(streams)
    _write_durably(path, content + hashlib.sha256(content).digest())


def read_undo_file(path: str) -> UndoFile:
    """Read an undo file.

    Raises:
        StorageError: it cannot be read.
        FormatError: it is none, of another version, or damaged.
    """
    try:
        if os.path.getsize(path) > _MAX_FILE:
            raise FormatError("undo file", None, f"'{path}' is too large to be one")
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise StorageError(path, "read", error) from error
    if content[: len(MAGIC)] != MAGIC or len(content) < _HEAD + _DIGEST:
        raise FormatError("undo file", None, f"'{path}' is not one")
    version = int.from_bytes(content[len(MAGIC) : len(MAGIC) + 4], "big")
    if version != VERSION:
        raise FormatError("undo file", None, f"'{path}' has version {version}, which is not known")
    if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
        raise FormatError("undo file", None, f"'{path}' is damaged: its checksum is wrong")
    start = _HEAD + int.from_bytes(content[len(MAGIC) + 4 : _HEAD], "big")
    try:
        return _parsed(json.loads(content[_HEAD:start]), content[start:-_DIGEST])
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise FormatError("undo file", None, f"'{path}' cannot be understood: {error}") from error


def undo_repair(path: str, undo_path: str) -> None:
    """Take the repair of an image back; the image is opened with its locks, as for writing.

    Args:
        path: of the image.
        undo_path: the undo file that the repair left.

    Raises:
        StorageError, ImageLocked: a file cannot be opened, read or written.
        FormatError: the undo file cannot be used.
        ImageStateError: the image is not the one that was repaired, or has been changed since; nothing was changed.
    """
    undo = read_undo_file(undo_path)
    storage = open_local(path, writable=True, force_share=False)
    try:
        take_back(undo, storage)
    finally:
        storage.close()


def take_back(undo: UndoFile, storage: Storage) -> None:
    """Make an image what it was before a repair, also one that was cut off.

    The writes are taken back in reverse order, with barriers; what breaks off in the middle can be done again.

    Args:
        undo: of that repair.
        storage: the image's file, writable.

    Raises:
        ImageStateError: the image is not the one that was repaired, or has been changed since; nothing was changed.
        StorageError: the file could not be written.
    """
    _require_unchanged(undo, storage)
    view = _as_before(undo, storage)
    steps = []
    for epoch in undo.epochs:
        # An epoch goes back to what the earlier ones had made of its places.
        steps.append([(offset, view.pread(len(data), offset)) for offset, data in epoch])
        _apply(view, [epoch])
    for step in reversed(steps):
        for offset, data in step:
            storage.pwrite(data, offset)
        storage.flush()
    if storage.size() > undo.size:
        storage.truncate(undo.size)
        storage.flush()


def metadata_digest(storage: ReadStorage) -> str:
    """SHA-256 of the metadata of a sound image: header, refcount table and blocks, all L1 and L2 tables."""
    digest = hashlib.sha256()
    state = load_state(storage, for_check=True)
    header = state.header
    digest.update(read_padded(storage, 0, header.cluster_size))
    stored = StoredRefcounts(storage, header)
    digest.update(stored.table.tobytes())
    _digest_tables(digest, state, stored.block_offsets[(stored.block_offsets > 0) & ~stored.unreadable])
    tables = [(header.l1_table_offset, header.l1_size)]
    tables += [(entry.l1_table_offset, entry.l1_size) for entry in state.snapshots]
    for offset, entries in tables:
        l1 = np.frombuffer(read_padded(storage, offset, 8 * entries), dtype=ENTRY_DTYPE)
        digest.update(l1.tobytes())
        _digest_tables(digest, state, table_offsets(l1, header.geometry))
    return digest.hexdigest()


def _digest_tables(digest: hashlib._Hash, state: Qcow2State, host: Int64Array) -> None:
    """Add tables of a cluster each, in batches."""
    per_batch = max(1, SCAN_BYTES >> state.geometry.cluster_bits)
    for start in range(0, len(host), per_batch):
        part = host[start : start + per_batch]
        words = empty_words(len(part), state.geometry)
        read_tables(state.storage, state.geometry, part, words)
        digest.update(words.tobytes())


def _require_unchanged(undo: UndoFile, storage: ReadStorage) -> None:
    """Every sector that was written is as before, or as one of the writes left it, and nothing else has changed."""
    changed = ImageStateError(
        f"'{storage.name}' has been changed since the repair, or the undo file is of another image ('{undo.image}')"
    )
    view = _as_before(undo, storage)
    present = [read_padded(storage, offset, length) for offset, length in undo.ranges]
    states = [[_equal_sectors(*row) for row in zip(undo.ranges, undo.before, present, strict=True)]]
    for epoch in undo.epochs:
        _apply(view, [epoch])
        now = [view.pread(length, offset) for offset, length in undo.ranges]
        states.append([_equal_sectors(*row) for row in zip(undo.ranges, now, present, strict=True)])
    # Cut off in an epoch, each sector is as before or after it.
    pairs = zip([states[0], *states], states, strict=False)
    if not any(all((old | new).all() for old, new in zip(*pair, strict=True)) for pair in pairs):
        raise changed
    try:
        digest = metadata_digest(view)
    except QcowError:
        raise changed from None
    if digest != undo.digest:
        raise changed


def _equal_sectors(place: Range, first: bytes, second: bytes) -> npt.NDArray[np.bool_]:
    """Which of the sectors that a range touches are equal in it."""
    equal = np.frombuffer(first, dtype=np.uint8) == np.frombuffer(second, dtype=np.uint8)
    skip = place[0] % _SECTOR
    starts = np.arange(-skip, len(equal), _SECTOR)
    starts[0] = 0
    sectors: npt.NDArray[np.bool_] = np.logical_and.reduceat(equal, starts)
    return sectors


def _as_before(undo: UndoFile, storage: ReadStorage) -> OverlayStorage:
    """The image's file with the bytes of all ranges as they were before the repair."""
    view = OverlayStorage(storage)
    for (offset, _), data in zip(undo.ranges, undo.before, strict=True):
        view.pwrite(data, offset)
    return view


def _apply(view: OverlayStorage, epochs: list[list[tuple[int, bytes]]]) -> None:
    for epoch in epochs:
        for offset, data in epoch:
            view.pwrite(data, offset)


def _merged(ranges: list[Range]) -> list[Range]:
    """The same bytes as ascending ranges that do not touch each other."""
    merged: list[Range] = []
    for offset, length in sorted(ranges):
        if merged and offset <= sum(merged[-1]):
            start = merged[-1][0]
            merged[-1] = (start, max(sum(merged[-1]), offset + length) - start)
        else:
            merged.append((offset, length))
    return merged


def _parsed(description: dict[str, Any], streams: bytes) -> UndoFile:
    stored, ranges = description["stored"], [(int(offset), int(length)) for offset, length in description["ranges"]]
    before = _inflated(streams[: stored[0]], sum(length for _, length in ranges))
    writes = _inflated(streams[stored[0] :], sum(length for epoch in description["epochs"] for _, length in epoch))
    pieces, position = [], 0
    for _, length in ranges:
        pieces.append(before[position : position + length])
        position += length
    epochs: list[list[tuple[int, bytes]]] = []
    at = 0
    for epoch in description["epochs"]:
        epochs.append([])
        for offset, length in epoch:
            epochs[-1].append((int(offset), writes[at : at + length]))
            at += length
    return UndoFile(description["image"], int(description["size"]), description["digest"], ranges, pieces, epochs)


def _inflated(stream: bytes, length: int) -> bytes:
    if not 0 <= length <= _MAX_FILE:
        raise ValueError("its lengths are impossible")
    data = zlib.decompressobj().decompress(stream, length + 1)
    if len(data) != length:
        raise ValueError("its parts do not fit each other")
    return data


def _write_durably(path: str, content: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(path, "create", error) from error
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)  # else the name may be lost while the repair is not
        finally:
            os.close(directory)
    except OSError as error:
        with suppress(OSError):
            os.unlink(path)
        raise StorageError(path, "write", error) from error
