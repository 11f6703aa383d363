"""The JSON of `json:` names, in QEMU's dialect: strings may stand in single quotes, and a key must not come twice.

text -> tokens -> standard JSON -> one object
"""

from __future__ import annotations

import json
import re
from typing import Any

from qcowlib.errors import ChainError

PREFIX = "json:"

_STRING = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![0-9])"
_TOKEN = re.compile(rf"{_STRING}|{_NUMBER}|[a-z]+|[{{}}\[\]:,]|\s+|.", re.DOTALL)
_KEYWORDS = frozenset(("true", "false", "null"))
_QUOTES = re.compile(r"""\\'|"|\\.""", re.DOTALL)


class _DuplicateKeyError(ValueError):
    """A key that an object has already."""


def parse_json_name(name: str) -> dict[str, Any]:
    """The options in a `json:` name.

    Args:
        name: "json:" and the text of an object.

    Raises:
        ChainError: it is no such text.
    """
    text = name.removeprefix(PREFIX)
    try:
        options = json.loads("".join(map(_standard, _TOKEN.findall(text))), object_pairs_hook=_unique)
    except _DuplicateKeyError:
        raise _unparsed(name, "JSON parse error, duplicate key") from None
    except (ValueError, RecursionError) as error:
        raise _unparsed(name, _stock_reason(text, error)) from None
    if not isinstance(options, dict):
        rule = f"could not parse the JSON options of '{name}': not an object"
        raise ChainError(rule, stock="Invalid JSON object given")
    return options


def _standard(token: str) -> str:
    """A token as standard JSON has it."""
    return f'"{_QUOTES.sub(_requoted, token[1:-1])}"' if token[0] == "'" and len(token) > 1 else token


def _requoted(match: re.Match[str]) -> str:
    """A piece of a string in single quotes, for double quotes."""
    return {"\\'": "'", '"': '\\"'}.get(match[0], match[0])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _DuplicateKeyError
    return found


def _stock_reason(text: str, error: Exception) -> str:
    if not text.strip():
        return "Expecting a JSON value"
    if isinstance(error, json.JSONDecodeError):
        if error.msg == "Extra data":
            return "Expecting at most one JSON value"
        if not error.doc[error.pos :].strip():
            return "JSON parse error, premature EOI"
        for token in _TOKEN.findall(text):
            if "a" <= token[0] <= "z" and token not in _KEYWORDS:
                return f"JSON parse error, invalid keyword '{token}'"
    return "JSON parse error, expecting value"


def _unparsed(name: str, reason: str) -> ChainError:
    rule = f"could not parse the JSON options of '{name}': {reason}"
    return ChainError(rule, stock=f"Could not parse the JSON options: {reason}")
