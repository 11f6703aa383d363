"""QEMU and this library keep out of each other's images: with stock tools, both ways round."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowlib.errors import ImageLocked
from qcowlib.storage.local import from_descriptor, open_local
from tests.oracle import environment, qemu_img, run, tool

pytestmark = pytest.mark.live

MIB = 1 << 20
WRITE_LOCK = 'Failed to get "write" lock\nIs another process using the image [{}]?'
SHARED_LOCK = 'Failed to get shared "write" lock\nIs another process using the image [{}]?'


def machine(*args: str) -> list[str]:
    """The command line of a stopped guest without devices; it needs no KVM."""
    options = "-S -accel tcg -m 16 -display none -nodefaults -qmp stdio"
    return [tool("qemu-system-x86_64"), *options.split(), *args]


@contextmanager
def running_guest(*args: str) -> Iterator[None]:
    """A QEMU with its disks open, until the block ends."""
    process = subprocess.Popen(
        machine(*args),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        # The greeting comes while the machine is still being made; a command is answered when it is complete.
        process.stdin.write('{"execute": "qmp_capabilities"}\n')
        process.stdin.flush()
        for expected in ("QMP", "return"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            assert expected in json.loads(line)
        yield
        assert process.poll() is None, "the guest ended too early"
    finally:
        process.kill()
        process.communicate()


def guest_output(*args: str) -> tuple[int, str]:
    """Exit code and error text of a QEMU that is told to quit as soon as it has started."""
    quit_now = '{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
    done = subprocess.run(
        machine(*args), input=quit_now, capture_output=True, text=True, timeout=60, env=environment(), check=False
    )
    return done.returncode, done.stderr


def drive(path: Path, options: str = "") -> list[str]:
    """A virtio disk; `format` is the file's extension."""
    name = path.stem
    return [
        "-drive",
        f"file={path},format={path.suffix[1:]},if=none,id={name}{options}",
        "-device",
        f"virtio-blk-pci,drive={name}",
    ]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    return path


@pytest.fixture
def overlay(image: Path) -> Path:
    path = image.with_name("overlay.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", path)
    return path


# We hold, QEMU comes


def test_while_we_write_the_tools_and_a_guest_refuse(image: Path) -> None:
    with open_local(image, writable=True):
        before = digest(image)
        for command in (["info"], ["check"], ["snapshot", "-l"], ["map"]):
            refused = qemu_img(*command, image, check=False)
            assert refused.returncode == 1
            assert SHARED_LOCK.format(image) in refused.stderr
        for command in (["resize"], ["snapshot", "-c", "one"]):
            refused = qemu_img(*command, image, *(["16M"] if command == ["resize"] else []), check=False)
            assert refused.returncode == 1
            assert WRITE_LOCK.format(image) in refused.stderr
        refused = qemu_img("create", "-f", "qcow2", image, "8M", check=False)
        assert WRITE_LOCK.format(image) in refused.stderr
        refused = run("qemu-io", "-f", "qcow2", "-c", "write 0 512", image, check=False)
        assert refused.returncode == 1
        assert WRITE_LOCK.format(image) in refused.stderr
        code, text = guest_output(*drive(image))
        assert code == 1
        assert 'Failed to get "write" lock' in text
        code, text = guest_output(*drive(image, ",readonly=on"))
        assert code == 1
        assert 'Failed to get shared "write" lock' in text
        assert qemu_img("info", "-U", image).returncode == 0
        assert digest(image) == before
    assert qemu_img("snapshot", "-c", "one", image).returncode == 0
    assert guest_output(*drive(image)) == (0, "")


def test_while_we_read_the_tools_read_and_a_guest_does_not_write(image: Path) -> None:
    with open_local(image):
        assert qemu_img("info", image).returncode == 0
        assert guest_output(*drive(image, ",readonly=on")) == (0, "")
        refused = qemu_img("snapshot", "-c", "one", image, check=False)
        assert WRITE_LOCK.format(image) in refused.stderr
        code, text = guest_output(*drive(image))
        assert code == 1
        assert 'Failed to get "write" lock' in text


