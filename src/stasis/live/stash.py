# SPDX-License-Identifier: Apache-2.0
"""Blocks of a device in memory: what changed while it was copied, in its latest state that was read.

All memory is locked and touched when it is taken, so that nothing is written to a swap file or waited for while file
systems are frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from stasis.errors import StorageError
from stasis.linux import memlock
from stasis.linux.iobuffer import IoBuffer
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.backup.source import Extent
    from stasis.live.direct import Place

__all__ = ["Budget", "Stash"]

SEGMENT = 8 << 20


class Budget:
    """Memory that all stashes of a set may take together, in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    @property
    def free(self) -> int:
        """Bytes that may still be taken."""
        return self.limit - self.used

    def take(self, length: int, what: str) -> None:
        """Take memory. Raises StorageError when that is too much."""
        if length > self.free:
            raise StorageError(f"what changed on {what} while it was copied does not fit into "
                               f"{format_size(self.limit)} of memory", hint="allow more with --freeze-memory, or "
                               "choose a time when less is written; nothing is lost")
        self.used += length


class Stash:
    """The blocks of one device. block_size is a power of two; the last block of a device may be short."""

    def __init__(self, path: str, block_size: int, size: int, budget: Budget) -> None:
        self._path, self._block_size, self._size, self._budget = path, block_size, size, budget
        self._segment_size = max(SEGMENT, block_size)
        self._segments: list[IoBuffer] = []
        self._slots: dict[int, tuple[int, int]] = {}
        self._next = 0

    @property
    def blocks(self) -> list[int]:
        """The numbers of the blocks that are held."""
        return sorted(self._slots)

    def prepare(self, length: int) -> None:
        """Have memory for so many more bytes, as far as the budget goes."""
        wanted = -(-length // self._segment_size)
        while len(self._segments) * self._segment_size - self._next < wanted * self._segment_size:
            if self._budget.free < self._segment_size:
                return
            self._grow()

    def places(self, extents: Iterable[Extent]) -> Iterator[Place]:
        """Where the blocks of the extents (whole blocks) are to be read to. Raises StorageError beyond the budget."""
        for offset, length in extents:
            for start in range(offset, offset + length, self._block_size):
                segment, at = self._slot(start // self._block_size)
                yield start, self._segments[segment].address + at, min(self._block_size, self._size - start)

    def _slot(self, block: int) -> tuple[int, int]:
        slot = self._slots.get(block)
        if slot is None:
            segment, at = divmod(self._next, self._segment_size)
            if segment == len(self._segments):
                self._grow()
            slot = self._slots[block] = segment, at
            self._next += self._block_size
        return slot

    def _grow(self) -> None:
        self._budget.take(self._segment_size, self._path)
        segment = IoBuffer(self._segment_size)
        with contextlib.suppress(OSError):  # not allowed to lock it: touched it is all the same by the first read
            memlock.lock(segment.address, segment.size)
        self._segments.append(segment)

    def overlay(self, offset: int, view: memoryview) -> list[Extent]:
        """Copy what is held of the range at `offset` into the view; the rest of the range, as extents."""
        missing: list[Extent] = []
        end, size = offset + len(view), self._block_size
        for block in range(offset // size, -(-end // size)):
            first, last = max(offset, block * size), min(end, (block + 1) * size)
            slot = self._slots.get(block)
            if slot is None:
                missing.append((first, last - first))
                continue
            start = slot[1] + first - block * size
            view[first - offset : last - offset] = self._segments[slot[0]].view[start : start + last - first]
        return missing

    def close(self) -> None:
        """Give the memory back."""
        for segment in self._segments:
            segment.close()
        self._budget.used -= len(self._segments) * self._segment_size
        self._segments, self._slots, self._next = [], {}, 0
