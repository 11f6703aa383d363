"""Sizes: qemu-img's own rules, by value and against the stock tool."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from qcowlib.errors import OptionError
from qcowlib.units import (
    SizeRangeError,
    SizeSyntaxError,
    format_size,
    parse_size,
    round_down,
    round_up,
    size_value,
)

GOOD = [
    ("0", 0),
    ("512", 512),
    ("+7", 7),
    (" 7", 7),
    ("7b", 7),
    ("7B", 7),
    ("1k", 1 << 10),
    ("1K", 1 << 10),
    ("3M", 3 << 20),
    ("2g", 2 << 30),
    ("1T", 1 << 40),
    ("1P", 1 << 50),
    ("1E", 1 << 60),
    ("1.5G", 3 << 29),
    ("1.5E", 3 << 59),
    ("1.k", 1 << 10),
    ("1.", 1),
    ("1.0", 1),
    ("0.1k", 102),
    ("0.0005k", 1),
    ("0.00048828125k", 1),
    ("0.00048k", 0),
    ("0x200", 512),
    ("0X1e", 30),
    ("0x10k", 16 << 10),
    ("0.1G", 107374182),
    ("1.7M", 1782579),
]
BAD_SYNTAX = [
    "",
    "k",
    "abc",
    "-1",
    "1kk",
    "1kB",
    "1.5",
    "1.5b",
    "1e3",
    "1.5e3k",
    "0x",
    "0x1.8",
    ".5k",
    "1 k",
    "1k ",
    "1_0",
]
TOO_LARGE = ["16E", "18446744073709551616", "99999999999999999999999", "15.9999999999999999999E"]


@pytest.mark.parametrize(("text", "value"), GOOD)
def test_size_value(text: str, value: int) -> None:
    assert size_value(text) == value
    assert parse_size(text) == value


@pytest.mark.parametrize("text", BAD_SYNTAX)
def test_not_a_size(text: str) -> None:
    with pytest.raises(SizeSyntaxError):
        size_value(text)
    with pytest.raises(OptionError, match="You may use k, M, G, T, P or E suffixes for\nkilobytes"):
        parse_size(text)


@pytest.mark.parametrize("text", TOO_LARGE)
def test_too_large(text: str) -> None:
    with pytest.raises(SizeRangeError):
        size_value(text)
    with pytest.raises(OptionError, match=r"Must be between 0 and 9223372036854775807\."):
        parse_size(text)


def test_limits_and_name() -> None:
    assert parse_size("8E", maximum=1 << 63) == 1 << 63
    with pytest.raises(OptionError, match=r"Invalid bs specified. Must be between 1 and 2147483647\."):
        parse_size("0", "bs", minimum=1, maximum=(1 << 31) - 1)
    with pytest.raises(OptionError, match="Must be between"):
        parse_size("8E")


def test_default_suffix_and_base() -> None:
    assert size_value("3", default_suffix="M") == 3 << 20
    assert size_value("3k", base=1000) == 3000


@pytest.mark.parametrize("text", [t for t, _ in GOOD] + BAD_SYNTAX + TOO_LARGE)
def test_same_as_qemu_img(text: str, tmp_path: Path) -> None:
    """`create` of a raw image takes the text as its size: accepted or refused alike, and of the same size."""
    image = tmp_path / "i"
    made = subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "--", str(image), text],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if text in BAD_SYNTAX + TOO_LARGE:
        with pytest.raises(OptionError) as refused:
            parse_size(text)
        assert made.returncode == 1
        assert [line.removeprefix("qemu-img: ") for line in made.stderr.splitlines()] == str(refused.value).splitlines()
        return
    value = parse_size(text)
    if value > 1 << 55:  # past what the format's L1 table reaches: the text was taken, the image is not made
        assert "The image size is too large" in made.stderr
        return
    assert made.returncode == 0, made.stderr
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", str(image)], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(info.stdout)["virtual-size"] == -(-value // 512) * 512


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (196 * 1024, "196 KiB"),
        (1 << 20, "1 MiB"),
        (1023 << 10, "0.999 MiB"),
        (10 << 30, "10 GiB"),
        (123456789, "118 MiB"),
        (1 << 63, "8 EiB"),
        ((1 << 64) - 1, "16 EiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("size", [512, 999 * 512, 1000 * 512, 1234567 * 512, (1 << 40) - 512, 3 << 40])
def test_format_size_as_qemu_img(size: int, tmp_path: Path) -> None:
    image = tmp_path / "i"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)], check=True, timeout=60)
    info = subprocess.run(["qemu-img", "info", str(image)], capture_output=True, text=True, check=True, timeout=60)
    assert f"virtual size: {format_size(size)} ({size} bytes)" in info.stdout


def test_rounding() -> None:
    assert [round_up(v, 512) for v in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert [round_down(v, 512) for v in (0, 1, 512, 1023)] == [0, 0, 512, 512]
