"""Passphrases from --object secret,id=...: plain text, base64, or the content of a file."""

from __future__ import annotations

import re

from qcowlib.cli.common import CommandFailed
from qcowlib.cli.options import Arguments, parse_key_values

_IDENTIFIER = re.compile(r"[a-zA-Z][a-zA-Z0-9._-]*", re.ASCII)
_MEMBERS = {"qom-type", "id", "data", "file", "format", "keyid", "iv"}


def read_secrets(arguments: Arguments) -> dict[str, bytes]:
    """The secrets of all --object arguments by their id.

    Raises:
        CommandFailed: an object of another type, or one that gives no passphrase.
    """
    secrets: dict[str, bytes] = {}
    for text in arguments.all("object"):
        members = _members(text)
        name = _identifier(members)
        if name in secrets:
            raise CommandFailed(f"attempt to add duplicate property '{name}' to object (type 'container')")
        secrets[name] = _passphrase(members)
    return secrets


def _members(text: str) -> dict[str, str]:
    if text.startswith("{"):
        return _json_members(text)
    return {element.name: element.value for element in parse_key_values(text, first="qom-type")}


def _json_members(text: str) -> dict[str, str]:
    import json

    try:
        members = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandFailed(f"JSON parse error, {error}") from None
    if not isinstance(members, dict) or not all(isinstance(value, str) for value in members.values()):
        raise CommandFailed("the JSON text of an object has to hold strings")
    return members


def _identifier(members: dict[str, str]) -> str:
    kind = members.get("qom-type")
    if kind is None:
        raise CommandFailed("Parameter 'qom-type' is missing")
    if kind != "secret":
        raise CommandFailed(f"Parameter 'qom-type' does not accept value '{kind}'")
    if "id" not in members:
        raise CommandFailed("Parameter 'id' is missing")
    if not _IDENTIFIER.fullmatch(members["id"]):
        raise CommandFailed("Parameter 'id' expects an identifier")
    unknown = next((name for name in members if name not in _MEMBERS), None)
    if unknown is not None:
        raise CommandFailed(f"Parameter '{unknown}' is unexpected")
    if "keyid" in members:
        raise CommandFailed("secrets that are themselves encrypted (keyid) are not available")
    return members["id"]


def _passphrase(members: dict[str, str]) -> bytes:
    form = members.get("format", "raw")
    if form not in {"raw", "base64"}:
        raise CommandFailed(f"Parameter 'format' does not accept value '{form}'")
    if "data" in members and "file" in members:
        raise CommandFailed("'file' and 'data' are mutually exclusive")
    if "data" in members:
        content = members["data"].encode("utf-8", "surrogateescape")
    elif "file" in members:
        content = _file_content(members["file"])
    else:
        raise CommandFailed("Either 'file' or 'data' must be provided")
    return _decode_base64(content) if form == "base64" else content


def _file_content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CommandFailed(f"Unable to read {path}: {error.strerror}") from None


def _decode_base64(content: bytes) -> bytes:
    import base64
    import binascii

    try:
        return base64.b64decode(b"".join(content.split()), validate=True)
    except binascii.Error:
        raise CommandFailed("Base64 data contains invalid characters") from None
