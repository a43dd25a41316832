# SPDX-License-Identifier: Apache-2.0
"""Deltas: a chunk stored as what differs from another one, which is stored whole.

An incremental backup of scattered small writes then reads, seals and stores what was written, and not the whole chunk
around each write. A delta's name is a digest of its own content (the name of its base, places, data), marked by a bit,
so a name alone tells how its chunk is stored. A base is never a delta itself: two objects make any chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from stasis.block.copy.plan import merge, total

__all__ = ["DELTA_BIT", "Delta", "apply_extents", "decode", "encode", "is_delta", "make_delta", "with_bit",
           "without_bit"]

Extent = tuple[int, int]
"""Offset in the chunk and length, in bytes."""

NAME_BYTES = 32
DELTA_BIT = 0x80  # in the last byte of a name
HEAD = struct.Struct("<32sI")  # name of the base, number of extents
EXTENT = struct.Struct("<II")  # offset in the chunk, length


def is_delta(name: bytes) -> bool:
    """Whether a name is that of a delta."""
    return name[-1] >= DELTA_BIT


def with_bit(digest: bytes) -> bytes:
    """The name of a delta with this digest."""
    return digest[:-1] + bytes([digest[-1] | DELTA_BIT])


def without_bit(digest: bytes) -> bytes:
    """The name of a chunk that is stored whole, with this digest."""
    return digest if digest[-1] < DELTA_BIT else digest[:-1] + bytes([digest[-1] & ~DELTA_BIT])


@dataclass(frozen=True, slots=True)
class Delta:
    """What to put where over the base. `data`: that of all extents, one behind the other."""

    base: bytes
    extents: tuple[Extent, ...]
    data: memoryview

    def apply(self, chunk: memoryview) -> None:
        """Turn the base's content into the chunk's. Raises ValueError when an extent lies outside."""
        apply_extents(self.extents, self.data, chunk)

    def overlaid(self, extents: Sequence[Extent], data: memoryview, room: memoryview) -> Delta:
        """This delta with other data over it. room: memory of a whole chunk to work in."""
        self.apply(room)
        make_delta(self.base, extents, data).apply(room)
        both = merge([*self.extents, *extents])
        joined = b"".join(room[offset : offset + length] for offset, length in both)
        return make_delta(self.base, both, memoryview(joined))


def apply_extents(extents: Sequence[Extent], data: memoryview, chunk: memoryview) -> None:
    """Put data, that of all extents one behind the other, where it belongs. Raises ValueError for a place outside."""
    position = 0
    for offset, length in extents:
        if offset + length > len(chunk):
            raise ValueError("it reaches past the end of its chunk")
        chunk[offset : offset + length] = data[position : position + length]
        position += length


def make_delta(base: bytes, extents: Sequence[Extent], data: memoryview) -> Delta:
    """A delta over `base`. Raises ValueError for what none can be: unordered or empty extents, other data, a base that
    is a delta."""
    end = 0
    for offset, length in extents:
        if offset < end or length <= 0:
            raise ValueError("its extents do not ascend")
        end = offset + length
    if not extents or total(extents) != len(data) or is_delta(base) or not any(base):
        raise ValueError("it does not fit its base or its data")
    return Delta(base, tuple(extents), data)


def encode(delta: Delta) -> bytes:
    """The content of the object."""
    places = (EXTENT.pack(offset, length) for offset, length in delta.extents)
    return b"".join((HEAD.pack(delta.base, len(delta.extents)), *places, delta.data))


def decode(content: bytes) -> Delta:
    """Raises ValueError for anything that `encode` does not make."""
    if len(content) < HEAD.size:
        raise ValueError("it is too short")
    base, count = HEAD.unpack_from(content)
    start = HEAD.size + count * EXTENT.size
    if start > len(content):
        raise ValueError("it is too short")
    extents = tuple(EXTENT.iter_unpack(memoryview(content)[HEAD.size : start]))
    return make_delta(base, extents, memoryview(content)[start:])
