"""The oracle itself: it reads what was written, and it can fail."""

from pathlib import Path

import pytest

from tests import oracle


def test_a_written_pattern_reads_back(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    oracle.qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    oracle.qemu_io(image, "write -P 0x5a 64k 4k")
    oracle.qemu_io(image, "read -P 0x5a 64k 4k")
    assert oracle.content(image, tmp_path)[0x10000:0x11000] == b"\x5a" * 4096
    assert oracle.image_info(image)["virtual-size"] == 1 << 20
    assert oracle.image_check(image)["rc"] == 0
    oracle.assert_clean(image)


def test_another_pattern_fails(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    oracle.qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    with pytest.raises(AssertionError):
        oracle.qemu_io(image, "read -P 0x5a 64k 4k")
    with pytest.raises(AssertionError):
        oracle.qemu_img("info", tmp_path / "missing.qcow2")


def test_a_missing_tool_fails_and_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    oracle.tool.cache_clear()
    with pytest.raises(pytest.fail.Exception, match="qemu-utils"):
        oracle.tool("qemu-img")
    oracle.tool.cache_clear()


def test_the_tools_are_those_of_the_design() -> None:
    assert oracle.version("qemu-img") >= (7, 2)
    assert oracle.versions()["qemu-img"] != "missing"
