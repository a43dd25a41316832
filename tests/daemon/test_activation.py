# SPDX-License-Identifier: Apache-2.0
"""The daemon on a control socket that systemd listens on: started by the first command, the socket outlives it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests import leaks
from tests.daemon.helpers import MIB, await_true
from tests.runner import Stasis

pytestmark = pytest.mark.tool("systemd-socket-activate")

PASSED_ON = ("PATH", "PYTHONPATH", "STASIS_RUN_DIR", "STASIS_STATE_DIR", leaks.SESSION_VARIABLE)


@contextlib.contextmanager
def activated(stasis: Stasis, path: Path) -> Iterator[subprocess.Popen[str]]:
    """systemd's own stand-in for its socket units: it becomes the daemon at the first connection."""
    variables = [f"--setenv={name}={stasis.environment[name]}" for name in PASSED_ON if name in stasis.environment]
    command = ["systemd-socket-activate", f"--listen={path}", *variables, *stasis.command, "daemon"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        try:
            await_true(path.exists)
            yield started
        finally:
            started.kill()
            path.unlink()


def test_the_first_command_starts_the_daemon_and_the_socket_stays(stasis: Stasis, short_dir: Path) -> None:
    image, control = short_dir / "disk.img", stasis.run_dir / "control.sock"
    image.write_bytes(bytes(MIB))
    with activated(stasis, control) as started:
        before = control.stat().st_ino
        assert stasis.daemon_pid() is None
        stasis("device", "attach", image, "--name", "disk")
        assert stasis.daemon_pid() == started.pid
        assert [device["name"] for device in stasis.json("device", "list")] == ["disk"]
        stasis("device", "detach", "disk")
        stasis("daemon", "stop")
        assert started.wait(30) == 0
        assert control.stat().st_ino == before


def test_a_socket_at_another_place_is_refused(stasis: Stasis, short_dir: Path) -> None:
    path = short_dir / "other.sock"
    with activated(stasis, path) as started, socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        assert started.wait(60) == ExitCode.USAGE
        assert started.stderr is not None
        said = started.stderr.read()
    assert f"passed {path}, not a socket that listens at {stasis.run_dir}/control.sock" in said
    assert "ListenStream=" in said
    assert "Traceback" not in said
