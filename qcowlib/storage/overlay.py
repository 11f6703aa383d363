"""A file as it would be after some writes, none of which has been done: what a repair is planned and proved on.

    base (only read) + pages that were written --> reads see both
    epochs: the writes in order, cut at each `flush` --> `replay` does them on the real file, with barriers

Staged writes are seen by reads at once, but reach the list of writes only with `link`: a reference to something new is
known to all that is computed from the overlay, and yet written after what it refers to.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcowlib.errors import ImageStateError
from qcowlib.storage.protocol import Buffer, ReadStorage, Storage

_PAGE = 4096
_BUDGET = 1 << 30  # bytes of changed pages: far above the metadata of a real image


class OverlayStorage:
    """A storage over `base`, which is never written.

    Args:
        base: the file as it is.

    Attributes:
        epochs: (host offset, data) of the writes, in lists between which a barrier stands.
    """

    def __init__(self, base: ReadStorage) -> None:
        self._base = base
        self._pages: dict[int, bytearray] = {}
        self._size = base.size()
        self.epochs: list[list[tuple[int, bytes]]] = [[]]
        self._staged: list[tuple[int, bytes]] = []  # (offset, what lies there until they are linked)

    @property
    def name(self) -> str:
        """Name of the file."""
        return self._base.name

    def size(self) -> int:
        """Length in bytes after all writes."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only where the file ends."""
        buffer = bytearray(max(0, min(length, self._size - offset)))
        self.pread_into(buffer, offset)
        return bytes(buffer)

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only where the file ends."""
        view = memoryview(buffer).cast("B")[: max(0, min(len(buffer), self._size - offset))]
        got = self._base.pread_into(view, offset) if len(view) else 0
        view[got:] = bytes(len(view) - got)
        if self._pages and len(view):
            for number in range(offset // _PAGE, (offset + len(view) - 1) // _PAGE + 1):
                page = self._pages.get(number)
                if page is not None:
                    start = number * _PAGE
                    low, high = max(offset, start), min(offset + len(view), start + _PAGE)
                    view[low - offset : high - offset] = page[low - start : high - start]
        return len(view)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Ranges of the file as it is; a hole that was written into is data."""
        for start, size, is_data in self._base.data_ranges(offset, length):
            yield start, size, is_data or any(start - _PAGE < page * _PAGE < start + size for page in self._pages)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Change the overlay, and list the write."""
        content = bytes(data)
        self._apply(content, offset)
        self.epochs[-1].append((offset, self._without_staged(content, offset)))

    def stage(self, data: Buffer, offset: int) -> None:
        """Change the overlay now, but list the write only with `link`."""
        self._staged.append((offset, self._without_staged(self.pread(len(data), offset), offset)))
        self._apply(bytes(data), offset)

    def link(self) -> None:
        """List what was staged, as it is by now, between two barriers."""
        self.flush()
        for offset, old in self._staged:
            self.epochs[-1].append((offset, self.pread(len(old), offset)))
        self._staged = []
        self.flush()

    def flush(self) -> None:
        """Barrier: begin a new epoch."""
        if self.epochs[-1]:
            self.epochs.append([])

    def write_zeroes(self, offset: int, length: int) -> None:
        """Write zeroes."""
        self.pwrite(bytes(length), offset)

    def discard(self, offset: int, length: int) -> None:
        """Nothing: what a repair no longer refers to stays where it is."""

    def allocate(self, offset: int, length: int) -> None:
        """Nothing: space is taken by writing."""

    def truncate(self, size: int) -> None:
        """Refuse: the file of an image only grows, by writing."""
        raise ImageStateError(f"'{self.name}' cannot be cut to {size} bytes here")

    def close(self) -> None:
        """Nothing to release: the file belongs to the caller."""

    @property
    def has_staged(self) -> bool:
        """Whether something waits for `link`."""
        return bool(self._staged)

    def replay(self, target: Storage) -> None:
        """Do listed writes on the real file, a barrier behind each epoch.

        Raises:
            StorageError: the host failed; what was written before stays.
        """
        for epoch in self.epochs:
            for offset, data in epoch:
                target.pwrite(data, offset)
            if epoch:
                target.flush()

    def _apply(self, data: bytes, offset: int) -> None:
        end = offset + len(data)
        for number in range(offset // _PAGE, (end - 1) // _PAGE + 1 if data else offset // _PAGE):
            start = number * _PAGE
            page = self._pages.get(number)
            if page is None:
                if len(self._pages) * _PAGE >= _BUDGET:
                    raise ImageStateError(f"'{self.name}': the repair would change more than {_BUDGET} bytes")
                page = bytearray(_PAGE)
                if start < self._size:
                    self._base.pread_into(memoryview(page)[: min(_PAGE, self._size - start)], start)
                self._pages[number] = page
            low, high = max(offset, start), min(end, start + _PAGE)
            page[low - start : high - start] = data[low - offset : high - offset]
        self._size = max(self._size, end)

    def _without_staged(self, data: bytes, offset: int) -> bytes:
        """The bytes of a write, with what lies on disk for now where something is staged."""
        content: bytearray | None = None
        for start, old in self._staged:
            low, high = max(offset, start), min(offset + len(data), start + len(old))
            if low < high:
                content = bytearray(data) if content is None else content
                content[low - offset : high - offset] = old[low - start : high - start]
        return data if content is None else bytes(content)
