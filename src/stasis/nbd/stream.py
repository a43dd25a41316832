# SPDX-License-Identifier: Apache-2.0
"""A buffered reader over a blocking socket, for the client: many small headers per receive, large data
without a copy."""

from __future__ import annotations

TYPE_CHECKING = False  # so that who reads in bulk need not load typing and socket
if TYPE_CHECKING:
    import _socket

__all__ = ["ReceiveStream"]

_CAPACITY = 256 << 10


class ReceiveStream:
    """Receives exactly what is asked for. Raises ConnectionError when the peer closes in between."""

    def __init__(self, sock: _socket.socket) -> None:
        self._socket = sock
        self._view = memoryview(bytearray(_CAPACITY))
        self._start = self._end = 0

    @property
    def buffered(self) -> int:
        """Bytes received and not yet taken."""
        return self._end - self._start

    def take(self, length: int) -> memoryview:
        """The next bytes, at most 256 KiB; the view is good until the next call."""
        if self._end - self._start < length:
            self._fill(length)
        start = self._start
        self._start += length
        return self._view[start : self._start]

    def read_into(self, target: memoryview) -> None:
        """The next len(target) bytes: what is buffered is copied, the rest comes straight from the socket."""
        done = min(self._end - self._start, len(target))
        target[:done] = self._view[self._start : self._start + done]
        self._start += done
        while len(target) - done >= _CAPACITY:
            done += self._receive(target[done:])
        if done < len(target):
            target[done:] = self.take(len(target) - done)

    def skip(self, length: int) -> None:
        """Throw bytes away."""
        while length:
            part = min(length, _CAPACITY)
            self.take(part)
            length -= part

    def _fill(self, length: int) -> None:
        if length > _CAPACITY:
            raise ValueError(f"{length} bytes do not fit the buffer")
        have = self._end - self._start
        self._view[:have] = self._view[self._start : self._end]
        self._start, self._end = 0, have
        while self._end < length:
            self._end += self._receive(self._view[self._end :])

    def _receive(self, target: memoryview) -> int:
        count = self._socket.recv_into(target)
        if not count:
            raise ConnectionResetError("the NBD server closed the connection")
        return count