def test_while_we_force_share_a_guest_may_write(image: Path) -> None:
    with open_local(image, force_share=True):
        assert guest_output(*drive(image)) == (0, "")
        assert qemu_img("snapshot", "-c", "one", image).returncode == 0


def test_writing_to_the_base_of_a_chain_excludes_the_overlay_s_guest(image: Path, overlay: Path) -> None:
    with open_local(image, writable=True):
        code, text = guest_output(*drive(overlay))
        assert code == 1
        assert 'Failed to get shared "write" lock' in text
    with open_local(image):
        assert guest_output(*drive(overlay)) == (0, "")


def test_locks_go_with_a_killed_process(image: Path) -> None:
    """No stale lock survives its owner, however it ends."""
    program = "import sys; from qcowlib.storage.local import open_local; f = open_local(sys.argv[1], writable=True); "
    program += "print('locked', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    assert SHARED_LOCK.format(image) in qemu_img("info", image, check=False).stderr
    holder.kill()
    holder.communicate()
    assert qemu_img("info", image).returncode == 0


# QEMU holds, we come


def assert_refused(path: Path, message: str, **use: bool) -> None:
    before = digest(path)
    with pytest.raises(ImageLocked) as refused:
        open_local(path, **use)
    assert str(refused.value) == message.format(path)
    assert digest(path) == before


def test_a_running_guest_keeps_us_out(image: Path) -> None:
    with running_guest(*drive(image)):
        assert_refused(image, WRITE_LOCK, writable=True)
        assert_refused(image, WRITE_LOCK, create=True)
        assert_refused(image, SHARED_LOCK)
        with open(image, "r+b") as file, pytest.raises(ImageLocked):
            from_descriptor(file.fileno(), writable=True)
        with open_local(image, force_share=True) as file:
            assert file.pread(4, 0) == b"QFI\xfb"
    open_local(image, writable=True).close()


def test_a_guest_on_a_raw_disk_keeps_us_out(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    with running_guest(*drive(path)):
        assert_refused(path, WRITE_LOCK, writable=True)
        assert_refused(path, SHARED_LOCK)


def test_a_guest_with_a_read_only_disk_lets_us_read(image: Path) -> None:
    with running_guest(*drive(image, ",readonly=on")):
        assert_refused(image, WRITE_LOCK, writable=True)
        with open_local(image) as file:
            assert file.pread(4, 0) == b"QFI\xfb"


def test_the_backing_file_of_a_running_guest_can_be_read_only(image: Path, overlay: Path) -> None:
    with running_guest(*drive(overlay)):
        assert_refused(image, WRITE_LOCK, writable=True)
        open_local(image).close()
        assert_refused(overlay, WRITE_LOCK, writable=True)
        assert_refused(overlay, SHARED_LOCK)


def test_a_tool_that_writes_keeps_us_out(image: Path) -> None:
    """qemu-io sleeps with the image open."""
    process = subprocess.Popen(
        [tool("qemu-io"), "-f", "qcow2", image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("write 0 512\n")
        process.stdin.flush()
        while "wrote 512/512" not in (line := process.stdout.readline()):
            assert line, "qemu-io ended"
        assert_refused(image, WRITE_LOCK, writable=True)
        assert_refused(image, SHARED_LOCK)
    finally:
        process.kill()
        process.communicate()
    open_local(image, writable=True).close()


def test_a_guest_that_does_not_lock_is_not_seen(image: Path) -> None:
    """Nothing can be done about it: stock tools do not see it either. Known, so that it is no surprise."""
    off = f"driver=qcow2,node-name=disk,file.driver=file,file.locking=off,file.filename={image}"
    with running_guest("-blockdev", off, "-device", "virtio-blk-pci,drive=disk"):
        assert run("qemu-io", "-f", "qcow2", "-c", "write 0 512", image).returncode == 0
        open_local(image, writable=True).close()
