"""The catalog: what is written is read back; a change is whole or has not happened; hostile documents are errors."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from snapshot.catalog import Catalog, default_directory
from snapshot.document import build, name_problem, parse
from snapshot.errors import CatalogError, NoSuchDomainSnapshot
from snapshot.model import DomainSnapshot
from tests.unit.snapshot.samples import ALL, DISK_ONLY, EXTERNAL, INTERNAL, OFFLINE


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "deep" / "snapshots")


def names(catalog: Catalog) -> list[str]:
    return [snapshot.name for snapshot in catalog.load()]


def test_what_is_added_is_read_back(catalog: Catalog) -> None:
    assert (catalog.load(), catalog.current) == ([], None)
    for snapshot in reversed(ALL):
        catalog.add(snapshot)
        assert catalog.current == snapshot.name
    assert catalog.load() == list(ALL)
    assert Catalog(catalog.directory).get("ext1") == EXTERNAL
    assert sorted(os.listdir(catalog.directory)) == [
        "before upgrade.xml",
        "current",
        "disks.xml",
        "ext1.xml",
        "off.xml",
    ]


def test_add_refuses_a_known_name_and_names_that_libvirt_refuses(catalog: Catalog) -> None:
    catalog.add(INTERNAL)
    with pytest.raises(CatalogError, match="already"):
        catalog.add(replace(EXTERNAL, name=INTERNAL.name))
    for bad in ("", ".hidden", "a/b", "a\nb", "x" * 1024, "bell\x07", "\udcff"):
        with pytest.raises(CatalogError):
            catalog.add(replace(EXTERNAL, name=bad))
        assert name_problem(bad) is not None
    with pytest.raises(CatalogError, match="XML cannot hold"):
        catalog.add(replace(EXTERNAL, disks=(replace(EXTERNAL.disks[0], file="/images/\udcff.qcow2"),)))
    assert catalog.load() == [INTERNAL]
    assert catalog.current == INTERNAL.name


def test_add_without_making_current(catalog: Catalog) -> None:
    catalog.add(INTERNAL)
    catalog.add(EXTERNAL, make_current=False)
    assert catalog.current == INTERNAL.name
    catalog.set_current(EXTERNAL.name)
    assert catalog.current == EXTERNAL.name
    catalog.set_current(None)
    assert catalog.current is None
    with pytest.raises(NoSuchDomainSnapshot, match="'nothing'"):
        catalog.set_current("nothing")
    assert catalog.current is None


def test_remove_hands_children_and_current_to_the_parent(catalog: Catalog) -> None:
    catalog.add(INTERNAL)
    catalog.add(EXTERNAL)
    catalog.add(DISK_ONLY)
    catalog.set_current(EXTERNAL.name)
    catalog.remove(EXTERNAL.name)
    assert catalog.load() == [INTERNAL, replace(DISK_ONLY, parent=INTERNAL.name)]
    assert catalog.current == INTERNAL.name
    catalog.remove(INTERNAL.name)
    assert catalog.load() == [replace(DISK_ONLY, parent=None)]
    assert catalog.current is None
    with pytest.raises(NoSuchDomainSnapshot):
        catalog.remove(INTERNAL.name)


def test_replace_changes_and_refuses_what_is_not_there(catalog: Catalog) -> None:
    catalog.add(EXTERNAL)
    changed = replace(EXTERNAL, description="checked", parent=None, disks=EXTERNAL.disks[:1])
    catalog.replace(changed)
    assert catalog.load() == [changed]
    with pytest.raises(NoSuchDomainSnapshot):
        catalog.replace(OFFLINE)


class PowerCut(BaseException):
    """The machine stops at this system call."""


def power_cut_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the number-th call that changes a directory or file (from 0) the one before which the power fails."""
    count = iter(range(1000))

    def cut(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) >= number:
                raise PowerCut
            return real(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, cut(getattr(os, name)))


