# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one connection, without its socket: requests in, replies out, one bounded turn at
a time.

A turn works in two gears. `_run` takes a run of plain reads and writes at full speed and gives them to the
export as two batches. Everything else, and every run that failed, goes one request at a time through
`_next_request`, which knows the whole protocol. Work of unknown length (trim, large reads) is a generator
that is stepped once per turn.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stasis.linux.iobuffer import PAGE_SIZE, IoBuffer
from stasis.nbd import answers, commands
from stasis.nbd import protocol as p
from stasis.nbd.answers import EXPORT_ERRORS, HOLE_MINIMUM, Dropped, Task
from stasis.nbd.commands import Command
from stasis.nbd.export import Request
from stasis.nbd.handshake import Session
from stasis.nbd.replies import LIMIT, PIECE, ReplyBuffer

__all__ = ["CAPACITY", "Next", "Transmission"]

CAPACITY = (1 << 20) + (256 << 10)
"""Longest write payload that is held whole; longer ones reach the export in pieces of this size. An unacknowledged
write may thus be partly applied when it fails, as on a disk. The quarter above 1 MiB lets a receive take the beginning
of the next write along: measured with fio, 1 MiB writes cost a tenth less CPU than with 1 MiB."""
_PAYLOAD = PAGE_SIZE
_BASE = PAGE_SIZE - p.REQUEST.size
"""Input begins here, so that the payload of the first write is page-aligned and direct I/O needs no copy."""
_RUN = 960
"""Requests in one run: fewer pieces than IOV_MAX, and some 2 ms of work."""
_REQUESTS_PER_TURN = 64


class Next(enum.Enum):
    """What a connection does after a turn, once the replies are sent."""

    READ = enum.auto()
    AGAIN = enum.auto()
    CLOSE = enum.auto()


@dataclass
class Incoming:
    """A write whose payload is longer than the input buffer."""

    command: Command
    offset: int
    remaining: int
    error: int


