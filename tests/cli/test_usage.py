"""Arguments, messages and exit codes that all commands share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qcowlib.cli.main import COMMANDS
from qcowlib.cli.options import (
    Arguments,
    HelpWanted,
    KeyValue,
    Option,
    Syntax,
    UsageError,
    help_wanted,
    join_option_lists,
    parse_arguments,
    parse_key_values,
)
from qcowlib.cli.qapi import dumps
from qcowlib.errors import OptionError
from tests import oracle
from tests.cli.side_by_side import assert_same, ours, process, process_environment, stock

SYNTAX = Syntax(
    "verb",
    "",
    (
        Option("format", "f", "format", "FMT"),
        Option("force-share", "U", "force-share"),
        Option("quiet", "q"),
        Option("object", "", "object", "OBJECT"),
    ),
)


def parsed(*words: str) -> Arguments:
    return parse_arguments(SYNTAX, list(words))


def test_options_and_operands_may_be_mixed() -> None:
    arguments = parsed("a", "-qf", "raw", "--force-share", "b", "--object=x", "--obj", "y", "-", "--", "-q")
    assert arguments.options == [
        ("quiet", ""),
        ("format", "raw"),
        ("force-share", ""),
        ("object", "x"),
        ("object", "y"),
    ]
    assert arguments.operands == ["a", "b", "-", "-q"]
    assert arguments.last("format") == "raw"
    assert arguments.last("quiet") == ""
    assert arguments.last("missing") is None
    assert arguments.all("object") == ["x", "y"]
    assert arguments.has("quiet")
    assert not arguments.has("missing")


def test_value_in_the_same_word_and_empty_values() -> None:
    assert parsed("-fqcow2", "--format=", "-f", "").options == [("format", "qcow2"), ("format", ""), ("format", "")]


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["-qh"], ["--he"], ["-q", "a", "--help", "-z"]])
def test_help_wins_over_later_errors(words: list[str]) -> None:
    with pytest.raises(HelpWanted):
        parsed(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-z"], "unrecognized option '-z'"),
        (["--fo"], "unrecognized option '--fo'"),  # --format or --force-share
        (["--force-share=1"], "unrecognized option '--force-share=1'"),
        (["-f"], "missing argument for option '-f'"),
        (["--object"], "missing argument for option '--object'"),
        (["--help=1"], "unrecognized option '--help=1'"),
    ],
)
def test_usage_errors(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parsed(*words)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("", []),
        ("a=b", [("a", "b", False)]),
        ("a=b,c=d,,e", [("a", "b", False), ("c", "d,e", False)]),
        ("a=,,", [("a", ",", False)]),
        ("a,nob,c=", [("a", "on", True), ("b", "off", True), ("c", "", False)]),
        ("a=b=c", [("a", "b=c", False)]),
        ("a=b,", [("a", "b", False)]),
    ],
)
def test_key_values(text: str, elements: list[tuple[str, str, bool]]) -> None:
    assert parse_key_values(text) == [KeyValue(*element) for element in elements]


def test_first_element_may_lack_its_name() -> None:
    assert parse_key_values("secret,id=a", "qom-type")[0] == ("qom-type", "secret", False)
    assert parse_key_values("x=secret,id=a", "qom-type")[0] == ("x", "secret", False)
    assert parse_key_values("a,,b,id=a", "file")[0] == ("file", "a,b", False)


def test_joined_option_lists() -> None:
    assert join_option_lists([]) is None
    assert join_option_lists(["a=1", "b=2,,"]) == "a=1,b=2,,"
    for bad in ("", ",a", "a,", "a,,,"):
        with pytest.raises(OptionError, match=f"Invalid option list: {bad}$"):
            join_option_lists(["x", bad])
    assert help_wanted("a=1,help")
    assert help_wanted("?")
    assert not help_wanted("help=1")
    assert not help_wanted(None)


def test_json_is_written_as_qemu_writes_it() -> None:
    value = {"filename": 'a"\\\n\x7fé\U0001f600\udcff', "format": "raw", "list": [1, True, {}], "empty": []}
    assert dumps(value, pretty=False) == (
        r'{"list": [1, true, {}], "empty": [], "filename": "a\"\\\n\u007F\u00E9\uD83D\uDE00\uFFFD", "format": "raw"}'
    )
    assert dumps({"a": [1, {"b": "c"}], "e": {}}) == (
        '{\n    "e": {\n    },\n    "a": [\n        1,\n        {\n            "b": "c"\n        }\n    ]\n}'
    )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["foo"],
        ["-z"],
        ["--foo", "info"],
        ["info"],
        ["info", "a", "b"],
        ["info", "-x", "a"],
        ["info", "a", "-xU"],
        ["info", "--o=json", "a"],
        ["info", "--outp", "json"],
        ["info", "--output=xml", "a"],
        ["info", "-f"],
        ["info", "a", "--backing-chain=2"],
        ["check"],
        ["check", "-r", "some", "a"],
        ["check", "-T", "foo", "image"],
        ["check", "--output=xml", "a"],
        ["map"],
        ["map", "-s", "x", "image"],
        ["map", "--max-length=-1", "image"],
        ["map", "--output=xml", "image"],
        ["snapshot"],
        ["snapshot", "-l", "-c", "x", "image"],
        ["snapshot", "-c"],
        ["convert"],
        ["convert", "image"],
        ["commit"],
        ["commit", "-U", "image"],
        ["commit", "image", "image"],
        ["commit", "-r", "x", "image"],
        ["commit", "-r", "-1", "image"],
        ["commit", "-t", "foo", "image"],
        ["commit", "image"],
        ["commit", "-b", "nothing", "image"],
        ["rebase"],
        ["rebase", "image"],
        ["rebase", "-b"],
        ["rebase", "-t", "foo", "-u", "image"],
        ["rebase", "-T", "foo", "-u", "image"],
        ["rebase", "-p", "-t", "foo", "-u", "image"],
        ["rebase", "-b", "nothing", "image"],
        ["rebase", "-b", "nothing", "-F", "foo", "image"],
        ["rebase", "-b", "nothing", "-F", "qcow2", "image"],
        ["rebase", "-b", "image", "-F", "qcow2", "image"],
        ["rebase", "-u", "-b", "image", "image"],
        ["rebase", "-u", "-b", "x" * 1100, "-F", "raw", "image"],
        ["dd"],
        ["dd", "foo"],
        ["dd", "foo=1"],
        ["dd", "bs=0", "if=image", "of=x"],
        ["dd", "if=image"],
    ],
)
def test_usage_text_of_the_stock_tool(tmp_path: Path, words: list[str]) -> None:
    oracle.qemu_img("create", "-q", "-f", "qcow2", "image", "1M", cwd=tmp_path)
    assert assert_same(tmp_path, *words).code == 1


@pytest.mark.parametrize(
    "text",
    [
        "foo",
        "secret",
        "id=s",
        "secret,id=s",
        "secret,id=s,data=x,file=y",
        "secret,id=s,data=x,format=hex",
        "secret,id=s,data=%%,format=base64",
        "secret,id=s,data=x,foo=1",
        "secret,id=s,data=secret",
        "secret,id=s,data=c2VjcmV0,format=base64",
        '{"qom-type":"secret","id":"s","data":"secret"}',
    ],
)
def test_objects(tmp_path: Path, text: str) -> None:
    oracle.qemu_img("create", "-q", "-f", "qcow2", "image", "1M", cwd=tmp_path)
    assert_same(tmp_path, "info", "--object", text, "image")


def test_identifier_of_an_object(tmp_path: Path) -> None:
    said = ours(tmp_path, "info", "--object", "secret,id=1s,data=x", "image")
    assert said == (1, "", "qemu-img: Parameter 'id' expects an identifier\n")


def test_the_programs_own_name_is_in_messages(tmp_path: Path) -> None:
    said = process(tmp_path, "foo")
    assert said.returncode == 1
    assert said.stderr == b"qcow: Command not found: foo\nTry 'qcow --help' for more information\n"
    link = tmp_path / "other-name"
    link.write_text(f"#!{sys.executable}\nimport sys\nfrom qcowlib.cli.main import main\nsys.exit(main())\n")
    link.chmod(0o755)
    done = subprocess.run(
        [link, "foo"], capture_output=True, check=False, timeout=60, cwd=os.getcwd(), env=process_environment()
    )
    assert done.stderr.startswith(b"other-name: Command not found: foo\n")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_has_help(tmp_path: Path, command: str) -> None:
    said = ours(tmp_path, command, "--help")
    assert said.code == 0
    assert said.out.startswith(f"usage: qemu-img {command} ")
    assert "-h, --help" in said.out
    assert not said.err
    for line in said.out.splitlines():
        assert len(line) <= 160


def test_overview_names_all_commands(tmp_path: Path) -> None:
    said = ours(tmp_path, "--help")
    assert said.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in said.out


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A file name of arbitrary bytes is printed as these bytes, in messages and in results."""
    name = b"n\xff\xfe"
    missing = process(tmp_path, "info", os.fsdecode(name))
    assert missing.stderr == b"qcow: Could not open '" + name + b"': Could not open '" + name + (
        b"': No such file or directory\n"
    )
    oracle.qemu_img("create", "-q", "-f", "qcow2", os.fsdecode(name), "1M", cwd=tmp_path)
    assert process(tmp_path, "info", os.fsdecode(name)).stdout.startswith(b"image: " + name + b"\n")


def test_closed_pipe_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/bash", "-c", f"{sys.executable} -m qcowlib --help | :; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        check=False,
        timeout=60,
        env=process_environment(),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qcowlib", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
            env=process_environment(),
            cwd=tmp_path,
        )
    assert (done.returncode, done.stderr) == (1, b"qcow: could not write the output: No space left on device\n")


def test_interrupt_ends_with_130(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from qcowlib.cli import main\n"
        "main.COMMANDS['hang'] = ''\n"
        "module = type(sys)('qcowlib.cli.cmd_hang')\n"
        "module.SYNTAX = main.STANDARD_SYNTAX\n"
        "module.run = lambda arguments: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.modules['qcowlib.cli.cmd_hang'] = module\n"
        "sys.exit(main.main(['hang']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=False,
        timeout=60,
        env=process_environment(),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, b"")


def test_stock_usage_is_what_we_compare_with(tmp_path: Path) -> None:
    """The comparison can fail: the two differ where they are meant to."""
    assert stock(tmp_path, "--version").out != ours(tmp_path, "--version").out
