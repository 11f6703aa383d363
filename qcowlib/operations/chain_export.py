"""Internal snapshots as a chain of overlays, and a chain as one image with internal snapshots.

    export   first state -> an image; every later one -> an overlay that holds what differs from the state before
             saved memory -> a file of its own; who is what -> chain.json beside them
    import   first layer -> active layer -> snapshot; every later one -> what differs -> snapshot; the top stays active

What two states share is not copied twice. Both only read their source, and make something new under a name that says
that it is not finished; after an interruption they are simply done again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcowlib.errors import ChainError, OptionError, StorageError
from qcowlib.extents import ExtentKind, ExtentTable
from qcowlib.format.features import Compatible
from qcowlib.format.header import Header
from qcowlib.format.snapshot_table import SnapshotEntry
from qcowlib.image.chain import chain_layers
from qcowlib.image.creation import create_image
from qcowlib.image.creation_options import CreationOptions
from qcowlib.image.opening import open_image
from qcowlib.image.policy import LocalFiles
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.reader import ReadableImage
from qcowlib.image.references import backing_reference
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.bitmaps import copy_bitmaps
from qcowlib.operations.difference import changed_extents
from qcowlib.operations.resize import resize
from qcowlib.operations.snapshots import create_snapshot
from qcowlib.operations.unfinished import UNFINISHED, UnfinishedFile

MANIFEST = "chain.json"
_VERSION = 1
_PIECE = 2 << 20  # a multiple of every cluster size
_ACTIVE = "active.qcow2"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportedState:
    """One state of an exported chain.

    Attributes:
        file: its file in the directory.
        snapshot: the internal snapshot; None for the active layer.
        data: bytes of data that the file has to hold.
        vmstate: name of the file with the saved memory; None where there is none.
    """

    file: str
    snapshot: SnapshotEntry | None
    data: int
    vmstate: str | None


def plan_export(image: Qcow2Image) -> list[ExportedState]:
    """What an export would write, oldest state first; from the metadata alone.

    Raises:
        OptionError: the image cannot be exported.
        CorruptMetadata: what differs between two states cannot be told.
    """
    if image.header.crypt_method:
        raise OptionError(f"'{image.name}' is encrypted, and its chain would not be: convert it first")
    planned: list[ExportedState] = []
    before: ReadableImage | None = None
    for number, (entry, state) in enumerate(_states(image)):
        stem = _ACTIVE if entry is None else f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', entry.name)[:80]}.qcow2"
        memory = None if entry is None or not entry.vm_state_size else stem.removesuffix("qcow2") + "vmstate"
        data = sum(_stored(table) for table in _rows(image, before, state))
        planned.append(ExportedState(stem, entry, data, memory))
        before = state
    return planned


def export_chain(image: Qcow2Image, directory: str, *, progress: Progress | None = None) -> list[ExportedState]:
    """Write the snapshots and the active layer of an image as a chain of overlays, `active.qcow2` on top.

        with qcowlib.open_image("disk.qcow2", policy=qcowlib.LocalFiles()) as image:
            qcowlib.export_chain(image, "disk.chain")

    The first image names the backing file that the image has, by its absolute path. Persistent bitmaps go to the top.

    Args:
        image: opened with its backing chain.
        directory: is made; until all is durable its name has ".qcow-incomplete" at the end.
        progress: called with (bytes done, bytes to do).

    Returns: what was written, oldest state first.

    Raises:
        OptionError: the image is encrypted, or the directory exists.
        CorruptMetadata, StorageError: a state cannot be read, or the host file failed. The directory is not there.
    """
    planned = plan_export(image)
    if os.path.lexists(directory):
        raise OptionError(f"'{directory}' exists already")
    unfinished = directory.rstrip("/") + UNFINISHED
    _make_directory(unfinished)
    copier = _Copier(sum(state.data for state in planned), progress)
    try:
        before: ReadableImage | None = None
        backing = _backing_of(image)
        for planned_state, (entry, state) in zip(planned, _states(image), strict=True):
            path = os.path.join(unfinished, planned_state.file)
            _make_like(image.header, path, state.size, backing)
            with _open_new(path) as target:
                copier.copy(target, state, _rows(image, before, state))
                if entry is None and image.bitmaps:
                    copy_bitmaps(image, target, skip_broken=True)
                target.flush()
            if planned_state.vmstate is not None and entry is not None:
                _write_vmstate(image, entry, os.path.join(unfinished, planned_state.vmstate))
            before, backing = state, (planned_state.file, "qcow2")
        _write_manifest(unfinished, planned, _backing_of(image) is not None, complete=True)
        os.rename(unfinished, directory)
        _sync(os.path.dirname(os.path.abspath(directory)))
    except OSError as error:
        raise StorageError(directory, "write", error) from error
    return planned


def import_chain(top: str, path: str, *, progress: Progress | None = None) -> None:
    """Fold a chain into one new image: every layer but the top becomes an internal snapshot.

        qcowlib.import_chain("disk.chain", "disk.qcow2")

    Args:
        top: the directory of an exported chain, whose snapshots get their names, ids, times and memory back; or the
            top of any chain, whose layers become snapshots named like their files.
        path: the new image; an existing file is replaced.
        progress: called with (bytes done, bytes to do).

    Raises:
        ChainError: the chain cannot be followed.
        OptionError: a layer is encrypted, or has internal snapshots itself.
        CorruptMetadata, StorageError: a layer cannot be read, or the host file failed. The new image is not there.
    """
    top, directory, manifest = _source(top)
    unfinished = UnfinishedFile(path)
    try:
        with open_image(top, policy=LocalFiles()) as image:
            _fold(image, manifest, directory, unfinished.name, progress)
    except BaseException as error:
        unfinished.give_up(error)
        raise
    unfinished.finish(durable=True)


def plan_import(top: str) -> list[tuple[str, str | None, int]]:
    """What an import would take from a chain, the lowest layer first: (file, name of the snapshot, bytes of data).

    The name of the top is None. Arguments and errors are those of `import_chain`.
    """
    top, _, manifest = _source(top)
    with open_image(top, policy=LocalFiles()) as image:
        layers = _layers(image, manifest)
        names = [*(str(described["name"]) for described in _names(layers, manifest)[: len(layers) - 1]), None]
        on_backing = manifest is not None and manifest["backing"]
        sizes = [
            sum(_stored(table) for table in _layer_rows(before, layer, on_backing))
            for before, layer in zip([None, *layers[:-1]], layers, strict=True)
        ]
        return list(zip([layer.name for layer in layers], names, sizes, strict=True))


def _source(top: str) -> tuple[str, str, dict[str, Any] | None]:
    """The top of the chain, and the directory and manifest if it is an exported one."""
    if not os.path.isdir(top):
        return top, "", None
    return os.path.join(top, _ACTIVE), top, _read_manifest(top)


def _fold(
    image: ReadableImage, manifest: dict[str, Any] | None, directory: str, path: str, progress: Progress | None
) -> None:
    layers = _layers(image, manifest)
    bottom = layers[0]
    keeps_backing = manifest is not None and manifest["backing"]
    like = next(layer for layer in reversed(layers) if isinstance(layer, Qcow2Image))
    backing = _backing_of(bottom) if keeps_backing and isinstance(bottom, Qcow2Image) else None
    _make_like(like.header, path, bottom.size, backing)
    names = _names(layers, manifest)
    pairs = list(zip([None, *layers[:-1]], layers, strict=True))
    total = sum(_stored(table) for before, layer in pairs for table in _layer_rows(before, layer, backing is not None))
    copier = _Copier(total, progress)
    for number, (before, layer) in enumerate(pairs):
        with _open_new(path) as target:
            if target.size != layer.size:
                resize(target, layer.size, shrink=True)
            copier.copy(target, layer, _layer_rows(before, layer, backing is not None))
            if layer is layers[-1]:
                if isinstance(layer, Qcow2Image) and layer.bitmaps:
                    copy_bitmaps(layer, target, skip_broken=True)
            else:
                _take_snapshot(target, names[number], directory)
            target.flush()


def _take_snapshot(target: WritableQcow2Image, described: dict[str, Any], directory: str) -> None:
    facts = {key: described[key] for key in ("date_ns", "vm_clock_ns", "icount", "snapshot_id") if key in described}
    if described.get("vmstate") is None:
        create_snapshot(target, described["name"], **facts)
        return
    memory = os.path.join(directory, os.path.basename(described["vmstate"]))
    try:
        with open(memory, "rb") as stream:
            create_snapshot(target, described["name"], vmstate=stream, **facts)
    except OSError as error:
        raise StorageError(memory, "read", error) from error


def _layers(image: ReadableImage, manifest: dict[str, Any] | None) -> list[ReadableImage]:
    """The layers that become states, the lowest first."""
    found = [layer for layer in chain_layers(image) if isinstance(layer, ReadableImage)]
    if manifest is not None:
        if len(found) < len(manifest["states"]):
            raise ChainError(f"the chain of '{image.name}' has fewer images than its {MANIFEST} tells")
        found = found[: len(manifest["states"])]
    for layer in found:
        if isinstance(layer, Qcow2Image) and layer.header.crypt_method:
            raise OptionError(f"'{layer.name}' is encrypted, and the new image would not be: convert it first")
        if isinstance(layer, Qcow2Image) and layer.header.nb_snapshots:
            raise OptionError(f"'{layer.name}' has internal snapshots itself: export it first, or delete them")
    if not any(isinstance(layer, Qcow2Image) for layer in found):
        raise OptionError(f"'{image.name}' is a raw image: there is no chain to import")
    return found[::-1]


def _names(layers: list[ReadableImage], manifest: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What the snapshots are to be called, and their other facts."""
    if manifest is not None:
        return list(manifest["states"])
    taken: dict[str, int] = {}
    names: list[dict[str, Any]] = []
    for layer in layers[:-1]:
        stem = os.path.splitext(os.path.basename(layer.name))[0] or "layer"
        taken[stem] = taken.get(stem, 0) + 1
        names.append({"name": stem if taken[stem] == 1 else f"{stem}-{taken[stem]}"})
    return names


