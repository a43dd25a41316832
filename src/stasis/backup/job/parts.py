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
from stasis.backup.repo.delta import Delta, apply_extents, is_delta, make_delta, packed_length
from stasis.backup.source import Extent
from stasis.block.copy.plan import merge, total

if TYPE_CHECKING:
    from stasis.backup.repo import ChunkReader, ChunkWriter, Index, Repository, StoredChunk

__all__ = ["DeltaMaker", "Part", "split_changes"]

LARGEST_SHARE = 2  # a delta holds at most the 2nd part of its chunk
ZERO = bytes(32)
PACK_HEAD = 4
Placed = tuple[int, bytes, bytes]
"""Number of a chunk, and the names of its delta and of that one's base."""


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

    def make(self, part: Part, data: memoryview) -> Delta | StoredChunk | None:
        """A delta of what was read of a part, or where the chunk went. None where it is to be read whole.

        Raises DamagedError when the parent's delta is.
        """
        held, chunk = self._parent.name(part.number), part.number * self._parent.chunk_size
        extents = [(offset - chunk, length) for offset, length in part.extents]
        if held == ZERO:
            return self._over_zeroes(extents, data, self._parent.chunk_length(part.number))
        if is_delta(held):
            delta = self._reader.delta(held).overlaid(extents, data, self._room)
        else:
            delta = make_delta(held, extents, data)
        if len(delta.data) > _largest(self._parent, part.number):
            return None
        return delta

    def store(self, made: Sequence[tuple[int, Delta]]) -> Iterator[tuple[StoredChunk, list[Placed]]]:
        """Store deltas, as many in an object as are not more than a chunk; each object, and what it holds."""
        pack: list[tuple[int, Delta]] = []
        length = 0
        for number, delta in made:
            if pack and length + packed_length(delta) > self._parent.chunk_size - PACK_HEAD:
                yield self._store_pack(pack)
                pack, length = [], 0
            pack.append((number, delta))
            length += packed_length(delta)
        if pack:
            yield self._store_pack(pack)

    def _store_pack(self, pack: Sequence[tuple[int, Delta]]) -> tuple[StoredChunk, list[Placed]]:
        stored, names = self._writer.store_deltas([delta for _, delta in pack])
        return stored, [(number, name, delta.base) for (number, delta), name in zip(pack, names, strict=True)]

    def _over_zeroes(self, extents: Sequence[Extent], data: memoryview, length: int) -> StoredChunk:
        chunk = self._room[:length]
        chunk[:] = bytes(length)
        apply_extents(extents, data, chunk)
        return self._writer.store(chunk)
