"""Descriptions of domains: domain files, libvirt's XML, Xen's xl.cfg; what they mean, and what they are refused for."""

import contextlib
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from snapshot.errors import SourceError
from snapshot.model import Disk
from snapshot.sources import DomainDescription, load_description
from snapshot.xl_config import parse_assignments, parse_disk

TOML = """
name = "web"
qmp = "run/web.qmp"
agent = "/run/web.qga"
command = ["qemu-system-x86_64", "-qmp", "unix:{qmp}", "-drive", "format={format:vda},file={disk:vda}", "{incoming}"]

[disks.vdb]
path = "/dev/vg/data"
format = "raw"

[disks.vda]
path = "../images/web.qcow2"
format = "qcow2"

[disks.iso]
path = "boot.iso"
format = "raw"
read-only = true
"""


def write(directory: Path, name: str, text: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_domain_file(tmp_path: Path) -> None:
    path = write(tmp_path, "web.toml", TOML)
    assert load_description(path) == DomainDescription(
        name="web",
        disks=(
            Disk("vdb", "/dev/vg/data", "raw"),
            Disk("vda", str(tmp_path.parent / "images/web.qcow2"), "qcow2"),
            Disk("iso", str(tmp_path / "boot.iso"), "raw", read_only=True),
        ),
        qmp_socket=str(tmp_path / "run/web.qmp"),
        command=(
            "qemu-system-x86_64",
            "-qmp",
            "unix:{qmp}",
            "-drive",
            "format={format:vda},file={disk:vda}",
            "{incoming}",
        ),
        agent_socket="/run/web.qga",
        path=str(path),
    )


def test_domain_file_with_a_command_as_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "name='a'\nqmp='q'\ncommand=\"qemu -name 'x y' {incoming}\"\n")
    description = load_description(path)
    assert description.command == ("qemu", "-name", "x y", "{incoming}")
    assert description.folder == str(tmp_path)
    assert description.disks == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no name"),
        ("name = 'a'", "neither disks nor"),
        ("name = 5\nqmp='q'", "name is not a text"),
        ("name = 'a'\nqmp=''", "qmp is not a text, or empty"),
        ("name = 'a'\nqpm='q'", "unknown key 'qpm'"),
        ("name = 'a'\ndisks = ['x']", "disks is not a table"),
        ("name = 'a'\ndisks.vda = 'x'", "disk vda is not a table"),
        ("name = 'a'\ndisks.vda.path = 'x'", "needs a path and a format"),
        ("name = 'a'\ndisks.vda = {path='x', format='raw', readonly=true}", "unknown key 'readonly'"),
        ("name = 'a'\ndisks.vda = {path='x', format='raw', read-only=1}", "true or false"),
        ("name = 'a'\ndisks.vda = {path='x\\u0000y', format='raw'}", None),
        ("name = 'a'\ndisks.vda = {path=\"x\\u0000y\", format='raw'}", "not an absolute path"),
        ("name = 'a'\ndisks.a = {path='x', format='raw'}\ndisks.b = {path='./x', format='raw'}", "are one file"),
        ("name = 'a'\nqmp = 'q'\nmemory = '1G'", "unknown key 'memory'"),  # the running machine is asked
        ("name = 'a'\nqmp = 'q'\ncommand = [1]", "list of texts"),
        ("name = 'a'\nqmp = 'q'\ncommand = \"'\"", "command: No closing"),
        ("name = 'a'\nqmp = 'q'\ncommand = ['{disk:vdz}']", "names no disk"),
        ("name = ", "not TOML"),
        ("x = " + "[" * 100_000, "not TOML"),
    ],
)
def test_bad_domain_files(tmp_path: Path, text: str, reason: str | None) -> None:
    path = write(tmp_path, "a.toml", text)
    if reason is None:  # a TOML text in single quotes has no escapes
        assert load_description(path).disks[0].path == str(tmp_path / "x\\u0000y")
        return
    with pytest.raises(SourceError, match=reason) as caught:
        load_description(path)
    assert str(caught.value).startswith(str(path))