class Transmission:
    """Requests of one client on one export. `space()` and `received()` take input, `turn()` does the work.

    `limit` is how many bytes of replies end a turn.
    """

    def __init__(self, session: Session, replies: ReplyBuffer, leftover: bytes = b"", limit: int = LIMIT) -> None:
        self._session = session
        self._export = session.export
        self._replies = replies
        self._limit = limit
        self._input = IoBuffer(_PAYLOAD + CAPACITY)
        self._view = self._input.view
        self._position = self._end = _BASE
        self._careful = 0
        """Requests before this position go one at a time: their run failed, and each needs its own errno."""
        self._incoming: Incoming | None = None
        self._task: Task | None = None
        self._handlers: dict[int, Callable[[Command], Task | None]] = {
            p.NBD_CMD_READ: self._read,
            p.NBD_CMD_WRITE: self._write,
            p.NBD_CMD_FLUSH: self._flush,
            p.NBD_CMD_TRIM: self._trim,
            p.NBD_CMD_CACHE: self._cache,
            p.NBD_CMD_WRITE_ZEROES: self._write_zeroes,
            p.NBD_CMD_BLOCK_STATUS: self._block_status,
        }
        self._view[_BASE : _BASE + len(leftover)] = leftover
        self._end += len(leftover)

    def space(self) -> memoryview:
        """Where to receive to; never empty after a turn that returned READ."""
        view = self._view
        if self._incoming is not None:
            return view[self._end : _PAYLOAD + min(CAPACITY, self._incoming.remaining)]
        if self._position > _BASE:
            tail = self._end - self._position
            view[_BASE : _BASE + tail] = view[self._position : self._end]
            self._position, self._end, self._careful = _BASE, _BASE + tail, 0
        return view[self._end :]

    def received(self, count: int) -> None:
        self._end += count

    def release_memory(self) -> None:
        """Give the input buffer's pages back while it holds nothing."""
        if self._position == self._end and self._incoming is None:
            self._input.release_pages()

    def close(self) -> None:
        """Stop whatever is going on and free the buffer."""
        if self._task is not None:
            self._task.close()
            self._task = None
        self._input.close()

    def turn(self) -> Next:
        """One bounded piece of work. Replies are in the reply buffer afterwards and must be sent before the
        next."""
        self._replies.limit = self._limit
        try:
            for _ in range(_REQUESTS_PER_TURN):
                outcome = self._work()
                if outcome is not None:
                    return outcome
        except Dropped:
            return Next.CLOSE
        return Next.AGAIN

    def _work(self) -> Next | None:
        if self._task is not None:
            return self._step_task(self._task)
        if self._incoming is not None:
            return self._take_payload(self._incoming)
        if self._position >= self._careful and self._run():
            return Next.AGAIN
        return self._next_request()

    def _run(self) -> bool:
        """Handle plain reads and writes up to the first request that is anything else; True when there may be
        more.

        One function and local names on purpose: this loop is most of the server's own time. Measured with a null
        export, a 4 KiB read costs 0.36 us here and 2.2 us through `_next_request`; with a file and fio at depth 16,
        all system calls included, 3.8 us of CPU against 5.3 us (tests/nbd/file_export.py).
        """
        view, export, replies, structured = self._view, self._export, self._replies, self._session.structured
        unpack, out = p.REQUEST.unpack_from, replies.view
        pack_simple, pack_chunk = p.SIMPLE_REPLY.pack_into, p.DATA_CHUNK.pack_into
        start = position = self._position
        end = self._end - 28
        mark = replies.mark()
        o = replies.position
        size = export.size
        writable = 0 if export.read_only else size
        low_bits = export.minimum_block - 1
        align = export.alignment - 1
        longest = min(PIECE, export.maximum_block)
        if structured and export.reports_holes:
            longest = min(longest, HOLE_MINIMUM - 1)
        reads: list[Request] = []
        writes: list[Request] = []
        durable = 0
        limit = self._limit
        more = True
        for _ in range(_RUN):
            if position > end:
                more = False
                break
            magic, flags, kind, cookie, offset, length = unpack(view, position)
            if kind == 0:
                if (
                    flags
                    or magic != 0x25609513
                    or not 0 < length <= longest
                    or offset + length > size
                    or (offset | length) & low_bits
                ):
                    more = False
                    break
                if o >= limit:
                    break
                header = 28 if structured else 16
                if align:
                    replies.position = o
                    o = replies.place(header, align + 1)
                if structured:
                    pack_chunk(out, o, 0x668E33EF, 1, 1, cookie, length + 8, offset)
                else:
                    pack_simple(out, o, 0x67446698, 0, cookie)
                o += header
                reads.append((offset, length, o))
                o += length
                position += 28
            elif kind == 1:
                payload = position + 28
                if (
                    flags > 1
                    or magic != 0x25609513
                    or not length
                    or offset + length > writable
                    or (offset | length) & low_bits
                    or end + 28 - payload < length
                ):
                    more = False
                    break
                if o >= limit:
                    break
                durable |= flags
                writes.append((offset, length, payload))
                pack_simple(out, o, 0x67446698, 0, cookie)
                o += 16
                position = payload + length
            else:
                more = False
                break
        if position == start:
            return more
        replies.position = o
        try:
            if writes:
                export.write(self._input, writes)
                if durable:
                    export.flush()
            if reads:
                export.read(replies.buffer, reads)
        except EXPORT_ERRORS:
            replies.rewind(mark)
            self._careful = position
            return False
        self._position = position
        return more

    def _next_request(self) -> Next | None:
        """Handle one request of any kind, or say what is missing."""
        position, available = self._position, self._end - self._position
        if available < p.REQUEST.size:
            return Next.READ
        if self._replies.full:
            return Next.AGAIN
        magic, flags, kind, cookie, offset, length = p.REQUEST.unpack_from(self._view, position)
        if magic != p.NBD_REQUEST_MAGIC or kind == p.NBD_CMD_DISC:
            return Next.CLOSE
        if kind == p.NBD_CMD_WRITE and available - p.REQUEST.size < length <= CAPACITY:
            return Next.READ
        command = Command(flags, kind, cookie, offset, length, position + p.REQUEST.size)
        refusal = commands.refusal(self._session, command)
        if kind == p.NBD_CMD_WRITE:
            if length > CAPACITY:
                return self._begin_payload(command, refusal)
            self._position += length
        self._position += p.REQUEST.size
        self._handle(command, refusal)
        return None

    def _handle(self, command: Command, refusal: int) -> None:
        if refusal:
            self._fail(command, refusal)
            return
        try:
            self._task = self._handlers[command.kind](command)
        except EXPORT_ERRORS as error:
            self._fail(command, error.errno)

    def _step_task(self, task: Task) -> Next | None:
        try:
            next(task)
        except StopIteration:
            self._task = None
            return None
        return Next.AGAIN

    # Writes longer than the input buffer.

    def _begin_payload(self, command: Command, refusal: int) -> Next | None:
        """From here on everything that arrives is payload, until it is complete."""
        if command.length > 2 * self._export.maximum_block:
            return Next.CLOSE  # the client would send for long what nobody wants (proto.md allows to disconnect)
        present = self._end - command.position
        self._view[_PAYLOAD : _PAYLOAD + present] = self._view[command.position : self._end]
        self._position, self._end = _PAYLOAD, _PAYLOAD + present
        self._incoming = Incoming(command, command.offset, command.length, refusal)
        return None

    def _take_payload(self, incoming: Incoming) -> Next | None:
        present = self._end - self._position
        if present < min(CAPACITY, incoming.remaining):
            return Next.READ
        if not incoming.error:
            incoming.error = self._write_piece(incoming, present)
        incoming.offset += present
        incoming.remaining -= present
        self._end = self._position
        if not incoming.remaining:
            self._incoming = None
            self._position = self._end = _BASE
            self._finish_payload(incoming)
        return None

    def _write_piece(self, incoming: Incoming, length: int) -> int:
        try:
            self._export.write(self._input, [(incoming.offset, length, self._position)])
        except EXPORT_ERRORS as error:
            return p.error_number(error.errno)
        return 0

    def _finish_payload(self, incoming: Incoming) -> None:
        command = incoming.command
        if incoming.error:
            self._fail(command, incoming.error)
            return
        try:
            self._finish_write(command)
        except EXPORT_ERRORS as error:
            self._fail(command, error.errno)

    # One request at a time.

    def _write(self, command: Command) -> None:
        self._export.write(self._input, [(command.offset, command.length, command.position)])
        self._finish_write(command)

    def _finish_write(self, command: Command) -> None:
        if command.flags & p.NBD_CMD_FLAG_FUA:
            self._export.flush()
        self._acknowledge(command)

    def _flush(self, command: Command) -> None:
        self._export.flush()
        self._acknowledge(command)

    def _cache(self, command: Command) -> None:
        self._export.cache(command.offset, command.length)
        self._acknowledge(command)

    def _trim(self, command: Command) -> Task:
        return self._in_steps(command, self._export.trim(command.offset, command.length))

    def _write_zeroes(self, command: Command) -> Task:
        steps = self._export.write_zeroes(
            command.offset,
            command.length,
            punch=not command.flags & p.NBD_CMD_FLAG_NO_HOLE,
            fast=bool(command.flags & p.NBD_CMD_FLAG_FAST_ZERO),
        )
        return self._in_steps(command, steps)

    def _in_steps(self, command: Command, steps: Iterator[None]) -> Task:
        try:
            yield from steps
            self._finish_write(command)
        except EXPORT_ERRORS as error:
            self._fail(command, error.errno)

    def _read(self, command: Command) -> Task:
        if self._session.structured and not command.flags & p.NBD_CMD_FLAG_DF:
            return answers.read_in_chunks(self._export, self._replies, command)
        return answers.read_contiguous(self._session, self._replies, command)

    def _block_status(self, command: Command) -> Task:
        return answers.block_status(self._session, self._replies, command)

    def _acknowledge(self, command: Command) -> None:
        self._replies.put(p.SIMPLE_REPLY.pack(p.NBD_SIMPLE_REPLY_MAGIC, 0, command.cookie))

    def _fail(self, command: Command, number: int | None) -> None:
        self._replies.put(answers.error(self._session.structured, command, number))
