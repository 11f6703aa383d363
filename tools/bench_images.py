"""The images that tools/bench.py measures, made with stock qemu-img so that no program has made its own.

    python3 tools/bench_images.py preallocated|scattered|scattered-filled PATH SIZE

A process of its own makes them: a measured process's peak memory is never seen smaller than that of its parent.
"""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

CLUSTER = 64 << 10
OFFSET_MASK = np.uint64(0x00FFFFFFFFFFFE00)
COPIED = np.uint64(1 << 63)


def preallocated(path: Path, size: int) -> Path:
    """A disk with all metadata and no data: every cluster mapped, the file full of holes."""
    options = ["-q", "-f", "qcow2", "-o", "preallocation=metadata"]
    subprocess.run(["qemu-img", "create", *options, path, str(size)], check=True)
    return path


def scattered(path: Path, size: int, *, fill: bool) -> Path:
    """A disk whose clusters lie in random order in the file, so that no two neighbours can be merged.

    Args:
        path: name of the new file.
        size: bytes of the disk, a multiple of what one L2 table maps.
        fill: put random bytes into the clusters instead of leaving them holes.
    """
    preallocated(path, size)
    with path.open("r+b") as image:
        tables = [offset for offset in _l1(image.fileno()) if offset]
        entries = np.concatenate(
            [np.frombuffer(os.pread(image.fileno(), CLUSTER, offset), ">u8") for offset in tables]
        ).astype(np.uint64)
        shuffled = np.random.default_rng(2026).permutation(entries & OFFSET_MASK) | COPIED
        for index, table in enumerate(np.split(shuffled, len(tables))):
            os.pwrite(image.fileno(), table.astype(">u8").tobytes(), tables[index])
        if fill:
            for offset in (entries & OFFSET_MASK).tolist():
                os.pwrite(image.fileno(), os.urandom(CLUSTER), offset)
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    return path


def _l1(descriptor: int) -> tuple[int, ...]:
    count, offset = struct.unpack(">IQ", os.pread(descriptor, 12, 36))
    raw = struct.unpack(f">{count}Q", os.pread(descriptor, count * 8, offset))
    return tuple(entry & int(OFFSET_MASK) for entry in raw)


def main() -> None:
    kind, path, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if kind == "preallocated":
        preallocated(path, size)
    else:
        scattered(path, size, fill=kind == "scattered-filled")


if __name__ == "__main__":
    main()
