"""A small Linux guest with the guest agent, for what the boot sector cannot show: frozen file systems.

    apt-get download -> dpkg-deb -x -> initramfs (busybox, modules, qemu-ga) -> QEMU with an ext4 disk

Nothing is installed: Debian's kernel, busybox and qemu-guest-agent are unpacked into a directory of the test run. The
guest mounts its first disk and writes files on it, one after the other, as fast as it can.
"""

import gzip
import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import qcowlib
from tests.live.guest import Guest, GuestError, launch, short_directory, wait_for
from tests.oracle import run, tool

KERNEL_PACKAGE = "linux-image-cloud-amd64"
PACKAGES = ("busybox-static", "qemu-guest-agent")
AGENT_PORT = "org.qemu.guest_agent.0"
#: In an order in which each finds what it needs.
MODULES = (
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk",
    "virtio_console",
)  # fmt: skip
BOOT_DEADLINE = 240.0

INIT = f"""#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc none /proc
busybox mount -t sysfs none /sys
busybox mount -t devtmpfs none /dev
for module in {" ".join(MODULES)}; do busybox insmod /modules/$module.ko || echo "no $module"; done
busybox mkdir -p /dev/virtio-ports /disk /tmp
for port in /sys/class/virtio-ports/*; do
    busybox ln -s /dev/${{port##*/}} /dev/virtio-ports/$(busybox cat $port/name)
done
busybox mount -t ext4 /dev/vda /disk || echo FAILED
qemu-ga -m virtio-serial -p /dev/virtio-ports/{AGENT_PORT} -t /tmp &
n=0
while true; do
    n=$((n + 1))
    echo $n > /disk/file.$((n % 64))
    busybox sync
    echo T $n
done
"""


@dataclass(frozen=True)
class LinuxImages:
    """Kernel and initramfs."""

    kernel: Path
    initramfs: Path


def build(work: Path) -> LinuxImages:
    """Download and unpack the packages, and make the initramfs."""
    depends = run("apt-cache", "depends", KERNEL_PACKAGE).stdout
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise GuestError(f"{KERNEL_PACKAGE} depends on no kernel: {depends}")
    run("apt-get", "download", found[1], *PACKAGES, cwd=work, deadline=600)
    root = work / "root"
    for package in work.glob("*.deb"):
        run("dpkg-deb", "-x", package, root)
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    initramfs = work / "initramfs.gz"
    with gzip.open(initramfs, "wb", compresslevel=1) as file:
        file.write(_cpio(_files(root)))
    return LinuxImages(kernel, initramfs)


def _files(root: Path) -> dict[str, bytes]:
    """Contents of the initramfs by name."""
    agent = root / "usr" / "sbin" / "qemu-ga"
    busybox = next(path for path in (root / "bin" / "busybox", root / "usr" / "bin" / "busybox") if path.exists())
    files = {"init": INIT.encode(), "bin/busybox": busybox.read_bytes(), "bin/qemu-ga": agent.read_bytes()}
    for module in MODULES:
        (path,) = root.rglob(f"{module}.ko")
        files[f"modules/{module}.ko"] = path.read_bytes()
    listed = run("ldd", agent).stdout
    if "not found" in listed:
        raise GuestError(f"qemu-ga needs libraries that are not installed here:\n{listed}")
    for library in re.findall(r"(/\S+) \(0x", listed):
        files[library.lstrip("/")] = Path(library).read_bytes()
    return files


def _cpio(files: dict[str, bytes]) -> bytes:
    """A newc archive with the directories that the files need."""
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."} | {"proc", "sys", "dev"}
    entries = [(folder, stat.S_IFDIR | 0o755, b"") for folder in sorted(folders)]
    entries += [(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    archive = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def make_ext4(path: Path, work: Path, *, megabytes: int = 64) -> None:
    """A qcow2 disk with an empty ext4 file system."""
    raw = work / "ext4.raw"
    with open(raw, "wb") as file:
        file.truncate(megabytes << 20)
    run("mkfs.ext4", "-q", "-F", raw)
    with qcowlib.open_image(raw, format="raw") as image:
        qcowlib.convert(image, path, target_format="qcow2")
    raw.unlink()


@contextmanager
def running_linux(images: LinuxImages, disks: list[Path]) -> Iterator[Guest]:
    """The guest with these disks, its agent's socket at `directory / "agent"`, until the block ends."""
    directory = short_directory()
    command = [tool("qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    command += ["-machine", "pc", "-m", "256", "-name", "linux", "-kernel", str(images.kernel)]
    command += ["-initrd", str(images.initramfs), "-append", "console=ttyS0 quiet panic=-1"]
    command += ["-serial", f"file:{directory}/serial", "-device", "virtio-serial-pci"]
    for name in ("qmp", "monitor"):
        command += ["-qmp", f"unix:{directory}/{name},server=on,wait=off"]
    command += ["-chardev", f"socket,id=agent,path={directory}/agent,server=on,wait=off"]
    command += ["-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
    for index, disk in enumerate(disks):
        command += ["-drive", f"if=none,id=vd{index},format=qcow2,file={disk}"]
        command += ["-device", f"virtio-blk-pci,drive=vd{index}"]
    guest = launch(command, directory, disks)
    try:
        wait_for(lambda: _booted(guest), "the Linux guest", deadline=BOOT_DEADLINE)
        yield guest
    finally:
        guest.kill()
        shutil.rmtree(directory, ignore_errors=True)


def writes(guest: Guest) -> int:
    """How many files the guest has written so far."""
    return len(re.findall(r"^T \d+\r?$", guest.serial(), re.M))


def _booted(guest: Guest) -> bool:
    guest.require_alive()
    text = guest.serial()
    if "FAILED" in text or "Kernel panic" in text:
        raise GuestError(text)
    return writes(guest) >= 3


def needs_recovery(disk: Path, *, snapshot: str | None = None) -> bool:
    """Whether ext4's journal has to be replayed: the incompatible feature bit 4, in the superblock at 1024."""
    with qcowlib.open_image(disk, format="qcow2", policy=qcowlib.LocalFiles(), force_share=True) as image:
        if snapshot is None:
            block = image.read(1024, 1024)
        else:
            with image.open_snapshot(snapshot) as view:
                block = view.read(1024, 1024)
    assert struct.unpack_from("<H", block, 56)[0] == 0xEF53, "no ext4"
    return bool(struct.unpack_from("<I", block, 96)[0] & 4)


def file_system_errors(disk: Path, work: Path) -> str | None:
    """What e2fsck finds on the disk as it is, journal unseen; None for a clean file system."""
    raw = work / "check.raw"
    with qcowlib.open_image(disk, format="qcow2", policy=qcowlib.LocalFiles(), force_share=True) as image:
        qcowlib.convert(image, raw, target_format="raw")
    done = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    os.unlink(raw)
    return None if done.returncode == 0 else done.stdout + done.stderr
