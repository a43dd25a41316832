# SPDX-License-Identifier: Apache-2.0
"""systemd's protocols, with a service manager that is this test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stasis.linux.activation import listen_fds, notify

SCRIPT = """
import os, socket
from stasis.linux.activation import listen_fds
passed = listen_fds()
assert not any(name.startswith("LISTEN_") for name in os.environ)
assert not any(os.get_inheritable(fd) for fd, _ in passed)
print(passed, [socket.socket(fileno=fd).getsockname() for fd, _ in passed])
"""


LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(word.split("=") for word in sys.argv[3:])
os.environ["LISTEN_PID"] = os.environ.get("LISTEN_PID") or str(os.getpid())
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""


def _child(path: str, *environment: str) -> str:
    """Run SCRIPT as a service manager would: the listening socket is descriptor 3."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        command = [sys.executable, "-c", LAUNCHER, str(listener.fileno()), SCRIPT, *environment]
        passed = (listener.fileno(),)
        return subprocess.run(command, pass_fds=passed, capture_output=True, text=True, check=True).stdout


def test_passed_sockets(short_dir: Path) -> None:
    path = str(short_dir / "s")
    output = _child(path, "LISTEN_FDS=1", "LISTEN_FDNAMES=nbd")
    assert output == f"[(3, 'nbd')] ['{path}']\n"


def test_sockets_without_names(short_dir: Path) -> None:
    assert _child(str(short_dir / "s"), "LISTEN_FDS=1").startswith("[(3, 'unknown')]")


def test_sockets_for_another_process_are_not_ours(short_dir: Path) -> None:
    assert _child(str(short_dir / "s"), "LISTEN_PID=1", "LISTEN_FDS=1") == "[] []\n"


def test_nothing_was_passed() -> None:
    assert listen_fds() == []


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(short_dir: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@stasis-test-{os.getpid()}" if abstract else str(short_dir / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_notify_without_a_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
