# SPDX-License-Identifier: Apache-2.0
"""Cutting the chunks of a backup into batches: what one thread reads and stores at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from stasis.backup.job.plan import ChunkRange

__all__ = ["Batch", "open_ended", "pack"]


@dataclass(slots=True)
class Batch:
    """Ranges of chunks to read. Everything below chunk `end` that the batches before left out needs no reading."""

    end: int
    reads: list[ChunkRange] = field(default_factory=list)

    @property
    def length(self) -> int:
        """How many chunks are read."""
        return sum(count for _, count in self.reads)


def pack(ranges: Iterable[ChunkRange], longest: int) -> Iterator[Batch]:
    """Batches of at most `longest` chunks, ascending: all of one lie below all of the next.

    Scattered chunks share a batch, whose reads travel together.
    """
    batch, room = Batch(0), longest
    for first, count in ranges:
        while count:
            taken = min(count, room)
            batch.reads.append((first, taken))
            first, count, room = first + taken, count - taken, room - taken
            batch.end = first
            if not room:
                yield batch
                batch, room = Batch(first), longest
    if batch.reads:
        yield batch


def open_ended(longest: int) -> Iterator[Batch]:
    """Batches one behind the other for a stream whose end nobody knows; whoever reads it stops asking."""
    first = 0
    while True:
        yield Batch(first + longest, [(first, longest)])
        first += longest
