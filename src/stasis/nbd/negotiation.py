# SPDX-License-Identifier: Apache-2.0
"""The client's side of the NBD negotiation, over a blocking socket."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from stasis.errors import NotFoundError, StasisError, UnsupportedError
from stasis.nbd import protocol as p
from stasis.nbd.export import MAXIMUM_BLOCK
from stasis.nbd.stream import ReceiveStream

__all__ = ["Negotiated", "ProtocolError", "negotiate"]

_MAXIMUM_REPLY = 64 << 10
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class ProtocolError(ConnectionError):
    """The server sent what the specification does not allow."""


@dataclass
class Negotiated:
    """What the server said about the export."""

    size: int = 0
    flags: int = 0
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_block: int = MAXIMUM_BLOCK
    structured: bool = False
    contexts: dict[int, str] = field(default_factory=dict)


class _Negotiation:
    def __init__(self, sock: socket.socket, stream: ReceiveStream) -> None:
        self._socket = sock
        self._stream = stream

    def greet(self) -> None:
        magic, option_magic, flags = p.GREETING.unpack(self._stream.take(p.GREETING.size))
        if magic != p.NBD_MAGIC or option_magic != p.NBD_OPTION_MAGIC:
            raise ProtocolError("not an NBD server, or one of the old style")
        if not flags & p.NBD_FLAG_FIXED_NEWSTYLE:
            raise UnsupportedError("the NBD server does not speak the fixed newstyle protocol")
        no_zeroes = flags & p.NBD_FLAG_NO_ZEROES
        self._socket.sendall(p.CLIENT_FLAGS.pack(p.NBD_FLAG_C_FIXED_NEWSTYLE | no_zeroes))

    def ask(self, option: int, data: bytes = b"") -> Iterator[tuple[int, bytes]]:
        """Send an option and give its replies, (type, data), the final one included."""
        self._socket.sendall(p.OPTION.pack(p.NBD_OPTION_MAGIC, option, len(data)) + data)
        while True:
            magic, echoed, kind, length = p.OPTION_REPLY.unpack(self._stream.take(p.OPTION_REPLY.size))
            if magic != p.NBD_REP_MAGIC or echoed != option or length > _MAXIMUM_REPLY:
                raise ProtocolError("bad option reply from the NBD server")
            yield kind, bytes(self._stream.take(length))
            if kind == p.NBD_REP_ACK or kind & p.NBD_REP_FLAG_ERROR:
                return

    def accepted(self, option: int, data: bytes = b"") -> bool:
        return [kind for kind, _ in self.ask(option, data)][-1] == p.NBD_REP_ACK

    def set_contexts(self, export: str, wanted: Sequence[str]) -> dict[int, str]:
        queries = b"".join(_string(name) for name in wanted)
        data = _string(export) + _U32.pack(len(wanted)) + queries
        contexts = {}
        for kind, answer in self.ask(p.NBD_OPT_SET_META_CONTEXT, data):
            if kind == p.NBD_REP_META_CONTEXT and len(answer) >= _U32.size:
                contexts[_U32.unpack_from(answer)[0]] = answer[_U32.size :].decode()
        return contexts

    def go(self, export: str, result: Negotiated) -> None:
        items = (p.NBD_INFO_EXPORT, p.NBD_INFO_BLOCK_SIZE)
        data = _string(export) + _U16.pack(len(items)) + b"".join(map(_U16.pack, items))
        for kind, answer in self.ask(p.NBD_OPT_GO, data):
            if kind & p.NBD_REP_FLAG_ERROR:
                raise _refused(export, kind, answer)
            if kind == p.NBD_REP_INFO:
                _take_info(answer, result)


def negotiate(
    sock: socket.socket,
    export: str,
    contexts: Sequence[str],
    tls: ssl.SSLContext | None,
    host: str,
    structured: bool = True,
) -> tuple[socket.socket, ReceiveStream, Negotiated]:
    """Negotiate up to the transmission phase; returns the socket to go on with, which TLS may have wrapped.

    With `structured` false the server answers with simple replies only, as the kernel's client needs.

    Raises NotFoundError for an unknown export, UnsupportedError for a server that is too old or does not want
    TLS as we do, ProtocolError and other OSErrors.
    """
    stream = ReceiveStream(sock)
    negotiation = _Negotiation(sock, stream)
    negotiation.greet()
    if tls is None:
        return sock, stream, _choose(negotiation, export, contexts, structured)
    if not negotiation.accepted(p.NBD_OPT_STARTTLS) or stream.buffered:
        raise UnsupportedError("the NBD server does not offer TLS")
    wrapped = _wrap(sock, tls, host)
    try:
        stream = ReceiveStream(wrapped)
        return wrapped, stream, _choose(_Negotiation(wrapped, stream), export, contexts, structured)
    except BaseException:
        wrapped.close()
        raise


def _wrap(sock: socket.socket, tls: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    """A unix socket has no host name to compare with: there the certificate's issuer alone must be right."""
    if not host:
        tls.check_hostname = False
    return tls.wrap_socket(sock, server_hostname=host or None)


def _choose(negotiation: _Negotiation, export: str, contexts: Sequence[str], structured: bool) -> Negotiated:
    result = Negotiated(structured=structured and negotiation.accepted(p.NBD_OPT_STRUCTURED_REPLY))
    if contexts and result.structured:
        result.contexts = negotiation.set_contexts(export, contexts)
    negotiation.go(export, result)
    return result


def _take_info(data: bytes, result: Negotiated) -> None:
    kind = _U16.unpack_from(data)[0] if len(data) >= _U16.size else -1
    if kind == p.NBD_INFO_EXPORT and len(data) == p.INFO_EXPORT.size:
        _, result.size, result.flags = p.INFO_EXPORT.unpack(data)
    elif kind == p.NBD_INFO_BLOCK_SIZE and len(data) == p.INFO_BLOCK_SIZE.size:
        _, result.minimum_block, result.preferred_block, result.maximum_block = p.INFO_BLOCK_SIZE.unpack(data)


def _refused(export: str, kind: int, answer: bytes) -> StasisError:
    told = answer.decode(errors="replace")
    if kind == p.NBD_REP_ERR_UNKNOWN:
        return NotFoundError(f"the NBD server has no export {export!r}")
    if kind == p.NBD_REP_ERR_TLS_REQD:
        return UnsupportedError("the NBD server requires TLS", hint="give certificates or a PSK file")
    return UnsupportedError(f"the NBD server refuses export {export!r}: {told or hex(kind)}")


def _string(text: str) -> bytes:
    data = text.encode()
    return _U32.pack(len(data)) + data
