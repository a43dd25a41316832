# SPDX-License-Identifier: Apache-2.0
"""Unix sockets that are bound to a relative path have the same one after a restore, and the same file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.process.programs import running, stasis

pytestmark = pytest.mark.root

PROGRAM = """
import os, socket, time
from pathlib import Path
top = os.getcwd()
for name in ("one", "other", "other/below"):
    os.mkdir(name)
def make(directory, name):
    os.chdir(f"{top}/{directory}")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(name)
    listener.listen(5)
    client = socket.socket(socket.AF_UNIX)
    client.connect(name)
    server, _ = listener.accept()
    client.send(b"waits")
    return listener, client, server
same = [make("one", "socket"), make("other", "socket"),
        make("other", "./below/../dotted"), make("other/below", "../up")]
os.chdir(f"{top}/other/below")
datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
datagrams.bind("here")
os.chmod("here", 0o640)
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.connect("here")
sender.send(b"a datagram")
names = ["socket", "socket", "./below/../dotted", "../up"]
Path(f"{top}/ready").touch()
while not os.path.exists(f"{top}/go"):
    time.sleep(0.003)
assert os.getcwd() == f"{top}/other/below"
for name, (listener, client, server) in zip(names, same):
    assert listener.getsockname() == server.getsockname() == client.getpeername() == name
    assert server.recv(100) == b"waits"
    server.send(b"back")
    assert client.recv(100) == b"back"
for path, (listener, *_) in zip(("one/socket", "other/socket", "other/dotted", "other/up"), same):
    os.chdir(top)
    with socket.socket(socket.AF_UNIX) as new:
        new.connect(path)
        accepted, _ = listener.accept()
        accepted.send(path.encode())
        assert new.recv(100) == path.encode()
assert datagrams.recv(100) == b"a datagram" and datagrams.getsockname() == "here"
sender.send(b"another")
assert datagrams.recv(100) == b"another"
assert os.stat(f"{top}/other/below/here").st_mode & 0o777 == 0o640
Path(f"{top}/content").touch()
"""


def test_relative_names(tmp_path: Path) -> None:
    with running(tmp_path, sys.executable, "-c", PROGRAM) as program:
        program.again_and_again()
        program.finish()


def test_one_that_lost_its_file_is_named(tmp_path: Path) -> None:
    with running(tmp_path, sys.executable, "-c", PROGRAM) as program:
        (tmp_path / "one" / "socket").unlink()
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert "relative path" in said
