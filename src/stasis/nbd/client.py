# SPDX-License-Identifier: Apache-2.0
"""A pipelined NBD client, for copying snapshot images and for forwarding an image's writes.

Blocking and for one thread. Many requests travel at once: a window of requests is sent with one system call,
and the next one follows before the replies of the first are read.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeAlias

from stasis.nbd import protocol as p
from stasis.nbd.listeners import set_socket_options
from stasis.nbd.negotiation import ProtocolError, negotiate
from stasis.nbd.pipeline import Call, Pipeline
from stasis.nbd.tls import TlsConfig
from stasis.nbd.uri import NbdUri

__all__ = ["Client", "ProtocolError"]

_WINDOW = 64
"""Requests in one window. The replies to two windows of writes, and two windows of read requests, fit any
socket buffer, so client and server never wait for each other to receive."""
_PIECE = 1 << 20
"""Longest single request that longer reads and writes are cut into, in bytes."""

Buffer: TypeAlias = bytes | bytearray | memoryview
Reading: TypeAlias = tuple[int, memoryview]
Extents: TypeAlias = list[tuple[int, int]]


class Client:
    """One connection to one export. Errors of requests are OSError with the errno the server sent."""

    def __init__(
        self,
        sock: socket.socket,
        export: str = "",
        *,
        contexts: Sequence[str] = (),
        tls: TlsConfig | None = None,
        host: str = "",
    ) -> None:
        """Negotiate on a connected socket, which the client then owns; see `negotiation.negotiate` for
        errors."""
        try:
            context = tls.client_context() if tls is not None else None
            self._socket, stream, said = negotiate(sock, export, contexts, context, host)
        except BaseException:
            sock.close()
            raise
        self.size = said.size
        self.flags = said.flags
        self.minimum_block = said.minimum_block
        self.maximum_block = said.maximum_block
        self.contexts = {name: number for number, name in said.contexts.items()}
        """Negotiated metadata contexts, name to ID."""
        self._pipeline = Pipeline(self._socket, stream, said)
        self._piece = min(_PIECE, said.maximum_block)

    @classmethod
    def connect(
        cls,
        uri: str | NbdUri,
        *,
        contexts: Sequence[str] = (),
        tls: TlsConfig | None = None,
        timeout: float | None = None,
    ) -> Client:
        """Connect to an address. `timeout` in seconds bounds every wait for the server afterwards, too."""
        address = NbdUri.parse(uri) if isinstance(uri, str) else uri
        if address.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout)
            try:
                sock.connect(address.socket)
            except OSError as error:
                sock.close()
                raise OSError(error.errno, os.strerror(error.errno or 0), address.socket) from error
        else:
            sock = socket.create_connection((address.host, address.port), timeout)
        set_socket_options(sock)
        return cls(sock, address.export, contexts=contexts, tls=tls, host=address.host)

    @property
    def read_only(self) -> bool:
        return bool(self.flags & p.NBD_FLAG_READ_ONLY)

    def pread(self, offset: int, length: int) -> bytes:
        """Read `length` bytes."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` from `offset` on, in pipelined pieces."""
        starts = range(0, len(target), self._piece)
        self.read_many([(offset + start, target[start : start + self._piece]) for start in starts])

    def read_many(self, requests: Sequence[Reading]) -> None:
        """Fill many (offset, view) at once; views no longer than `maximum_block`. Raises the first error
        after all replies are in."""
        calls = (Call(p.NBD_CMD_READ, offset, len(view), target=view) for offset, view in requests)
        self._pipeline.run(_windows(calls))

    def pwrite(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write all of `data`; with `fua` it is durable on return."""
        view = memoryview(data).cast("B")
        starts = range(0, len(view), self._piece)
        self.write_many([(offset + start, view[start : start + self._piece]) for start in starts], fua=fua)

    def write_many(self, requests: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        """Write many (offset, data) at once, in no particular order. Raises the first error after all
        replies."""
        flags = p.NBD_CMD_FLAG_FUA if fua else 0
        calls = (Call(p.NBD_CMD_WRITE, offset, len(data), flags, payload=data) for offset, data in requests)
        self._pipeline.run(_windows(calls))

    def flush(self) -> None:
        """Everything written before is durable on return."""
        self._command(p.NBD_CMD_FLUSH, 0, 0, 0)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._command(p.NBD_CMD_TRIM, p.NBD_CMD_FLAG_FUA if fua else 0, offset, length)

    def write_zeroes(
        self, offset: int, length: int, *, punch: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        """Make a range read as zeroes. `punch` allows a hole; `fast` fails with ENOTSUP instead of being
        slow."""
        flags = (
            (0 if punch else p.NBD_CMD_FLAG_NO_HOLE)
            | (p.NBD_CMD_FLAG_FAST_ZERO if fast else 0)
            | (p.NBD_CMD_FLAG_FUA if fua else 0)
        )
        self._command(p.NBD_CMD_WRITE_ZEROES, flags, offset, length)

    def cache(self, offset: int, length: int) -> None:
        self._command(p.NBD_CMD_CACHE, 0, offset, length)

    def block_status(self, context: str, offset: int, length: int) -> Extents:
        """(length, flags) of extents from `offset` on; the server may stop before the end. `length` < 4
        GiB."""
        if context not in self.contexts:
            raise OSError(errno.ENOTSUP, f"the server has no metadata context {context}")
        call = Call(p.NBD_CMD_BLOCK_STATUS, offset, length)
        self._pipeline.run([[call]])
        extents = call.extents.get(context)
        if not extents or not all(extent for extent, _ in extents):
            raise ProtocolError(f"the NBD server did not say anything about {context}")
        return extents

    def extents(self, context: str, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int, int]]:
        """(offset, length, flags) over the whole range, neighbours with equal flags merged."""
        end = self.size if length is None else offset + length
        start, pending = offset, -1
        while offset < end:
            for extent, flags in self.block_status(context, offset, min(end - offset, 1 << 30)):
                if flags != pending and offset > start:
                    yield start, offset - start, pending
                    start = offset
                pending = flags
                offset += extent
        if offset > start:
            yield start, offset - start, pending

    def _command(self, kind: int, flags: int, offset: int, length: int) -> None:
        self._pipeline.run([[Call(kind, offset, length, flags)]])

    def abort(self) -> None:
        """Break the connection, from any thread: a call that waits in another one ends with
        ConnectionError."""
        if self._socket.fileno() >= 0:
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Say goodbye and close. Writes that were not flushed are the server's to keep."""
        if self._socket.fileno() < 0:
            return
        try:
            self._socket.sendall(p.REQUEST.pack(p.NBD_REQUEST_MAGIC, 0, p.NBD_CMD_DISC, 0, 0, 0))
        except OSError:
            pass  # the server is gone: there is nobody to say goodbye to
        finally:
            self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _windows(calls: Iterable[Call]) -> Iterator[list[Call]]:
    iterator = iter(calls)
    while window := list(itertools.islice(iterator, _WINDOW)):
        yield window