# -- states and their rows


def _states(image: Qcow2Image) -> Iterator[tuple[SnapshotEntry | None, ReadableImage]]:
    for entry in image.snapshots:
        yield entry, image.open_snapshot(entry)
    yield None, image


def _rows(image: Qcow2Image, before: ReadableImage | None, state: ReadableImage) -> Iterator[ExtentTable]:
    return _layer_rows(before, state, image.header.backing_file is not None)


def _layer_rows(before: ReadableImage | None, state: ReadableImage, on_backing: bool) -> Iterator[ExtentTable]:
    """What a file has to say, as rows of data and of zeroes.

    The first file tells all, or what is not its backing file's; every other one what differs from the state before.
    """
    if before is not None:
        for table in changed_extents(before, state):
            table.kind[table.kind == ExtentKind.UNALLOCATED] = ExtentKind.ZERO
            yield table
    elif on_backing:
        for table in state.layer_extents(0, state.size):
            yield _selected(table, table.kind != ExtentKind.UNALLOCATED)
    else:
        for table in state.extents():
            yield _selected(table, (table.kind != ExtentKind.UNALLOCATED) & (table.kind != ExtentKind.ZERO))


def _selected(table: ExtentTable, rows: npt.NDArray[np.bool_]) -> ExtentTable:
    columns = (table.start, table.length, table.kind, table.host_offset, table.host_length, table.layer)
    return ExtentTable(*(column[rows] for column in columns))  # type: ignore[arg-type]  # each keeps its dtype


