"""Compressed clusters: exact size, hostile streams, the parameters that other readers need."""

import contextlib
import random
import time
import zlib
from pathlib import Path

import pytest
from backports import zstd

from qcowlib.codecs.compression import COMPRESSION_ZLIB, COMPRESSION_ZSTD, MAX_ZSTD_FRAMES, compress, decompress
from qcowlib.errors import CorruptMetadata, UnsupportedFeature
from tests import oracle

BOTH = pytest.mark.parametrize("kind", [COMPRESSION_ZLIB, COMPRESSION_ZSTD])
TEXT = b"".join(b"line %d of a text that compresses\n" % n for n in range(4000))[: 1 << 16]


def raw_deflate(data: bytes, window: int = -15) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, window)
    return encoder.compress(data) + encoder.flush()


@BOTH
@pytest.mark.parametrize("size", [512, 65536, 2 << 20])
def test_round_trip_with_trailing_bytes(kind: int, size: int) -> None:
    data = (TEXT * 32)[:size]
    stream = compress(kind, data)
    assert stream is not None
    assert len(stream) < size
    for trailing in (b"", b"\0" * 511, b"\xff" * 300, stream):
        assert decompress(kind, memoryview(stream + trailing), size, 4096) == data


@BOTH
def test_incompressible_is_none(kind: int) -> None:
    assert compress(kind, random.Random(1).randbytes(65536)) is None


@BOTH
@pytest.mark.parametrize(
    ("delta", "rule"), [(-512, "only 65024 of 65536 bytes"), (1, "more than 65536 bytes"), (1 << 24, "more than")]
)
def test_wrong_length_is_refused(kind: int, delta: int, rule: str) -> None:
    data = bytes(65536 + delta)
    stream = raw_deflate(data) if kind == COMPRESSION_ZLIB else zstd.compress(data)
    with pytest.raises(CorruptMetadata, match=rule) as caught:
        decompress(kind, stream, 65536, 0x30000)
    assert caught.value.host_offset == 0x30000
    assert caught.value.structure == "compressed cluster"


@BOTH
def test_damaged_streams_are_refused_or_have_the_size(kind: int) -> None:
    stream = compress(kind, TEXT)
    assert stream is not None
    with pytest.raises(CorruptMetadata):
        decompress(kind, b"\xff" * 4096, 65536)
    with pytest.raises(CorruptMetadata):
        decompress(kind, b"", 65536)
    with pytest.raises(CorruptMetadata):
        decompress(kind, stream[: len(stream) // 2], 65536)
    rng = random.Random(2)
    for _ in range(300):
        damaged = bytearray(stream)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(CorruptMetadata):
            assert len(decompress(kind, damaged, 65536)) == 65536


def test_distances_beyond_the_written_window_are_read() -> None:
    block = random.Random(3).randbytes(16384)
    data = block * 4
    stream = raw_deflate(data, -15)
    assert len(stream) < 20000, "the stream must refer further back than 4 KiB"
    assert decompress(COMPRESSION_ZLIB, stream, 65536) == data


def test_written_streams_need_a_window_of_4_kib_only() -> None:
    block = random.Random(4).randbytes(8192)
    data = block * 8
    assert compress(COMPRESSION_ZLIB, data) is None, "a repetition 8 KiB back is out of reach of the window"
    stream = compress(COMPRESSION_ZLIB, TEXT)
    assert stream is not None
    assert zlib.decompressobj(-12).decompress(stream) == TEXT


def test_zstd_frames_are_joined() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    stream = zstd.compress(TEXT[:1000]) + skippable + zstd.compress(b"") + zstd.compress(TEXT[1000:])
    assert decompress(COMPRESSION_ZSTD, stream + b"junk", 65536) == TEXT


def test_zstd_frame_must_be_complete() -> None:
    stream = zstd.compress(TEXT, options={zstd.CompressionParameter.checksum_flag: 1})
    assert decompress(COMPRESSION_ZSTD, stream, 65536) == TEXT
    with pytest.raises(CorruptMetadata, match="no end"):
        decompress(COMPRESSION_ZSTD, stream[:-1], 65536)


def test_endless_empty_zstd_frames_end_soon() -> None:
    stream = zstd.compress(b"") * 300_000
    start = time.monotonic()
    with pytest.raises(CorruptMetadata, match=f"more than {MAX_ZSTD_FRAMES} zstd frames"):
        decompress(COMPRESSION_ZSTD, stream, 2 << 20)
    assert time.monotonic() - start < 5


def test_unknown_type() -> None:
    with pytest.raises(UnsupportedFeature, match="compression type 2"):
        decompress(2, b"", 512)
    with pytest.raises(UnsupportedFeature, match="compression type 2"):
        compress(2, b"")


@pytest.mark.parametrize(("kind", "name"), [(COMPRESSION_ZLIB, "zlib"), (COMPRESSION_ZSTD, "zstd")])
def test_a_cluster_that_qemu_compressed(kind: int, name: str, tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(TEXT)
    image = tmp_path / "a.qcow2"
    oracle.qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={name}", raw, image)
    data = image.read_bytes()
    l1_table = int.from_bytes(data[40:48], "big")
    l2_table = int.from_bytes(data[l1_table : l1_table + 8], "big") & 0x00FFFFFFFFFFFE00
    entry = int.from_bytes(data[l2_table : l2_table + 8], "big")
    assert entry >> 62 == 1
    start = entry & ((1 << 54) - 1)  # 62 - (cluster_bits 16 - 8) offset bits
    assert decompress(kind, data[start:], 65536, start) == TEXT
    if kind == COMPRESSION_ZLIB:
        stream = compress(kind, TEXT)
        assert stream is not None
        assert data[start : start + len(stream)] == stream, "the same parameters as QEMU's give the same bytes"
