# SPDX-License-Identifier: Apache-2.0
"""Programs that carry a node (nbdfuse, nbdublk): started so that they outlive us, found again by pid and start time.

What both need is here: what to know of the export before, and what they cannot do.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from stasis.block.frontend.node import Wish
from stasis.errors import StasisError, UnsupportedError
from stasis.linux import process
from stasis.nbd.client import Client

__all__ = ["END_WAIT", "START_WAIT", "Helper", "Shape", "is_installed", "refuse_reconnect"]

HANDSHAKE_TIMEOUT = 10.0
START_WAIT = 20.0
END_WAIT = 10.0
LOG = "helper.log"
LOG_TAIL = 300


@dataclass(frozen=True)
class Shape:
    """An export as its node will show it: `export_size` bytes, of which `size` fill sectors of `sector` bytes."""

    export_size: int
    size: int
    sector: int
    read_only: bool

    @classmethod
    def ask(cls, wish: Wish) -> Shape:
        """Connect and ask. Raises StateError if the export has not the size that is wished, and OSError."""
        with Client.connect(wish.uri, timeout=HANDSHAKE_TIMEOUT) as client:
            wish.expect(client.size)
            sector = wish.sector_for(client.minimum_block)
            return cls(client.size, client.size // sector * sector, sector, wish.read_only or client.read_only)

    @property
    def options(self) -> list[str]:
        """How both programs are told of it."""
        return ["--readonly"] if self.read_only else []


def is_installed(program: str) -> bool:
    """Whether there is the program, and we may make devices with it."""
    return os.geteuid() == 0 and shutil.which(program) is not None


def refuse_reconnect(state: dict[str, Any], program: str) -> NoReturn:
    raise UnsupportedError(
        f"{state['node']} cannot be given a new connection: {program} has none",
        hint="unmount it, detach the device and attach it again",
    )


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
