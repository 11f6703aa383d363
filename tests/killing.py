"""Running a function in a child process that is killed at its nth change of a file."""

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

from qcowlib.storage.local import LocalFile

#: What changes a file or a name: the calls that are counted.
STORAGE_CALLS = ("pwrite", "write_zeroes", "discard", "allocate", "truncate", "flush")
NAME_CALLS = ("replace", "rename", "unlink", "fsync", "mkdir")


def survives(function: Callable[[], object], steps: int) -> bool:
    """Run a function in a child process that dies by SIGKILL before its change number `steps`, counted from 0.

    Returns: whether the function came to its end, because it makes no more changes than that.
    """
    child = os.fork()
    if child == 0:
        try:
            _count_down(steps)
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert status == 0, "the function failed"
    return True


def _count_down(steps: int) -> None:
    left = steps

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper

    for name in STORAGE_CALLS:
        setattr(LocalFile, name, counted(getattr(LocalFile, name)))
    for name in NAME_CALLS:
        setattr(os, name, counted(getattr(os, name)))
