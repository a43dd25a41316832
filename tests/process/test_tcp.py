# SPDX-License-Identifier: Apache-2.0
"""TCP connections go on after a restore, with everything that was on its way."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux import nftables
from tests.process.programs import Program, running, stasis, wait_for

pytestmark = pytest.mark.root

SERVER = """
import os, select, socket, sys, time
from pathlib import Path
address, script = sys.argv[1:]
listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
Path("port").write_text(str(listener.getsockname()[1]))
peer, _ = listener.accept()
def wait(name):
    while not os.path.exists(name):
        time.sleep(0.003)
def set_up():
    Path("ready").touch()
    wait("go")
    peer.settimeout(60)
def receive(length=1 << 30):
    data = b""
    while len(data) < length and (portion := peer.recv(1 << 20)):
        data += portion
    return data
exec(script)
Path("content").touch()
"""
ECHO = "set_up(); data = receive(); peer.sendall(data[::-1]); peer.close()"
"""Answers with all that came before and after the dump."""


class Case:
    """A server that is dumped, and its client, which is the test."""

    def __init__(self, program: Program, client: socket.socket) -> None:
        self.program, self.client = program, client

    def cycle(self, *, locks: bool = True) -> None:
        images = self.program.dump("--tcp", "established")
        assert (_table(images) in nftables.tables()) == locks
        self.program.restore(images)
        assert _table(images) not in nftables.tables()

    def go(self) -> None:
        (self.program.directory / "go").touch()


def _table(images: Path) -> str:
    shown = json.loads(stasis("decode", images / "inventory.img"))
    return f"CRIU-{shown['entries'][0]['dump_criu_run_id'][:21]}"


def _connect(directory: Path, address: str) -> socket.socket:
    port = directory / "port"
    wait_for(lambda: port.exists() and port.read_text(), "the server does not listen")
    client = socket.create_connection((address, int(port.read_text())))
    client.settimeout(60)
    return client


@contextmanager
def server(
    directory: Path, script: str, address: str = "127.0.0.1", before: bytes = b"", *, ends: bool = False
) -> Iterator[Case]:
    """A server that runs `script` for the connection of a client, which has sent something; no more if it `ends`."""
    found: list[socket.socket] = []

    def connect() -> None:
        found.append(_connect(directory, address))
        found[0].sendall(before)
        if ends:
            found[0].shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        with running(directory, sys.executable, "-c", SERVER, address, script) as program:
            thread.join()
            yield Case(program, found[0])
    finally:
        thread.join()
        for client in found:
            client.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_connection_goes_on(tmp_path: Path, address: str) -> None:
    with server(tmp_path, ECHO, address, b"before ") as case:
        for word in (b"between ", b"after"):
            if word == b"after" or address == "::1":  # twice in one family
                case.cycle()
            case.client.sendall(word)
        case.client.shutdown(socket.SHUT_WR)
        case.go()
        assert case.client.recv(100) == b"before between after"[::-1]
        assert case.client.recv(100) == b""
        case.program.finish()


def test_full_queues_come_back_whole(tmp_path: Path) -> None:
    """More in both directions than was read, acknowledged, or even sent."""
    script = """
peer.setblocking(False)
sent = 0
while select.select([], [peer], [], 0.5)[1]:
    sent += peer.send(bytes(range(256)) * 256)
Path("sent").write_text(str(sent))
set_up()
peer.sendall(b"end")
peer.shutdown(socket.SHUT_WR)
assert receive() == b"in" * 100_000 + b"later"
"""
    with server(tmp_path, script, before=b"in" * 100_000) as case:
        case.cycle()
        case.client.sendall(b"later")
        case.go()
        length = int((tmp_path / "sent").read_text())
        received = bytearray()
        while portion := case.client.recv(1 << 20):
            received += portion
        assert received == (bytes(range(256)) * (length // 256 + 1))[:length] + b"end"
        case.client.close()
        case.program.finish()


HALVES = {
    "CLOSE_WAIT": "set_up(); assert receive() == b'all'; peer.sendall(b'answer'); peer.close()",
    "FIN_WAIT2": "peer.sendall(b'answer'); peer.shutdown(1); set_up(); assert receive() == b'allmore'",
    "CLOSE": "wait_state(8); peer.sendall(b'answer'); peer.shutdown(1); wait_state(7); set_up(); "
             "assert receive() == b'all'",
}  # fmt: skip
STATES = {"CLOSE_WAIT": 8, "FIN_WAIT2": 5, "CLOSE": 7}
WAIT_STATE = """
def state():
    return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
def wait_state(wanted):
    while state() != wanted:
        time.sleep(0.003)
"""


@pytest.mark.parametrize("name", HALVES)
def test_a_half_that_is_closed_stays_closed(tmp_path: Path, name: str) -> None:
    wanted = STATES[name]
    script = HALVES[name].replace("set_up()", f"wait_state({wanted}); set_up(); assert state() in ({wanted}, 7)")
    with server(tmp_path, WAIT_STATE + script, before=b"all", ends=name != "FIN_WAIT2") as case:
        case.cycle(locks=name != "CLOSE")
        if name == "FIN_WAIT2":
            case.client.sendall(b"more")
            case.client.shutdown(socket.SHUT_WR)
        case.go()
        assert case.client.recv(100) == b"answer"
        assert case.client.recv(100) == b""
        case.program.finish()


def test_a_dump_that_lets_it_run_on_leaves_the_connection_alone(tmp_path: Path) -> None:
    with server(tmp_path, ECHO, before=b"one") as case:
        images = case.program.dump("--tcp", "established", "--leave-running")
        assert _table(images) not in nftables.tables()
        case.client.sendall(b"two")
        case.client.shutdown(socket.SHUT_WR)
        case.go()
        assert case.client.recv(100) == b"owteno"
        case.program.finish()


def test_a_connection_without_a_word_is_named(tmp_path: Path) -> None:
    with server(tmp_path, ECHO) as case:
        said = stasis("dump", case.program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert "--tcp established" in said
        case.client.close()
        case.program.finish()


def test_a_connection_that_others_have_is_named(tmp_path: Path) -> None:
    script = """
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    while os.getppid() != 1 and not os.path.exists("go"):
        time.sleep(0.003)
    Path("alone").touch()
    wait("go")
    os._exit(0)
