"""Compressed clusters: one zlib (raw deflate) or zstd stream per guest cluster.

The L2 entry tells the length of a stream only to the sector, so what follows the stream is normal and ignored.
A cluster that does not come out at exactly the cluster size is damaged.

Source: qcow2.txt, "Compressed Clusters Descriptor" and header field "compression_type"; parameters and acceptance
as in QEMU's qcow2-threads.c, except that a stream going on behind the end of the cluster is refused for both types
(QEMU refuses it for zstd only).
"""

from __future__ import annotations

import sys
import zlib
from functools import cache
from types import ModuleType

from qcowlib.errors import CorruptMetadata, UnsupportedFeature

COMPRESSION_ZLIB = 0
COMPRESSION_ZSTD = 1

# Writers use one frame per cluster. Every frame costs a pass over the remaining input, so a cluster made of
# millions of empty frames must not be followed to its end.
MAX_ZSTD_FRAMES = 256

_STRUCTURE = "compressed cluster"
_ZLIB_WRITE_WINDOW = -12
# A reader of one whole cluster can follow any distance inside it, whatever window the stream was written with:
# QEMU inflates into one buffer and thereby accepts distances above 4 KiB as well.
_ZLIB_READ_WINDOW = -15
_ZLIB_MEMORY_LEVEL = 9


def decompress(
    compression_type: int, data: bytes | bytearray | memoryview, cluster_size: int, host_offset: int | None = None
) -> bytes:
    """The guest bytes of one compressed cluster.

    Args:
        compression_type: header field: 0 zlib, 1 zstd.
        data: the stream, possibly with trailing bytes that belong to something else.
        cluster_size: bytes that must come out.
        host_offset: where `data` starts in the host file, for the error.

    Returns:
        Exactly `cluster_size` bytes.

    Raises:
        CorruptMetadata: the stream is damaged, or gives fewer or more bytes.
        UnsupportedFeature: another compression type.
    """
    if compression_type == COMPRESSION_ZLIB:
        guest = _inflate(data, cluster_size + 1, host_offset)
    elif compression_type == COMPRESSION_ZSTD:
        guest = _zstd_decompress(data, cluster_size, host_offset)
    else:
        raise UnsupportedFeature("header", None, f"compression type {compression_type} is unknown")
    if len(guest) != cluster_size:
        found = f"only {len(guest)}" if len(guest) < cluster_size else "more than"
        wanted = f" of {cluster_size}" if len(guest) < cluster_size else f" {cluster_size}"
        raise CorruptMetadata(_STRUCTURE, host_offset, f"decompresses to {found}{wanted} bytes")
    return guest


def compress(compression_type: int, data: bytes | bytearray | memoryview) -> bytes | None:
    """One cluster as a stream that every reader of the format takes.

    Args:
        compression_type: header field: 0 zlib, 1 zstd.
        data: the guest bytes of one whole cluster.

    Returns:
        The stream, or None when it is not smaller than the data (the cluster is then stored as it is).

    Raises:
        UnsupportedFeature: another compression type.
    """
    if compression_type == COMPRESSION_ZLIB:
        # Readers only need to support a 4 KiB window (specification).
        encoder = zlib.compressobj(
            zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _ZLIB_WRITE_WINDOW, _ZLIB_MEMORY_LEVEL, zlib.Z_DEFAULT_STRATEGY
        )
        stream = encoder.compress(data) + encoder.flush()
    elif compression_type == COMPRESSION_ZSTD:
        stream = bytes(_zstd().compress(data))
    else:
        raise UnsupportedFeature("header", None, f"compression type {compression_type} is unknown")
    return stream if len(stream) < len(data) else None


def _inflate(data: bytes | bytearray | memoryview, limit: int, host_offset: int | None) -> bytes:
    """At most `limit` bytes of a raw deflate stream."""
    try:
        return zlib.decompressobj(_ZLIB_READ_WINDOW).decompress(data, limit)
    except zlib.error as error:
        raise CorruptMetadata(_STRUCTURE, host_offset, f"the deflate stream is damaged ({error})") from error


def _zstd_decompress(data: bytes | bytearray | memoryview, cluster_size: int, host_offset: int | None) -> bytes:
    """The output of as many zstd frames as one cluster needs, at most one byte more than the cluster.

    The frame that completes the cluster must be complete itself.
    """
    zstd = _zstd()
    parts: list[bytes] = []
    length = 0
    rest = data
    for _ in range(MAX_ZSTD_FRAMES):
        frame = zstd.ZstdDecompressor()
        try:
            part = frame.decompress(rest, cluster_size + 1 - length)
        except zstd.ZstdError as error:
            raise CorruptMetadata(_STRUCTURE, host_offset, f"the zstd stream is damaged ({error})") from error
        parts.append(part)
        length += len(part)
        if not frame.eof:
            if length == cluster_size:
                raise CorruptMetadata(_STRUCTURE, host_offset, "the zstd frame has no end")
            break
        rest = frame.unused_data
        if length >= cluster_size or not rest:
            break
    else:
        raise CorruptMetadata(_STRUCTURE, host_offset, f"more than {MAX_ZSTD_FRAMES} zstd frames")
    return parts[0] if len(parts) == 1 else b"".join(parts)


@cache
def _zstd() -> ModuleType:
    """The zstd module: the standard library's from Python 3.14 on, its backport before."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
