# SPDX-License-Identifier: Apache-2.0
"""The NBD server: listeners, the limits that keep one client from hurting the others, and idle memory."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable

from stasis.linux.eventloop import EPOLLIN, EventLoop
from stasis.nbd.connection import Connection
from stasis.nbd.export import ExportSource
from stasis.nbd.listeners import set_socket_options
from stasis.nbd.replies import ReplyBuffer
from stasis.nbd.tls import TlsConfig

__all__ = ["Server"]

_IDLE_SECONDS = 5.0
_ACCEPT_RETRY_SECONDS = 1.0


class Server:
    """Serves `exports` on any number of listening sockets, on one event loop, in one thread.

    `max_connections` bounds the clients; one more is accepted and closed at once, so that it fails and does
    not hang. A client has `handshake_seconds` to negotiate. With `tls`, everything but the start of TLS is
    refused without it. `hand_over` may take an accepted client away, to be served elsewhere: it then returns True.
    """

    def __init__(
        self,
        loop: EventLoop,
        exports: ExportSource,
        tls: TlsConfig | None = None,
        *,
        max_connections: int = 64,
        handshake_seconds: float = 30.0,
        hand_over: Callable[[socket.socket], bool] | None = None,
    ) -> None:
        self._loop = loop
        self._hand_over = hand_over
        self._exports = exports
        self._tls = tls.server_context() if tls is not None else None
        self._max_connections = max_connections
        self._handshake_seconds = handshake_seconds
        self._listeners: list[socket.socket] = []
        self._paused: set[socket.socket] = set()
        self._clients: set[Connection] = set()
        self._replies = ReplyBuffer()
        self._idle_timer = loop.every(_IDLE_SECONDS, self._release_idle_memory)
        self._closed = False

    @property
    def connections(self) -> int:
        """Number of clients, those that negotiate included."""
        return len(self._clients)

    def add_listener(self, listener: socket.socket) -> None:
        """Accept clients from a listening socket, which the server then owns."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._listen(listener)

    def add_connection(self, sock: socket.socket) -> None:
        """Serve an already connected socket, which the server then owns."""
        if len(self._clients) >= self._max_connections:
            sock.close()
            return
        set_socket_options(sock)
        client = Connection(
            self._loop,
            sock,
            self._exports,
            self._replies,
            self._clients.discard,
            tls=self._tls,
            handshake_seconds=self._handshake_seconds,
        )
        self._clients.add(client)
        client.start()

    def close(self) -> None:
        """Close listeners and clients. Replies that were not sent are lost, as when the machine stops."""
        if self._closed:
            return
        self._closed = True
        self._idle_timer.cancel()
        for listener in self._listeners:
            if listener not in self._paused:
                self._loop.unregister(listener.fileno())
            listener.close()
        self._listeners.clear()
        for client in list(self._clients):
            client.close()
        self._replies.close()

    def _listen(self, listener: socket.socket) -> None:
        self._paused.discard(listener)
        if not self._closed:
            self._loop.register(listener.fileno(), EPOLLIN, functools.partial(self._accept, listener))

    def _accept(self, listener: socket.socket, events: int) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # Mostly the limit of open files; accept(2) also passes on errors of the network.
            # The waiting client keeps the listener ready: look away for a while, or the loop spins.
            self._loop.unregister(listener.fileno())
            self._paused.add(listener)
            self._loop.call_later(_ACCEPT_RETRY_SECONDS, functools.partial(self._listen, listener))
            return
        if self._hand_over is None or not self._hand_over(sock):
            self.add_connection(sock)

    def _release_idle_memory(self) -> None:
        for client in self._clients:
            if not client.active:
                client.release_memory()
            client.active = False
