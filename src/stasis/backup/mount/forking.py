# SPDX-License-Identifier: Apache-2.0
"""Processes that are forked off a command: they have its terminal, for a passphrase, until they leave its session."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from stasis.errors import ExitCode

__all__ = ["fork", "leave_session"]


def fork(function: Callable[[], object]) -> int:
    """Run a function in a child, which ends with it; returns the child's pid. The caller must have no threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _run(function)
    return pid


def _inherited() -> list[int]:
    """Descriptors that the command was started with: what we open ourselves is never handed on by exec."""
    found = [int(name) for name in os.listdir("/proc/self/fd")]
    return [fd for fd in found if fd > 2 and _is_handed_on(fd)]


def _is_handed_on(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False  # it was that of the listing


def _run(function: Callable[[], object]) -> NoReturn:
    """Nothing of what the command would have done after the fork, or at its end, happens in the child."""
    code = ExitCode.FAILURE
    try:
        function()
        code = ExitCode.OK
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED  # the command got the same signal and says so
    except BaseException:  # a fault in stasis: nobody above us would show it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def leave_session(log: Path) -> None:
    """Let go of the terminal, the working directory, and whoever waits for the command's output or for a pipe that it
    was given; what is said from now on goes to a log."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.chdir("/")
    for fd in _inherited():
        os.close(fd)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for fd, to in ((null, 0), (output, 1), (output, 2)):
        os.dup2(fd, to)
    os.close(output)
    os.close(null)