def _stored(table: ExtentTable) -> int:
    return int(table.length[table.kind != ExtentKind.ZERO].sum())


class _Copier:
    """Copies rows, and tells how far it is.

    Args:
        total: bytes of data in all.
        progress: called with (bytes done, bytes to do).
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0

    def copy(self, target: WritableQcow2Image, state: ReadableImage, tables: Iterator[ExtentTable]) -> None:
        """Write rows of a state to an image that shows the state before."""
        cluster = target.cluster_size
        for table in tables:
            for start, length, kind, *_ in table.rows():
                if kind == ExtentKind.ZERO:
                    target.write_zeroes(start, length)
                    continue
                whole = start % cluster == 0 and length == min(cluster, target.size - start)
                if kind == ExtentKind.COMPRESSED and whole:
                    target.write_compressed(start, state.read(start, length))
                else:
                    for offset in range(start, start + length, _PIECE):
                        target.write(offset, state.read(offset, min(_PIECE, start + length - offset)))
                self._done += length
                if self._progress is not None:
                    self._progress(self._done, self._total)


# -- files


def _make_like(header: Header, path: str, size: int, backing: tuple[str, str] | None) -> None:
    """A new image with the properties of another one; version 3, since version 2 cannot say that a cluster is zero."""
    options: CreationOptions = {
        "cluster_size": header.cluster_size,
        "refcount_bits": 1 << header.refcount_order,
        "extended_l2": header.extended_l2,
        "lazy_refcounts": bool(header.compatible_features & Compatible.LAZY_REFCOUNTS),
        "compression_type": "zstd" if header.compression_type else "zlib",
    }
    name, image_format = (None, None) if backing is None else backing
    create_image(path, size, backing_file=name, backing_fmt=image_format, check_backing=False, **options)


def _open_new(path: str) -> WritableQcow2Image:
    image = open_image(path, format="qcow2", writable=True, policy=LocalFiles())
    assert isinstance(image, WritableQcow2Image)
    return image


def _backing_of(image: Qcow2Image) -> tuple[str, str] | None:
    """(absolute path, format) of an image's backing file."""
    name = image.header.backing_file
    if name is None:
        return None
    reference = backing_reference(name, image.header.backing_format, image.name)
    if image.backing is None or reference.windows or reference.zeroes is not None:
        raise ChainError(f"the backing file '{name}' of '{image.name}' is no plain file that is open")
    return os.path.abspath(reference.path), image.backing.format


