# SPDX-License-Identifier: Apache-2.0
"""Chunks of which little changed: only that is read, and stored as a delta over what the parent has there.

Which chunks these are is decided from the change map and the parent's index alone. A small delta is laid over whatever
the parent has, so that nothing but the change is read and written. That makes chains, which a restore has to walk; so a
delta that would make one too long, or that is not small, takes up what the deltas below it hold, and where that saves
little the chunk is read and stored whole.
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
    from stasis.backup.repo.index import Chain

__all__ = ["DeltaMaker", "Part", "split_changes"]

LARGEST_SHARE = 2  # a delta holds at most the 2nd part of its chunk
LAID_SHARE = 8  # and one that is laid over others the 8th
LONGEST_CHAIN = 4  # deltas over one another
ZERO = bytes(32)
PACK_HEAD = 4
Made = tuple[int, Delta, "Chain"]
"""A chunk's number and delta, and what that is laid over."""
Placed = tuple[int, bytes, "Chain"]
"""The same with the name of the delta."""


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk of which only these bytes of the device are read."""

    number: int
    extents: tuple[Extent, ...]

    @property
    def length(self) -> int:
        """Bytes to read."""
        return self.extents[0][1] if len(self.extents) == 1 else total(self.extents)


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
        if total(extents) <= _largest(parent, number) or parent.name(number) == ZERO:
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

    def make(self, part: Part, data: memoryview) -> Made | StoredChunk | None:
        """A delta of what was read of a part, or where the chunk went. None where it is to be read whole.

        Raises DamagedError when what the parent has is.
        """
        number, held = part.number, self._parent.name(part.number)
        start, largest = number * self._parent.chunk_size, _largest(self._parent, number)
        extents = [(offset - start, length) for offset, length in part.extents]
        if held == ZERO and (len(data) > largest or not data.tobytes().strip(b"\0")):
            return self._over_zeroes(extents, data, self._parent.chunk_length(number))
        below = (held, *self._parent.chain(number)) if is_delta(held) else (held,)
        if len(below) == 1 or (len(below) <= LONGEST_CHAIN and len(data) <= 2 * largest // LAID_SHARE):
            return number, make_delta(held, extents, data), below
        merged = self._merged(below[:-1]).overlaid(extents, data, self._room)
        return None if len(merged.data) > largest else (number, merged, below[-1:])

    def _merged(self, names: Sequence[bytes]) -> Delta:
        """One delta for those that are laid over one another, the newest first."""
        merged, *later = map(self._reader.delta, reversed(names))
        for delta in later:
            merged = merged.overlaid(delta.extents, delta.data, self._room)
        return merged

    def store(self, made: Sequence[Made]) -> Iterator[tuple[StoredChunk, list[Placed]]]:
        """Store deltas, as many in an object as are not more than a chunk; each object, and what it holds."""
        pack: list[Made] = []
        length = 0
        for one in made:
            if pack and length + packed_length(one[1]) > self._parent.chunk_size - PACK_HEAD:
                yield self._store_pack(pack)
                pack, length = [], 0
            pack.append(one)
            length += packed_length(one[1])
        if pack:
            yield self._store_pack(pack)

    def _store_pack(self, pack: Sequence[Made]) -> tuple[StoredChunk, list[Placed]]:
        stored, names = self._writer.store_deltas([delta for _, delta, _ in pack])
        return stored, [(number, name, below) for (number, _, below), name in zip(pack, names, strict=True)]

    def _over_zeroes(self, extents: Sequence[Extent], data: memoryview, length: int) -> StoredChunk:
        chunk = self._room[:length]
        chunk[:] = bytes(length)
        apply_extents(extents, data, chunk)
        return self._writer.store(chunk)
