# SPDX-License-Identifier: Apache-2.0
"""Runs a dump or a restore in a process that is killed at a step of our choice.

A step is a system call: what goes through ptrace, libc or Python's os module. Each one counts twice, before and behind
it, as what is noted in memory stands in between.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from stasis.linux import libc, ptrace

__all__ = ["count_steps", "kill_at"]

MODULES = {"posix", "fcntl", "_socket", "mmap"}


def count_steps(work: Callable[[], object]) -> int:
    """How many steps the work has, which is done."""
    reader, writer = os.pipe()
    counter = _run(work, None, writer)
    os.close(writer)
    with open(reader, "rb") as file:
        told = file.read()
    os.waitpid(counter, 0)
    assert told, "the work failed"
    return int(told)


def kill_at(step: int, work: Callable[[], object]) -> None:
    """Do the work up to this step; then the process that does it is killed. Returns when all that it started, the
    guardian, have ended, too."""
    reader, writer = os.pipe()
    pid = _run(work, step, writer)
    os.close(writer)
    with open(reader, "rb") as file:
        file.read()
    os.waitpid(pid, 0)


def _run(work: Callable[[], object], last: int | None, told: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        steps = _Steps(last)
        steps.begin()
        work()
        steps.end()
        os.write(told, str(steps.count).encode())
        status = 0
    except BaseException:  # the parent sees that nothing was told
        traceback.print_exc()
    finally:
        os._exit(status)


class _Steps:
    def __init__(self, last: int | None) -> None:
        self.count = 0
        self._last = last
        self._process = os.getpid()

    def begin(self) -> None:
        ptrace._ptrace = self._counted(ptrace._ptrace)
        libc.syscall = self._counted(libc.syscall)
        sys.setprofile(self._see)

    def end(self) -> None:
        sys.setprofile(None)

    def _counted(self, function: Any) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self._step()
            try:
                return int(function(*arguments))
            finally:
                self._step()

        return call

    def _see(self, _: object, event: str, function: Any) -> None:
        if event in ("c_call", "c_return") and getattr(function, "__module__", "") in MODULES:
            self._step()

    def _step(self) -> None:
        if self._process != os.getpid():
            return  # the guardian, or a process of the restore
        self.count += 1
        if self.count == self._last:
            os.kill(self._process, signal.SIGKILL)