def _write_vmstate(image: Qcow2Image, entry: SnapshotEntry, path: str) -> None:
    memory = image.open_snapshot(entry).vmstate
    with open(path, "xb") as file:
        for offset in range(0, memory.size, _PIECE):
            file.write(memory.read(offset, min(_PIECE, memory.size - offset)))
        file.flush()
        os.fsync(file.fileno())


def _make_directory(path: str) -> None:
    """Make the directory; what an export that was cut off has left of it goes."""
    if os.path.lexists(path):
        if not os.path.isfile(os.path.join(path, MANIFEST)):
            raise OptionError(f"'{path}' is in the way, and no export has made it: remove it")
        shutil.rmtree(path)
    try:
        os.mkdir(path)
    except OSError as error:
        raise StorageError(path, "create", error) from error
    _write_manifest(path, [], on_backing=False, complete=False)


def _write_manifest(directory: str, states: list[ExportedState], on_backing: bool, *, complete: bool) -> None:
    content = {
        "version": _VERSION,
        "complete": complete,
        "backing": on_backing,
        "states": [_described(state) for state in states],
    }
    with open(os.path.join(directory, MANIFEST), "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(content, file, indent=4)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    _sync(directory)


def _described(state: ExportedState) -> dict[str, Any]:
    entry = state.snapshot
    if entry is None:
        return {"file": state.file, "active": True}
    return {
        "file": state.file,
        "snapshot_id": entry.id,
        "name": entry.name,
        "date_ns": entry.date_sec * 10**9 + entry.date_nsec,
        "vm_clock_ns": entry.vm_clock_nsec,
        "icount": entry.icount,
        "vmstate": state.vmstate,
    }


def _read_manifest(directory: str) -> dict[str, Any]:
    path = os.path.join(directory, MANIFEST)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            content = json.load(file)
    except OSError as error:
        raise StorageError(path, "read", error) from error
    except ValueError:
        content = None
    if not _is_manifest(content):
        raise ChainError(f"'{path}' is no {MANIFEST} of version {_VERSION} of a finished export")
    found: dict[str, Any] = content
    return found


def _is_manifest(content: Any) -> bool:  # noqa: ANN401 - JSON of a stranger
    if not isinstance(content, dict) or content.get("version") != _VERSION or content.get("complete") is not True:
        return False
    states = content.get("states")
    if not isinstance(states, list) or not states or not all(isinstance(state, dict) for state in states):
        return False
    texts = [(state.get("name"), state.get("snapshot_id"), state.get("vmstate", "")) for state in states[:-1]]
    numbers = [state.get(key) for state in states[:-1] for key in ("date_ns", "vm_clock_ns")]
    counts = [state.get("icount") for state in states[:-1]]
    return (
        all(isinstance(name, str) and isinstance(one_id, str) for name, one_id, _ in texts)
        and all(memory is None or isinstance(memory, str) for *_, memory in texts)
        and all(isinstance(number, int) and 0 <= number < 1 << 62 for number in numbers)
        and all(count is None or (isinstance(count, int) and 0 <= count < 1 << 63) for count in counts)
        and isinstance(content.get("backing"), bool)
    )


def _sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
