# SPDX-License-Identifier: Apache-2.0
"""What a test may leave behind on the host: nothing. Counted from /proc and /sys around every test."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SESSION_VARIABLE", "Leftovers", "end_processes", "session_processes"]

SESSION_VARIABLE = "STASIS_TEST_SESSION"
"""Set in the environment of every test; a process that has our value was started by us, if indirectly."""

_GRACE = 5.0
"""Seconds a process that was told to end may take to be gone."""


@dataclass(frozen=True)
class Leftovers:
    """What exists now that a test could have made. `new_since` tells what was not there before."""

    processes: frozenset[int]
    mounts: frozenset[str]
    loops: frozenset[str]
    descriptors: frozenset[str]

    @classmethod
    def now(cls, roots: Iterable[Path]) -> Leftovers:
        """Only mounts and loop devices of files under `roots` count: the host has others that come and go."""
        names = tuple(str(root) for root in roots)
        return cls(session_processes(), _mounts(names), _loops(names), _descriptors())

    def new_since(self, before: Leftovers) -> list[str]:
        """One line per thing that is here now and was not then."""
        return [
            *(f"process {pid}: {_command(pid)}" for pid in sorted(self.processes - before.processes)),
            *(f"mount {line}" for line in sorted(self.mounts - before.mounts)),
            *(f"loop device {line}" for line in sorted(self.loops - before.loops)),
            *(f"open descriptor {line}" for line in sorted(self.descriptors - before.descriptors)),
        ]


def leaked(before: Leftovers, roots: Iterable[Path]) -> list[str]:
    """What is left since `before`, once garbage is collected and ending processes have ended."""
    roots = list(roots)
    left = Leftovers.now(roots).new_since(before)
    if not left:
        return []
    gc.collect()
    deadline = time.monotonic() + _GRACE
    while (left := Leftovers.now(roots).new_since(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def session_processes() -> frozenset[int]:
    """Living processes that this test session started, without the pytest processes themselves."""
    entry = f"{SESSION_VARIABLE}={os.environ.get(SESSION_VARIABLE, '')}".encode()
    started = {pid for pid in _pids() if entry in _environment(pid)}
    return frozenset((started | _children()) - {os.getpid()})


def end_processes(pids: Iterable[int]) -> None:
    """Kill what a test left, so that it does not disturb the next ones; the test has failed by then."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended in between


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _children() -> set[int]:
    # A child that was forked and runs no other program has our own environment, which lacks the variable.
    try:
        lists = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    except OSError:
        return set()  # a thread ended in between
    return {int(pid) for pids in lists for pid in pids}


def _environment(pid: int) -> list[bytes]:
    # Empty for a zombie, for a kernel thread, and for processes of other users.
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "(gone)"


def _mounts(roots: tuple[str, ...]) -> frozenset[str]:
    # Field 5 is the mount point, the one after next to the lone "-" the source (proc(5), mountinfo).
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return frozenset(line for line in lines if any(f" {root}/" in line for root in roots))


def _loops(roots: tuple[str, ...]) -> frozenset[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            path = backing.read_text().strip()
        except OSError:
            continue  # taken off in between
        if path.startswith(roots):
            found.append(f"{backing.parts[3]} of {path}")
    return frozenset(found)


def _descriptors() -> frozenset[str]:
    # By number and target. Regular files are left out: pytest and coverage keep some of their own.
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of the listing itself
        if not target.startswith("/") or target.startswith(("/dev/loop", "/dev/nbd", "/memfd:")):
            found.append(f"{name} -> {target}")
    return frozenset(found)
