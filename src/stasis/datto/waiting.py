# SPDX-License-Identifier: Apache-2.0
"""Blocks that changed and are still to be entered in the index of a COW file.

In incremental mode this is all that tracing adds to a write, so it is one byte set per block, whether the block was
entered before or not. What that comes to is found out for thousands of writes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stasis.block.origin import Request
from stasis.datto.layout import BLOCK_SHIFT, SECTION_BLOCKS, SECTION_SHIFT

__all__ = ["SECTION_MASK", "SECTION_SPAN", "Waiting", "pieces", "places"]

SECTION_SPAN = SECTION_SHIFT + BLOCK_SHIFT
"""Shift of the bytes of the device that a section of the index is for."""
SECTION_MASK = SECTION_BLOCKS - 1

MOST_SECTIONS = 1024
"""Sections with blocks that wait: 4 MiB."""

_SET = memoryview(b"\1" * SECTION_BLOCKS)


def pieces(first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(section, first entry in it, entry behind the last) for blocks first to end."""
    while first < end:
        stop = min(end, ((first >> SECTION_SHIFT) + 1) << SECTION_SHIFT)
        low = first & SECTION_MASK
        yield first >> SECTION_SHIFT, low, low + stop - first
        first = stop


def places(plane: bytes | bytearray) -> Iterator[int]:
    """Where a section's plane is set."""
    place = plane.find(1)
    while place >= 0:
        yield place
        place = plane.find(1, place + 1)


class Waiting:
    """By sections a plane: a byte for each block, 1 if it waits. `blocks` of the device; others do not count."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._planes: dict[int, bytearray] = {}

    def add(self, requests: Sequence[Request]) -> bool:
        """The blocks of these requests wait from here on. True if it is time to `take` what waits."""
        # Hot: 0.07 µs for a block that is written as a whole. The comparison with 4096 is quicker than one with a name.
        planes = self._planes
        for offset, length, _ in requests:
            if length == 4096 and not offset & 4095:
                try:
                    planes[offset >> SECTION_SPAN][(offset >> BLOCK_SHIFT) & 4095] = 1
                except KeyError:
                    self._add(offset >> BLOCK_SHIFT, (offset >> BLOCK_SHIFT) + 1)
            else:
                self._add(offset >> BLOCK_SHIFT, -(-(offset + length) >> BLOCK_SHIFT))
        return len(planes) >= MOST_SECTIONS

    def _add(self, first: int, end: int) -> None:
        for number, low, high in pieces(first, min(end, self._blocks)):
            if number not in self._planes:
                self._planes[number] = bytearray(SECTION_BLOCKS)
            self._planes[number][low:high] = _SET[: high - low]

    def take(self) -> Iterator[tuple[int, bytearray]]:
        """Sections with their planes, ascending. Nothing waits from here on."""
        taken, self._planes = self._planes, {}
        for number in sorted(taken):
            plane, end = taken[number], self._blocks - (number << SECTION_SHIFT)
            plane[end:] = bytes(len(plane[end:]))
            yield number, plane
