# SPDX-License-Identifier: Apache-2.0
"""The server's side of the NBD negotiation, without sockets.

Bytes in, bytes out: so that every message can be tested as golden bytes and mutated by a fuzzer, and so that
the server decides alone how long it waits and how much it buffers. Section names are those of the
specification (`doc/proto.md`).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stasis.nbd import protocol as p
from stasis.nbd.export import Export, ExportSource, transmission_flags

__all__ = ["Handshake", "HandshakeError", "Session", "State"]

MAXIMUM_OPTION = 64 << 10
"""Longest option data that is answered. The specification bounds names and queries at 4096 bytes each; a
client that asks for more contexts than fit here gets NBD_REP_ERR_TOO_BIG, and its data is read and thrown
away."""
MAXIMUM_SKIPPED = 1 << 20
"""An option longer than this is no option of any client: the connection is dropped."""


class HandshakeError(Exception):
    """The client broke the negotiation in a way that has no reply: the connection must be dropped."""


class OptionError(Exception):
    """An option that is answered by an error reply; negotiation goes on."""

    def __init__(self, reply_type: int, message: str) -> None:
        super().__init__(message)
        self.reply_type = reply_type


class State(enum.Enum):
    CLIENT_FLAGS = enum.auto()
    OPTIONS = enum.auto()
    STARTTLS = enum.auto()
    """ACK is sent; the socket must be wrapped in TLS, then `tls_started()` called."""
    ABORTED = enum.auto()
    DONE = enum.auto()


@dataclass
class Session:
    """What was negotiated."""

    export: Export
    structured: bool = False
    contexts: dict[int, str] = field(default_factory=dict)
    """Metadata context ID to name."""


class Reader:
    """Takes fields off the data of one option; data that is too short is the client's error."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def number(self, layout: struct.Struct) -> int:
        value: int = layout.unpack(self.take(layout.size))[0]
        return value

    def take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise OptionError(p.NBD_REP_ERR_INVALID, "option data is too short")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def text(self) -> str:
        """A string with its 32-bit length in front."""
        length = self.number(U32)
        if length > p.NBD_MAX_STRING:
            raise OptionError(p.NBD_REP_ERR_TOO_BIG, "string is longer than 4096 bytes")
        return decode(self.take(length))

    def finish(self) -> None:
        if self._position != len(self._data):
            raise OptionError(p.NBD_REP_ERR_INVALID, "option data is too long")


U16 = struct.Struct(">H")
U32 = struct.Struct(">I")


def decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OptionError(p.NBD_REP_ERR_INVALID, "string is not UTF-8") from None


