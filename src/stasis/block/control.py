# SPDX-License-Identifier: Apache-2.0
"""The worker's control socket: one JSON object per SOCK_SEQPACKET message, descriptors beside it.

A request is {"op": NAME, ...}, its reply {"ok": true, ...} or {"ok": false, "errno": n, "message": text}. A
connection that sent "subscribe" carries events from then on. docs/formats/worker-control.md lists the requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections.abc import Callable
from errno import EINVAL
from typing import Any

from stasis.linux.eventloop import EventLoop

MAXIMUM_MESSAGE = 64 << 10
MAXIMUM_DESCRIPTORS = 8

Message = dict[str, Any]


class Connection:
    """One peer of the control socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.subscribed = False

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next request with its descriptors, which belong to the caller; None at the end of the connection."""
        data, fds, _, _ = socket.recv_fds(self.sock, MAXIMUM_MESSAGE, MAXIMUM_DESCRIPTORS)
        if not data:
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        try:
            message = json.loads(data)
        except ValueError:
            message = None
        return message if isinstance(message, dict) else {"op": ""}, fds

    def reply(self, fds: tuple[int, ...] = (), **fields: object) -> None:
        """Answer that it worked."""
        self._send({"ok": True, **fields}, fds)

    def refuse(self, errno: int, message: str) -> None:
        """Answer that it did not."""
        self._send({"ok": False, "errno": errno, "message": message})

    def event(self, fields: Message) -> None:
        """Send an event."""
        self._send(fields)

    def _send(self, fields: Message, fds: tuple[int, ...] = ()) -> None:
        # A peer that is gone, or that does not read, must not stop the worker: it asks again when it is back.
        with contextlib.suppress(OSError):
            socket.send_fds(self.sock, [json.dumps(fields).encode()], list(fds), socket.MSG_DONTWAIT)


class ControlSocket:
    """Listens, and calls `handle(connection, request, descriptors)` for each request."""

    def __init__(self, loop: EventLoop, path: str, handle: Callable[[Connection, Message, list[int]], None]) -> None:
        self._loop, self._handle, self.path = loop, handle, path
        self.connections: dict[int, Connection] = {}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        mask = os.umask(0o177)
        try:
            self._listener.bind(path)
        finally:
            os.umask(mask)
        self._listener.listen(16)
        loop.register(self._listener.fileno(), select.EPOLLIN, self._accept)

    def broadcast(self, event: Message) -> None:
        """Send an event to every subscriber."""
        for connection in list(self.connections.values()):
            if connection.subscribed:
                connection.event(event)

    def close(self) -> None:
        """Close the listener and all connections, remove the socket."""
        self._loop.unregister(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        for connection in list(self.connections.values()):
            self.drop(connection)

    def _accept(self, _events: int) -> None:
        sock, _ = self._listener.accept()
        self.connections[sock.fileno()] = connection = Connection(sock)
        self._loop.register(sock.fileno(), select.EPOLLIN, lambda _: self._serve(connection))

    def _serve(self, connection: Connection) -> None:
        try:
            request = connection.receive()
        except OSError:
            request = None
        if request is None:
            self.drop(connection)
            return
        message, fds = request
        try:
            self._handle(connection, message, fds)
        except (KeyError, TypeError, ValueError) as error:
            connection.refuse(EINVAL, f"bad request: {error!r}")

    def drop(self, connection: Connection) -> None:
        """Forget a connection."""
        fd = connection.sock.fileno()
        if self.connections.pop(fd, None) is not None:
            self._loop.unregister(fd)
            connection.sock.close()
