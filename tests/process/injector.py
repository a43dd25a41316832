# SPDX-License-Identifier: Apache-2.0
"""Runs a dump or a restore in a process that is killed at a step of our choice; or any process that it makes.

A step is a system call: what goes through ptrace, libc or Python's os module. Each one counts twice, before and behind
it, as what is noted in memory stands in between. A process is known by how it came about: as which child of which one.
"""

from __future__ import annotations

import _thread
import mmap
import os
import signal
import struct
import sys
import traceback
import zlib
from collections.abc import Callable
from typing import Any

from stasis.linux import libc, ptrace

__all__ = ["FIRST", "count_steps", "count_steps_of_all", "kill_at"]

MODULES = {"posix", "fcntl", "_socket", "mmap"}
SYS_CLONE3 = 435
SLOTS = 4096
COUNT = struct.Struct("<Q")
FIRST = zlib.crc32(b"") % SLOTS
"""Number of the process that does the work itself."""


def count_steps(work: Callable[[], object]) -> int:
    """How many steps the work has, which is done."""
    return count_steps_of_all(work)[FIRST]


def count_steps_of_all(work: Callable[[], object]) -> dict[int, int]:
    """The same of each process that the work makes, by its number."""
    with mmap.mmap(-1, SLOTS * COUNT.size) as counts:
        assert _done(lambda: _Steps(counts), work), "the work failed"
        return {number: count for number, (count,) in enumerate(COUNT.iter_unpack(counts[:])) if count}


def kill_at(step: int, work: Callable[[], object], process: int = FIRST) -> None:
    """Do the work up to this step of a process, which is killed then. Returns when all that it started, the guardian,
    have ended, too."""
    with mmap.mmap(-1, SLOTS * COUNT.size) as counts:
        _done(lambda: _Steps(counts, process, step), work)


def _done(steps: Callable[[], _Steps], work: Callable[[], object]) -> bool:
    """Whether the work came to its end."""
    reader, writer = os.pipe()
    pid = _run(steps, work, writer)
    os.close(writer)
    with open(reader, "rb") as file:
        told = file.read()
    os.waitpid(pid, 0)
    return bool(told)


def _run(steps: Callable[[], _Steps], work: Callable[[], object], told: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        counted = steps()
        counted.begin()
        work()
        counted.end()
        os.write(told, b"d")
        status = 0
    except BaseException:  # the parent sees that nothing was told
        traceback.print_exc()
    finally:
        os._exit(status)


class _Steps:
    def __init__(self, counts: mmap.mmap, killed: int = -1, last: int = 0) -> None:
        self._counts = counts
        self._killed, self._last = killed, last
        self._count = self._forks = 0
        self._path, self._number = b"", FIRST
        self._process = _thread.get_native_id()

    def begin(self) -> None:
        ptrace._ptrace = self._counted(ptrace._ptrace)
        libc.syscall = self._counted(libc.syscall)
        sys.setprofile(self._see)

    def end(self) -> None:
        sys.setprofile(None)

    def _counted(self, function: Any) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self._step(forks=arguments[0] == SYS_CLONE3)
            try:
                return int(function(*arguments))
            finally:
                self._step()

        return call

    def _see(self, _: object, event: str, function: Any) -> None:
        if event in ("c_call", "c_return") and getattr(function, "__module__", "") in MODULES:
            self._step(forks=event == "c_call" and function.__name__ == "fork")

    def _step(self, *, forks: bool = False) -> None:
        if self._process != _thread.get_native_id():
            self._be_child()
        self._count += 1
        self._forks += forks
        COUNT.pack_into(self._counts, self._number * COUNT.size, self._count)
        if self._number == self._killed and self._count == self._last:
            if os.getpid() == 1:
                os._exit(1)  # the first process of a pid namespace cannot kill itself
            os.kill(os.getpid(), signal.SIGKILL)

    def _be_child(self) -> None:
        self._process = _thread.get_native_id()
        self._path += b"/%d" % self._forks
        self._number = zlib.crc32(self._path) % SLOTS
        self._count = self._forks = 0
