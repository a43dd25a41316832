# SPDX-License-Identifier: Apache-2.0
"""Blocks of a device held aside: what changed while it was copied, in its latest state that was read.

They are in memory as far as that goes, and in the staging area beyond. All memory is locked and touched when it is
taken, so that nothing is written to a swap file or waited for while file systems are frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from stasis.errors import StorageError
from stasis.linux import memlock
from stasis.linux.iobuffer import IoBuffer
from stasis.live.staging import StagingArea
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.backup.source import Extent
    from stasis.live.direct import Place

__all__ = ["Budget", "Stash", "StashFull"]

SEGMENT = 8 << 20
BOUNCE = 4 << 20
"""Memory in which blocks travel to the staging area."""


class StashFull(StorageError):
    """There is neither memory nor space in the staging area for a block."""


class Budget:
    """Memory that all stashes of a set may take together, in bytes, and where they stage what is more."""

    def __init__(self, limit: int, area: StagingArea | None = None) -> None:
        """The area passes to the budget."""
        self.limit, self.used, self.area = limit, 0, area

    @property
    def free(self) -> int:
        """Bytes of memory that may still be taken."""
        return self.limit - self.used

    def stage(self, length: int) -> int | None:
        """Space in the staging area; None if there is no more, or no such area."""
        return None if self.area is None else self.area.take(length)

    def exhausted(self, what: str) -> StashFull:
        """There is no room for more of the device `what`."""
        memory = f"{format_size(self.limit)} of memory"
        if self.area is None:
            return StashFull(f"what changed on {what} while it was copied does not fit into {memory}",
                             hint="allow more with --freeze-memory, name a directory with --staging, or choose a "
                                  "time when less is written; nothing is lost")
        return StashFull(f"the staging area {self.area.directory} is full: what changed on {what} while it was "
                         f"copied needs more than {memory} and {format_size(self.area.used)} there",
                         hint="give it more space (--staging, --staging-size), or choose a time when less is "
                              "written; nothing is lost")

    def close(self) -> None:
        """Give the staging area back."""
        if self.area is not None:
            self.area.close()


class _InMemory:
    """A segment of blocks in memory."""

    def __init__(self, size: int) -> None:
        self.buffer = IoBuffer(size)
        with contextlib.suppress(OSError):  # not allowed to lock it: touched it is all the same by the first read
            memlock.lock(self.buffer.address, size)

    def copy_to(self, view: memoryview, start: int) -> None:
        view[:] = self.buffer.view[start : start + len(view)]


class _Staged:
    """A segment of blocks in the staging area."""

    def __init__(self, area: StagingArea, place: int) -> None:
        self.area, self.place = area, place

    def copy_to(self, view: memoryview, start: int) -> None:
        self.area.read(self.place + start, view)


class Stash:
    """The blocks of one device. block_size is a power of two; the last block of a device may be short."""

    def __init__(self, path: str, block_size: int, size: int, budget: Budget) -> None:
        self._path, self._block_size, self._size, self._budget = path, block_size, size, budget
        self._segment_size = max(SEGMENT, block_size)
        self._segments: list[_InMemory | _Staged] = []
        self._slots: dict[int, tuple[int, int]] = {}
        self._next = 0
        self._bounce: IoBuffer | None = None
        if budget.area is not None:
            self._bounce = _InMemory(max(BOUNCE, block_size)).buffer

    @property
    def blocks(self) -> list[int]:
        """The numbers of the blocks that are held."""
        return sorted(self._slots)

    @property
    def used(self) -> int:
        """Bytes of room that they take."""
        return self._next

    def clear(self) -> None:
        """Hold nothing any more; the room stays."""
        self._slots, self._next = {}, 0

    def prepare(self, length: int) -> None:
        """Have room for so many more bytes, as far as there is any."""
        wanted = -(-length // self._segment_size)
        while len(self._segments) * self._segment_size - self._next < wanted * self._segment_size:
            if not self._grow():
                return

    def batches(self, extents: Iterable[Extent]) -> Iterator[list[Place]]:
        """Where the blocks of the extents (whole blocks) are to be read to: each list before the next is asked for.

        Raises StashFull where there is no room for a block; `clear` is all that helps then.
        """
        here: list[Place] = []
        staged: list[tuple[int, int]] = []
        for offset, length in extents:
            for start in range(offset, offset + length, self._block_size):
                segment, at = self._slot(start // self._block_size)
                if isinstance(segment, _Staged):
                    staged.append((start, segment.place + at))
                else:
                    here.append((start, segment.buffer.address + at, self._length(start)))
        if here:
            yield here
        yield from self._stage(staged)

    def _length(self, start: int) -> int:
        return min(self._block_size, self._size - start)

    def _stage(self, blocks: list[tuple[int, int]]) -> Iterator[list[Place]]:
        """Blocks (offset, place in the area) by way of the bounce buffer."""
        if not blocks or self._bounce is None or self._budget.area is None:
            return
        at_once = self._bounce.size // self._block_size
        for first in range(0, len(blocks), at_once):
            batch = blocks[first : first + at_once]
            places = [(start, self._bounce.address + number * self._block_size, self._length(start))
                      for number, (start, _) in enumerate(batch)]
            yield places
            for number, (start, place) in enumerate(batch):
                begin = number * self._block_size
                self._budget.area.write(place, self._bounce.view[begin : begin + self._length(start)])

    def _slot(self, block: int) -> tuple[_InMemory | _Staged, int]:
        slot = self._slots.get(block)
        if slot is None:
            number, at = divmod(self._next, self._segment_size)
            if number == len(self._segments) and not self._grow():
                raise self._budget.exhausted(self._path)
            slot = self._slots[block] = number, at
            self._next += self._block_size
        return self._segments[slot[0]], slot[1]

    def _grow(self) -> bool:
        """One segment more, in memory or else staged; False if there is no room for it."""
        if self._budget.free >= self._segment_size:
            self._budget.used += self._segment_size
            self._segments.append(_InMemory(self._segment_size))
            return True
        place = self._budget.stage(self._segment_size)
        if place is None or self._budget.area is None:
            return False
        self._segments.append(_Staged(self._budget.area, place))
        return True

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
            self._segments[slot[0]].copy_to(view[first - offset : last - offset], slot[1] + first - block * size)
        return missing

    def close(self) -> None:
        """Give the memory back. What is staged goes with the area."""
        for segment in self._segments:
            if isinstance(segment, _InMemory):
                segment.buffer.close()
                self._budget.used -= self._segment_size
        if self._bounce is not None:
            self._bounce.close()
            self._bounce = None
        self._segments, self._slots, self._next = [], {}, 0
