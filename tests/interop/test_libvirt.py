"""libvirt takes the catalog's documents: its schema allows them, its parser keeps them, virsh lists them.

`virsh -c test:///` is libvirt's own in-memory driver: the parser and the snapshot tree are those of the other drivers,
and it needs no daemon.
"""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from snapshot.catalog import Catalog
from snapshot.document import parse
from snapshot.model import DomainSnapshot, DomainState
from tests import oracle
from tests.unit.snapshot.samples import ALL, DISK_ONLY, EXTERNAL, INTERNAL, OFFLINE

SCHEMAS = Path("/usr/share/libvirt/schemas")


def documents(directory: Path, snapshots: Sequence[DomainSnapshot], *, domain_xml: bytes | None = None) -> list[Path]:
    """The catalog's documents of these snapshots, in their order."""
    catalog = Catalog(directory, domain_xml=domain_xml)
    for snapshot in snapshots:
        catalog.add(snapshot)
    return [directory / f"{snapshot.name}.xml" for snapshot in snapshots]


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    """Exit code 0 when libvirt's RelaxNG schema allows the document."""
    schema = SCHEMAS / "domainsnapshot.rng"
    if not schema.exists():
        pytest.fail("libvirt's schemas are not installed: apt-get install libvirt0", pytrace=False)
    return oracle.run("xmllint", "--noout", "--nonet", "--relaxng", schema, path, check=False)


def test_schema_allows_our_documents(tmp_path: Path) -> None:
    odd = replace(DISK_ONLY, name="odd", domain="a <b> & 'c'", description="\u20ac\n")
    for path in documents(tmp_path, [*ALL, odd]):
        done = validate(path)
        assert done.returncode == 0, done.stderr


def test_schema_still_allows_a_libvirt_document_that_we_changed(tmp_path: Path) -> None:
    documents(tmp_path, [EXTERNAL])
    path = tmp_path / "ext1.xml"
    text = path.read_text().replace("</domainsnapshot>", "<cookie><a b='c'/></cookie></domainsnapshot>")
    path.write_text(text)
    Catalog(tmp_path).replace(replace(EXTERNAL, description="changed"))
    assert "<cookie>" in path.read_text()
    assert validate(path).returncode == 0


def test_the_schema_would_see_a_fault(tmp_path: Path) -> None:
    (path,) = documents(tmp_path, [INTERNAL])
    path.write_text(path.read_text().replace("<state>running<", "<state>walking<"))
    assert validate(path).returncode != 0
    path.write_text(path.read_text().replace("<state>walking<", "<metadata/><state>running<"))
    assert validate(path).returncode != 0  # why our facts stand inside <domain>


def virsh(directory: Path, domain: str, *commands: str) -> str:
    """What virsh prints for these commands, run in one session of libvirt's test driver with one domain."""
    node = directory / "node.xml"
    node.write_text(f"<node>{domain}</node>")
    return oracle.run("virsh", "-q", "-c", f"test://{node}", "; ".join(commands)).stdout


def split_dumps(output: str) -> tuple[str, list[str]]:
    """What stands before the first document, and the documents."""
    listing, *dumps = output.split("<domainsnapshot>")
    return listing, ["<domainsnapshot>" + dump for dump in dumps]


def redefine(paths: Sequence[Path], domain: str, current: str) -> list[str]:
    flags = {path: " --current" if path.stem == current else "" for path in paths}
    return [f"snapshot-create {domain} --xmlfile '{path}' --redefine{flags[path]}" for path in paths]


def as_test_domain(path: Path) -> str:
    """The <domain> of a document, for the test driver: the same but for the kind of hypervisor."""
    domain = ElementTree.parse(path).getroot().find("domain")
    assert domain is not None
    domain.set("type", "test")
    return ElementTree.tostring(domain, encoding="unicode")


def for_the_test_driver(paths: Sequence[Path]) -> None:
    for path in paths:
        path.write_text(path.read_text().replace('<domain type="qemu">', '<domain type="test">'))


def test_virsh_redefines_lists_and_keeps_our_facts(tmp_path: Path) -> None:
    paths = documents(tmp_path / "catalog", ALL)
    for_the_test_driver(paths)
    output = virsh(
        tmp_path,
        as_test_domain(paths[0]),
        *redefine(paths, "guest", "ext1"),
        "snapshot-list guest --name",
        "snapshot-list guest --tree",
        "snapshot-list guest",
        "snapshot-current guest --name",
        *(f"snapshot-dumpxml guest '{snapshot.name}'" for snapshot in ALL),
    )
    listing, dumps = split_dumps(output)
    assert re.search(r"^before upgrade\n\s+\|\n\s+\+- ext1\n\s+\|\n\s+\+- disks$", listing, re.M), listing
    for snapshot in ALL:
        state = {DomainState.DISK_SNAPSHOT: "disk-snapshot"}.get(snapshot.state, snapshot.state.value)
        assert re.search(rf"^ {snapshot.name} +\S+ \S+ \S+ +{state}$", listing, re.M), listing
    assert listing.rstrip().endswith("\next1")
    assert len(dumps) == len(ALL)
    for snapshot, text in zip(ALL, dumps, strict=True):
        assert parse(text.encode()) == snapshot  # after a trip through libvirt's own structures


DOMAIN = """<domain type='test'><name>guest</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
<memory unit='KiB'>16384</memory><os><type arch='x86_64'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/a.qcow2'/><target dev='vda'
 bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/b.qcow2'/><target dev='vdb'
 bus='virtio'/></disk></devices></domain>"""


def test_virsh_takes_snapshots_of_a_domain_that_libvirt_knows(tmp_path: Path) -> None:
    snapshots = [INTERNAL, EXTERNAL, replace(OFFLINE, parent="ext1")]
    paths = documents(tmp_path / "catalog", snapshots, domain_xml=DOMAIN.encode())
    output = virsh(tmp_path, DOMAIN, *redefine(paths, "guest", "off"), "snapshot-list guest --tree")
    assert [line.strip(" +-|") for line in output.splitlines() if line.strip(" |")][-3:] == [
        "before upgrade",
        "ext1",
        "off",
    ]


def test_snapshots_that_libvirt_made_are_read(tmp_path: Path) -> None:
    output = virsh(
        tmp_path,
        DOMAIN,
        "snapshot-create-as guest made 'by libvirt'",
        "snapshot-dumpxml guest made",
    )
    _, (made,) = split_dumps(output)
    snapshot = parse(made.encode())
    assert (snapshot.name, snapshot.domain, snapshot.description) == ("made", "guest", "by libvirt")
    assert (snapshot.state.value, snapshot.memory.mode.value) == ("running", "internal")
    assert [(disk.target, disk.mode.value, disk.file) for disk in snapshot.disks] == [
        ("vda", "internal", "/images/a.qcow2"),
        ("vdb", "internal", "/images/b.qcow2"),
    ]
