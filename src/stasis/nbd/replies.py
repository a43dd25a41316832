# SPDX-License-Identifier: Apache-2.0
"""The buffer in which a turn's replies are laid out, so that they leave with one system call.

One buffer serves all connections: it is filled and emptied within one turn of one connection, and what a
socket does not take at once is copied away.
"""

from __future__ import annotations

from stasis.linux.iobuffer import IoBuffer

__all__ = ["LIMIT", "PIECE", "ReplyBuffer"]

LIMIT = 1 << 20
"""Bytes after which a turn ends. Measured with fio, 256 KiB reads at depth 16: 256 KiB here takes a tenth more CPU,
4 MiB gains nothing."""
PIECE = 512 << 10
"""Longest part in which a large read is made."""
_SLACK = 96 << 10  # room above the limit for the headers of a run, or for one block status chunk


class ReplyBuffer:
    """Replies of one turn: bytes 0 to `position` of the buffer, minus the gaps that alignment left."""

    def __init__(self) -> None:
        self.buffer = IoBuffer(LIMIT + PIECE + _SLACK)
        self.view = self.buffer.view
        self.limit = LIMIT
        """Where the present turn ends: LIMIT, or less for a socket that takes less at once."""
        self.position = 0
        self.run = 0
        """Start of the contiguous run that ends at `position`."""
        self.pieces: list[tuple[int, int]] = []
        """Runs before it, as (start, end)."""

    @property
    def full(self) -> bool:
        return self.position >= self.limit

    def place(self, header: int, alignment: int) -> int:
        """Where to put a header of so many bytes so that the data behind it is aligned; the gap is not
        sent."""
        start = -(-(self.position + header) // alignment) * alignment - header
        if start != self.position:
            if self.position != self.run:
                self.pieces.append((self.run, self.position))
            self.run = self.position = start
        return start

    def put(self, data: bytes) -> None:
        end = self.position + len(data)
        self.view[self.position : end] = data
        self.position = end

    def mark(self) -> tuple[int, int, int]:
        """A state to `rewind()` to."""
        return self.position, self.run, len(self.pieces)

    def rewind(self, mark: tuple[int, int, int]) -> None:
        self.position, self.run, count = mark
        del self.pieces[count:]

    def take(self) -> list[memoryview]:
        """The replies as views, and an empty buffer; the views are good until it is filled again."""
        view = self.view
        if self.position != self.run:
            self.pieces.append((self.run, self.position))
        taken = [view[start:end] for start, end in self.pieces]
        self.pieces.clear()
        self.position = self.run = 0
        return taken

    def close(self) -> None:
        self.buffer.close()