def cuts(monkeypatch: pytest.MonkeyPatch, change: Any, restore: Any) -> Iterator[bool]:
    """Try a change with the power failing at each of its calls in turn; yields after each, and after the whole one."""
    for number in range(100):
        restore()
        with monkeypatch.context() as patch:
            power_cut_at(patch, number)
            try:
                change()
            except PowerCut:
                finished = False
            else:
                finished = True
        yield finished
        if finished:
            return
    raise AssertionError("the change does not end")


def test_power_cut_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add, remove and replace: what is read afterwards is the state before or the one after, nothing between."""
    number = 0
    catalog = Catalog(tmp_path)

    def fresh(*snapshots: DomainSnapshot, current: str | None) -> None:
        nonlocal number, catalog
        number += 1
        catalog = Catalog(tmp_path / str(number))
        for snapshot in snapshots:
            catalog.add(snapshot)
        catalog.set_current(current)

    def state() -> tuple[list[DomainSnapshot], str | None]:
        return Catalog(catalog.directory).load(), Catalog(catalog.directory).current

    seen = set()
    before = ([INTERNAL], INTERNAL.name)
    after = ([INTERNAL, EXTERNAL], EXTERNAL.name)
    for finished in cuts(monkeypatch, lambda: catalog.add(EXTERNAL), lambda: fresh(INTERNAL, current=INTERNAL.name)):
        assert state() in (before, after)
        assert state() == after or not finished
        seen.add(state()[1])
        catalog.add(OFFLINE)  # what the crash left is not in the way
    assert seen == {INTERNAL.name, EXTERNAL.name}

    before, after = ([INTERNAL, EXTERNAL], EXTERNAL.name), ([INTERNAL], INTERNAL.name)
    for finished in cuts(
        monkeypatch,
        lambda: catalog.remove(EXTERNAL.name),
        lambda: fresh(INTERNAL, EXTERNAL, current=EXTERNAL.name),
    ):
        assert state() in (before, after)
        assert state() == after or not finished

    changed = replace(EXTERNAL, description="x" * 100_000)
    for finished in cuts(monkeypatch, lambda: catalog.replace(changed), lambda: fresh(EXTERNAL, current=EXTERNAL.name)):
        assert state()[0] in ([EXTERNAL], [changed])
        assert state()[0] == [changed] or not finished


def test_a_cut_off_add_does_not_make_a_later_one_current(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.add(INTERNAL)
    with monkeypatch.context() as patch:
        power_cut_at(patch, 3)
        with pytest.raises(PowerCut):
            catalog.add(EXTERNAL)
    assert (names(catalog), catalog.current) == ([INTERNAL.name], INTERNAL.name)
    catalog.add(EXTERNAL, make_current=False)
    assert catalog.current == INTERNAL.name


def test_a_full_disk_leaves_the_catalog_as_it_was(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.add(INTERNAL)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CatalogError, match="No space left"):
            catalog.add(EXTERNAL)
    assert (catalog.load(), catalog.current) == ([INTERNAL], INTERNAL.name)
    assert not [name for name in os.listdir(catalog.directory) if name.startswith(".")]


BOMB = b"""<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>
<domainsnapshot><name>&c;</name></domainsnapshot>"""
EXTERNAL_ENTITY = b"""<!DOCTYPE d [<!ENTITY e SYSTEM "file:///etc/passwd">]>
<domainsnapshot><name>&e;</name></domainsnapshot>"""


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (BOMB, "document types"),
        (EXTERNAL_ENTITY, "document types"),
        (b"<!DOCTYPE d SYSTEM 'http://example.invalid/d.dtd'><domainsnapshot/>", "document types"),
        (b"", "not well-formed"),
        (b"<domainsnapshot><name>x</name>", "not well-formed"),
        (b"<domainsnapshot>&undefined;</domainsnapshot>", "not well-formed"),
        (b"<domain><name>x</name></domain>", "not a <domainsnapshot>"),
        (b"<domainsnapshot/>", "no name"),
        (b"<domainsnapshot>" + b"<a>" * 5000, "deeply nested"),
        (b"<domainsnapshot><name>x</name>" + b"<a/>" * 200_000 + b"</domainsnapshot>", "too many"),
        (b"<domainsnapshot>" + b" " * (5 << 20) + b"</domainsnapshot>", "larger than 4 MiB"),
        (b"<?xml version='1.0' encoding='no-such'?><domainsnapshot/>", "encoding"),
        (b"<domainsnapshot><name>x</name><creationTime>soon</creationTime></domainsnapshot>", "soon"),
        (b"<domainsnapshot><name>x</name><creationTime>" + b"9" * 5000 + b"</creationTime></domainsnapshot>", "digits"),
        (b"<domainsnapshot><name>x</name><creationTime>-1</creationTime></domainsnapshot>", "out of range"),
        (b"<domainsnapshot><name>x</name><memory snapshot='cloud'/></domainsnapshot>", "cloud"),
    ],
)
def test_hostile_documents_are_errors_that_name_the_file(catalog: Catalog, document: bytes, text: str) -> None:
    catalog.add(OFFLINE)
    path = Path(catalog.directory) / "evil.xml"
    path.write_bytes(document)
    with pytest.raises(CatalogError, match=text) as caught:
        catalog.load()
    assert str(path) in str(caught.value)


def test_two_documents_of_one_name_are_an_error(catalog: Catalog) -> None:
    catalog.add(OFFLINE)
    path = Path(catalog.directory)
    (path / "other.xml").write_bytes((path / "off.xml").read_bytes())
    with pytest.raises(CatalogError, match="second document"):
        catalog.load()


def test_links_and_special_files_do_no_harm(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add(OFFLINE)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (Path(catalog.directory) / ".ext1.xml.new").symlink_to(victim)
    with pytest.raises(CatalogError):
        catalog.add(EXTERNAL)
    assert victim.read_text() == "precious"
    os.mkfifo(Path(catalog.directory) / "pipe.xml")
    with pytest.raises(CatalogError, match="not a regular file"):
        catalog.load()


LIBVIRT = b"""<domainsnapshot>
  <name>ext1</name><description>by virsh</description><state>running</state><creationTime>1795405639</creationTime>
  <parent><name>int1</name></parent>
  <memory snapshot='external' file='/images/ext1.mem'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'><driver type='qcow2'><metadata_cache><max_size
      unit='bytes'>1</max_size></metadata_cache></driver><source file='/images/a.s1'><seclabel model='dac'
      relabel='no'/></source></disk>
    <disk name='vdb' snapshot='no'/>
    <disk name='vdc' snapshot='internal'/>
  </disks>
  <domain type='qemu'><name>web</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid><memory>2048</memory>
    <metadata><other xmlns='urn:other'>kept</other></metadata>
    <os><type arch='x86_64'>hvm</type></os>
    <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/a.qcow2'/>
      <target dev='vda' bus='virtio'/></disk>
      <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/b'/>
      <target dev='vdb'/></disk>
      <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/c.qcow2'/>
      <target dev='vdc'/></disk></devices></domain>
  <inactiveDomain type='qemu'><name>web</name></inactiveDomain>
  <cookie><cpu mode='custom'/></cookie>
  <future thing='1'><deep>er</deep></future>
