# SPDX-License-Identifier: Apache-2.0
"""One client's socket: negotiation, TLS, turns of the transmission phase, back-pressure, and its end.

The connection moves bytes between the socket and the two sans-I/O halves (`Handshake`, `Transmission`). What
a slow client does not take is kept, at most one turn's replies, and nothing more is read from it until it has
taken them.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable

from stasis.linux.eventloop import EPOLLIN, EPOLLOUT, EventLoop
from stasis.nbd.export import ExportSource
from stasis.nbd.handshake import Handshake, HandshakeError, State
from stasis.nbd.listeners import turn_limit
from stasis.nbd.replies import ReplyBuffer
from stasis.nbd.transmission import Next, Transmission

__all__ = ["Connection"]

_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_HANDSHAKE_RECEIVE = 4096
"""Bytes per receive while negotiating: bounds what a flood of options can make the server answer at once."""
_MAXIMUM_PIECES = 1024  # IOV_MAX
_NOTHING = memoryview(b"")


class Connection:
    """A client from accept to close. `on_close(self)` is called once, whatever ended it."""

    def __init__(
        self,
        loop: EventLoop,
        sock: socket.socket,
        exports: ExportSource,
        replies: ReplyBuffer,
        on_close: Callable[[Connection], None],
        *,
        tls: ssl.SSLContext | None = None,
        handshake_seconds: float = 30.0,
    ) -> None:
        self._loop = loop
        self._socket = sock
        self._fd = sock.fileno()
        self._replies = replies
        self._on_close = on_close
        self._tls = tls
        self._handshake = Handshake(exports, tls_available=tls is not None)
        self._transmission: Transmission | None = None
        self._unsent = _NOTHING
        self._next = Next.READ
        self._scheduled = False
        self._closed = False
        self._receive_handler: Callable[[], None] = self._negotiate
        self.active = True
        """Set by every receive; the server clears it to find connections that idle."""
        sock.setblocking(False)
        self._events = EPOLLIN
        loop.register(self._fd, EPOLLIN, self._on_ready)
        self._deadline = loop.call_later(handshake_seconds, self.close)

    def start(self) -> None:
        """Greet the client. It may be gone already: then this closes."""
        self._send([memoryview(self._handshake.greeting)])

    def release_memory(self) -> None:
        """Give back the memory of a client that idles."""
        if self._transmission is not None and not self._scheduled and not self._unsent:
            self._transmission.release_memory()

    def close(self) -> None:
        """End the connection at once. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._deadline.cancel()
        if self._fd >= 0:
            self._loop.unregister(self._fd)
        if self._transmission is not None:
            self._transmission.close()
        self._socket.close()
        self._on_close(self)

    def _on_ready(self, events: int) -> None:
        if self._unsent:
            self._send([])
            if not self._unsent and not self._closed:
                self._continue()
        elif not self._scheduled:
            self.active = True
            self._receive_handler()

    # Negotiation.

    def _negotiate(self) -> None:
        data = self._receive(_HANDSHAKE_RECEIVE)
        if data is None:
            return
        try:
            reply = self._handshake.feed(data)
        except HandshakeError:
            self.close()
            return
        if reply:
            self._send([memoryview(reply)])
        if not self._closed and not self._unsent:
            self._continue()

    def _receive(self, length: int) -> bytes | None:
        """What has arrived; None when there is nothing to do, because nothing has or the client is gone."""
        try:
            data = self._socket.recv(length)
        except _WOULD_BLOCK:
            return None
        except OSError:
            data = b""
        if not data:
            self.close()
            return None
        return data

    def _after_negotiation(self) -> None:
        state = self._handshake.state
        if state is State.ABORTED:
            self.close()
        elif state is State.STARTTLS:
            self._receive_handler = self._tls_handshake
            self._wrap()
        elif state is State.DONE:
            self._begin_transmission()
        elif isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            self._schedule()

    def _wrap(self) -> None:
        assert self._tls is not None  # Handshake offers STARTTLS only with it
        self._loop.unregister(self._fd)
        try:
            self._socket = self._tls.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
        except OSError:
            self._fd = -1  # the client left meanwhile, and the wrapper has closed the descriptor
            self.close()
            return
        self._loop.register(self._fd, self._events, self._on_ready)

    def _tls_handshake(self) -> None:
        assert isinstance(self._socket, ssl.SSLSocket)
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            self._watch(EPOLLIN)
        except ssl.SSLWantWriteError:
            self._watch(EPOLLOUT)
        except OSError:
            self.close()
        else:
            self._watch(EPOLLIN)
            self._handshake.tls_started()
            self._receive_handler = self._negotiate
            self._negotiate()

    def _begin_transmission(self) -> None:
        session = self._handshake.session
        assert session is not None  # state DONE
        self._deadline.cancel()
        self._transmission = Transmission(session, self._replies, self._handshake.leftover, turn_limit(self._socket))
        self._receive_handler = self._receive_requests
        self._turn(self._transmission)

    # Transmission.

    def _receive_requests(self) -> None:
        transmission = self._transmission
        assert transmission is not None
        try:
            count = self._socket.recv_into(transmission.space())
        except _WOULD_BLOCK:
            return
        except OSError:
            count = 0
        if not count:
            self.close()
            return
        transmission.received(count)
        self._turn(transmission)

    def _turn(self, transmission: Transmission) -> None:
        self._next = transmission.turn()
        if self._replies.position:
            self._send(self._replies.take())
        if not self._unsent and not self._closed:
            self._continue()

    def _continue(self) -> None:
        """What comes after everything is sent."""
        if self._transmission is None:
            self._after_negotiation()
        elif self._next is Next.CLOSE:
            self.close()
        elif self._next is Next.AGAIN:
            self._schedule()
        elif isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            self._schedule()  # decrypted data waits inside the library, where epoll does not see it

    def _schedule(self) -> None:
        self._scheduled = True
        self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        if self._transmission is not None and self._next is Next.AGAIN:
            self._turn(self._transmission)
        else:
            self._receive_handler()

    def _watch(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._loop.modify(self._fd, events)

    def _send(self, pieces: list[memoryview]) -> None:
        """Send what was kept, else `pieces`; keep what the socket does not take. The two never meet: while something
        is kept, no turn is made."""
        total = len(self._unsent) or sum(map(len, pieces))
        try:
            sent = self._transmit(pieces)
        except _WOULD_BLOCK:
            sent = 0
        except OSError:
            self._unsent = _NOTHING
            self.close()
            return
        if sent < total:
            self._unsent = (self._unsent or memoryview(b"".join(pieces)))[sent:]
            self._watch(EPOLLOUT)
        elif self._events != EPOLLIN:
            self._unsent = _NOTHING
            self._watch(EPOLLIN)

    def _transmit(self, pieces: list[memoryview]) -> int:
        if self._unsent:
            return self._socket.send(self._unsent)
        if len(pieces) == 1:
            return self._socket.send(pieces[0])
        if isinstance(self._socket, ssl.SSLSocket) or len(pieces) > _MAXIMUM_PIECES:
            return self._socket.send(b"".join(pieces))
        return self._socket.sendmsg(pieces)
