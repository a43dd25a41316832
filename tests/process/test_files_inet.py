# SPDX-License-Identifier: Apache-2.0
"""Internet sockets come back bound, listening and connected, with their options."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from pathlib import Path

import pytest

from stasis.errors import BusyError
from stasis.process.files.rawsock import peer_words
from tests.process.cycles import cycle, findings_of

pytestmark = pytest.mark.root

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def _at(fd: int) -> socket.socket:
    return socket.socket(fileno=fd)


@pytest.mark.parametrize("family", LOOPBACK)
def test_a_listener_listens_on(tmp_path: Path, family: socket.AddressFamily) -> None:
    def set_up() -> list[int]:
        listener, unbound = socket.socket(family), socket.socket(family)
        listener.bind((LOOPBACK[family], 0))
        listener.listen(17)
        listener.setblocking(False)
        unbound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        unbound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return [listener.getsockname()[1], listener.detach(), unbound.detach()]

    def verify(state: list[int]) -> None:
        port, listener, unbound = state
        with _at(listener) as server:
            assert server.getsockname()[:2] == (LOOPBACK[family], port)
            assert not os.get_blocking(listener)
            _connect(unbound, port)

    def _connect(unbound: int, port: int) -> None:
        client = _at(unbound)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        client.connect((LOOPBACK[family], port))

    cycle(tmp_path / "images", set_up, verify)


@pytest.mark.parametrize("family", LOOPBACK)
def test_datagrams_come_and_go(tmp_path: Path, family: socket.AddressFamily) -> None:
    def set_up() -> list[int]:
        server, client = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
        server.bind((LOOPBACK[family], 0))
        client.connect(server.getsockname())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        return [client.getsockname()[1], server.detach(), client.detach()]

    def verify(state: list[int]) -> None:
        port, server, client = state[0], _at(state[1]), _at(state[2])
        client.send(b"hello")
        server.settimeout(30)
        data, sender = server.recvfrom(100)
        assert (data, sender[1]) == (b"hello", port)
        assert client.getpeername() == server.getsockname()
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)

    cycle(tmp_path / "images", set_up, verify)


def test_a_filter_and_an_interface(tmp_path: Path) -> None:
    code = struct.pack("=HBBI", 0x06, 0, 0, 3)  # at most three bytes of each datagram

    def set_up() -> list[int]:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", 0))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        buffer = ctypes.create_string_buffer(code, len(code))
        server.setsockopt(socket.SOL_SOCKET, 26, struct.pack("=H6xQ", 1, ctypes.addressof(buffer)))
        return [server.detach()]

    def verify(state: list[int]) -> None:
        server = _at(state[0])
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"
        server.settimeout(30)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"abcdefghijklm", server.getsockname())
        assert server.recv(100) == b""  # of which the header takes all

    cycle(tmp_path / "images", set_up, verify)


def test_raw_sockets(tmp_path: Path) -> None:
    icmp_filter, ipv6_filter = struct.pack("=I", 0b101), struct.pack("=8I", *range(1, 9))

    def set_up() -> list[int]:
        ping = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        ping.setsockopt(255, 1, icmp_filter)
        ping.connect(("127.0.0.1", 0))
        own = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        assert own.getsockopt(socket.IPPROTO_IP, 3)
        six = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        six.bind(("::1", 0))
        six.setsockopt(socket.IPPROTO_ICMPV6, 1, ipv6_filter)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        tcp.setsockopt(socket.IPPROTO_IP, 3, 1)
        return [sock.detach() for sock in (ping, own, six, tcp)]

    def verify(fds: list[int]) -> None:
        ping, own, six, tcp = map(_at, fds)
        assert peer_words(socket.AF_INET, os.fstat(ping.fileno()).st_ino) == [0x0100007F]
        assert ping.getsockopt(255, 1, 4) == icmp_filter
        assert own.getsockopt(socket.IPPROTO_IP, 3)
        assert six.getsockname()[0] == "::1"
        assert six.getsockopt(socket.IPPROTO_ICMPV6, 1, 32) == ipv6_filter
        assert (tcp.type, tcp.proto) == (socket.SOCK_RAW, socket.IPPROTO_TCP)
        assert tcp.getsockopt(socket.IPPROTO_IP, 3)

    cycle(tmp_path / "images", set_up, verify)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        port = ours.getsockname()[1]
        ours.close()
        taker = socket.socket()

        def set_up() -> int:
            listener = socket.socket()
            listener.bind(("127.0.0.1", port))
            listener.listen()
            return listener.detach()

        def take() -> None:
            taker.bind(("127.0.0.1", port))
            taker.listen()

        with taker, pytest.raises(AssertionError, match=rf"{BusyError.__name__}: port {port} of 127.0.0.1"):
            cycle(tmp_path / "images", set_up, lambda _: None, between=take)


def test_a_connection_is_named(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        listener, client = socket.socket(), socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        return [sock.detach() for sock in (listener, client, server)]

    found = findings_of(set_up, tmp_path / "images")
    assert [finding.reason for finding in found] == ["it is a TCP connection"] * 2
