# SPDX-License-Identifier: Apache-2.0
"""Cutting the chunks of a backup into batches: what one thread reads and stores at a time."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from stasis.backup.job.parts import Part
from stasis.backup.job.plan import ChunkRange

__all__ = ["Batch", "open_ended", "pack"]


@dataclass(slots=True)
class Batch:
    """Chunks to read, whole or in part. What lies below chunk `end` and in no batch before needs no reading."""

    end: int
    reads: list[ChunkRange] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def length(self) -> int:
        """How many chunks are read."""
        return sum(count for _, count in self.reads) + len(self.parts)


def pack(ranges: Iterable[ChunkRange], parts: Iterable[Part], longest: int, chunk_size: int) -> Iterator[Batch]:
    """Batches of at most `longest` chunks to read whole, or as many bytes of parts, ascending: all of one lie below all
    of the next.

    Scattered chunks share a batch, whose reads travel together.
    """
    full = longest * chunk_size
    batch, room = Batch(0), full
    for first, count, part in _in_order(ranges, parts):
        while count:
            unit = chunk_size if part is None else part.length
            if room < unit:
                yield batch
                batch, room = Batch(batch.end), full
            taken = min(count, room // unit)
            if part is None:
                batch.reads.append((first, taken))
            else:
                batch.parts.append(part)
            first, count, room = first + taken, count - taken, room - taken * unit
            batch.end = first
    if batch.length:
        yield batch


def _in_order(ranges: Iterable[ChunkRange], parts: Iterable[Part]) -> Iterator[tuple[int, int, Part | None]]:
    """(first, count, part) of both, ascending."""
    return heapq.merge(((first, count, None) for first, count in ranges), ((part.number, 1, part) for part in parts),
                       key=operator.itemgetter(0))


def open_ended(longest: int) -> Iterator[Batch]:
    """Batches one behind the other for a stream whose end nobody knows; whoever reads it stops asking."""
    first = 0
    while True:
        yield Batch(first + longest, [(first, longest)])
        first += longest
