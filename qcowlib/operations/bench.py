"""Equal requests to an image, one after another or several at a time, and how long they take.

Source: qemu-img's bench.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from qcowlib.errors import OptionError, OutOfRange
from qcowlib.image.interface import BlockImage
from qcowlib.image.raw import WritableRawImage
from qcowlib.image.writable import WritableQcow2Image

_MAX_THREADS = 64


@dataclass(frozen=True)
class Requests:
    """What is asked of the image.

    Attributes:
        count: how many requests.
        size: bytes of each.
        offset: guest bytes where the first one begins.
        step: bytes from one to the next; behind the end of the disk it goes on at its beginning.
        depth: requests under way at a time, at least 1; more than 64 wait for a thread.
        pattern: the byte that is written; None to read.
        flush_interval: flush after so many writes; 0 for never.
        drain: wait for the writes under way before a flush.
    """

    count: int
    size: int
    offset: int
    step: int
    depth: int
    pattern: int | None = None
    flush_interval: int = 0
    drain: bool = True

    def places(self, disk_size: int) -> Iterator[int]:
        """Where each request begins."""
        place = self.offset
        for _ in range(self.count):
            yield place
            place = (place + self.step) % disk_size if disk_size else 0


def bench(image: BlockImage, requests: Requests) -> float:
    """Send the requests; returns the seconds that they took.

    Args:
        image: opened for writing, if a pattern is to be written.
        requests: what to send.

    Raises:
        OutOfRange: a request reaches behind the end of the disk; those before it were sent.
        QcowError: a request failed.
    """
    writes = requests.pattern is not None
    if requests.depth < 1:
        raise OptionError("at least one request is to be under way at a time")
    if writes and not isinstance(image, WritableQcow2Image | WritableRawImage):
        raise OptionError(f"'{image.name}' is not open for writing")
    data = bytes((requests.pattern or 0,)) * requests.size

    def send(place: int) -> None:
        if place + requests.size > image.size:
            raise OutOfRange(f"bytes {place} to {place + requests.size} lie behind the end of the disk")
        if isinstance(image, WritableQcow2Image | WritableRawImage) and writes:
            image.write(place, data)
        else:
            image.read(place, requests.size)

    def flush() -> None:
        if isinstance(image, WritableQcow2Image | WritableRawImage):
            image.flush()

    began = time.perf_counter()
    with ThreadPoolExecutor(min(requests.depth, _MAX_THREADS)) as threads:
        under_way: set[Future[None]] = set()
        for number, place in enumerate(requests.places(image.size), 1):
            if len(under_way) >= requests.depth:
                under_way = _after(under_way, FIRST_COMPLETED)
            under_way.add(threads.submit(send, place))
            if requests.flush_interval and number % requests.flush_interval == 0:
                if requests.drain:
                    under_way = _after(under_way)
                under_way.add(threads.submit(flush))
        _after(under_way)
    return time.perf_counter() - began


def _after(under_way: set[Future[None]], when: str = "ALL_COMPLETED") -> set[Future[None]]:
    """Wait; returns what is still under way, and raises what a request raised."""
    done, rest = wait(under_way, return_when=when)
    for request in done:
        request.result()
    return rest
