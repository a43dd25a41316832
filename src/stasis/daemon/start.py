# SPDX-License-Identifier: Apache-2.0
"""Starting the daemon when a command needs it and none runs, as gpg-agent is started.

Two commands may do so at the same time: the lock of the run directory lets one daemon live, and the command whose
daemon lost connects to the other's.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

from stasis.daemon.child import environment, last_line
from stasis.daemon.paths import Directories, check_socket_path
from stasis.errors import DaemonError, StasisError

__all__ = ["start"]

PATIENCE = 60.0
"""Seconds to wait for a daemon that somebody else is starting."""


def start(directories: Directories, connect: Callable[[], bool], started: Callable[[int], None] | None) -> None:
    """Start a daemon in the background and wait until `connect` says it could.

    Raises what keeps the daemon from starting; `started` is told its pid.
    """
    check_socket_path(directories.control_socket)
    directories.create()
    pid, answer = _spawn(directories)
    if answer.get("exit_code") and not _lost_the_race(answer):
        raise StasisError.from_dict(answer)
    if not answer.get("exit_code") and started is not None:
        started(pid)
    deadline = time.monotonic() + PATIENCE
    while not connect():
        if time.monotonic() > deadline:
            raise DaemonError(f"the daemon on {directories.run} does not answer", hint=f"its log is {directories.log}")
        time.sleep(0.02)


def _lost_the_race(answer: dict[str, object]) -> bool:
    return answer.get("errno") == errno.EBUSY and answer.get("error") == "DaemonError"


def _spawn(directories: Directories) -> tuple[int, dict[str, object]]:
    """Start the process and read what it says when it serves, or cannot: its pid and that message."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "stasis", "daemon", "--run-dir", str(directories.run),
               "--state-dir", str(directories.state), "--ready-fd", str(writer)]
    log = os.open(directories.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # The process forks and ends at once: the daemon is not our child, so that nobody must wait for its end.
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", pass_fds=[writer],
                       start_new_session=True, env=environment(), check=False)
    finally:
        os.close(log)
        os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.readline()
    if not said:
        raise DaemonError(f"the daemon does not start: {last_line(directories.log)}",
                          hint=f"its log is {directories.log}")
    answer: dict[str, object] = json.loads(said)
    return int(str(answer.get("pid", 0))), answer
