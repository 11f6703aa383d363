"""A disk as a plain bytearray with copies as snapshots, and stock QEMU's view of an image to compare it with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.oracle import qemu_img

PASSPHRASE = "open sesame"


@dataclass
class BitmapModel:
    """A dirty bitmap: bytes for one bit, whether it records, numbers of the set bits."""

    granularity: int
    enabled: bool = True
    bits: set[int] = field(default_factory=set)

    def mark(self, offset: int, length: int) -> None:
        self.bits.update(range(offset // self.granularity, (offset + length - 1) // self.granularity + 1))

    def merge(self, other: "BitmapModel", size: int) -> None:
        for bit in list(other.bits):
            start = bit * other.granularity
            self.mark(start, min(other.granularity, size - start))


@dataclass
class DiskModel:
    """What an image must hold.

    Attributes:
        content: guest bytes of the active layer.
        cluster_size: unit of discard in bytes.
        can_discard: False where the format cannot say that a cluster is zero (version 2 with a backing file).
        snapshots: name -> guest bytes.
        bitmaps: name -> what is marked.
    """

    content: bytearray
    cluster_size: int
    can_discard: bool = True
    snapshots: dict[str, bytes] = field(default_factory=dict)
    bitmaps: dict[str, BitmapModel] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.mark(offset, len(data))

    def write_zeroes(self, offset: int, length: int) -> None:
        self.content[offset : offset + length] = bytes(length)
        self.mark(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Only whole clusters are given back; the last one ends with the disk."""
        first = -(-offset // self.cluster_size) * self.cluster_size
        end = offset + length
        last = end if end == self.size else end // self.cluster_size * self.cluster_size
        if self.can_discard and first < last:
            self.content[first:last] = bytes(last - first)
        self.mark(offset, length)

    def mark(self, offset: int, length: int) -> None:
        """Let the bitmaps that record say that a range has changed."""
        for bitmap in self.bitmaps.values():
            if bitmap.enabled:
                bitmap.mark(offset, length)


@dataclass(frozen=True)
class StockView:
    """An image as qemu-img sees it.

    Attributes:
        path: the image.
        encryption: "luks", "aes" or None.
    """

    path: Path
    encryption: str | None = None

    @property
    def selector(self) -> list[str]:
        """Options and name that open the image, for most commands of qemu-img."""
        if self.encryption is None:
            return ["-f", "qcow2", str(self.path)]
        return [
            *("--object", f"secret,id=key,data={PASSPHRASE}"),
            "--image-opts",
            f"driver=qcow2,encrypt.format={self.encryption},encrypt.key-secret=key,file.filename={self.path}",
        ]

    def assert_clean(self) -> None:
        """`qemu-img check` ends with 0."""
        qemu_img("check", *self.selector)

    def content(self, snapshot_id: str | None = None) -> bytes:
        """Guest bytes of the active layer or of a snapshot of the same size."""
        raw = self.path.with_suffix(".oracle-raw")
        select = [] if snapshot_id is None else ["-l", f"snapshot.id={snapshot_id}"]
        *options, name = self.selector
        qemu_img("convert", "-O", "raw", *select, *options, name, raw)
        data = raw.read_bytes()
        raw.unlink()
        return data

    def assert_holds(self, model: DiskModel, snapshots: Sequence[tuple[str, str]]) -> None:
        """The active layer and each snapshot, given as (id, name), are what the model says."""
        self.assert_clean()
        assert_equal(self.content(), model.content, "active layer")
        for snapshot_id, name in snapshots:
            assert_equal(self.content(snapshot_id), model.snapshots[name], f"snapshot {name}")


def assert_equal(found: bytes | bytearray, expected: bytes | bytearray, what: str, start: int = 0) -> None:
    """Equal bytes, or a short message that says where the first difference is (pytest's own would be megabytes)."""
    if found == expected:
        return
    assert len(found) == len(expected), f"{what}: {len(found)} bytes instead of {len(expected)}"
    first = next(i for i in range(len(found)) if found[i] != expected[i])
    last = next(i for i in reversed(range(len(found))) if found[i] != expected[i])
    got, want = bytes(found[first : first + 8]).hex(), bytes(expected[first : first + 8]).hex()
    raise AssertionError(f"{what}: {got} instead of {want} at {start + first:#x}, last difference at {start + last:#x}")
