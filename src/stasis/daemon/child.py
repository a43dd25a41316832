# SPDX-License-Identifier: Apache-2.0
"""Workers and image servers as processes: started with a configuration in a memory file, watched by pidfd.

A process may have been started by this daemon or by one that died before it; both look the same from here.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stasis
from stasis.errors import DaemonError
from stasis.linux import process

__all__ = ["NICE_IN_PATH", "Child", "Prestarted", "environment", "last_line", "set_priority", "spawn", "spawned"]

NICE_IN_PATH = -5
"""For what stands in the path of I/O: workers, and the daemon while it holds them. Only root can have it."""


LOG_VARIABLE = "STASIS_LOG"
"""In the environment of what `spawn` starts: so it is found by a daemon that was not told of it."""


class Child:
    """A worker or image server process."""

    def __init__(self, pid: int, popen: subprocess.Popen[bytes] | None = None) -> None:
        """Raises ProcessLookupError if there is no such process."""
        self.pid = pid
        self._popen = popen
        self._pidfd = process.pidfd_open(pid)
        self.start_time = process.start_time(pid)

    @classmethod
    def adopt(cls, pid: int, start_time: int | None) -> Child | None:
        """The process with this pid if it still is the one that started then."""
        try:
            child = cls(pid)
        except (ProcessLookupError, OSError):
            return None
        if child.start_time is None or child.start_time != start_time:
            child.close()
            return None
        return child

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for ever) for its end; tells whether it ended."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(None if timeout is None else int(timeout * 1000)):
            return False
        if self._popen is not None:
            self._popen.wait()
        return True

    @property
    def alive(self) -> bool:
        return not self.wait(0)

    def stop(self, timeout: float) -> None:
        """Ask it to end with SIGTERM, insist with SIGKILL after `timeout` seconds, and wait."""
        process.signal_pidfd(self._pidfd, signal.SIGTERM)
        if not self.wait(timeout):
            self.kill()

    def kill(self) -> None:
        """End it and what it forked with SIGKILL and wait: all of them have the origin open, and its lock."""
        with contextlib.ExitStack() as stack:
            forked = []
            for pid in process.children(self.pid):
                with contextlib.suppress(ProcessLookupError):
                    forked.append(Child(pid))
                    stack.callback(forked[-1].close)
            for child in (self, *forked):
                process.signal_pidfd(child._pidfd, signal.SIGKILL)
            for child in (self, *forked):
                child.wait()

    def close(self) -> None:
        """Forget it; it runs on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._popen is not None:
            self._popen.returncode = self._popen.poll() or 0  # it may outlive us on purpose: no ResourceWarning


def spawn(module: str, configuration: dict[str, Any], descriptors: Sequence[int], log: Path, *,
          nice: int = 0) -> Child:
    """Start `python -m module --config-fd N` in a session of its own, its output appended to `log`.

    `configuration` names descriptors by their numbers; they are passed on under these. Raises DaemonError.
    """
    config_fd = _memory_file(configuration)
    try:
        popen = _start(module, config_fd, descriptors, log)
    finally:
        os.close(config_fd)
    set_priority(popen.pid, nice)
    return Child(popen.pid, popen)


def _start(module: str, config_fd: int, descriptors: Sequence[int], log: Path) -> subprocess.Popen[bytes]:
    try:
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", module, "--config-fd", str(config_fd)], stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, pass_fds=[config_fd, *descriptors], start_new_session=True,
                env=environment() | {LOG_VARIABLE: str(log)})
    except OSError as error:
        raise DaemonError(f"{module} cannot be started: {error.strerror}", errno=error.errno or 0) from error


class Prestarted:
    """A process that loads its modules while its configuration is yet to be made. Given none, it ends; so it does when
    the daemon dies."""

    def __init__(self, module: str, log: Path) -> None:
        """Start `python -m module`. Raises DaemonError."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._popen = _start(module, theirs.fileno(), [], log)
            except DaemonError:
                self._socket.close()
                raise

    def go(self, configuration: dict[str, Any], descriptors: Sequence[int]) -> Child | None:
        """Hand over what `spawn` takes. None if the process has died."""
        numbers = list(descriptors)
        message = json.dumps({"configuration": configuration, "descriptors": numbers}).encode()
        try:
            with self._socket:
                sent = socket.send_fds(self._socket, [message], numbers)
                self._socket.sendall(message[sent:])
            return Child(self._popen.pid, self._popen)
        except OSError:
            self.close()
            return None

    def close(self) -> None:
        """Have it end, and wait for that."""
        self._socket.close()
        self._popen.kill()
        self._popen.wait()


def spawned(directory: Path) -> list[int]:
    """Processes that run and that `spawn` started with a log in `directory`, and what they forked."""
    logs = ((pid, process.variable(pid, LOG_VARIABLE)) for pid in process.processes())
    return [pid for pid, log in logs if log and Path(log).parent == directory]


def environment() -> dict[str, str]:
    """The environment for a process of ours: it must find this very package, from whatever directory."""
    package = str(Path(stasis.__file__).resolve().parents[1])
    others = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    return variables | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([package, *others])), "PYTHONSAFEPATH": "1"}


def last_line(log: Path) -> str:
    """The last line a process wrote to its log, for a message that says why it ended."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def _memory_file(configuration: dict[str, Any]) -> int:
    fd = os.memfd_create("stasis-config", os.MFD_CLOEXEC)
    os.write(fd, json.dumps(configuration).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def set_priority(pid: int, nice: int) -> None:
    """Set the nice value of a process (0: our own) if we may."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, nice)
    except (PermissionError, ProcessLookupError):
        pass  # an ordinary user keeps the usual priority
