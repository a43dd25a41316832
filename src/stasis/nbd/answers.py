# SPDX-License-Identifier: Apache-2.0
"""Replies that are more than a header: large reads, holes, block status, errors.

The functions that may need more room than the reply buffer has are generators: they yield when it is full and
go on when it has been sent, so that memory stays bounded whatever was asked for.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from stasis.errors import StasisError
from stasis.nbd import protocol as p
from stasis.nbd.commands import Command
from stasis.nbd.export import Export
from stasis.nbd.handshake import Session
from stasis.nbd.replies import PIECE, ReplyBuffer

__all__ = [
    "EXPORT_ERRORS",
    "HOLE_MINIMUM",
    "Dropped",
    "Task",
    "block_status",
    "error",
    "read_contiguous",
    "read_in_chunks",
]

EXPORT_ERRORS = (OSError, StasisError)
"""What an export may raise; both carry an errno."""
HOLE_MINIMUM = 64 << 10
"""Shortest structured read that is worth asking for holes, in bytes."""
_MAXIMUM_EXTENTS = 8192
"""Extents in one block status chunk: 64 KiB. A client asks again from where they end."""
_STRUCTURED_ERRORS = frozenset({p.NBD_CMD_READ, p.NBD_CMD_BLOCK_STATUS})

Task = Generator[None, None, None]


class Dropped(Exception):
    """The reply cannot be completed in any way that the client would understand."""


def error(structured: bool, command: Command, number: int | None) -> bytes:
    """An error reply; a chunk where structured replies are expected, a simple reply elsewhere."""
    value = p.error_number(number)
    if structured and command.kind in _STRUCTURED_ERRORS:
        return p.ERROR_CHUNK.pack(
            p.NBD_STRUCTURED_REPLY_MAGIC,
            p.NBD_REPLY_FLAG_DONE,
            p.NBD_REPLY_TYPE_ERROR,
            command.cookie,
            6,
            value,
            0,
        )
    return p.SIMPLE_REPLY.pack(p.NBD_SIMPLE_REPLY_MAGIC, value, command.cookie)


def read_in_chunks(export: Export, replies: ReplyBuffer, command: Command) -> Task:
    """A structured read: one chunk per hole and per piece of data."""
    end = command.offset + command.length
    try:
        for offset, length, hole in _parts(export, command.offset, end):
            while replies.full:
                yield
            flags = p.NBD_REPLY_FLAG_DONE if offset + length == end else 0
            if hole:
                replies.put(
                    p.HOLE_CHUNK.pack(
                        p.NBD_STRUCTURED_REPLY_MAGIC,
                        flags,
                        p.NBD_REPLY_TYPE_OFFSET_HOLE,
                        command.cookie,
                        12,
                        offset,
                        length,
                    )
                )
            else:
                header = p.DATA_CHUNK.pack(
                    p.NBD_STRUCTURED_REPLY_MAGIC,
                    flags,
                    p.NBD_REPLY_TYPE_OFFSET_DATA,
                    command.cookie,
                    length + 8,
                    offset,
                )
                _put_data(export, replies, header, offset, length)
    except EXPORT_ERRORS as failure:
        replies.put(error(True, command, failure.errno))


def _parts(export: Export, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """The range as (offset, length, is a hole); data no longer than PIECE."""
    while offset < end:
        for length, flags in _allocation(export, offset, end - offset):
            hole = bool(flags & p.NBD_STATE_ZERO)
            extent_end = min(offset + length, end)
            while offset < extent_end:
                part = extent_end - offset if hole else min(PIECE, extent_end - offset)
                yield offset, part, hole
                offset += part


def _allocation(export: Export, offset: int, length: int) -> list[tuple[int, int]]:
    if export.reports_holes and length >= HOLE_MINIMUM:
        return export.block_status(p.BASE_ALLOCATION, offset, length) or [(length, 0)]
    return [(length, 0)]


def _put_data(export: Export, replies: ReplyBuffer, header: bytes, offset: int, length: int) -> None:
    """Header and data, or nothing when the export fails."""
    mark = replies.mark()
    replies.place(len(header), export.alignment)
    replies.put(header)
    position = replies.position
    try:
        export.read(replies.buffer, [(offset, length, position)])
    except EXPORT_ERRORS:
        replies.rewind(mark)
        raise
    replies.position = position + length


def read_contiguous(session: Session, replies: ReplyBuffer, command: Command) -> Task:
    """A simple reply, or one chunk for NBD_CMD_FLAG_DF: the header goes out before all the data is read."""
    header = _contiguous_header(session.structured, command)
    offset, end = command.offset, command.offset + command.length
    try:
        while offset < end:
            while replies.full:
                yield
            length = min(PIECE, end - offset)
            _put_data(session.export, replies, header, offset, length)
            header = b""
            offset += length
    except EXPORT_ERRORS as failure:
        yield from _break_off(session, replies, command, offset, failure.errno)
        return
    if session.structured:
        replies.put(
            p.CHUNK.pack(p.NBD_STRUCTURED_REPLY_MAGIC, p.NBD_REPLY_FLAG_DONE, p.NBD_REPLY_TYPE_NONE, command.cookie, 0)
        )


def _contiguous_header(structured: bool, command: Command) -> bytes:
    if structured:
        return p.DATA_CHUNK.pack(
            p.NBD_STRUCTURED_REPLY_MAGIC,
            0,
            p.NBD_REPLY_TYPE_OFFSET_DATA,
            command.cookie,
            command.length + 8,
            command.offset,
        )
    return p.SIMPLE_REPLY.pack(p.NBD_SIMPLE_REPLY_MAGIC, 0, command.cookie)


def _break_off(session: Session, replies: ReplyBuffer, command: Command, offset: int, number: int | None) -> Task:
    """End a contiguous read that failed at `offset`.

    A chunk that was begun is completed with zeroes and followed by an error chunk. A simple reply that was
    begun says "no error" already: the specification leaves only to disconnect.
    """
    if offset > command.offset and not session.structured:
        raise Dropped
    remaining = command.offset + command.length - offset if offset > command.offset else 0
    while remaining:
        while replies.full:
            yield
        padding = min(PIECE, remaining)
        replies.put(bytes(padding))
        remaining -= padding
    replies.put(error(session.structured, command, number))


def block_status(session: Session, replies: ReplyBuffer, command: Command) -> Task:
    """One chunk per negotiated context."""
    last = max(session.contexts)
    most = 1 if command.flags & p.NBD_CMD_FLAG_REQ_ONE else _MAXIMUM_EXTENTS
    try:
        for number, name in session.contexts.items():
            while replies.full:
                yield
            extents = session.export.block_status(name, command.offset, command.length)[:most]
            flags = p.NBD_REPLY_FLAG_DONE if number == last else 0
            replies.put(_status_chunk(command.cookie, flags, number, extents))
    except EXPORT_ERRORS as failure:
        replies.put(error(True, command, failure.errno))


def _status_chunk(cookie: int, flags: int, context: int, extents: list[tuple[int, int]]) -> bytes:
    header = p.CHUNK.pack(
        p.NBD_STRUCTURED_REPLY_MAGIC, flags, p.NBD_REPLY_TYPE_BLOCK_STATUS, cookie, 4 + 8 * len(extents)
    )
    return b"".join([header, context.to_bytes(4, "big"), *(p.EXTENT.pack(*extent) for extent in extents)])
