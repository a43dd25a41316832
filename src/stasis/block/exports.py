# SPDX-License-Identifier: Apache-2.0
"""What a worker serves: the origin, with tracking and copy-on-write in front, and the writers' side of its image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from errno import EINVAL, EPERM
from typing import Protocol

from stasis.block.changemap import ChangeMap
from stasis.block.cow import WINDOW, CopyOnWrite
from stasis.block.origin import DISCARD_STEP, Origin, Request
from stasis.block.tracking import Tracker
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.export import Export

BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
DIRTY_BITMAP = "qemu:dirty-bitmap:"

NBD_STATE_HOLE = 1
NBD_STATE_ZERO = 2

MAXIMUM_EXTENTS = 4096
"""Extents one answer holds at most; the client asks on from where it ends."""


class Status:
    """Collects (length, flags) extents: merges neighbours, fills gaps, stops at the range's end or at the maximum."""

    def __init__(self, offset: int, length: int) -> None:
        self.position, self.end = offset, offset + length
        self.extents: list[tuple[int, int]] = []

    def add(self, upto: int, flags: int) -> bool:
        """Everything from where we are up to byte `upto` has these flags. False when the answer is complete."""
        length = min(upto, self.end) - self.position
        if length > 0:
            self.position += length
            if self.extents and self.extents[-1][1] == flags:
                self.extents[-1] = (self.extents[-1][0] + length, flags)
            elif len(self.extents) == MAXIMUM_EXTENTS:
                self.position -= length
                return False
            else:
                self.extents.append((length, flags))
        return self.position < self.end


def dirty_status(changes: ChangeMap, since: int, held: bool, offset: int, length: int) -> list[tuple[int, int]]:
    """Extents of a dirty bitmap: 1 where blocks changed after snapshot `since`; all of it where that is not known.

    A client may hold on to a bitmap's name over a new generation, or while the map breaks.
    """
    if changes.is_broken or since > (changes.held_number if held else changes.change_number):
        return [(length, 1)]
    status = Status(offset, length)
    shift = changes.block_shift
    first, stop = offset >> shift, -(-(offset + length) >> shift)
    bits = bytes((changes.held if held else changes.active)[first:stop])
    position = 0
    flags = [1 if value > since else 0 for value in range(256)]
    bits = bits.translate(bytes(flags))
    while position < len(bits):
        value = bits[position]
        found = bits.find(bytes((1 - value,)), position)
        position = len(bits) if found < 0 else found
        if not status.add((first + position) << shift, value):
            break
    return status.extents


class Observer(Protocol):
    """Who is told of every write before it happens."""

    @property
    def step(self) -> int:
        """Bytes of a long discard that it takes at a time."""
        ...

    def before(self, requests: Sequence[Request]) -> None:
        """These ranges (offset, length, …) are about to be overwritten. Never raises, whatever happens."""
        ...


