# SPDX-License-Identifier: Apache-2.0
"""Reading many places of an export at a unix socket, by a command that does little else.

`nbd.client` can do all this and TLS, writing and block status besides, and takes 30 ms to load, most of it for modules
of the standard library that this does without (`socket` too, for what it loads). `update-img` with 1 % of 1 GiB
changed is done in twice that.
"""

from __future__ import annotations

import _socket

from stasis.nbd import protocol as p
from stasis.nbd.stream import ReceiveStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

__all__ = ["BulkReader"]

Extent = tuple[int, int]
"""Offset and length in bytes."""

LONGEST = 64 << 10
"""Bytes of one request."""
WINDOW = 64
"""Requests sent at a time; while their replies are taken, the server works on the window behind."""


class BulkReader:
    """A connection to one export; `size` in bytes, and the `description` that the server gives of it."""

    def __init__(self, path: str, export: str, *, timeout: float) -> None:
        """Raises OSError; it is a ConnectionError (or TimeoutError, in seconds) if the server is none of ours."""
        self.size, self.description = 0, ""
        self._cookie = 0
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            self._stream = ReceiveStream(self._socket)
            self._negotiate(export)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the connection; a server takes that as a goodbye (proto.md, "Terminating the transmission phase")."""
        self._socket.close()

    def __enter__(self) -> BulkReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _negotiate(self, export: str) -> None:
        magic, option_magic, _ = p.GREETING.unpack(self._stream.take(p.GREETING.size))
        if magic != p.NBD_MAGIC or option_magic != p.NBD_OPTION_MAGIC:
            raise ConnectionError("it is no NBD server")
        name = export.encode()
        wanted = (p.NBD_INFO_EXPORT, p.NBD_INFO_DESCRIPTION)
        data = b"".join((len(name).to_bytes(4, "big"), name, len(wanted).to_bytes(2, "big"),
                         *(item.to_bytes(2, "big") for item in wanted)))
        self._socket.sendall(p.CLIENT_FLAGS.pack(p.NBD_FLAG_C_FIXED_NEWSTYLE)
                             + p.OPTION.pack(p.NBD_OPTION_MAGIC, p.NBD_OPT_GO, len(data)) + data)
        while True:
            magic, _, kind, length = p.OPTION_REPLY.unpack(self._stream.take(p.OPTION_REPLY.size))
            if magic != p.NBD_REP_MAGIC or kind & p.NBD_REP_FLAG_ERROR:
                raise ConnectionError(f"the NBD server has no export {export}")
            self._take_info(bytes(self._stream.take(length)))
            if kind == p.NBD_REP_ACK:
                return

    def _take_info(self, info: bytes) -> None:
        kind = int.from_bytes(info[:2], "big") if info else -1
        if kind == p.NBD_INFO_EXPORT and len(info) == p.INFO_EXPORT.size:
            self.size = p.INFO_EXPORT.unpack(info)[1]
        elif kind == p.NBD_INFO_DESCRIPTION:
            self.description = info[2:].decode(errors="replace")

    def read_each(self, extents: Iterable[Extent]) -> Iterator[tuple[int, int, memoryview | None]]:
        """Offset, length and contents of each extent, cut into pieces, in any order; None for one that cannot be read.

        The contents are good until the next piece is asked for. Raises ConnectionError or TimeoutError, after which
        the reader is of no more use.
        """
        pending: dict[int, Extent] = {}
        for window in _windows(extents):
            self._ask(window, pending)
            while len(pending) > len(window):
                yield self._answer(pending)
        while pending:
            yield self._answer(pending)

    def _ask(self, window: list[Extent], pending: dict[int, Extent]) -> None:
        pack, requests = p.REQUEST.pack, []
        for cookie, extent in enumerate(window, self._cookie):
            pending[cookie] = extent
            requests.append(pack(p.NBD_REQUEST_MAGIC, 0, p.NBD_CMD_READ, cookie, *extent))
        self._cookie += len(window)
        self._socket.sendall(b"".join(requests))

    def _answer(self, pending: dict[int, Extent]) -> tuple[int, int, memoryview | None]:
        magic, error, cookie = p.SIMPLE_REPLY.unpack(self._stream.take(p.SIMPLE_REPLY.size))
        extent = pending.pop(cookie, None)
        if magic != p.NBD_SIMPLE_REPLY_MAGIC or extent is None:
            raise ConnectionError("the NBD server answers what was not asked")
        return *extent, None if error else self._stream.take(extent[1])


def _windows(extents: Iterable[Extent]) -> Iterator[list[Extent]]:
    window: list[Extent] = []
    for offset, length in extents:
        for start in range(0, length, LONGEST):
            window.append((offset + start, min(LONGEST, length - start)))
            if len(window) == WINDOW:
                yield window
                window = []
    if window:
        yield window
