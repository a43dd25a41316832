# SPDX-License-Identifier: Apache-2.0
"""The client against our server, and against one that lies."""

from __future__ import annotations

import errno
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import NotFoundError, UnsupportedError
from stasis.nbd import protocol as p
from stasis.nbd.client import Client, ProtocolError
from tests.nbd.exports import DIRTY, MemoryExport
from tests.nbd.wire import ThreadedServer

MIB = 1 << 20
HOLE = p.NBD_STATE_HOLE | p.NBD_STATE_ZERO


@pytest.fixture
def export() -> MemoryExport:
    return MemoryExport(8 * MIB)


@pytest.fixture
def server(export: MemoryExport, short_dir: Path) -> Iterator[ThreadedServer]:
    with ThreadedServer(short_dir / "s", [export, MemoryExport(4096, "other")]) as server:
        yield server


@pytest.fixture
def client(server: ThreadedServer) -> Iterator[Client]:
    with Client.connect(server.uri(), contexts=[p.BASE_ALLOCATION, DIRTY, "x:unknown"], timeout=30) as client:
        yield client


def test_what_the_server_said(client: Client, export: MemoryExport) -> None:
    assert client.size == export.size
    assert sorted(client.contexts) == [p.BASE_ALLOCATION, DIRTY]
    assert not client.read_only
    assert client.flags & p.NBD_FLAG_CAN_MULTI_CONN


def test_reads_and_writes_of_any_size(client: Client, export: MemoryExport, seed: int) -> None:
    draw = random.Random(seed)
    for size in (1, 511, 4096, MIB, MIB + 1, 5 * MIB + 77):
        offset, data = draw.randrange(export.size - size), draw.randbytes(size)
        client.pwrite(offset, data)
        assert export.data[offset : offset + size] == data
        assert client.pread(offset, size) == data


def test_many_requests_travel_together(client: Client, export: MemoryExport, seed: int) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(4 * MIB)
    client.write_many([(n * 8192, data[n * 4096 : (n + 1) * 4096]) for n in range(1000)])
    assert sum(count for name, count in export.calls if name == "write") == 1000
    assert len(export.calls) < 300, "writes did not travel in windows"
    target = memoryview(bytearray(4096 * 1000))
    client.read_many([(n * 8192, target[n * 4096 : (n + 1) * 4096]) for n in range(1000)])
    assert target == data[: 4096 * 1000]


def test_fua_flush_trim_zeroes_cache(client: Client, export: MemoryExport) -> None:
    client.pwrite(0, b"x" * 65536, fua=True)
    client.flush()
    client.trim(0, 4096)
    client.write_zeroes(4096, 4096)
    client.write_zeroes(8192, 4096, punch=False)
    client.cache(0, 65536)
    assert [n for n, _ in export.calls] == ["write", "flush", "flush", "trim", "punch", "zero", "cache"]
    with pytest.raises(OSError) as caught:
        client.write_zeroes(0, 4096, punch=False, fast=True)
    assert caught.value.errno == errno.ENOTSUP


def test_extents(client: Client) -> None:
    client.pwrite(MIB, b"x" * 4096)
    client.pwrite(3 * MIB, b"x" * 8192)
    assert list(client.extents(p.BASE_ALLOCATION)) == [
        (0, MIB, HOLE), (MIB, 4096, 0), (MIB + 4096, 2 * MIB - 4096, HOLE), (3 * MIB, 8192, 0),
        (3 * MIB + 8192, 5 * MIB - 8192, HOLE),
    ]  # fmt: skip
    assert client.block_status(DIRTY, MIB, 8192) == [(4096, 1), (4096, 0)]
    assert list(client.extents(DIRTY, MIB, 4096)) == [(MIB, 4096, 1)]


def test_a_context_that_was_not_negotiated(client: Client) -> None:
    with pytest.raises(OSError) as caught:
        client.block_status("qemu:allocation-depth", 0, 4096)
    assert caught.value.errno == errno.ENOTSUP


