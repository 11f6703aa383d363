"""Where the description of a domain comes from: a domain file (TOML), libvirt's domain XML, Xen's xl.cfg.

    file -> load_description -> DomainDescription

A domain file names everything that domsnap needs; the other two give the name and the disks of a domain that is off.

    name = "web"
    qmp = "run/web.qmp"              # socket of QEMU's QMP monitor; all paths are relative to this file
    agent = "run/web.qga"            # socket of the guest agent, for --quiesce
    command = ["qemu-system-x86_64", "-m", "512", "-qmp", "unix:{qmp},server=on,wait=off",
               "-drive", "if=virtio,format={format:vda},file={disk:vda}", "{incoming}"]

    [disks.vda]
    path = "web.qcow2"
    format = "qcow2"
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from snapshot.description import DomainDescription, checked
from snapshot.errors import SourceError
from snapshot.model import Disk
from snapshot.xl_config import from_xl_config

__all__ = ["DomainDescription", "from_libvirt_xml", "from_toml", "load_description"]

_MAX_BYTES = 4 << 20


def load_description(path: str | os.PathLike[str]) -> DomainDescription:
    """Read a domain's description; the kind is seen from the content (XML) and the suffix (".toml", else xl.cfg).

    Args:
        path: the file.

    Raises: SourceError, naming the file and what is wrong.
    """
    name = os.path.abspath(os.fspath(path))
    try:
        with open(name, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{name}: {error.strerror}") from None
    try:
        if len(data) > _MAX_BYTES:
            raise SourceError(f"larger than {_MAX_BYTES >> 20} MiB")
        if data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
            return from_libvirt_xml(data, name)
        text = data.decode()
        if name.endswith(".toml"):
            return from_toml(text, name)
        return from_xl_config(text, name)
    except UnicodeDecodeError:
        raise SourceError(f"{name}: not UTF-8 text") from None
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from None


# --- Domain files


def from_toml(text: str, path: str) -> DomainDescription:
    """The description in a domain file. Raises SourceError."""
    import tomllib

    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SourceError(f"not TOML: {error}") from None
    _refuse_unknown(table, {"name", "disks", "qmp", "agent", "command"}, "the domain")
    folder = os.path.dirname(path)
    disks = tuple(_toml_disk(target, entry, folder) for target, entry in _table(table, "disks").items())
    command = _toml_command(table.get("command", []))
    description = DomainDescription(
        name=_text(table, "name", "the domain") or "",
        disks=disks,
        qmp_socket=_path(table, "qmp", folder),
        command=command,
        agent_socket=_path(table, "agent", folder),
        path=path,
    )
    return checked(description)


def _toml_disk(target: str, entry: Any, folder: str) -> Disk:  # noqa: ANN401 - any TOML value
    what = f"disk {target}"
    if not isinstance(entry, dict):
        raise SourceError(f"{what} is not a table")
    _refuse_unknown(entry, {"path", "format", "read-only"}, what)
    path, disk_format = _path(entry, "path", folder), _text(entry, "format", what)
    if path is None or disk_format is None:
        raise SourceError(f"{what} needs a path and a format (a guest could write anything at the start of a raw disk)")
    read_only = entry.get("read-only", False)
    if not isinstance(read_only, bool):
        raise SourceError(f"{what}: read-only is true or false")
    return Disk(target, path, disk_format, read_only=read_only)


def _toml_command(value: Any) -> tuple[str, ...]:  # noqa: ANN401 - any TOML value
    if isinstance(value, str):
        try:
            return tuple(shlex.split(value))
        except ValueError as error:
            raise SourceError(f"command: {error}") from None
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise SourceError("command is a list of texts, or one text")
    return tuple(value)


def _table(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise SourceError(f"{key} is not a table: write [{key}.vda], with a path and a format below it")
    return value


def _text(table: Mapping[str, Any], key: str, what: str) -> str | None:
    value = table.get(key)
    if value is not None and not (isinstance(value, str) and value):
        raise SourceError(f"{what}: {key} is not a text, or empty")
    return value


def _path(table: Mapping[str, Any], key: str, folder: str) -> str | None:
    value = _text(table, key, key)
    return None if value is None else os.path.normpath(os.path.join(folder, value))


def _refuse_unknown(table: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise SourceError(f"{what} has an unknown key '{unknown[0]}'; known are {', '.join(sorted(known))}")


# --- libvirt


def from_libvirt_xml(data: bytes, path: str) -> DomainDescription:
    """The name and the disks in libvirt's domain XML. Raises SourceError."""
    from snapshot.document import parse_domain
    from snapshot.safe_xml import attribute_of, text_of

    try:
        root = parse_domain(data)
    except ValueError as error:
        raise SourceError(str(error)) from None
    disks = []
    for element in root.findall("devices/disk"):
        target = attribute_of(element, "target", "dev") or "?"
        kind, device = element.get("type", "file"), element.get("device", "disk")
        source = attribute_of(element, "source", {"file": "file", "block": "dev"}.get(kind, "-"))
        if source is None:
            if element.find("source") is None and device in {"cdrom", "floppy"}:
                continue  # an empty drive
            raise SourceError(f"disk {target} is of type '{kind}'; only files and block devices can be snapshotted")
        read_only = device == "cdrom" or element.find("readonly") is not None
        # Without a driver, libvirt takes a disk as raw, whatever its content.
        disks.append(Disk(target, source, attribute_of(element, "driver", "type") or "raw", read_only=read_only))
    description = DomainDescription(
        name=text_of(root, "name") or "",
        disks=tuple(disks),
        path=path,
        xml=data,
    )
    return checked(description)