class Handshake:
    """One negotiation, from the greeting to the transmission phase.

    Send `greeting`, then give `feed()` what the client sends and send what it returns, until `state` is DONE
    (`session` is set, `leftover` holds what came after), ABORTED (send, then close) or STARTTLS.
    """

    def __init__(self, exports: ExportSource, *, tls_available: bool = False) -> None:
        self._exports = exports
        self._tls_available = tls_available
        self._tls_on = False
        self._data = bytearray()
        self._skip = 0
        self._no_zeroes = False
        self._structured = False
        self._contexts: dict[int, str] = {}
        self._contexts_of: Export | None = None
        self.state = State.CLIENT_FLAGS
        self.session: Session | None = None
        self.greeting = p.GREETING.pack(
            p.NBD_MAGIC, p.NBD_OPTION_MAGIC, p.NBD_FLAG_FIXED_NEWSTYLE | p.NBD_FLAG_NO_ZEROES
        )
        self._options: dict[int, Callable[[int, bytes], bytes]] = {
            p.NBD_OPT_ABORT: self._abort,
            p.NBD_OPT_LIST: self._list,
            p.NBD_OPT_STARTTLS: self._starttls,
            p.NBD_OPT_INFO: self._info,
            p.NBD_OPT_GO: self._info,
            p.NBD_OPT_STRUCTURED_REPLY: self._structured_reply,
            p.NBD_OPT_LIST_META_CONTEXT: self._list_meta_context,
            p.NBD_OPT_SET_META_CONTEXT: self._set_meta_context,
        }

    @property
    def leftover(self) -> bytes:
        """What the client sent after the negotiation: the first requests."""
        return bytes(self._data)

    def feed(self, data: bytes) -> bytes:
        """Take what the client sent, return what to send. Raises HandshakeError when it must be dropped."""
        self._data += data
        replies = bytearray()
        while self._step(replies):
            pass
        if self.state is State.STARTTLS and self._data:
            # Plaintext behind STARTTLS may come from somebody in the middle, who wants it read as if it were
            # encrypted.
            raise HandshakeError("data behind NBD_OPT_STARTTLS")
        return bytes(replies)

    def tls_started(self) -> None:
        """Go on inside TLS: nothing that was negotiated in the clear counts (proto.md, NBD_OPT_STARTTLS)."""
        self._tls_on = True
        self._structured = False
        self._contexts = {}
        self._contexts_of = None
        self.state = State.OPTIONS

    def _step(self, replies: bytearray) -> bool:
        """Handle one message; False when more bytes are needed or no more are wanted."""
        if self._skip:
            skipped = min(self._skip, len(self._data))
            del self._data[:skipped]
            self._skip -= skipped
            if self._skip:
                return False
        if self.state is State.CLIENT_FLAGS:
            return self._client_flags()
        if self.state is State.OPTIONS:
            return self._next_option(replies)
        return False

    def _client_flags(self) -> bool:
        if len(self._data) < p.CLIENT_FLAGS.size:
            return False
        flags: int = p.CLIENT_FLAGS.unpack_from(self._data)[0]
        del self._data[: p.CLIENT_FLAGS.size]
        if flags & ~(p.NBD_FLAG_C_FIXED_NEWSTYLE | p.NBD_FLAG_C_NO_ZEROES):
            raise HandshakeError(f"unknown client flags {flags:#x}")
        if not flags & p.NBD_FLAG_C_FIXED_NEWSTYLE:
            raise HandshakeError("client does not speak fixed newstyle")
        self._no_zeroes = bool(flags & p.NBD_FLAG_C_NO_ZEROES)
        self.state = State.OPTIONS
        return True

    def _next_option(self, replies: bytearray) -> bool:
        if len(self._data) < p.OPTION.size:
            return False
        magic, option, length = p.OPTION.unpack_from(self._data)
        if magic != p.NBD_OPTION_MAGIC:
            raise HandshakeError("bad option magic")
        if length > MAXIMUM_OPTION:
            replies += self._refuse_long(option, length)
            return True
        end = p.OPTION.size + length
        if len(self._data) < end:
            return False
        data = bytes(self._data[p.OPTION.size : end])
        del self._data[:end]
        replies += self._answer(option, data)
        return True

    def _refuse_long(self, option: int, length: int) -> bytes:
        if length > MAXIMUM_SKIPPED or option == p.NBD_OPT_EXPORT_NAME:
            raise HandshakeError(f"option {option} with {length} bytes of data")
        del self._data[: p.OPTION.size]
        self._skip = length
        return error_reply(option, p.NBD_REP_ERR_TOO_BIG, "option data is too long")

    def _answer(self, option: int, data: bytes) -> bytes:
        if option == p.NBD_OPT_EXPORT_NAME:
            return self._export_name(data)
        always = (p.NBD_OPT_ABORT, p.NBD_OPT_STARTTLS)
        if self._tls_available and not self._tls_on and option not in always:
            return error_reply(option, p.NBD_REP_ERR_TLS_REQD, "this server requires TLS")
        handler = self._options.get(option)
        if handler is None:
            # NBD_OPT_EXTENDED_HEADERS comes here too: the specification lets a server without them say so.
            return error_reply(option, p.NBD_REP_ERR_UNSUP, "unknown option")
        try:
            return handler(option, data)
        except OptionError as error:
            return error_reply(option, error.reply_type, str(error))

    def _export_name(self, data: bytes) -> bytes:
        """NBD_OPT_EXPORT_NAME has no error reply: whatever is wrong ends the connection."""
        if self._tls_available and not self._tls_on:
            raise HandshakeError("NBD_OPT_EXPORT_NAME without TLS")
        try:
            export = self._find(decode(data))
        except OptionError as error:
            raise HandshakeError(str(error)) from None
        self._finish(export)
        reply = p.EXPORT_NAME_REPLY.pack(export.size, transmission_flags(export, self._structured))
        return reply if self._no_zeroes else reply + bytes(124)

    def _abort(self, option: int, data: bytes) -> bytes:
        self.state = State.ABORTED
        return reply(option, p.NBD_REP_ACK)

    def _list(self, option: int, data: bytes) -> bytes:
        Reader(data).finish()
        names = [name.encode() for name in self._exports.list()]
        servers = (reply(option, p.NBD_REP_SERVER, U32.pack(len(name)) + name) for name in names)
        return b"".join(servers) + reply(option, p.NBD_REP_ACK)

    def _starttls(self, option: int, data: bytes) -> bytes:
        Reader(data).finish()
        if self._tls_on:
            raise OptionError(p.NBD_REP_ERR_INVALID, "TLS is already on")
        if not self._tls_available:
            raise OptionError(p.NBD_REP_ERR_POLICY, "this server is not configured for TLS")
        self.state = State.STARTTLS
        return reply(option, p.NBD_REP_ACK)

    def _structured_reply(self, option: int, data: bytes) -> bytes:
        Reader(data).finish()
        self._structured = True
        return reply(option, p.NBD_REP_ACK)

    def _info(self, option: int, data: bytes) -> bytes:
        reader = Reader(data)
        name = reader.text()
        wanted = {reader.number(U16) for _ in range(reader.number(U16))}
        reader.finish()
        export = self._find(name)
        if option == p.NBD_OPT_GO:
            self._finish(export)
        items = self._information(export, wanted)
        return b"".join(reply(option, p.NBD_REP_INFO, item) for item in items) + reply(option, p.NBD_REP_ACK)

    def _information(self, export: Export, wanted: set[int]) -> list[bytes]:
        """Block sizes are told unasked: a server that enforces them should (proto.md, "Block size
        constraints")."""
        items = [
            p.INFO_EXPORT.pack(p.NBD_INFO_EXPORT, export.size, transmission_flags(export, self._structured)),
            p.INFO_BLOCK_SIZE.pack(
                p.NBD_INFO_BLOCK_SIZE, export.minimum_block, export.preferred_block, export.maximum_block
            ),
        ]
        if p.NBD_INFO_NAME in wanted:
            items.append(U16.pack(p.NBD_INFO_NAME) + export.name.encode())
        if p.NBD_INFO_DESCRIPTION in wanted and export.description:
            items.append(U16.pack(p.NBD_INFO_DESCRIPTION) + export.description.encode()[: p.NBD_MAX_STRING])
        return items

    def _list_meta_context(self, option: int, data: bytes) -> bytes:
        export, queries = self._context_queries(data)
        offered = export.contexts()
        names = [name for name in offered if not queries or any(listed_by(query, name) for query in queries)]
        return context_replies(option, dict(enumerate(names)), ids=False)

    def _set_meta_context(self, option: int, data: bytes) -> bytes:
        # A SET that fails leaves nothing selected (proto.md: the previous selection is dropped in any case).
        self._contexts, self._contexts_of = {}, None
        export, queries = self._context_queries(data)
        names = [name for name in export.contexts() if name in queries]
        self._contexts, self._contexts_of = dict(enumerate(names)), export
        return context_replies(option, self._contexts, ids=True)

    def _context_queries(self, data: bytes) -> tuple[Export, Sequence[str]]:
        if not self._structured:
            raise OptionError(p.NBD_REP_ERR_INVALID, "structured replies must be negotiated first")
        reader = Reader(data)
        name = reader.text()
        queries = [reader.text() for _ in range(reader.number(U32))]
        reader.finish()
        return self._find(name), queries

    def _find(self, name: str) -> Export:
        export = self._exports.find(name)
        if export is None:
            raise OptionError(p.NBD_REP_ERR_UNKNOWN, f"no export named {name!r}"[: p.NBD_MAX_STRING // 4])
        return export

    def _finish(self, export: Export) -> None:
        """Enter transmission. Contexts that were set for another export do not count (proto.md,
        NBD_OPT_GO)."""
        contexts = self._contexts if self._contexts_of is export else {}
        self.session = Session(export, self._structured, contexts)
        self.state = State.DONE


def listed_by(query: str, name: str) -> bool:
    """Whether a LIST query names a context: exactly, or its namespace ("base:", "qemu:",
    "qemu:dirty-bitmap:")."""
    return query == name or (query.endswith(":") and name.startswith(query))


def reply(option: int, reply_type: int, data: bytes = b"") -> bytes:
    return p.OPTION_REPLY.pack(p.NBD_REP_MAGIC, option, reply_type, len(data)) + data


def error_reply(option: int, reply_type: int, message: str) -> bytes:
    return reply(option, reply_type, message.encode())


def context_replies(option: int, contexts: dict[int, str], *, ids: bool) -> bytes:
    """One reply per context, then the ACK. LIST carries no IDs: the field is reserved there."""
    parts = [
        reply(option, p.NBD_REP_META_CONTEXT, U32.pack(number if ids else 0) + name.encode())
        for number, name in contexts.items()
    ]
    return b"".join(parts) + reply(option, p.NBD_REP_ACK)
