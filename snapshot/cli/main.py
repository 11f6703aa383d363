"""The command domsnap: finds the verb, runs it, turns errors into one message and an exit code.

    main -> cmd_VERB.run(arguments) -> exit code

Each verb is a module that is imported when it is asked for: `domsnap --help` imports neither QMP nor qcowlib.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from snapshot.cli.syntax import DONE, FAILED, NOT_POSSIBLE, OCCUPIED, RECOVER, build_parser

#: What pip installs the modules with that only some commands need.
_EXTRAS = {"qemu": "domain", "defusedxml": "domain", "xxhash": "domain"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after the program's name; those of the process when None.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names need not be text: their bytes are printed as they are
            stream.reconfigure(errors="surrogateescape")
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = build_parser().parse_args(words)
        code = _run(arguments.module, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE  # the reader has seen enough
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


def _run(module: str, arguments: object) -> int:
    from snapshot.errors import DomainSnapshotError

    try:
        code: int = import_module(f"snapshot.cli.{module}").run(arguments)
        return code
    except DomainSnapshotError as error:
        return _report(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _say(f"the module {error.name} is not installed: pip install 'qcowlib[{extra}]'")
    except Exception as error:
        from qcowlib import QcowError

        if not isinstance(error, QcowError):
            raise
        return _say(str(error))


def _report(error: Exception) -> int:
    """Print the error of an operation; its kind is the exit code."""
    from snapshot import errors

    if isinstance(error, errors.NotPossible):
        _say(f"cannot {error.what}:" if error.reasons else str(error))
        for reason in error.reasons:
            print(f"  - {_plain(reason)}", file=sys.stderr)
        return NOT_POSSIBLE
    _say(str(error))
    if isinstance(error, errors.RecoverNeeded | errors.UndoFailed):
        return RECOVER
    if isinstance(error, errors.DomainBusy | errors.SocketTaken):
        return OCCUPIED
    if isinstance(error, errors.Interrupted):
        return 128 + (signal.SIGTERM if "SIGTERM" in str(error) else signal.SIGINT)
    return FAILED


def _say(text: str) -> int:
    print(f"domsnap: {_plain(text)}", file=sys.stderr)
    return FAILED


def _plain(text: str) -> str:
    from snapshot.cli.output import plain

    return plain(text)


if __name__ == "__main__":
    sys.exit(main())
