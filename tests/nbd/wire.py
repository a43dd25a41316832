# SPDX-License-Identifier: Apache-2.0
"""NBD messages as bytes, and ways to run a server for a test: in steps on a socket pair, or in a thread."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from stasis.linux.eventloop import EventLoop
from stasis.nbd import protocol as p
from stasis.nbd.export import Export, ExportList
from stasis.nbd.listeners import unix_listener
from stasis.nbd.server import Server
from stasis.nbd.tls import TlsConfig

__all__ = ["Chunk", "Pair", "Simple", "ThreadedServer", "parse_replies", "request"]

CLIENT_FLAGS = p.CLIENT_FLAGS.pack(p.NBD_FLAG_C_FIXED_NEWSTYLE | p.NBD_FLAG_C_NO_ZEROES)


def option(number: int, data: bytes = b"") -> bytes:
    return p.OPTION.pack(p.NBD_OPTION_MAGIC, number, len(data)) + data


def text(string: str) -> bytes:
    return struct.pack(">I", len(string.encode())) + string.encode()


def go(name: str, *infos: int, number: int = p.NBD_OPT_GO) -> bytes:
    return option(number, text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def contexts(name: str, *queries: str, number: int = p.NBD_OPT_SET_META_CONTEXT) -> bytes:
    return option(number, text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries)))


def request(kind: int, offset: int, length: int, *, flags: int = 0, cookie: int = 1, payload: bytes = b"") -> bytes:
    return p.REQUEST.pack(p.NBD_REQUEST_MAGIC, flags, kind, cookie, offset, length) + payload


def option_replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, reply type, data) of each; the bytes must be whole replies."""
    replies = []
    while data:
        magic, number, kind, length = p.OPTION_REPLY.unpack_from(data)
        assert magic == p.NBD_REP_MAGIC
        end = p.OPTION_REPLY.size + length
        assert len(data) >= end
        replies.append((number, kind, data[p.OPTION_REPLY.size : end]))
        data = data[end:]
    return replies


class Simple(NamedTuple):
    cookie: int
    error: int
    data: bytes = b""


class Chunk(NamedTuple):
    cookie: int
    flags: int
    kind: int
    payload: bytes


def parse_replies(data: bytes, read_lengths: dict[int, int] | None = None) -> list[Simple | Chunk]:
    """Replies of the transmission phase; `read_lengths` says by cookie how much data a simple read reply brings."""
    replies: list[Simple | Chunk] = []
    position = 0
    while position < len(data):
        magic = int.from_bytes(data[position : position + 4], "big")
        if magic == p.NBD_SIMPLE_REPLY_MAGIC:
            _, error, cookie = p.SIMPLE_REPLY.unpack_from(data, position)
            position += p.SIMPLE_REPLY.size
            length = 0 if error else (read_lengths or {}).get(cookie, 0)
            replies.append(Simple(cookie, error, data[position : position + length]))
        else:
            magic, flags, kind, cookie, length = p.CHUNK.unpack_from(data, position)
            assert magic == p.NBD_STRUCTURED_REPLY_MAGIC
            position += p.CHUNK.size
            replies.append(Chunk(cookie, flags, kind, data[position : position + length]))
        assert position + length <= len(data), "a reply was cut off"
        position += length
    return replies


class Pair:
    """A server and one client socket in one thread: `exchange` sends, turns the loop until quiet, and receives."""

    def __init__(self, *exports: Export, tls: TlsConfig | None = None, **limits: float) -> None:
        self.loop = EventLoop()
        self.server = Server(self.loop, ExportList(*exports), tls, **limits)  # type: ignore[arg-type]
        self.client = self.connect()

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.server.add_connection(theirs)
        return ours

    def negotiate(self, *options: bytes, name: str = "disk") -> bytes:
        """Negotiate up to the transmission phase; returns all the server's answers."""
        return self.exchange(CLIENT_FLAGS + b"".join(options) + go(name))

    def exchange(self, data: bytes = b"", client: socket.socket | None = None, turns: int = 100) -> bytes:
        """Send everything, however the server takes it, and return what it answers until it falls silent."""
        client = client or self.client
        received = bytearray()
        quiet = 0
        while quiet < turns:
            progress = False
            if data:
                sent = try_send(client, data)
                data, progress = data[sent:], sent > 0
            self.loop.run_once(0)
            answer = try_receive(client)
            received += answer
            quiet = 0 if answer or progress else quiet + 1
        return bytes(received)

    @property
    def dropped(self) -> bool:
        """Whether the server has closed the connection."""
        self.loop.run_once(0)
        try:
            return self.client.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self.loop.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def try_send(client: socket.socket, data: bytes) -> int:
    try:
        return client.send(data)
    except BlockingIOError:
        return 0
    except (BrokenPipeError, ConnectionResetError):
        return len(data)


def try_receive(client: socket.socket) -> bytes:
    try:
        return client.recv(1 << 20)
    except (BlockingIOError, ConnectionResetError):
        return b""


class ThreadedServer:
    """A server on its own thread, for clients that block."""

    def __init__(
        self, path: Path, exports: Sequence[Export], *, tls: TlsConfig | None = None, tcp: bool = False
    ) -> None:
        self.loop = EventLoop()
        self.path = path
        self.server = Server(self.loop, ExportList(*exports), tls)
        listener = socket.create_server(("127.0.0.1", 0)) if tcp else unix_listener(str(path))
        self.port = listener.getsockname()[1] if tcp else 0
        self.server.add_listener(listener)
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def uri(self, name: str = "disk") -> str:
        return f"nbd+unix:///{name}?socket={self.path}"

    def close(self) -> None:
        self.loop.stop()
        self._thread.join()
        self.server.close()
        self.loop.close()

    def __enter__(self) -> ThreadedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
