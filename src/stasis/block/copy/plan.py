# SPDX-License-Identifier: Apache-2.0
"""What a copy has to do, as arithmetic on extents.

An extent is ``(offset, length)`` in bytes.  Lists of extents are ascending and do not overlap.  Everything
here is pure, so that the part of a copy that decides which bytes are left out can be tested by properties.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Extent",
    "Piece",
    "Window",
    "clip",
    "complement",
    "merge",
    "sample_blocks",
    "split_by_allocation",
    "total",
    "windows",
]

Extent = tuple[int, int]
Piece = tuple[int, int, bool]  # offset, length, whether it is known to read as zeroes


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Sort extents and join those that touch or overlap; empty ones are left out."""
    merged: list[Extent] = []
    for offset, length in sorted(extents):
        if length <= 0:
            continue
        if merged and offset <= merged[-1][0] + merged[-1][1]:
            start, known = merged[-1]
            merged[-1] = (start, max(known, offset + length - start))
        else:
            merged.append((offset, length))
    return merged


def clip(extents: Iterable[Extent], start: int, end: int) -> list[Extent]:
    """The parts of the extents that lie in ``[start, end)``."""
    clipped = ((max(offset, start), min(offset + length, end)) for offset, length in extents)
    return [(first, last - first) for first, last in clipped if last > first]


def complement(extents: Iterable[Extent], size: int) -> list[Extent]:
    """What ``[0, size)`` holds besides the extents (ascending, merged)."""
    gaps: list[Extent] = []
    position = 0
    for offset, length in clip(extents, 0, size):
        if offset > position:
            gaps.append((position, offset - position))
        position = offset + length
    if position < size:
        gaps.append((position, size - position))
    return gaps


def total(extents: Iterable[Extent]) -> int:
    """Sum of the lengths, in bytes."""
    return sum(length for _, length in extents)


def split_by_allocation(wanted: Sequence[Extent], zeroes: Sequence[Extent]) -> list[Piece]:
    """Cut the wanted extents into ``(offset, length, reads_as_zeroes)``, ascending; both lists are merged
    ones."""
    pieces: list[Piece] = []
    index = 0
    for offset, length in wanted:
        position, end = offset, offset + length
        while index < len(zeroes) and zeroes[index][0] + zeroes[index][1] <= position:
            index += 1
        scan = index
        while position < end:
            if scan == len(zeroes) or zeroes[scan][0] >= end:
                pieces.append((position, end - position, False))
                break
            zero_start, zero_length = zeroes[scan]
            if zero_start > position:
                pieces.append((position, zero_start - position, False))
            position = max(position, zero_start)
            stop = min(end, zero_start + zero_length)
            pieces.append((position, stop - position, True))
            position = stop
            scan += 1
    return pieces


@dataclass(slots=True)
class Window:
    """A bounded piece of work: extents to read and extents that are known to be zeroes, all below ``end``."""

    reads: list[Extent] = field(default_factory=list)
    zeroes: list[Extent] = field(default_factory=list)
    read_bytes: int = 0
    end: int = 0

    @property
    def length(self) -> int:
        """Bytes of the image that this window settles."""
        return self.read_bytes + total(self.zeroes)


def windows(pieces: Iterable[Piece], window_size: int, max_extents: int) -> Iterator[Window]:
    """Pack pieces into windows of at most ``window_size`` bytes to read and ``max_extents`` extents.

    Windows are ascending: all bytes of one lie below all bytes of the next, so that a single position tells
    what is done.  Scattered small extents share a window, because each window is one burst of pipelined
    requests.
    """
    window = Window()
    for offset, length, is_zero in pieces:
        while length:
            room = length if is_zero else min(length, window_size - window.read_bytes)
            if not room or len(window.reads) + len(window.zeroes) >= max_extents:
                yield window
                window = Window()
                continue
            _add_piece(window, offset, room, is_zero)
            offset, length = offset + room, length - room
    if window.end:
        yield window


def _add_piece(window: Window, offset: int, length: int, is_zero: bool) -> None:
    if is_zero:
        window.zeroes.append((offset, length))
    else:
        window.reads.append((offset, length))
        window.read_bytes += length
    window.end = offset + length


def sample_blocks(unchanged: Sequence[Extent], block_size: int, share: float, minimum: int, seed: int) -> list[Extent]:
    """Draw random blocks out of extents that should be unchanged.

    Takes ``share`` of the blocks that lie in the extents (a short piece at an end counts as a block), at
    least ``minimum`` of them, or all if there are fewer.  The same seed draws the same blocks.  A share of 0
    draws none.
    """
    counts = [-(-length // block_size) for _, length in unchanged]
    available = sum(counts)
    if share <= 0 or not available:
        return []
    wanted = min(available, max(minimum, round(available * share)))
    chosen = sorted(random.Random(seed).sample(range(available), wanted))
    return list(_blocks_at(unchanged, counts, block_size, chosen))


def _blocks_at(
    extents: Sequence[Extent], counts: Sequence[int], block_size: int, chosen: Iterable[int]
) -> Iterator[Extent]:
    index, first = 0, 0
    for number in chosen:
        while number >= first + counts[index]:
            first += counts[index]
            index += 1
        offset, length = extents[index]
        start = (number - first) * block_size
        yield offset + start, min(block_size, length - start)
