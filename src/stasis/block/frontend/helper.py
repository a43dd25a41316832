# SPDX-License-Identifier: Apache-2.0
"""Programs that carry a node (nbdfuse, nbdublk): started so that they outlive us, found again by pid and start time."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stasis.errors import StasisError
from stasis.linux import process

__all__ = ["Helper"]

LOG = "helper.log"
LOG_TAIL = 300


@dataclass(frozen=True)
class Helper:
    """A process in a session of its own; it writes into a log in the node's directory."""

    pid: int
    start: int

    @classmethod
    def spawn(cls, command: list[str], directory: Path) -> Helper:
        """Start a program with nothing inherited. Raises FileNotFoundError if there is none of this name."""
        log = os.open(directory / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((null, 0), (log, 1), (log, 2))]
            pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions, setsid=True)
        finally:
            os.close(log)
            os.close(null)
        return cls(pid, process.start_time(pid) or 0)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Helper:
        return cls(state["pid"], state["pid_start"])

    def as_state(self) -> dict[str, int]:
        return {"pid": self.pid, "pid_start": self.start}

    def runs(self) -> bool:
        """Whether it runs; a pid that another process got later does not count, nor does one that only waits."""
        self._reap()
        return process.start_time(self.pid) == self.start

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # not our child: we are another process than its starter
            os.waitpid(self.pid, os.WNOHANG)

    def wait(self, seconds: float) -> bool:
        """Whether it ended within the time."""
        if not self.runs():
            return True
        try:
            pidfd = process.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            ended = bool(select.select([pidfd], [], [], seconds)[0])
        finally:
            os.close(pidfd)
        self._reap()
        return ended

    def end(self, seconds: float) -> None:
        """Ask it to end; kill it if it does not within the time."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.runs():
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            if self.wait(seconds):
                return
        raise StasisError(f"{process.name(self.pid)} (pid {self.pid}) does not end")

    @staticmethod
    def last_words(directory: Path) -> str:
        """The end of its log on one line."""
        try:
            return " ".join((directory / LOG).read_text(errors="replace")[-LOG_TAIL:].split())
        except OSError:
            return ""