LIBVIRT = """<?xml version='1.0'?>
<domain type='qemu'><name>web</name><memory unit='MiB'>512</memory>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
<devices>
 <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/a.qcow2'/>
  <backingStore type='file'><source file='/images/base.qcow2'/></backingStore><target dev='vda' bus='virtio'/></disk>
 <disk type='block' device='lun'><source dev='/dev/vg/b'/><target dev='sda'/></disk>
 <disk type='file' device='cdrom'><target dev='hdc'/><readonly/></disk>
 <disk type='file' device='cdrom'><driver type='raw'/><source file='/images/x.iso'/><target dev='hdd'/></disk>
 <disk type='file' device='disk'><driver type='qcow2'/><source file='/images/ro.qcow2'/><target dev='vdc'/>
  <readonly/></disk>
</devices></domain>"""


def test_libvirt_xml(tmp_path: Path) -> None:
    path = write(tmp_path, "web.xml", LIBVIRT)
    description = load_description(path)
    assert description.name == "web"
    assert description.disks == (
        Disk("vda", "/images/a.qcow2", "qcow2"),
        Disk("sda", "/dev/vg/b", "raw"),
        Disk("hdd", "/images/x.iso", "raw", read_only=True),
        Disk("vdc", "/images/ro.qcow2", "qcow2", read_only=True),
    )
    assert description.xml == LIBVIRT.encode()
    running = f"<!-- made by libvirt --><domstatus state='running'>{LIBVIRT.split('?>')[1]}</domstatus>"
    assert load_description(write(tmp_path, "run.xml", running)).disks == description.disks


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<domain/>", "no name"),
        ("<network><name>x</name></network>", "not a <domain>"),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>", "document types"),
        (LIBVIRT.replace("type='block'", "type='network'"), "of type 'network'"),
        (LIBVIRT.replace("/images/a.qcow2", "a.qcow2"), "not an absolute path"),
        (LIBVIRT.replace("dev='vdc'", "dev='vda'"), "two disks are called vda"),
        ("<domain>" * 2000, "deeply nested"),
    ],
)
def test_bad_libvirt_xml(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        load_description(write(tmp_path, "a.xml", text))


XL = r"""
# a comment
name = 'web'; memory = 512
vif = [ 'mac=00:16:3e:00:00:01, bridge=xenbr0', ]
nested = [ [1, 0x10], "a\"b\x41\n" ]
disk = [
    '/dev/vg/root,raw,xvda,rw',   # the first
    "format=qcow2, vdev=xvdb, access=rw, target=/images/a, with a comma.qcow2",
    '/images/boot.iso,,hdc,cdrom', ',,hdd,cdrom',
]
disk += [ 'tap:qcow2:/images/old.qcow2,xvdc,w' ]
extra = "a" 'b'
""".replace("\"a\" 'b'", '"ab"')


def test_xl_config(tmp_path: Path) -> None:
    description = load_description(write(tmp_path, "web.cfg", XL))
    assert description.name == "web"
    assert description.disks == (
        Disk("xvda", "/dev/vg/root", "raw"),
        Disk("xvdb", "/images/a, with a comma.qcow2", "qcow2"),
        Disk("hdc", "/images/boot.iso", "raw", read_only=True),
        Disk("xvdc", "/images/old.qcow2", "qcow2"),
    )
    assert parse_assignments(XL)["nested"] == [[1, 16], 'a"bA\n']


@pytest.mark.parametrize(
    ("spec", "disk"),
    [
        # Those of the manual page, which it says are equivalent.
        ("/dev/vg/guest-volume,,hda", Disk("hda", "/dev/vg/guest-volume", "raw")),
        ("/dev/vg/guest-volume,raw,hda,rw", Disk("hda", "/dev/vg/guest-volume", "raw")),
        ("format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume", Disk("hda", "/dev/vg/guest-volume", "raw")),
        ("raw:/dev/vg/guest-volume,hda,w", Disk("hda", "/dev/vg/guest-volume", "raw")),
        ("/root/image.iso,,hdc,cdrom", Disk("hdc", "/root/image.iso", "raw", read_only=True)),
        ("/root/image.iso,,hdc,,cdrom", Disk("hdc", "/root/image.iso", "raw", read_only=True)),
        ("/root/image.iso,raw,hdc,devtype=cdrom", Disk("hdc", "/root/image.iso", "raw", read_only=True)),
        (
            "format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso",
            Disk("hdc", "/root/image.iso", "raw", read_only=True),
        ),
        ("raw:/root/image.iso,hdc:cdrom,ro", Disk("hdc", "/root/image.iso", "raw", read_only=True)),
        # Others.
        ("phy:/dev/vg/a,xvda,w", Disk("xvda", "/dev/vg/a", "raw")),
        ("phy:vg/a,xvda,w", Disk("xvda", "/dev/vg/a", "raw")),
        ("file:/images/a.img,xvda,r", Disk("xvda", "/images/a.img", "raw", read_only=True)),
        ("tap2:tapdisk:aio:/images/a.img,xvda,w", Disk("xvda", "/images/a.img", "raw")),
        ("vdev=xvda,/images/a.qcow2,qcow2", Disk("xvda", "/images/a.qcow2", "qcow2")),
        ("/images/a.qcow2,qcow2,xvda,rw,discard,backendtype=qdisk", Disk("xvda", "/images/a.qcow2", "qcow2")),
        ("backend=0,vdev=d1p0,format=qcow2,target=/a=b,c", Disk("d1p0", "/a=b,c", "qcow2")),
        (",empty,hdc,cdrom", None),
        ("vdev=hdc,format=empty,devtype=cdrom", None),
    ],
)
def test_disk_specifications(spec: str, disk: Disk | None) -> None:
    assert parse_disk(spec) == disk


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "no target"),
        ("/images/a", "no virtual device"),
        ("/images/a,raw,xvda,rw,more", "one too many"),
        ("/images/a,raw,xvda,maybe", "unknown access"),
        ("/images/a,vmdk,xvda", "unknown format"),
        ("/images/a,raw,xvda,color=red", "unknown key"),
        ("vdev=xvda,vdev=xvdb,target=/a", "given twice"),
        ("a.img,raw,xvda", "not an absolute path"),
        ("iscsi:iqn.2001-05,xvda,w", "behind 'iscsi:'"),
        ("script=block-iscsi,vdev=xvda,target=iqn", "behind a script"),
        ("backend=storage,vdev=xvda,target=/a", "another backend"),
    ],
)
def test_bad_disk_specifications(spec: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        parse_disk(spec)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("memory = 5", "does not name a domain"),
        ("name = 'a'\ndisk = 5", "disk is not a list"),
        ("name = 'a'\ndisk = [5]", "not a text"),
        ("name = 'a'", "neither disks"),
        ("\n\nname == 'a'", "line 3: a value was expected"),
        ("name = 'a' 5", "does not end"),
        ("name = [1, 2", "does not end"),
        ("name = [1 2]", "was expected in a list"),
        ("name = 'a", "is not understood"),
        ("5 = 5", "a name was expected"),
        ("name", "'=' was expected"),
        ("a = " + "[" * 1000, "deeply nested"),
        ("a = " + "9" * 10_000, "does not end"),
        ("name = 'a'\ndisk = ['/a,raw,xvda', '/a,raw,xvdb']", "are one file"),
    ],
)
def test_bad_xl_config(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        load_description(write(tmp_path, "a.cfg", text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        load_description(tmp_path / "missing")
    with pytest.raises(SourceError, match="not UTF-8"):
        load_description(write(tmp_path, "a", b"\xff\xfe"))
    with pytest.raises(SourceError, match="larger than"):
        load_description(write(tmp_path, "a", b" " * (5 << 20)))


@hypothesis.given(st.text(max_size=200), st.sampled_from(["", "name = 'a'\ndisk = ['", "name='a'\nqmp='q'\ncommand="]))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_text_is_a_description_or_an_error(tmp_path: Path, text: str, start: str) -> None:
    for suffix in (".toml", ".cfg"):
        path = write(tmp_path, "any" + suffix, (start + text).encode("utf-8", "surrogatepass"))
        with contextlib.suppress(SourceError):
            assert load_description(path).name
