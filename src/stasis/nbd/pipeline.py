# SPDX-License-Identifier: Apache-2.0
"""Requests in flight on one connection: sends windows of them, matches replies in whatever order they
come."""

from __future__ import annotations

import itertools
import os
import socket
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stasis.nbd import protocol as p
from stasis.nbd.negotiation import Negotiated, ProtocolError
from stasis.nbd.stream import ReceiveStream

__all__ = ["Call", "Pipeline"]

_MAXIMUM_MESSAGE = 64 << 10
_MAXIMUM_STATUS = 16 << 20


@dataclass(slots=True)
class Call:
    """One request, and where its answer goes."""

    kind: int
    offset: int
    length: int
    flags: int = 0
    payload: bytes | bytearray | memoryview = b""
    """What a write sends."""
    target: memoryview = field(default_factory=lambda: memoryview(b""))
    """What a read fills."""
    extents: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Block status: what the server said, by context."""
    received: int = 0
    error: int = 0


class Pipeline:
    """Runs calls on a connected, negotiated socket. After a ConnectionError it is of no more use."""

    def __init__(self, sock: socket.socket, stream: ReceiveStream, said: Negotiated) -> None:
        self._socket = sock
        self._stream = stream
        self._structured = said.structured
        self._contexts = said.contexts
        self._cookies = itertools.count(1)
        self._pending: dict[int, Call] = {}
        self._error = 0

    def run(self, windows: Iterable[Sequence[Call]]) -> None:
        """Send window after window; a window is sent before the replies of the one before it are awaited.

        Raises OSError with the errno of the first call that failed, once every call has been answered.
        """
        self._error = 0
        for window in windows:
            self._send(window)
            self._receive_until(len(window))
        self._receive_until(0)
        if self._error:
            raise OSError(self._error, f"NBD server: {os.strerror(self._error)}")

    def _send(self, window: Sequence[Call]) -> None:
        pieces: list[bytes | bytearray | memoryview] = []
        for call in window:
            cookie = next(self._cookies)
            self._pending[cookie] = call
            pieces.append(p.REQUEST.pack(p.NBD_REQUEST_MAGIC, call.flags, call.kind, cookie, call.offset, call.length))
            if call.payload:
                pieces.append(call.payload)
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.sendall(b"".join(pieces))
        else:
            self._send_pieces(pieces)

    def _send_pieces(self, pieces: list[bytes | bytearray | memoryview]) -> None:
        while pieces:
            sent = self._socket.sendmsg(pieces)
            taken = 0
            while taken < len(pieces) and sent >= len(pieces[taken]):
                sent -= len(pieces[taken])
                taken += 1
            del pieces[:taken]
            if sent:
                pieces[0] = memoryview(pieces[0])[sent:]

    def _receive_until(self, outstanding: int) -> None:
        while len(self._pending) > outstanding:
            magic, first, cookie = p.SIMPLE_REPLY.unpack(self._stream.take(p.SIMPLE_REPLY.size))
            call = self._pending.get(cookie)
            if call is None:
                raise ProtocolError("the NBD server answers what was not asked")
            if magic == p.NBD_SIMPLE_REPLY_MAGIC:
                done = self._simple_reply(call, first)
            elif magic == p.NBD_STRUCTURED_REPLY_MAGIC and self._structured:
                length = int.from_bytes(self._stream.take(4), "big")
                done = self._chunk(call, first >> 16, first & 0xFFFF, length)
            else:
                raise ProtocolError("bad reply magic from the NBD server")
            if done:
                del self._pending[cookie]
                self._finish(call)

    def _finish(self, call: Call) -> None:
        if not call.error and call.received != len(call.target):
            raise ProtocolError("the NBD server did not send all the data of a read")
        self._error = self._error or call.error

    def _simple_reply(self, call: Call, error: int) -> bool:
        call.error = error
        if not error and call.kind == p.NBD_CMD_READ:
            self._stream.read_into(call.target)
            call.received = len(call.target)
        return True

    def _chunk(self, call: Call, flags: int, kind: int, length: int) -> bool:
        if kind == p.NBD_REPLY_TYPE_OFFSET_DATA and length > 8:
            self._data(call, length - 8)
        elif kind == p.NBD_REPLY_TYPE_OFFSET_HOLE and length == 12:
            self._hole(call)
        elif kind == p.NBD_REPLY_TYPE_BLOCK_STATUS and 12 <= length <= _MAXIMUM_STATUS and length % 8 == 4:
            self._status(call, length - 4)
        elif kind & p.NBD_REPLY_TYPE_FLAG_ERROR and 6 <= length <= _MAXIMUM_MESSAGE:
            call.error = int.from_bytes(self._stream.take(4), "big") or call.error
            self._stream.skip(length - 4)
        elif kind != p.NBD_REPLY_TYPE_NONE or length:
            raise ProtocolError(f"bad reply chunk of type {kind} from the NBD server")
        return bool(flags & p.NBD_REPLY_FLAG_DONE)

    def _data(self, call: Call, length: int) -> None:
        offset = int.from_bytes(self._stream.take(8), "big")
        self._stream.read_into(_part(call, offset, length))

    def _hole(self, call: Call) -> None:
        offset = int.from_bytes(self._stream.take(8), "big")
        length = int.from_bytes(self._stream.take(4), "big")
        _part(call, offset, length)[:] = bytes(length)

    def _status(self, call: Call, length: int) -> None:
        context = self._contexts.get(int.from_bytes(self._stream.take(4), "big"), "")
        data = bytearray(length)
        self._stream.read_into(memoryview(data))
        call.extents[context] = list(p.EXTENT.iter_unpack(data))


def _part(call: Call, offset: int, length: int) -> memoryview:
    """The part of a read's target that a content chunk is for."""
    start = offset - call.offset
    if start < 0 or start + length > len(call.target):
        raise ProtocolError("the NBD server sent data outside the request")
    call.received += length
    return call.target[start : start + length]
