"""The second part of demo.py, in the current directory: a running virtual machine, a snapshot of it, and back.

The machine is a boot sector (fixtures/boot_sector.s) that counts in its memory and on its disk, and prints each count.
"""

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import qcowlib

BOOT_SECTOR = Path(__file__).resolve().parent.parent / "fixtures" / "boot_sector.hex"
QEMU = "qemu-system-x86_64"
DEADLINE = 60.0


class WrongState(Exception):
    """The machine is not in the state in which it must be."""


def domsnap(*arguments: str) -> None:
    """Run the installed command, shown with its output."""
    print(f"$ domsnap {shlex.join(arguments)}", flush=True)
    done = subprocess.run([Path(sys.executable).with_name("domsnap"), *arguments], check=False)
    if done.returncode != 0:
        raise WrongState(f"domsnap {arguments[0]} ended with exit code {done.returncode}")


def make_disk() -> None:
    """A disk that boots the counting guest."""
    code = bytes.fromhex(BOOT_SECTOR.read_text()).ljust(510, b"\0") + b"\x55\xaa"
    qcowlib.create_image("vm.qcow2", 8 << 20)
    with qcowlib.open_image("vm.qcow2", writable=True) as image:
        image.write(0, code)


@contextmanager
def running(socket: Path) -> Iterator[None]:
    """The virtual machine, until the block ends."""
    drive = f"if=virtio,format=qcow2,file={Path('vm.qcow2').absolute()}"
    options = ["-accel", "tcg", "-m", "4", "-display", "none", "-nodefaults", "-name", "vm", "-drive", drive]
    command = [QEMU, *options, "-serial", "file:printed", "-qmp", f"unix:{socket},server=on,wait=off"]
    print(f"$ {shlex.join(command)} &", flush=True)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def counts() -> list[int]:
    """What the guest has printed so far: "T" and its count in each line."""
    printed = Path("printed")
    lines = printed.read_text(errors="replace").split("\n")[:-1] if printed.exists() else []
    return [int(line[-8:], 16) for line in lines if line[-9:-8] == "T"]


def wait_for_counts(more: int) -> int:
    """Let the guest count on; returns its last count."""
    before, end = len(counts()), time.monotonic() + DEADLINE
    while len(counts()) < before + more:
        if time.monotonic() > end:
            raise WrongState("the guest does not count")
        time.sleep(0.05)
    return counts()[-1]


def demonstrate() -> None:
    """A snapshot of a running machine and back, in the current directory."""
    make_disk()
    sockets = Path(tempfile.mkdtemp(prefix="demo-"))  # the name of a socket must be short
    try:
        with running(sockets / "qmp"):
            where = ["--qmp", str(sockets / "qmp"), "--catalog", "vm.snapshots"]
            first = wait_for_counts(5)
            print(f"the guest has counted to {first}")
            domsnap("create", "before", "--description", "memory and disk at one instant", *where)
            taken = counts()[-1]
            later = wait_for_counts(20)
            print(f"the snapshot was taken between {first} and {taken + 1}; the guest has counted on to {later}")
            domsnap("list", "-l", *where)
            printed = len(counts())
            domsnap("revert", "before", "--discard-current", *where)
            wait_for_counts(3)
            # What was printed between looking and going back still belongs to the time before.
            after = next((count for count in counts()[printed:] if count < later), None)
            if after is None or not first <= after <= taken + 2:
                raise WrongState(f"the guest goes on at {after}, and the snapshot was taken from {first} to {taken}")
            domsnap("info", "before", "--check", *where)
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
    if "!" in Path("printed").read_text(errors="replace"):
        raise WrongState("the guest says that its disk is not as its memory remembers it")
    print(f"ok: after the revert the guest went on at {after}, its disk with it")


def main() -> int:
    try:
        demonstrate()
    except WrongState as error:
        print(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
