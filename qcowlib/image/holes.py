"""Holes of the host file under allocated clusters.

An image with preallocated metadata maps clusters that nobody has written: in the host file they are holes. Asking the
host about every data extent costs system calls, so it is done only for a file in which the image has allocated clearly
more than the host; QEMU has the same rule, and its map shows the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcowlib.extents import ExtentKind, ExtentTable
from qcowlib.image.chain import Layer, chain_layers
from qcowlib.image.qcow2 import MappedLayer
from qcowlib.metadata.state import Qcow2State
from qcowlib.metadata.stored_refcounts import StoredRefcounts
from qcowlib.storage.local import LocalFile
from qcowlib.storage.protocol import ReadStorage

_DATA = int(ExtentKind.DATA)


class HoleFinder:
    """Cuts the data rows of an image at the holes of its host files.

    Args:
        image: the image whose resolved extents will be asked about.
    """

    def __init__(self, image: Layer) -> None:
        self._storages: dict[int, ReadStorage] = {
            number: layer.state.data_storage
            for number, layer in enumerate(chain_layers(image))
            if isinstance(layer, MappedLayer) and layer.cipher is None and is_preallocated(layer.state)
        }

    def split(self, table: ExtentTable) -> tuple[ExtentTable, npt.NDArray[np.bool_]]:
        """The table with data rows cut where holes begin and end, and which of its rows are holes."""
        asked = (table.kind == _DATA) & np.isin(table.layer, list(self._storages))
        if not asked.any():
            return table, asked
        rows: list[tuple[int, int, int, int, int, int]] = []
        holes: list[bool] = []
        for (start, length, kind, host, host_length, layer), ask in zip(table.rows(), asked.tolist(), strict=True):
            if not ask:
                rows.append((start, length, kind, host, host_length, layer))
                holes.append(False)
                continue
            for position, run, is_data in self._storages[layer].data_ranges(host, length):
                rows.append((start + position - host, run, kind, position, run, layer))
                holes.append(not is_data)
        return ExtentTable.from_rows(rows), np.array(holes, dtype=np.bool_)


def is_preallocated(state: Qcow2State) -> bool:
    """Whether clearly more clusters have a refcount than the host has given space for.

    Source: QEMU 7.2 calls an image preallocated when a tenth, and at least two, of its clusters have no space.
    """
    storage = state.storage
    if not isinstance(storage, LocalFile):
        return False
    geometry = state.geometry
    real = storage.allocated_size() >> geometry.cluster_bits
    threshold = max(real * 10 // 9, real + 2)
    clusters = geometry.clusters_for(storage.size())
    if clusters < threshold:
        return False
    stored = StoredRefcounts(storage, state.header)
    counted = 0
    step = max(1 << 20, geometry.refcount_block_entries)
    for first in range(0, clusters, step):
        window = stored.window(first, step)[: clusters - first]
        counted += int(np.count_nonzero(window))
        if counted >= threshold:
            return True
    return False
