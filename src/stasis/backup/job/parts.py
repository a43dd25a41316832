# SPDX-License-Identifier: Apache-2.0
"""Chunks of which little changed: only that is read, and stored as a delta over what the parent has there.

Which chunks these are is decided from the change map and the parent's index alone. A chunk whose parent holds a delta
itself gets a new delta over the same base with both their data, so no chunk is ever made of more than two objects; once
so much of it has changed that this saves little, it is read and stored whole. Where the parent has zeroes the rest of
the chunk is known, and it is stored whole without being read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stasis.backup.job.plan import ChunkRange
from stasis.backup.repo.delta import apply_extents, is_delta, make_delta
from stasis.backup.source import Extent
from stasis.block.copy.plan import merge, total

if TYPE_CHECKING:
    from stasis.backup.repo import ChunkReader, ChunkWriter, Index, Repository, StoredChunk

__all__ = ["DeltaMaker", "Part", "split_changes"]

LARGEST_SHARE = 2  # a delta holds at most the 2nd part of its chunk
ZERO = bytes(32)


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk of which only these bytes of the device are read."""

    number: int
    extents: tuple[Extent, ...]

    @property
    def length(self) -> int:
        """Bytes to read."""
        return total(self.extents)


def split_changes(changed: Iterable[Extent], parent: Index) -> tuple[list[ChunkRange], list[Part]]:
    """The chunks to read whole, and those to read in part. changed: merged."""
    size = parent.chunk_size
    whole: list[ChunkRange] = []
    partly: dict[int, list[Extent]] = {}
    for offset, length in changed:
        first, last = -(-offset // size), (offset + length) // size
        if first < last:
            whole.append((first, last - first))
        for number, piece in _ends(offset, offset + length, size):
            partly.setdefault(number, []).append(piece)
    parts = []
    for number, extents in partly.items():
        if parent.name(number) == ZERO or total(extents) <= _largest(parent, number):
            parts.append(Part(number, tuple(extents)))
        else:
            whole.append((number, 1))
    return merge(whole), parts


def _ends(offset: int, end: int, size: int) -> Iterator[tuple[int, Extent]]:
    """The chunks that an extent covers in part, with what it covers."""
    first, last = offset // size, end // size
    if first == last:
        yield first, (offset, end - offset)
        return
    if offset % size:
        yield first, (offset, (first + 1) * size - offset)
    if end % size:
        yield last, (last * size, end % size)


def _largest(parent: Index, number: int) -> int:
    """Bytes that a delta over a chunk may hold."""
    return parent.chunk_length(number) // LARGEST_SHARE


class DeltaMaker:
    """Stores parts as deltas. A thread has one of its own."""

    def __init__(self, repository: Repository, parent: Index, writer: ChunkWriter) -> None:
        self._parent, self._writer = parent, writer
        self._reader: ChunkReader = repository.chunk_reader()
        self._room = memoryview(bytearray(repository.chunk_size))

    def store(self, part: Part, data: memoryview) -> tuple[StoredChunk, bytes | None] | None:
        """Store what was read of a part; where it went, and its base. None where the chunk is to be read whole.

        Raises DamagedError when the parent's delta is.
        """
        held, chunk = self._parent.name(part.number), part.number * self._parent.chunk_size
        extents = [(offset - chunk, length) for offset, length in part.extents]
        if held == ZERO:
            return self._over_zeroes(extents, data, self._parent.chunk_length(part.number)), None
        if is_delta(held):
            delta = self._reader.delta(held).overlaid(extents, data, self._room)
        else:
            delta = make_delta(held, extents, data)
        if len(delta.data) > _largest(self._parent, part.number):
            return None
        return self._writer.store_delta(delta), delta.base

    def _over_zeroes(self, extents: Sequence[Extent], data: memoryview, length: int) -> StoredChunk:
        chunk = self._room[:length]
        chunk[:] = bytes(length)
        apply_extents(extents, data, chunk)
        return self._writer.store(chunk)