os.wait()
wait("alone")
set_up()
"""
    with server(tmp_path, script) as case:
        said = stasis(
            "dump", case.program.pid, "--images", tmp_path / "images", "--tcp", "established",
            status=ExitCode.UNSUPPORTED,
        )  # fmt: skip
        assert "outside of the tree, has it open as well" in said
        case.program.finish()


def test_a_connection_can_be_closed(tmp_path: Path) -> None:
    script = """
set_up()
try:
    peer.send(b"x")
except OSError:
    pass
else:
    raise SystemExit("it is connected")
listener.settimeout(60)
listener.accept()[0].sendall(b"hello")
"""
    with server(tmp_path, script) as case:
        case.program.restore(case.program.dump("--tcp", "close"))
        assert case.client.recv(1) == b""
        case.go()
        with _connect(tmp_path, "127.0.0.1") as second:
            assert second.recv(100) == b"hello"
        case.program.finish()


def test_a_restore_that_fails_leaves_the_lock_and_can_be_repeated(tmp_path: Path) -> None:
    with server(tmp_path, ECHO, before=b"kept") as case:
        images = case.program.dump("--tcp", "established")
        with socket.socket() as taker:
            taker.bind(("127.0.0.1", int((tmp_path / "port").read_text())))
            taker.listen()
            stasis("restore", "--images", images, status=ExitCode.BUSY)
        assert _table(images) in nftables.tables()
        case.program.restore(images)
        case.client.shutdown(socket.SHUT_WR)
        case.go()
        assert case.client.recv(100) == b"tpek"
        case.program.finish()


def test_both_ends_in_the_tree(tmp_path: Path) -> None:
    script = f"""
a = socket.create_connection(listener.getsockname())
b, _ = listener.accept()
a.sendall(b"{"x" * 1000}")
if not (child := os.fork()):
    a.close(); b.sendall(b"from the child"); wait("go"); assert b.recv(5000) == b"{"x" * 1000}"; os._exit(0)
set_up()
assert a.recv(100) == b"from the child"
assert os.waitpid(child, 0)[1] == 0
"""
    with server(tmp_path, script) as case:
        case.cycle()
        case.go()
        case.program.finish()


def test_the_dumper_dies_and_the_connection_lives(tmp_path: Path) -> None:
    with server(tmp_path, ECHO, before=b"alive") as case:
        code = """
import os, signal, sys
from stasis.process.dump import job
from stasis.process.files.options import FileOptions
job._Dump.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
job.dump(int(sys.argv[1]), sys.argv[2], job.DumpOptions(files=FileOptions(tcp="established")))
"""
        before = set(nftables.tables())
        subprocess.run([sys.executable, "-c", code, str(case.program.pid), str(tmp_path / "images")], check=False)
        wait_for(lambda: set(nftables.tables()) <= before, "the lock stays")
        case.client.shutdown(socket.SHUT_WR)
        case.go()
        assert case.client.recv(100) == b"evila"
        case.program.finish()


@pytest.mark.parametrize("moment", ["Roll.enter", "Connections.keep"])
def test_the_dumper_dies_while_it_ends_the_tree(tmp_path: Path, moment: str) -> None:
    """The set is there: the tree ends, and the connection waits for it."""
    with server(tmp_path, ECHO, before=b"alive") as case:
        code = f"""
import os, signal, sys
from stasis.process.dump import job
from stasis.process.files.options import FileOptions
do = job.{moment}
job.{moment} = lambda *words: (do(*words), os.kill(os.getpid(), signal.SIGKILL))
job.dump(int(sys.argv[1]), sys.argv[2], job.DumpOptions(files=FileOptions(tcp="established")))
"""
        images = tmp_path / "images"
        case.program.pids = case.program.descendants()
        subprocess.run([sys.executable, "-c", code, str(case.program.pid), str(images)], check=False)
        case.program.process.wait()
        assert _table(images) in nftables.tables()
        case.program.restore(images)
        case.client.shutdown(socket.SHUT_WR)
        case.go()
        assert case.client.recv(100) == b"evila"
        case.program.finish()


def test_accepted_connections_share_the_listeners_port(tmp_path: Path) -> None:
    script = """
others = [socket.create_connection(listener.getsockname()) for _ in range(3)]
accepted = [listener.accept()[0] for _ in others]
set_up()
for number, (one, two) in enumerate(zip(others, accepted)):
    one.sendall(bytes([number]))
    assert two.recv(1) == bytes([number])
listener.settimeout(60)
last = socket.create_connection(listener.getsockname())
assert listener.accept()[0].getpeername() == last.getsockname()
assert os.path.exists("go")
"""
    with server(tmp_path, script) as case:
        case.cycle()
        case.go()
        case.program.finish()
