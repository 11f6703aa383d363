"""Command-line syntax: options by getopt's rules, and comma lists of `name=value`.

qemu-img's scripts rely on details of getopt_long (options after operands, `-qf raw`, `--out=json`, abbreviated long
options) and on the texts of its usage errors, so that the rules are spelled out here instead of using argparse; it
also starts faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qcowlib.errors import OptionError


class UsageError(OptionError):
    """The arguments do not fit the command's syntax; the message is followed by a pointer to --help."""


class HelpWanted(Exception):
    """-h or --help was met."""


class Option(NamedTuple):
    """One option: `name` is what commands ask for, `value` the word for its argument in the help, None for a flag."""

    name: str
    short: str = ""
    long: str = ""
    value: str | None = None
    help: str = ""


class Syntax(NamedTuple):
    """What a command takes: `usage` without program and command, options, free text below them.

    With `ends_with_operand` the last word is an operand whatever it begins with.
    """

    command: str
    usage: str
    options: tuple[Option, ...]
    notes: str = ""
    ends_with_operand: bool = False


class Arguments:
    """Parsed arguments: options in the order given, and operands."""

    def __init__(self, options: list[tuple[str, str]], operands: list[str]) -> None:
        self.options = options
        self.operands = operands

    def has(self, name: str) -> bool:
        """Whether the option was given."""
        return any(given == name for given, _ in self.options)

    def last(self, name: str) -> str | None:
        """Value of the last occurrence, None when the option was not given."""
        return next((value for given, value in reversed(self.options) if given == name), None)

    def all(self, name: str) -> list[str]:
        """Values of all occurrences."""
        return [value for given, value in self.options if given == name]


def parse_arguments(syntax: Syntax, arguments: list[str]) -> Arguments:
    """Sort a command's arguments into options and operands.

    Args:
        syntax: what the command takes; -h and --help are always taken.
        arguments: the words after the command's name.

    Raises:
        UsageError: unknown option or missing value, in qemu-img's words.
        HelpWanted: -h or --help comes before any such error.
    """
    options: list[tuple[str, str]] = []
    operands: list[str] = []
    last = arguments[-1:] if syntax.ends_with_operand and len(arguments) > 1 else []
    words = iter(arguments[: len(arguments) - len(last)])
    previous = syntax.command
    for word in words:
        if word == "--":
            operands.extend(words)
        elif word.startswith("--"):
            options.append(_long_option(syntax, word, words))
        elif word.startswith("-") and word != "-":
            options.extend(_short_options(syntax, word, words, previous))
        else:
            operands.append(word)
        previous = word
    return Arguments(options, operands + last)


def _long_option(syntax: Syntax, word: str, words: Iterator[str]) -> tuple[str, str]:
    given, equals, value = word[2:].partition("=")
    found = [option for option in syntax.options if option.long.startswith(given)] if given else []
    exact = [option for option in found if option.long == given]
    if given and "help".startswith(given) and not exact and not found and not equals:
        raise HelpWanted
    if len(exact or found) != 1:
        raise UsageError(f"unrecognized option '{word}'")
    option = (exact or found)[0]
    if option.value is None:
        if equals:
            raise UsageError(f"unrecognized option '{word}'")
        return option.name, ""
    if equals:
        return option.name, value
    following = next(words, None)
    if following is None:
        raise UsageError(f"missing argument for option '{word}'")
    return option.name, following


def _short_options(syntax: Syntax, word: str, words: Iterator[str], previous: str) -> list[tuple[str, str]]:
    parsed: list[tuple[str, str]] = []
    for place, letter in enumerate(word[1:], start=1):
        rest = word[place + 1 :]
        option = next((option for option in syntax.options if option.short == letter), None)
        if option is None and letter == "h":
            raise HelpWanted
        if option is None:
            # getopt steps over a word when its last letter is read: until then the word before it is the current one.
            raise UsageError(f"unrecognized option '{previous if rest else word}'")
        if option.value is None:
            parsed.append((option.name, ""))
            continue
        value = rest or next(words, None)
        if value is None:
            raise UsageError(f"missing argument for option '{word}'")
        parsed.append((option.name, value))
        break
    return parsed


class KeyValue(NamedTuple):
    """One element of a comma list; a flag is an element without "=" (its value is "on", or "off" after "no")."""

    name: str
    value: str
    flag: bool


def parse_key_values(text: str, first: str | None = None) -> list[KeyValue]:
    """Elements of `name=value,name=value`; a comma inside a value is doubled.

    Args:
        text: the list.
        first: name of a first element that has no "=".

    Source: QEMU's option lists (QemuOpts).
    """
    elements: list[KeyValue] = []
    position = 0
    while position < len(text):
        stop = _first_of(text, "=,", position)
        name, flag = text[position:stop], text[stop : stop + 1] != "="
        if flag and first is not None and not elements:
            value, position = _value(text, position)
            elements.append(KeyValue(first, value, False))
        elif flag:
            position = stop
            negated = name.startswith("no")
            elements.append(KeyValue(name[2:] if negated else name, "off" if negated else "on", True))
        else:
            value, position = _value(text, stop + 1)
            elements.append(KeyValue(name, value, False))
        position += 1
    return elements


def join_option_lists(lists: list[str]) -> str | None:
    """Several -o arguments as one list; None when there is none.

    Raises:
        OptionError: an argument that would change its neighbours when joined (empty, leading or trailing comma).
    """
    for text in lists:
        trailing = len(text) - len(text.rstrip(","))
        if not text or text.startswith(",") or trailing % 2:
            raise OptionError(f"Invalid option list: {text}")
    return ",".join(lists) if lists else None


def help_wanted(text: str | None) -> bool:
    """Whether an option list asks for help ("help" or "?")."""
    return any(
        element.flag and element.value == "on" and element.name in {"help", "?"}
        for element in parse_key_values(text or "")
    )


def escape_commas(value: str) -> str:
    """A value as it has to be written in an option list."""
    return value.replace(",", ",,")


def _first_of(text: str, marks: str, position: int) -> int:
    return min((at for mark in marks if (at := text.find(mark, position)) >= 0), default=len(text))


def _value(text: str, position: int) -> tuple[str, int]:
    """The value that starts at `position`, and where the comma behind it (or the end) is."""
    parts: list[str] = []
    while True:
        stop = _first_of(text, ",", position)
        if text[stop : stop + 2] != ",,":
            parts.append(text[position:stop])
            return "".join(parts), stop
        parts.append(text[position : stop + 1])
        position = stop + 2