def test_an_error_of_one_request_leaves_the_connection_good(client: Client, export: MemoryExport) -> None:
    export.faults[4096 * 100] = errno.ENOSPC
    with pytest.raises(OSError) as caught:
        client.write_many([(n * 4096, b"y" * 4096) for n in range(200)])
    assert caught.value.errno == errno.ENOSPC
    assert export.data[199 * 4096 : 200 * 4096] == b"y" * 4096
    with pytest.raises(OSError) as caught:
        client.pread(0, 8 * MIB)
    assert caught.value.errno == errno.ENOSPC
    export.faults.clear()
    assert client.pread(0, 4096) == b"y" * 4096


def test_unknown_export_and_unreachable_server(server: ThreadedServer, short_dir: Path) -> None:
    with pytest.raises(NotFoundError):
        Client.connect(server.uri("nothing"))
    with pytest.raises(FileNotFoundError) as caught:
        Client.connect(f"nbd+unix:///x?socket={short_dir}/none")
    assert caught.value.filename == f"{short_dir}/none"


def test_tcp(export: MemoryExport, short_dir: Path) -> None:
    with (
        ThreadedServer(short_dir / "s", [export], tcp=True) as server,
        Client.connect(f"nbd://127.0.0.1:{server.port}/disk") as client,
    ):
        client.pwrite(0, b"over tcp")
        assert client.pread(0, 8) == b"over tcp"


GREETING = p.GREETING.pack(p.NBD_MAGIC, p.NBD_OPTION_MAGIC, 3)


def _option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return p.OPTION_REPLY.pack(p.NBD_REP_MAGIC, option, kind, len(data)) + data


def _negotiated(structured: bool) -> bytes:
    return (
        GREETING
        + _option_reply(8, p.NBD_REP_ACK if structured else p.NBD_REP_ERR_UNSUP)
        + _option_reply(7, p.NBD_REP_INFO, p.INFO_EXPORT.pack(0, MIB, 1))
        + _option_reply(7, p.NBD_REP_ACK)
    )


def _chunk(kind: int, payload: bytes, *, cookie: int = 1, done: bool = True) -> bytes:
    return p.CHUNK.pack(p.NBD_STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, len(payload)) + payload


@pytest.mark.parametrize(
    "script",
    [
        b"",
        b"NBDMAGIC",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        GREETING + b"\xff" * 20,
        GREETING + _option_reply(9, 1),
        GREETING + p.OPTION_REPLY.pack(p.NBD_REP_MAGIC, 8, 1, 1 << 30),
        _negotiated(False) + b"\xff" * 16,
        _negotiated(False) + p.SIMPLE_REPLY.pack(p.NBD_SIMPLE_REPLY_MAGIC, 0, 99),
        _negotiated(False) + p.SIMPLE_REPLY.pack(p.NBD_SIMPLE_REPLY_MAGIC, 0, 1) + b"short",
        _negotiated(False) + _chunk(1, bytes(8 + 512)),
        _negotiated(True) + _chunk(1, struct.pack(">Q", 1) + bytes(512)),
        _negotiated(True) + _chunk(1, struct.pack(">Q", 0) + bytes(100)),
        _negotiated(True) + _chunk(1, bytes(8)),
        _negotiated(True) + _chunk(2, struct.pack(">QI", 0, 1 << 31)),
        _negotiated(True) + _chunk(0, b""),
        _negotiated(True) + _chunk(77, b"what"),
        _negotiated(True) + p.CHUNK.pack(p.NBD_STRUCTURED_REPLY_MAGIC, 1, p.NBD_REPLY_TYPE_ERROR, 1, 1 << 31),
    ],
)
def test_a_server_that_lies_is_a_connection_error(script: bytes) -> None:
    ours, theirs = socket.socketpair()

    def lie() -> None:
        theirs.sendall(script)
        theirs.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=lie)
    thread.start()
    try:
        with pytest.raises(ConnectionError), Client(ours) as client:
            client.pread(0, 512)
    finally:
        thread.join()
        theirs.close()


@pytest.mark.parametrize("script", [p.GREETING.pack(p.NBD_MAGIC, p.NBD_OPTION_MAGIC, 0)])
def test_a_server_that_is_too_old(script: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(script)
    with pytest.raises(UnsupportedError):
        Client(ours)
    theirs.close()


def test_protocol_error_is_a_connection_error() -> None:
    assert issubclass(ProtocolError, ConnectionError)
