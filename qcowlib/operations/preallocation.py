"""Host clusters for a part of the disk that has nothing yet: mapped, and with space reserved if wanted.

    free host clusters -> made to read as zeroes ("falloc": reserved, "full": written) -> L2 entries

Source: QEMU 7.2's preallocation modes.
"""

from __future__ import annotations

from collections.abc import Callable

from qcowlib.errors import StorageError
from qcowlib.image.writer import ClusterWriter
from qcowlib.metadata.transaction import MetadataTransaction
from qcowlib.storage.protocol import Storage

_RUN_BYTES = 1 << 30
_PIECE = 1 << 20


def preallocate(
    transaction: MetadataTransaction,
    writer: ClusterWriter,
    start: int,
    stop: int,
    mode: str,
    *,
    zero: bool,
    full: bool,
    fill: bool,
    head: bytes,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Map guest clusters that are not mapped, so that they read as zeroes.

    Args:
        transaction, writer: of the image; nobody else uses it meanwhile.
        start, stop: guest range in bytes, aligned to clusters.
        mode: "metadata", "falloc" or "full".
        zero: the entries say that the clusters are zero, whatever is in the file.
        full: all subclusters are allocated; else they are to be written first.
        fill: store zeroes as the guest's data: an encrypted image of version 2.
        head: what the first cluster begins with: it gets a new place with the others.
        progress: called with (bytes done, bytes to do).

    Raises:
        StorageError: the host has no room; what was mapped before is in the transaction.
    """
    geometry = transaction.state.geometry
    bits, has_data_file = geometry.cluster_bits, transaction.state.header.has_data_file
    position = start
    while position < stop:
        border = min(stop, (position // geometry.l2_coverage + 1) * geometry.l2_coverage)
        want = min(border - position, _RUN_BYTES) >> bits
        if has_data_file:
            host, count = position, want
        else:
            transaction.writable_table(geometry.l1_index(position))  # the table before its data, as QEMU has it
            first, count = transaction.allocate(want, want)
            host = first << bits
            try:
                _reserve(transaction.storage, host, count << bits, mode)
                if head:
                    writer.store(host, position, head.ljust(geometry.cluster_size, b"\0"))
                if fill:
                    _fill(writer, host, position, len(head) and geometry.cluster_size, count << bits)
            except StorageError:
                transaction.give_back(first, count)
                raise
        if head:
            writer.preallocate(position, host, 1, zero=False, full=True)
            position, host, count, head = position + geometry.cluster_size, host + geometry.cluster_size, count - 1, b""
        if count:
            writer.preallocate(position, host, count, zero=zero, full=full)
        position += count << bits
        if transaction.pressure:
            transaction.commit()
        if progress is not None:
            progress(position - start, stop - start)


def _fill(writer: ClusterWriter, host: int, guest: int, start: int, stop: int) -> None:
    """Store zeroes as guest data from `start` to `stop` behind both offsets."""
    for position in range(start, stop, _PIECE):
        writer.store(host + position, guest + position, bytes(min(_PIECE, stop - position)))


def _reserve(storage: Storage, offset: int, length: int, mode: str) -> None:
    """Make host clusters that are free read as zeroes, and be in the file."""
    end = offset + length
    inside = min(length, max(0, storage.size() - offset))
    # What freed clusters held must not be seen by the guest.
    for start, run, is_data in storage.data_ranges(offset, inside) if inside else ():
        if is_data:
            storage.write_zeroes(start, run)
    if mode == "falloc":
        storage.allocate(offset, length)
    elif mode == "full":
        zeroes = memoryview(bytes(_PIECE))
        for position in range(offset, end, _PIECE):
            storage.pwrite(zeroes[: end - position], position)
    elif end > storage.size():
        storage.truncate(end)
