# SPDX-License-Identifier: Apache-2.0
"""The shared fixtures do what the other tests rely on: they notice leaks and suspicious logs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests import leaks
from tests.conftest import _suspicious
from tests.runner import Stasis


def test_a_command_line_of_its_own_is_ended_with_the_test(stasis: Stasis, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    uri = stasis("device", "attach", image)
    assert [(device["name"], device["uri"]) for device in stasis.json("device", "list")] == [("disk.img", uri)]
    assert len(leaks.session_processes()) >= 2  # daemon and worker
    stasis.stop()
    assert stasis.daemon_pid() is None


def test_workers_of_a_killed_daemon_are_ended_too(stasis: Stasis, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    stasis("device", "attach", image)
    pid = stasis.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while stasis.daemon_pid() == pid:
        pass  # the lock goes with the process
    stasis.stop()
    assert not list((stasis.run_dir / "workers").glob("*.ctl"))


def test_run_directories_leave_room_for_socket_names(run_dir: Path) -> None:
    assert len(str(run_dir)) < 40


def test_a_process_is_a_leak(tmp_path: Path) -> None:
    before = leaks.Leftovers.now([tmp_path])
    with subprocess.Popen(["sleep", "60"]) as process:
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
            pass  # Popen returns inside execve, before the new program's arguments are in place
        left = leaks.Leftovers.now([tmp_path]).new_since(before)
        process.kill()
    assert left == [f"process {process.pid}: sleep 60 "]


def test_an_open_socket_is_a_leak(tmp_path: Path) -> None:
    before = leaks.Leftovers.now([tmp_path])
    with socket.socket() as sock:
        left = leaks.Leftovers.now([tmp_path]).new_since(before)
        expected = [f"open descriptor {sock.fileno()} -> socket:[{os.fstat(sock.fileno()).st_ino}]"]
    assert left == expected


@pytest.mark.parametrize(
    ("line", "expected", "found"),
    [
        ("2026-01-01 12:00:00 INFO serving", [], False),
        ("2026-01-01 12:00:00 ERROR the worker died", [], True),
        ("2026-01-01 12:00:00 ERROR the worker died", ["worker died"], False),
        ("Traceback (most recent call last):", [], True),
        ("Exception ignored in: <function>", ["worker died"], True),
    ],
)
def test_suspicious_lines_are_found(tmp_path: Path, line: str, expected: list[str], found: bool) -> None:
    log = tmp_path / "worker.log"
    log.write_text(f"{line}\n")
    assert bool(_suspicious(log, expected)) is found