</domainsnapshot>"""


def test_libvirt_s_document_is_read_and_what_we_do_not_know_is_kept(catalog: Catalog) -> None:
    os.makedirs(catalog.directory)
    path = Path(catalog.directory) / "any name.xml"
    path.write_bytes(LIBVIRT)
    (snapshot,) = catalog.load()
    assert (snapshot.name, snapshot.domain, snapshot.parent) == ("ext1", "web", "int1")
    assert (snapshot.state.value, snapshot.consistency.value) == ("running", "checkpoint")
    assert (snapshot.memory.mode.value, snapshot.memory.file) == ("external", "/images/ext1.mem")
    assert [(d.target, d.mode.value, d.file, d.format, d.overlay, d.internal_name) for d in snapshot.disks] == [
        ("vda", "external", "/images/a.qcow2", "qcow2", "/images/a.s1", None),
        ("vdb", "no", "/dev/vg/b", "raw", None, None),
        ("vdc", "internal", "/images/c.qcow2", "qcow2", None, "ext1"),
    ]
    changed = replace(snapshot, description="ours now")
    catalog.replace(changed)
    assert catalog.load() == [changed]
    text = path.read_text()
    for kept in ("urn:other", "kept", "<future thing=", "<deep>er", "inactiveDomain", "mode=", "max_size", "seclabel"):
        assert kept in text
    assert text.count("<disk name=") == 3
    catalog.remove("ext1")
    assert not path.exists()


def test_the_domain_s_own_xml_is_stored(tmp_path: Path) -> None:
    domain = b"<domain type='kvm'><name>guest</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid></domain>"
    catalog = Catalog(tmp_path, domain_xml=domain)
    catalog.add(INTERNAL)
    assert "6695eb01-f6a4-8304-79aa-97f2502e193f" in (tmp_path / "before upgrade.xml").read_text()
    assert catalog.load() == [INTERNAL]
    with pytest.raises(CatalogError, match="not a <domain>"):
        Catalog(tmp_path, domain_xml=b"<network/>").add(EXTERNAL)


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=60)


@hypothesis.given(name=TEXT, other=TEXT, path=TEXT, description=st.text(max_size=200))
def test_any_text_comes_back_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, other: str, path: str, description: str
) -> None:
    catalog = Catalog(tmp_path_factory.mktemp("catalog"))
    disk = replace(EXTERNAL.disks[0], file=f"/{path}", overlay=f"/{path}.1", target=path)
    snapshot = replace(EXTERNAL, name=name, parent=other, description=description, disks=(disk,))
    try:
        catalog.add(snapshot)
    except CatalogError:
        assert catalog.load() == []
        return
    assert catalog.load() == [replace(snapshot, description=description.replace("\r\n", "\n"))]
    assert catalog.current == name
    if name != other and name_problem(other) is None:
        catalog.add(replace(snapshot, name=other))
        assert set(names(catalog)) == {name, other}


def test_long_and_odd_names_have_their_own_files(catalog: Catalog) -> None:
    odd = ["a" * 1000, "a" * 1001, "\u20ac" * 300, "%61", "a", "A", "..".replace(".", "%2E"), "current", "x.xml"]
    for name in odd:
        catalog.add(replace(OFFLINE, name=name))
    assert sorted(names(catalog)) == sorted(odd)
    for name in odd:
        catalog.remove(name)
    assert names(catalog) == []


def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_directory("guest", "/etc/guest.toml") == "/etc/guest.toml.snapshots"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/me/state")
    assert default_directory("a/../b") == "/home/me/state/domsnap/a%2F..%2Fb"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_directory("guest") == "/home/me/.local/state/domsnap/guest"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_directory("..") == "/var/lib/domsnap/%2E."


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.data())
def test_any_damage_to_a_document_is_an_error_or_a_snapshot(data: Any) -> None:
    """Bytes, words and elements changed at random: nothing but a ValueError, and what is read can be written."""
    document = bytearray(data.draw(st.sampled_from([build(snapshot) for snapshot in ALL] + [LIBVIRT])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(document) - 1))
        length = data.draw(st.integers(0, 30))
        words = [b"", b"external", b"-1", b"0", b"9" * 30, b"<disk/>", b"<domain/>", b"<metadata/>", b"\xff", b"&lt;"]
        document[at : at + length] = data.draw(st.sampled_from(words) | st.binary(max_size=4))
    try:
        snapshot = parse(bytes(document))
    except ValueError:
        return
    assert snapshot.name
    try:
        again = build(snapshot, earlier=bytes(document))
    except ValueError:
        return
    assert parse(again).name == snapshot.name