class OriginExport(Export):
    """The served device."""

    can_multi_conn = True
    can_trim = True
    can_zero = True
    can_cache = True

    def __init__(self, name: str, origin: Origin, tracker: Tracker | None, epochs: Sequence[int] = ()) -> None:
        self.name, self.description = name, f"stasis device {name}"
        self.origin, self.tracker = origin, tracker
        self.size = origin.size
        self.minimum_block = origin.sector if origin.direct and not origin.size % origin.sector else 1
        self.alignment = origin.sector if origin.direct else 1
        self.can_fast_zero = not origin.is_device
        self.cow: CopyOnWrite | None = None
        self.observer: Observer | None = None
        self.epochs = tuple(epochs)

    # Hot path: one call per batch. Tracking first, then copy-on-write, then the origin.

    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        self.origin.read(buffer, requests)

    def write(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        self._before(requests)
        self.origin.write(buffer, requests)

    def _before(self, requests: Sequence[Request]) -> None:
        self.before_beneath(requests)
        if self.observer is not None:
            self.observer.before(requests)

    def before_beneath(self, requests: Sequence[Request]) -> None:
        """These ranges are about to be overwritten by the observer itself, beneath the export. Between batches."""
        if self.tracker is not None:
            self.tracker.mark(requests)
        if self.cow is not None:
            self.cow.preserve(requests)

    def flush(self) -> None:
        # Marks were made durable before their writes (see tracking.py), so the origin is all that is left.
        self.origin.flush()

    def trim(self, offset: int, length: int) -> Iterator[None]:
        for start, count in self._steps(offset, length):
            self.origin.discard(start, count)
            yield

    def write_zeroes(self, offset: int, length: int, *, punch: bool, fast: bool) -> Iterator[None]:
        for start, count in self._steps(offset, length):
            self.origin.zero(start, count, punch=punch, fast=fast)
            yield

    def _steps(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Cut a long range into steps, each tracked and preserved when it is its turn: a snapshot may be taken
        between two. Where the origin holds no data nothing is destroyed, and nothing is stored."""
        end = offset + length
        while offset < end:
            step, data = min(end - offset, DISCARD_STEP), False
            if self.cow is not None or self.observer is not None:
                _, step, data = next(self.origin.data_extents(offset, step))
                step = min(step, self._longest_step()) if data else step
            requests = [(offset, step, 0)]
            if self.tracker is not None:
                self.tracker.mark(requests)
            if self.cow is not None and data:
                self.cow.preserve(requests)
            if self.observer is not None and data:
                self.observer.before(requests)
            yield offset, step
            offset += step

    def _longest_step(self) -> int:
        if self.cow is not None or self.observer is None:
            return WINDOW
        return self.observer.step

    def cache(self, offset: int, length: int) -> None:
        self.origin.prefetch(offset, length)

    def contexts(self) -> Sequence[str]:
        return (BASE_ALLOCATION, ALLOCATION_DEPTH, *(f"{DIRTY_BITMAP}{name}" for name, _ in self._bitmaps()))

    def _bitmaps(self) -> list[tuple[str, int]]:
        if self.tracker is None:
            return []
        wanted = self.epochs or (self.tracker.changes.change_number,)
        return [(f"since-{number}", number) for number in wanted]

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        if context.startswith(DIRTY_BITMAP) and self.tracker is not None:
            since = int(context.rsplit("-", 1)[1])
            return dirty_status(self.tracker.changes, since, False, offset, length)
        status = Status(offset, length)
        for start, count, data in self.origin.data_extents(offset, length):
            if context == BASE_ALLOCATION:
                flags = 0 if data else NBD_STATE_HOLE | NBD_STATE_ZERO
            else:
                flags = 1 if data else 0
            if not status.add(start + count, flags):
                break
        return status.extents


class ImageWriter(Export):
    """The inner export through which an image server hands over writes: they touch the storage only."""

    can_multi_conn = True
    can_trim = True
    can_zero = True

    def __init__(self, export: OriginExport) -> None:
        self.name, self.description = "image", "image writes"
        self._export = export
        self.size = export.size

    def _cow(self) -> CopyOnWrite:
        if self._export.cow is None:
            raise OSError(EPERM, "no snapshot is held")
        return self._export.cow

    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        raise OSError(EINVAL, "the image server reads by itself")

    def write(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        cow = self._cow()
        self._mark(requests)
        cow.overwrite(buffer.view, requests)

    def trim(self, offset: int, length: int) -> Iterator[None]:
        return self.write_zeroes(offset, length, punch=True, fast=False)

    def write_zeroes(self, offset: int, length: int, *, punch: bool, fast: bool) -> Iterator[None]:
        cow = self._cow()
        self._mark([(offset, length, 0)])
        for _ in cow.zero_image(offset, length):
            yield
            if self._export.cow is not cow:
                raise OSError(EPERM, "the snapshot was destroyed")

    def _mark(self, requests: Sequence[Request]) -> None:
        tracker = self._export.tracker
        if tracker is not None:
            tracker.mark_both([(offset, length) for offset, length, _ in requests])
