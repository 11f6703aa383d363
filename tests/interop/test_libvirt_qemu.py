"""libvirt's QEMU driver takes the catalog's documents, lists them, and reverts to what we took.

The driver runs inside virsh (`qemu:///embed`), with its files in a directory of the test: no daemon, nothing of the
machine's own libvirt is touched. It insists on a user called libvirt-qemu, which it gets in a mount namespace.
"""

import contextlib
import io
import os
import pwd
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcowlib
from snapshot.catalog import Catalog
from snapshot.cli.main import main
from snapshot.document import parse
from snapshot.memory import export_memory, import_memory, memory_file_facts
from snapshot.model import DomainState
from snapshot.stream import migration_stream
from tests import oracle
from tests.live import guest
from tests.live.guest import short_directory
from tests.oracle import assert_clean
from tests.unit.snapshot.samples import EXTERNAL, INTERNAL, OFFLINE

DRIVER = "/usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so"
SETTINGS = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
stdio_handler = "file"
remember_owner = 0
"""
NAMESPACE = 'mount --bind "$1/passwd" /etc/passwd && mount --bind "$1/group" /etc/group && shift && exec "$@"'  # sh -c
DOMAIN = """<domain type='qemu'><name>guest</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
<memory unit='KiB'>16384</memory><os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type></os>
<devices><emulator>{emulator}</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{a}'/><target dev='vda' bus='virtio'/>
</disk>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{b}'/><target dev='vdb' bus='virtio'/>
</disk></devices></domain>"""


class Libvirt:
    """libvirt's QEMU driver with its own files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "etc").mkdir()
        (root / "etc" / "qemu.conf").write_text(SETTINGS)
        user, group = "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin\n", "libvirt-qemu:x:64055:\n"
        (root / "passwd").write_text(Path("/etc/passwd").read_text() + user)
        (root / "group").write_text(Path("/etc/group").read_text() + group + "kvm:x:64056:\n")

    def virsh(self, *commands: str) -> str:
        """What virsh prints for these commands, in one session."""
        words = ["-q", "-c", f"qemu:///embed?root={self.root}", "; ".join(commands)]
        try:
            pwd.getpwnam("libvirt-qemu")
        except KeyError:
            inside = ["-m", "sh", "-c", NAMESPACE, "sh", str(self.root), oracle.tool("virsh"), *words]
            return oracle.run("unshare", *inside).stdout
        return oracle.run("virsh", *words).stdout


@pytest.fixture
def libvirt() -> Iterator[Libvirt]:
    if not list(Path("/").glob(DRIVER[1:])) or shutil.which("virt-ssh-helper") is None:
        missing = "libvirt-daemon-driver-qemu libvirt-daemon"  # the second has helpers of the first
        pytest.fail(f"libvirt's QEMU driver is missing: apt-get install {missing}", pytrace=False)
    if os.geteuid() != 0 or oracle.run("unshare", "-m", "mount", "--bind", "/", "/", check=False).returncode != 0:
        pytest.skip("libvirt's QEMU driver needs root and a mount namespace")
    root = short_directory()
    yield Libvirt(root)
    for pid_file in root.rglob("guest.pid"):  # a guest that a failed test has left
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    """libvirt's XML of a domain that is off, with two disks."""
    for name in ("a", "b"):
        qcowlib.create_image(tmp_path / f"{name}.qcow2", 1 << 20)
    path = tmp_path / "guest.xml"
    emulator = oracle.tool("qemu-system-x86_64")
    path.write_text(DOMAIN.format(emulator=emulator, a=tmp_path / "a.qcow2", b=tmp_path / "b.qcow2"))
    return path


def write(path: Path, data: bytes) -> None:
    with qcowlib.open_image(path, writable=True) as image:
        image.write(0, data)


def read(path: Path) -> bytes:
    with qcowlib.open_image(path) as image:
        return image.read(0, 5)


def test_all_kinds_are_redefined_listed_and_kept(libvirt: Libvirt, domain: Path) -> None:
    snapshots = [INTERNAL, EXTERNAL, OFFLINE]
    catalog = Catalog(domain.parent / "catalog", domain_xml=domain.read_bytes())
    for snapshot in snapshots:
        catalog.add(snapshot)
    output = libvirt.virsh(
        f"define {domain}",
        *(
            f"snapshot-create guest --xmlfile '{catalog.directory}/{snapshot.name}.xml' --redefine"
            for snapshot in snapshots
        ),
        "snapshot-list guest",
        *(f"snapshot-dumpxml guest '{snapshot.name}'" for snapshot in snapshots),
    )
    listing, *dumps = output.split("<domainsnapshot>")
    for snapshot in snapshots:
        assert snapshot.state is not DomainState.DISK_SNAPSHOT
        (line,) = [line for line in listing.splitlines() if line.startswith(f" {snapshot.name} ")]
        assert line.endswith(snapshot.state.value)
    assert [parse(b"<domainsnapshot>" + dump.encode()) for dump in dumps] == snapshots


