# SPDX-License-Identifier: Apache-2.0
"""What a restore has to do, as arithmetic on the chunks of an index; pure, so that properties can test it.

A batch is one piece of work of one thread: chunks to read and extents that are zeroes. Batches ascend, so a single
offset tells what is done. They are made while the index is walked, so that memory does not grow with the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from stasis.backup.repo.index import NAME_BYTES, NAMES_PER_SEGMENT, ZERO, Index
from stasis.block.copy.plan import Extent

__all__ = ["Batch", "Chunk", "Entry", "all_entries", "batches", "changed_entries", "read_index", "total_length"]

# One batch never has more than this, in bytes of chunks, in pieces, and in bytes of all, zeroes included: an
# interrupt waits for the batches under way.
BATCH_BYTES = 1 << 20
BATCH_PIECES = 64
BATCH_SPAN = 256 << 20

_ZEROES = re.compile(rb"\0+")


class Entry(NamedTuple):
    """Chunk `number` of a backup; `base` is its name in the backup that the target holds, if that is known.

    run: that many chunks from there on are ZERO. Mostly empty disks have millions in a row.
    """

    number: int
    name: bytes
    base: bytes | None = None
    run: int = 1


class Chunk(NamedTuple):
    """A stored chunk and its place, in bytes."""

    offset: int
    length: int
    name: bytes
    base: bytes | None = None


@dataclass(slots=True)
class Batch:
    """Work for one thread: settles `length` bytes, all below `end`."""

    chunks: list[Chunk] = field(default_factory=list)
    zeroes: list[Extent] = field(default_factory=list)
    chunk_bytes: int = 0
    length: int = 0
    end: int = 0

    def has_room(self, length: int) -> bool:
        """Whether a chunk of `length` bytes still belongs into this batch."""
        pieces = len(self.chunks) + len(self.zeroes)
        return not self.end or (pieces < BATCH_PIECES and self.length < BATCH_SPAN
                                and self.chunk_bytes + length <= BATCH_BYTES)

    def add(self, chunk: Chunk) -> None:
        """Append a chunk behind all others."""
        if chunk.name != ZERO:
            self.chunks.append(chunk)
            self.chunk_bytes += chunk.length
        elif self.zeroes and sum(self.zeroes[-1]) == chunk.offset:
            self.zeroes[-1] = (self.zeroes[-1][0], self.zeroes[-1][1] + chunk.length)
        else:
            self.zeroes.append((chunk.offset, chunk.length))
        self.length += chunk.length
        self.end = chunk.offset + chunk.length


def batches(entries: Iterable[Entry], size: int, chunk_size: int) -> Iterator[Batch]:
    """Pack ascending entries of a backup of `size` bytes."""
    batch = Batch()
    for chunk in _chunks(entries, size, chunk_size):
        if not batch.has_room(0 if chunk.name == ZERO else chunk.length):
            yield batch
            batch = Batch()
        batch.add(chunk)
    if batch.end:
        yield batch


def _chunks(entries: Iterable[Entry], size: int, chunk_size: int) -> Iterator[Chunk]:
    """Chunks with their places; zeroes in a row come as one, as long as a batch may be."""
    for number, name, base, run in entries:
        end = min((number + run) * chunk_size, size)
        for offset in range(number * chunk_size, end, max(chunk_size, BATCH_SPAN)):
            yield Chunk(offset, min(BATCH_SPAN, end - offset), name, base)


def all_entries(index: Index, first: int = 0) -> Iterator[Entry]:
    """All chunks of a backup from number `first` on."""
    for segment in range(first // NAMES_PER_SEGMENT, len(index.segment_names())):
        start = segment * NAMES_PER_SEGMENT
        yield from _entries_in(index.segment(segment), start, max(first - start, 0))


def _entries_in(names: bytes, start: int, place: int) -> Iterator[Entry]:
    """Entries of the names from `place` on; the first name is that of chunk `start`."""
    while place * NAME_BYTES < len(names):
        position = place * NAME_BYTES
        zeroes = _ZEROES.match(names, position)
        count = (zeroes.end() - position) // NAME_BYTES if zeroes else 0
        name = ZERO if count else names[position : position + NAME_BYTES]
        yield Entry(start + place, name, None, max(count, 1))
        place += max(count, 1)


def changed_entries(old: Index, new: Index, first: int = 0) -> Iterator[Entry]:
    """The chunks of `new`, from number `first` on, that `old` has not or has otherwise. Both have one chunk size.

    An entry has no base where the two chunks are not of one length.
    """
    alike = min(new.count, old.count) if new.size == old.size else min(new.size, old.size) // new.chunk_size
    for segment in _unequal_segments(old, new, alike):
        start = max(first, segment * NAMES_PER_SEGMENT)
        names = new.names(start, (segment + 1) * NAMES_PER_SEGMENT - start)
        for number, name in enumerate(names, start):
            base = old.name(number) if number < alike else None
            if name != base:
                yield Entry(number, name, base)


def _unequal_segments(old: Index, new: Index, alike: int) -> Iterator[int]:
    """Numbers of the segments that must be looked into: equal names stand for equal chunks, if these are as long."""
    old_names, new_names = old.segment_names(), new.segment_names()
    for number, name in enumerate(new_names):
        is_alike = min((number + 1) * NAMES_PER_SEGMENT, new.count) <= alike
        if not is_alike or name != old_names[number]:
            yield number


def total_length(entries: Iterable[Entry], size: int, chunk_size: int) -> int:
    """Bytes of the device that the entries stand for."""
    return sum(min(entry.run * chunk_size, size - entry.number * chunk_size) for entry in entries)


def read_index(index: Index) -> None:
    """Read all of an index, so that damage to it shows before anything is done. Raises DamagedError."""
    for number in range(len(index.segment_names())):
        index.segment(number)
