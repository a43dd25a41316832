# SPDX-License-Identifier: Apache-2.0
"""Unix sockets come back connected, with what waited in them and the descriptors on their way."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.process.cycles import cycle, findings_of

pytestmark = pytest.mark.root

TYPES = {"stream": socket.SOCK_STREAM, "dgram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}


def _at(fd: int) -> socket.socket:
    return socket.socket(fileno=fd)


@pytest.mark.parametrize("kind", TYPES)
def test_a_pair_keeps_what_waits_in_it(tmp_path: Path, kind: str) -> None:
    def set_up() -> list[int]:
        one, other = socket.socketpair(socket.AF_UNIX, TYPES[kind])
        one.send(b"first")
        one.send(b"second")
        other.send(b"back")
        other.settimeout(30)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50000)
        return [one.detach(), other.detach()]

    def verify(fds: list[int]) -> None:
        one, other = map(_at, fds)
        assert not os.get_blocking(other.fileno())
        other.setblocking(True)
        expected = [b"firstsecond"] if kind == "stream" else [b"first", b"second"]
        assert [other.recv(100) for _ in expected] == expected
        assert one.recv(100) == b"back"
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 100000
        one.send(b"more")
        assert other.recv(100) == b"more"

    cycle(tmp_path / "images", set_up, verify)


def test_descriptors_on_their_way_arrive(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        one, other = socket.socketpair()
        reader, writer = os.pipe()
        inner, deep = socket.socketpair()
        inner.send(b"deep")
        socket.send_fds(one, [b"fds"], [writer, deep.fileno()])
        os.close(writer)
        deep.close()
        return [one.detach(), other.detach(), reader, inner.detach()]

    def verify(fds: list[int]) -> None:
        data, (writer, deep), _, _ = socket.recv_fds(_at(fds[1]), 100, 10)
        assert data == b"fds"
        os.write(writer, b"through")
        assert os.read(fds[2], 100) == b"through"
        assert _at(deep).recv(100) == b"deep"

    cycle(tmp_path / "images", set_up, verify)


def test_an_end_whose_other_end_is_closed_is_read_to_its_end(tmp_path: Path) -> None:
    def set_up() -> int:
        one, other = socket.socketpair()
        one.send(b"last words")
        one.close()
        return other.detach()

    def verify(fd: int) -> None:
        sock = _at(fd)
        assert sock.recv(100) == b"last words"
        assert sock.recv(100) == b""

    cycle(tmp_path / "images", set_up, verify)


def test_a_shut_down_direction_stays_so(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        one, other = socket.socketpair()
        one.send(b"end")
        one.shutdown(socket.SHUT_WR)
        return [one.detach(), other.detach()]

    def verify(fds: list[int]) -> None:
        one, other = map(_at, fds)
        assert other.recv(100) == b"end"
        assert other.recv(100) == b""
        other.send(b"still")
        assert one.recv(100) == b"still"
        with pytest.raises(BrokenPipeError):
            one.send(b"x")

    cycle(tmp_path / "images", set_up, verify)


@pytest.mark.parametrize("is_abstract", [False, True])
def test_a_listener_and_its_connections_have_their_names(short_dir: Path, is_abstract: bool) -> None:
    name = f"\0{short_dir}" if is_abstract else str(short_dir / "socket")

    def set_up() -> list[int]:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(name)
        listener.listen(7)
        if not is_abstract:
            os.chmod(name, 0o640)
        client = socket.socket(socket.AF_UNIX)
        client.connect(name)
        server, _ = listener.accept()
        client.send(b"request")
        return [sock.detach() for sock in (listener, client, server)]

    def verify(fds: list[int]) -> None:
        listener, client, server = map(_at, fds)
        shown = name.encode() if is_abstract else name
        assert client.getpeername() == server.getsockname() == listener.getsockname() == shown
        assert server.recv(100) == b"request"
        other = socket.socket(socket.AF_UNIX)
        other.connect(name)
        listener.accept()
        if not is_abstract:
            assert os.stat(name).st_mode & 0o777 == 0o640

    cycle(short_dir / "images", set_up, verify)


def test_datagrams_to_a_named_socket_wait_for_it(short_dir: Path) -> None:
    def set_up() -> list[int]:
        server, client = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        server.bind(str(short_dir / "socket"))
        client.connect(str(short_dir / "socket"))
        client.send(b"one")
        client.send(b"two")
        return [server.detach(), client.detach()]

    def verify(fds: list[int]) -> None:
        server, client = map(_at, fds)
        client.send(b"three")
        assert [server.recv(100) for _ in range(3)] == [b"one", b"two", b"three"]

    cycle(short_dir / "images", set_up, verify)


def test_a_socket_that_leads_outside_is_named_with_the_option(tmp_path: Path) -> None:
    outside, inside = socket.socketpair()
    moved = os.dup2(inside.fileno(), 700)
    with outside, inside:
        try:
            (finding,) = findings_of(lambda: os.dup2(moved, 5) and os.close(moved), tmp_path / "images")
        finally:
            os.close(moved)
    assert "socket:[" in finding.resource
    assert "outside the tree" in finding.reason
    assert finding.option == "--ext-unix-sk"


def test_connections_that_nobody_accepted_are_named(short_dir: Path) -> None:
    def set_up() -> list[int]:
        listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        listener.bind(str(short_dir / "socket"))
        listener.listen()
        client.connect(str(short_dir / "socket"))
        return [listener.detach(), client.detach()]

    found = findings_of(set_up, short_dir / "images")
    assert any("not accepted" in finding.reason for finding in found)