def test_libvirt_reverts_to_our_snapshot_and_deletes_it(
    libvirt: Libvirt, domain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disks = [domain.parent / "a.qcow2", domain.parent / "b.qcow2"]
    for disk in disks:
        write(disk, b"first")
    assert main(["create", "s1", "--disk-only", "--internal", "-f", str(domain)]) == 0, capsys.readouterr().err
    for disk in disks:
        write(disk, b"later")
    document = f"{domain}.snapshots/s1.xml"
    libvirt.virsh(
        f"define {domain}", f"snapshot-create guest --xmlfile {document} --redefine", "snapshot-revert guest s1"
    )
    assert [read(disk) for disk in disks] == [b"first", b"first"]
    libvirt.virsh("snapshot-delete guest s1")
    for disk in disks:
        assert_clean(disk)
        with qcowlib.open_image(disk) as image:
            assert image.snapshots == []


def test_a_running_domain_s_snapshot_by_libvirt_is_read_by_us(
    libvirt: Libvirt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """External, with libvirt's kind of memory file: found whole, of one instant with the frozen disks, imported."""
    disks = guest.make_disks(tmp_path, 2)
    path = tmp_path / "guest.xml"
    text = DOMAIN.format(emulator=oracle.tool("qemu-system-x86_64"), a=disks[0], b=disks[1])
    for number, letter in enumerate("ab", start=1):  # the BIOS shows the guest only disks that it may boot from
        text = text.replace(f"<target dev='vd{letter}'", f"<boot order='{number}'/><target dev='vd{letter}'")
    path.write_text(text)
    memory = tmp_path / "memory"
    output = libvirt.virsh(
        f"define {path}",
        "start guest",
        *["nodecpustats --percent"] * 3,  # it watches for a second: so long the guest counts
        f"snapshot-create-as guest theirs --memspec file={memory},snapshot=external"
        + "".join(f" --diskspec vd{letter},snapshot=external,file={tmp_path}/{letter}.theirs" for letter in "ab"),
        "snapshot-dumpxml guest theirs",
        "destroy guest",
    )
    directory = Path(f"{path}.snapshots")
    directory.mkdir()
    end = "</domainsnapshot>"
    (directory / "theirs.xml").write_text(output[output.index("<domainsnapshot>") : output.index(end) + len(end)])
    snapshot = Catalog(directory).get("theirs")
    assert [(disk.target, disk.file, disk.overlay) for disk in snapshot.disks] == [
        ("vda", str(disks[0]), f"{tmp_path}/a.theirs"),
        ("vdb", str(disks[1]), f"{tmp_path}/b.theirs"),
    ]
    assert memory.read_bytes()[:16] == b"LibvirtQemudSave"
    facts = memory_file_facts(memory)
    assert (facts.complete, facts.machine) == (True, "pc-i440fx-7.2")
    assert ("pc.ram", 16 << 20) in facts.ram_blocks
    with open(memory, "rb") as file:
        stream = migration_stream(file, "memory").read()
    record = guest.memory_record(io.BytesIO(stream))
    assert record.n > 0
    assert guest.torn(record, [guest.disk_counter(disk) for disk in disks]) is None
    assert main(["info", "theirs", "--check", "--catalog", str(directory)]) == 0, capsys.readouterr().out
    oracle.qemu_img("snapshot", "-c", "inside", disks[0])
    import_memory(memory, str(disks[0]), "inside")
    export_memory(str(disks[0]), "inside", tmp_path / "stream")
    assert (tmp_path / "stream").read_bytes() == stream


def test_a_snapshot_that_libvirt_took_is_read_by_us(
    libvirt: Libvirt, domain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = libvirt.virsh(
        f"define {domain}", "snapshot-create-as guest theirs 'by libvirt'", "snapshot-dumpxml guest theirs"
    )
    directory = Path(f"{domain}.snapshots")
    directory.mkdir()
    (directory / "theirs.xml").write_text(output[output.index("<domainsnapshot>") :])
    assert main(["info", "theirs", "--check", "-f", str(domain)]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "description:  by libvirt\n" in out
    assert "consistency:  clean\n" in out
    assert f"internal, id None\n              in {domain.parent}/b.qcow2" in out
    assert main(["list", "-f", str(domain)]) == 0
    assert capsys.readouterr().out.count("theirs") == 1  # known, so not found in the files once more
