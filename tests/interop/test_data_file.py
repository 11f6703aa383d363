"""Writing to images with an external data file."""

import random
from pathlib import Path

import pytest

import qcowlib
from tests.oracle import assert_clean, content, qemu_img, qemu_io

SIZE = (1 << 20) + 512  # the last cluster is cut


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on,cluster_size=16k"])
def test_writes_zeroes_and_discards(tmp_path: Path, raw: bool, options: str) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    chosen = ",".join(filter(None, [options, f"data_file={data}", "data_file_raw=on" if raw else ""]))
    qemu_img("create", "-q", "-f", "qcow2", "-o", chosen, path, str(SIZE))
    before = data.stat().st_size  # qemu-img rounds a raw one up to clusters
    rng = random.Random(options)
    model = bytearray(SIZE)
    with qcowlib.open_image(path, writable=True, policy=qcowlib.LocalFiles()) as image:
        for _ in range(20):
            start = rng.randrange(SIZE)
            length = min(SIZE - start, rng.choice([1, 512, 4096, 100_000]))
            payload = rng.randbytes(length)
            image.write(start, payload)
            model[start : start + length] = payload
            start = rng.randrange(SIZE)
            length = min(SIZE - start, 50_000)
            image.write_zeroes(start, length)
            model[start : start + length] = bytes(length)
        image.write(SIZE - 700, b"e" * 700)  # the end of the disk lies inside a cluster
        model[-700:] = b"e" * 700
        assert image.read(0, SIZE) == model
    assert_clean(path)
    assert content(path, tmp_path) == model
    assert data.stat().st_size == max(before, SIZE)
    if raw:
        assert data.read_bytes()[:SIZE] == model
    with qcowlib.open_image(path, writable=True, policy=qcowlib.LocalFiles()) as image:
        image.discard(0, SIZE)
        assert image.read(0, SIZE) == bytes(SIZE)
    assert content(path, tmp_path) == bytes(SIZE)
    assert_clean(path)
    if raw:
        assert data.read_bytes() == bytes(len(data.read_bytes()))
    qemu_io(path, f"read -P 0 0 {SIZE}")
