"""Show the main job on a real image: create, write, snapshot, change, read both states, overlay, revert, check.

    python3 tools/demo.py

It needs nothing but Python 3.11: it makes its own virtual environment (`.venv-demo`), installs the package and then
uses the `qcow` command and the library as a user would. What each state of the disk must hold is kept in a plain byte
array beside it; the exit code is not 0 when any state reads otherwise. Where QEMU is installed, a snapshot of a running
virtual machine follows (demo_domain.py).
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-demo"

MIB = 1 << 20
DISK_SIZE = 64 * MIB
#: Where on the disk there is a line of text that the demonstration changes.
NOTE = 3 * MIB + 12345


class WrongState(Exception):
    """A state of the disk does not read as it must."""


def set_up() -> Path:
    """Make the virtual environment and install the package from this checkout; returns its Python."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        print(f"making {ENVIRONMENT.name} ...", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=False)
        if made.returncode != 0:
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            sys.exit("python3 -m venv failed; on Debian run as root: apt-get install python3-venv")
    print("installing qcowlib ...", flush=True)
    pip: list[str | Path] = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if subprocess.run([*pip, f"{ROOT}[domain]"], check=False).returncode != 0:
        sys.exit("pip could not install the package")
    return python


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def qcow(*arguments: str) -> None:
    """Run the installed command, shown with its output."""
    print(f"$ qcow {shlex.join(arguments)}", flush=True)
    done = subprocess.run([Path(sys.executable).with_name("qcow"), *arguments], check=False)
    if done.returncode != 0:
        raise WrongState(f"qcow {arguments[0]} ended with exit code {done.returncode}")


def expect(what: str, content: bytes, model: bytearray) -> None:
    """Compare a state of the disk with what it must be, byte for byte."""
    digest = hashlib.sha256(content).hexdigest()[:16]
    if content != model:
        raise WrongState(f"{what}: reads {digest}, must be {hashlib.sha256(model).hexdigest()[:16]}")
    print(f"ok: {what}: all {len(content)} bytes as they must be (sha256 {digest}...)", flush=True)


def real_data() -> bytes:
    """Some megabytes that are not made up: sources of this Python's library."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    return b"".join(source.read_bytes() for source in sources)[: 5 * MIB]


def write_note(model: bytearray, text: str) -> bytes:
    """Put a line of text into the model; returns the bytes for the disk."""
    note = text.encode().ljust(64)
    model[NOTE : NOTE + len(note)] = note
    return note


def create_and_write(disk: bytearray) -> None:
    title("Create a disk and write to it")
    data = real_data()
    disk[: len(data)] = data
    write_note(disk, "balance: 100")
    Path("input.raw").write_bytes(disk)
    qcow("create", "-f", "qcow2", "disk.qcow2", "64M")
    qcow("convert", "-n", "-f", "raw", "-O", "qcow2", "input.raw", "disk.qcow2")
    qcow("info", "disk.qcow2")


def take_snapshot() -> None:
    title("Take an internal snapshot")
    qcow("snapshot", "-c", "before", "disk.qcow2")
    qcow("snapshot", "-l", "disk.qcow2")


def change(disk: bytearray) -> None:
    import qcowlib

    title("Change the disk through the library")
    data = real_data()[: 3 * MIB]
    with qcowlib.open_image("disk.qcow2", writable=True) as image:
        image.write(NOTE, write_note(disk, "balance: 0"))
        image.write_zeroes(0, 2 * MIB)
        image.write(40 * MIB - 100, data)
    disk[: 2 * MIB] = bytes(2 * MIB)
    disk[40 * MIB - 100 : 40 * MIB - 100 + len(data)] = data
    print("image.write(...), image.write_zeroes(...), image.write(...)")


def read_both_states(disk: bytearray, before: bytearray) -> None:
    import qcowlib

    title("Read both states")
    with qcowlib.open_image("disk.qcow2") as image, image.open_snapshot("before") as snapshot:
        print(f"now:      {image.read(NOTE, 64).rstrip().decode()}")
        print(f"snapshot: {snapshot.read(NOTE, 64).rstrip().decode()}")
        expect("the disk now", image.read(0, image.size), disk)
        expect("the snapshot", snapshot.read(0, snapshot.size), before)
    qcow("convert", "-l", "before", "-O", "raw", "disk.qcow2", "before.raw")
    expect("the snapshot, converted", Path("before.raw").read_bytes(), before)


def put_overlay(disk: bytearray) -> None:
    import qcowlib

    title("Put an overlay on it: an external snapshot")
    qcow("create", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "overlay.qcow2")
    above = bytearray(disk)
    with qcowlib.open_image("overlay.qcow2", writable=True, policy=qcowlib.LocalFiles()) as writing:
        writing.write(NOTE, write_note(above, "balance: 50"))
    qcow("info", "--backing-chain", "overlay.qcow2")
    qcow("map", "overlay.qcow2")
    qcow("check", "overlay.qcow2")
    with qcowlib.open_image("overlay.qcow2", policy=qcowlib.LocalFiles()) as overlay:
        print(f"overlay:  {overlay.read(NOTE, 64).rstrip().decode()}")
        expect("the overlay", overlay.read(0, overlay.size), above)
    with qcowlib.open_image("disk.qcow2") as image:
        expect("its base, as before", image.read(0, image.size), disk)


def revert(before: bytearray) -> None:
    import qcowlib

    title("Throw the overlay away, revert the disk to the snapshot, delete the snapshot")
    os.unlink("overlay.qcow2")
    qcow("snapshot", "-a", "before", "disk.qcow2")
    qcow("snapshot", "-d", "before", "disk.qcow2")
    with qcowlib.open_image("disk.qcow2") as image:
        print(f"now:      {image.read(NOTE, 64).rstrip().decode()}")
        expect("the disk after the revert", image.read(0, image.size), before)


def check() -> None:
    import qcowlib

    title("Check")
    qcow("check", "disk.qcow2")
    with qcowlib.open_image("disk.qcow2") as image:
        report = qcowlib.check(image)
    if report.findings:
        raise WrongState(f"the check has findings: {report.findings}")
    print(f"ok: no findings; {report.allocated_clusters} of {report.total_clusters} clusters are allocated")


def show_domain() -> None:
    """A snapshot of a running machine, where QEMU is installed."""
    title("A running virtual machine: take a snapshot of memory and disk, go back to it")
    if shutil.which("qemu-system-x86_64") is None:
        print("left out: qemu-system-x86_64 is not installed")
    elif subprocess.run([sys.executable, ROOT / "tools" / "demo_domain.py"], check=False).returncode != 0:
        raise WrongState("the running machine")


def demonstrate() -> None:
    """The main job, in the current directory."""
    disk = bytearray(DISK_SIZE)
    create_and_write(disk)
    take_snapshot()
    before = bytearray(disk)
    change(disk)
    read_both_states(disk, before)
    put_overlay(disk)
    revert(before)
    check()
    show_domain()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--no-setup", action="store_true", help="use the package that this Python has")
    if not parser.parse_args().no_setup:
        return subprocess.run([set_up(), __file__, "--no-setup"], check=False).returncode
    with tempfile.TemporaryDirectory(prefix="qcowlib-demo-") as work:
        os.chdir(work)
        try:
            demonstrate()
        except WrongState as error:
            print(f"\nFAILED: {error}")
            return 1
        finally:
            os.chdir(ROOT)
    print("\nAll states read as they must.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
