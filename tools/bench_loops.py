"""One measured loop over an image, run by tools/bench.py in a process of its own: prints seconds of the loop alone.

    python3 tools/bench_loops.py random-read|sequential-read qcowlib|dissect|pyqcow IMAGE COUNT
    python3 tools/bench_loops.py sequential-write qcowlib IMAGE COUNT

COUNT is the number of reads of 4 KiB, or of reads or writes of 1 MiB. All readers get the same offsets.
"""

import importlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PAGE = 4 << 10
PIECE = 1 << 20


@contextmanager
def opened(reader: str, path: str) -> Iterator[tuple[int, Callable[[int, int], bytes]]]:
    """Size of the disk, and a function that reads (offset, length)."""
    if reader == "qcowlib":
        import qcowlib

        with qcowlib.open_image(path, format="qcow2") as image:
            yield image.size, image.read
    elif reader == "dissect":
        # The two other readers have no type information.
        module: Any = importlib.import_module("dissect.hypervisor.disk.qcow2")
        with open(path, "rb") as file:
            disk = module.QCow2(file)
            stream = disk.open() if hasattr(disk, "open") else disk

            def read_stream(offset: int, length: int) -> bytes:
                stream.seek(offset)
                data: bytes = stream.read(length)
                return data

            yield disk.size, read_stream
    else:
        pyqcow: Any = importlib.import_module("pyqcow")
        handle = pyqcow.file()
        handle.open(path)
        yield handle.get_media_size(), lambda offset, length: handle.read_buffer_at_offset(length, offset)
        handle.close()


def random_read(reader: str, path: str, count: int) -> float:
    with opened(reader, path) as (size, read):
        order = random.Random(2026)
        offsets = [order.randrange(size // PAGE) * PAGE for _ in range(count)]
        read(0, PAGE)  # tables that are loaded at the first read are not the loop's
        began = time.perf_counter()
        for offset in offsets:
            read(offset, PAGE)
        return time.perf_counter() - began


def sequential_read(reader: str, path: str, count: int) -> float:
    with opened(reader, path) as (_, read):
        began = time.perf_counter()
        for index in range(count):
            read(index * PIECE, PIECE)
        return time.perf_counter() - began


def sequential_write(path: str, count: int) -> float:
    import qcowlib

    data = random.Random(2026).randbytes(PIECE)
    began = time.perf_counter()
    with qcowlib.open_image(path, format="qcow2", writable=True) as image:
        for index in range(count):
            image.write(index * PIECE, data)
    return time.perf_counter() - began


def main() -> None:
    loop, reader, path, count = sys.argv[1:]
    if loop == "random-read":
        print(random_read(reader, path, int(count)))
    elif loop == "sequential-read":
        print(sequential_read(reader, path, int(count)))
    else:
        print(sequential_write(path, int(count)))


if __name__ == "__main__":
    main()
