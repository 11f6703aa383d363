"""qcow bench: how long equal requests to an image take."""

from __future__ import annotations

from qcowlib.cli.common import (
    CACHE_MODES,
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    SHORT_FORMAT,
    CommandFailed,
    one_filename,
    size_argument,
    stock_errno,
    stock_text,
)
from qcowlib.cli.opening import image_name, open_image_name, open_image_name_for_writing, with_known_format
from qcowlib.cli.options import Arguments, Option, Syntax
from qcowlib.errors import OutOfRange, QcowError
from qcowlib.units import INT32_MAX

SYNTAX = Syntax(
    "bench",
    "[OPTIONS] [-c COUNT] [-d DEPTH] [-o OFFSET] [-s SIZE] [-S STEP] [-w] FILENAME",
    (
        Option("count", "c", "", "COUNT", "number of requests (default: 75000)"),
        Option("depth", "d", "", "DEPTH", "requests under way at a time (default: 64)"),
        SHORT_FORMAT,
        Option("flush-interval", "", "flush-interval", "N", "flush after so many writes"),
        Option("aio", "i", "", "AIO", "threads, the only way of sending requests that there is here"),
        Option("no-drain", "", "no-drain", None, "flush while writes are under way"),
        Option("offset", "o", "", "OFFSET", "where the first request begins (default: 0)"),
        Option("pattern", "", "pattern", "BYTE", "the byte that is written (default: 0)"),
        QUIET,
        Option("size", "s", "", "SIZE", "bytes of a request (default: 4k)"),
        Option("step", "S", "", "STEP", "bytes from one request to the next (default: SIZE)"),
        Option("cache", "t", "", "CACHE", "cache mode; requests are the same in all of them"),
        Option("write", "w", "", None, "write instead of reading: the image is changed"),
        FORCE_SHARE,
        OBJECT,
        IMAGE_OPTS,
    ),
    "Exit codes: 0 done, 1 a request failed.",
)


def run(arguments: Arguments) -> int:
    """Send the requests and print how long they took."""
    from qcowlib.operations.bench import Requests, bench

    count = _number(arguments, "count", 75000, "Invalid request count specified")
    depth = _number(arguments, "depth", 64, "Invalid queue depth specified")
    aio = arguments.last("aio") or "threads"
    if aio not in {"threads", "native", "io_uring"}:
        raise CommandFailed(f"Invalid aio option: {aio}")
    if aio != "threads":
        raise CommandFailed(f"requests are sent by threads: '{aio}' is not available")
    offset = size_argument(arguments.last("offset") or "0", "offset")
    size = size_argument(arguments.last("size") or "4096", "buffer size", maximum=INT32_MAX)
    step = size_argument(arguments.last("step") or "0", "step_size", maximum=INT32_MAX) or size
    if arguments.last("cache") not in (None, *CACHE_MODES):
        raise CommandFailed("Invalid cache mode")
    writes = arguments.has("write")
    pattern = _number(arguments, "pattern", 0, "Invalid pattern byte specified", maximum=255)
    interval = _number(arguments, "flush-interval", 0, "Invalid flush interval specified")
    filename = one_filename(arguments)
    if interval and not writes:
        raise CommandFailed("--flush-interval is only available in write tests")
    if interval and interval < depth:
        raise CommandFailed("Flush interval can't be smaller than depth")
    force_share = arguments.has("force-share")
    if writes and force_share:
        raise CommandFailed(f"Could not open '{filename}': force-share=on can only be used with read-only images")
    name = image_name(arguments, filename)
    image = (
        open_image_name_for_writing(with_known_format(name), open_backing=True)
        if writes
        else open_image_name(name, force_share=force_share, open_backing=True)
    )
    with image:
        print(
            f"Sending {count} {'write' if writes else 'read'} requests, {size} bytes each, {depth} in parallel "
            f"(starting at offset {offset}, step size {step})",
        )
        if interval:
            print(f"Sending flush every {interval} requests")
        drain = not arguments.has("no-drain")
        requests = Requests(count, size, offset, step, depth, pattern if writes else None, interval, drain)
        try:
            seconds = bench(image, requests)
        except OutOfRange as error:
            raise CommandFailed("Failed request: Input/output error") from error
        except QcowError as error:
            raise CommandFailed(f"Failed request: {stock_errno(error) or stock_text(error)}") from error
    print(f"Run completed in {seconds:.3f} seconds.")
    return 0


def _number(arguments: Arguments, option: str, default: int, message: str, *, maximum: int = INT32_MAX) -> int:
    text = arguments.last(option)
    try:
        number = default if text is None else int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= maximum:
        raise CommandFailed(message)
    return number
