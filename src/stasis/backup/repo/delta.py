# SPDX-License-Identifier: Apache-2.0
"""Deltas: a chunk stored as what differs from another one, which is stored whole.

An incremental backup of scattered small writes then reads, seals and stores what was written, and not the whole chunk
around each write. A base may be a delta itself, a few deep: what the parent has is then not even read. The last base is
a chunk that is stored whole, or ZERO.

Deltas that were made together share an object, a pack: a file for each would cost more than its data. A delta's name is
the digest of its pack, marked by a bit, with its place in the pack in two of its bytes. So a name alone tells how and
where its chunk is stored.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from stasis.block.copy.plan import merge, total

__all__ = [
    "DELTA_BIT", "Delta", "apply_extents", "decode", "decode_pack", "encode", "encode_pack", "in_pack", "is_delta",
    "make_delta", "objects_of", "pack_name", "packed_length", "place_of", "with_bit", "without_bit",
]

Extent = tuple[int, int]
"""Offset in the chunk and length, in bytes."""

NAME_BYTES = 32
DELTA_BIT = 0x80  # in the last byte of a name
PLACE = NAME_BYTES - 3  # two bytes: place in the pack
MOST_IN_PACK = 1 << 12
COUNT = struct.Struct("<I")
HEAD = struct.Struct("<32sI")  # name of the base, number of extents
EXTENT = struct.Struct("<II")  # offset in the chunk, length


def pack_name(digest: bytes) -> bytes:
    """Name of a pack with this digest, which is that of its first delta."""
    return in_pack(with_bit(digest), 0)


def in_pack(name: bytes, place: int) -> bytes:
    """Name of the delta at another place of the same pack."""
    return name[:PLACE] + place.to_bytes(2, "big") + name[-1:]


def place_of(name: bytes) -> int:
    """At which place of its pack a delta is."""
    return int.from_bytes(name[PLACE:-1], "big")


def objects_of(names: bytes) -> bytes:
    """Names of the objects that hold what the names, one behind the other, stand for."""
    last_bytes = names[NAME_BYTES - 1 :: NAME_BYTES]
    if not last_bytes or max(last_bytes) < DELTA_BIT:
        return names
    found = bytearray(names)
    for number, byte in enumerate(last_bytes):
        if byte >= DELTA_BIT:
            found[number * NAME_BYTES + PLACE : number * NAME_BYTES + NAME_BYTES - 1] = b"\0\0"
    return bytes(found)


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
        apply_extents(extents, data, room)
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
    """A delta over `base`. Raises ValueError for what none can be: unordered or empty extents, or other data."""
    end = 0
    for offset, length in extents:
        if offset < end or length <= 0:
            raise ValueError("its extents do not ascend")
        end = offset + length
    if not extents or total(extents) != len(data):
        raise ValueError("it does not fit its data")
    return Delta(base, tuple(extents), data)


def encode_pack(deltas: Sequence[Delta]) -> bytes:
    """The content of an object of deltas: how many, the length of each, and they themselves."""
    encoded = [encode(delta) for delta in deltas]
    return b"".join((COUNT.pack(len(encoded)), *(COUNT.pack(len(one)) for one in encoded), *encoded))


def decode_pack(content: bytes) -> list[memoryview]:
    """The deltas in an object, yet to be decoded. Raises ValueError for what `encode_pack` does not make."""
    view = memoryview(content)
    if len(view) < COUNT.size or not 0 < (count := COUNT.unpack_from(view)[0]) <= MOST_IN_PACK:
        raise ValueError("it holds no deltas")
    start = COUNT.size * (1 + count)
    lengths = [length for length, in COUNT.iter_unpack(view[COUNT.size : start])] if start <= len(view) else []
    if not lengths or start + sum(lengths) != len(view):
        raise ValueError("it is not as long as its deltas")
    found = []
    for length in lengths:
        found.append(view[start : start + length])
        start += length
    return found


def packed_length(delta: Delta) -> int:
    """Bytes that a delta takes in a pack."""
    return COUNT.size + HEAD.size + EXTENT.size * len(delta.extents) + len(delta.data)


def encode(delta: Delta) -> bytes:
    """One delta as it is in a pack."""
    places = (EXTENT.pack(offset, length) for offset, length in delta.extents)
    return b"".join((HEAD.pack(delta.base, len(delta.extents)), *places, delta.data))


def decode(content: bytes | memoryview) -> Delta:
    """Raises ValueError for anything that `encode` does not make."""
    if len(content) < HEAD.size:
        raise ValueError("it is too short")
    base, count = HEAD.unpack_from(content)
    start = HEAD.size + count * EXTENT.size
    if start > len(content):
        raise ValueError("it is too short")
    extents = tuple(EXTENT.iter_unpack(memoryview(content)[HEAD.size : start]))
    return make_delta(base, extents, memoryview(content)[start:])
