"""How errors are told on the command line."""

import pytest

from qcowlib.cli.common import CommandFailed, report_error
from qcowlib.errors import OptionError


def test_what_was_lost_is_said_in_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    cause = OptionError("no space")
    cause.add_note("'x' has lost its content")
    with pytest.raises(CommandFailed) as caught:
        raise CommandFailed("x: no space") from cause
    assert report_error(caught.value) == 1
    assert capsys.readouterr().err.endswith(": x: no space; 'x' has lost its content\n")
    assert report_error(cause) == 1
    assert capsys.readouterr().err.endswith(": no space; 'x' has lost its content\n")
