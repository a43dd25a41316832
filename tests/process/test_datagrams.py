# SPDX-License-Identifier: Apache-2.0
"""UDP datagrams that nobody read are there after a restore, with their senders; or it is told that they are not."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stasis.errors import DamagedError
from stasis.process.files import datagrams
from stasis.process.images.imageset import ImageSet
from stasis.process.images.schema.inventory import InventoryEntry
from stasis.process.images.schema.sockets import DatagramEntry
from stasis.process.images.setwriter import ImageSetWriter
from tests.process.cycles import cycle
from tests.process.programs import running, stasis

pytestmark = pytest.mark.root

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
KNOWN = 700
SENT = [b"first", b"", b"", b"x" * 9000, b"odd length", b"last"]
WILDCARD = """
import os, socket, time
from pathlib import Path
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
server.bind(("::", 0))
port = server.getsockname()[1]
clients = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
clients[0].sendto(b"from four", ("127.0.0.1", port))
clients[1].sendto(b"from six", ("::1", port))
Path("ready").touch()
while not os.path.exists("go"):
    time.sleep(0.003)
server.setblocking(False)
for client, name in zip(clients, ("four", "six")):
    data, sender = server.recvfrom(100)
    assert (data, sender[1]) == (f"from {name}".encode(), client.getsockname()[1])
    assert sender[0] == {"four": "::ffff:127.0.0.1", "six": "::1"}[name], sender
    server.sendto(b"answer", sender)
    client.settimeout(30)
    assert client.recv(100) == b"answer"
try:
    print(server.recv(100))
except BlockingIOError:
    Path("content").touch()
"""


def test_a_server_of_both_protocols(tmp_path: Path) -> None:
    with running(tmp_path, sys.executable, "-c", WILDCARD) as program:
        told = stasis("dump", program.pid, "--images", tmp_path / "running", "--leave-running", "--json")
        assert not json.loads(told)["warnings"]
        program.again_and_again()
        program.finish()


@contextmanager
def _known_to_children(sock: socket.socket) -> Iterator[None]:
    os.dup2(sock.fileno(), KNOWN)
    try:
        yield
    finally:
        os.close(KNOWN)


@pytest.mark.parametrize("family", LOOPBACK)
def test_what_waits_in_a_connected_socket(tmp_path: Path, family: socket.AddressFamily) -> None:
    """Sent by somebody else, who is still there and has its port."""
    with socket.socket(family, socket.SOCK_DGRAM) as client, _known_to_children(client):
        client.bind((LOOPBACK[family], 0))
        name = client.getsockname()

        def set_up() -> int:
            client = socket.socket(fileno=KNOWN)
            server = socket.socket(family, socket.SOCK_DGRAM)
            server.bind((LOOPBACK[family], 0))
            server.connect(client.getsockname())
            for data in SENT:
                client.sendto(data, server.getsockname())
            client.close()
            return server.detach()

        def verify(fd: int) -> None:
            with socket.socket(fileno=fd) as server:
                server.setblocking(False)
                assert [server.recvfrom(1 << 16) for _ in SENT] == [(data, name) for data in SENT]
                assert not datagrams.is_waiting(server)

        cycle(tmp_path / "images", set_up, verify)


def test_another_socket_of_the_port_gets_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        name = other.getsockname()

        def set_up() -> int:
            server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(name)
            server.sendto(b"to the last that was bound", server.getsockname())
            assert datagrams.is_waiting(server)
            return server.detach()

        def verify(fd: int) -> None:
            with socket.socket(fileno=fd) as server:
                assert server.getsockname() == name
                assert not datagrams.is_waiting(server)
                assert "another socket" in datagrams._why_not_sent(server, [])

        cycle(tmp_path / "images", set_up, verify)
        assert not datagrams.is_waiting(other)


def test_why_some_are_not_kept() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP) as one, socket.socket() as gone:
        assert not datagrams.why_not_kept(one)
        gone.bind(("127.0.0.1", 0))  # of TCP: nobody has this port of UDP, which an error tells
        one.connect(gone.getsockname())
        one.send(b"into the void")
        assert "an error" in datagrams.why_not_kept(one)
        with pytest.raises(ConnectionRefusedError):
            one.recv(1)
        one.setsockopt(socket.IPPROTO_UDP, datagrams.UDP_GRO, 1)
        assert "UDP_GRO" in datagrams.why_not_kept(one)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        assert "no UDP" in datagrams.why_not_kept(raw)


@pytest.mark.parametrize(("address", "port"), [(b"123", 1), (bytes(4), 1 << 16), (bytes(17), 1)])
def test_senders_that_cannot_be(tmp_path: Path, address: bytes, port: int) -> None:
    with ImageSetWriter(tmp_path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=2))
        out.image("stasis-datagrams").append(DatagramEntry(id_for=1, length=2, address=address, port=port), b"hi")
        out.commit(durable=False)
    opened = type("Opened", (), {"images": ImageSet.open(tmp_path / "set")})()
    with pytest.raises(DamagedError, match="stasis-datagrams"):
        datagrams.put_back([1], opened)


def test_a_checksum() -> None:
    """The example of RFC 1071, section 3."""
    assert datagrams._checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2
    assert datagrams._checksum(b"\x01") == 0xFFFF - struct.unpack(">H", b"\x01\x00")[0]
