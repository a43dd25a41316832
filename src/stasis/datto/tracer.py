# SPDX-License-Identifier: Apache-2.0
"""The active tracer of one served device: before a block is overwritten its old contents go to the COW file, or, in
incremental mode, the fact that it changes.

It runs in the device's worker, between batches, after the change map and the snapshot engine. Its own failures never
become failures of the write: the tracer has failed then, and the device goes on. docs/design/datto.md has the order of
what is made durable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from errno import EFBIG, EIO, EOPNOTSUPP, ESTALE

from stasis.block.chunktable import merge_runs
from stasis.block.intentlog import IntentLog
from stasis.block.origin import DISCARD_STEP, Origin, Request
from stasis.datto.claim import Claim
from stasis.datto.cowfile import CowFile
from stasis.datto.layout import BLOCK_SHIFT, BLOCK_SIZE
from stasis.datto.scan import Run
from stasis.datto.waiting import SECTION_MASK, SECTION_SPAN
from stasis.linux.iobuffer import IoBuffer

__all__ = ["WARN_AT", "Tracer"]

BLOCK_MASK = BLOCK_SIZE - 1

WINDOW_BLOCKS = 64
"""Blocks copied at a time, as in the snapshot engine (block/cow.py)."""

WARN_AT = (75, 90)
"""Percent of the room for data at which a warning is given, once each."""


class Tracer:
    """`failed` is called once with an errno, `low` with each of WARN_AT that is passed."""

    def __init__(self, origin: Origin, cow: CowFile, log: IntentLog, *, failed: Callable[[int], None],
                 low: Callable[[int], None]) -> None:
        self.origin, self.cow, self.log = origin, cow, log
        self.error = 0
        self.auto_expand: tuple[int, int] | None = None
        """Bytes to grow by when full, and bytes to leave free on the file system."""
        self.claim: Claim | None = None
        """Blocks that are about to become those of the next COW file."""
        self._failed, self._low = failed, low
        self._window = IoBuffer(WINDOW_BLOCKS << BLOCK_SHIFT)
        self._warned = 0

    def close(self) -> None:
        """Close COW file and log as they are."""
        self._window.close()
        self.log.close()
        self.cow.close()

    def follow(self, cow: CowFile, log: IntentLog) -> tuple[CowFile, IntentLog]:
        """Go on with the next file of the series, between batches; gives back the one that is done."""
        done = self.cow, self.log
        self.cow, self.log, self._warned, self.auto_expand = cow, log, 0, None
        return done

    def fail(self, errno: int) -> None:
        """End it: nothing more is kept, its image answers EIO. The first error stays."""
        if not self.error:
            self.error = errno
            self._failed(errno)

    # -- before the origin is written ---------------------------------------------------------------

    @property
    def step(self) -> int:
        """Bytes of a long discard to take at a time: what is only marked can be more than what is copied."""
        return DISCARD_STEP if self.cow.is_index_only or self.error else WINDOW_BLOCKS << BLOCK_SHIFT

    def before(self, requests: Sequence[Request]) -> None:
        """Enter what these requests are about to overwrite. Never raises."""
        if self.error:
            return
        if self.claim is not None:
            requests = self.claim.see(requests)
        try:
            if self.cow.is_index_only:
                self._mark_soon(requests)
                return
            if self.cow.territory.is_rough:
                self._guard(requests)
            if fresh := self._without_entry(requests):
                self._guard(fresh)
                if runs := self._runs(fresh):
                    self._enter(runs)
        except OSError as error:
            self.fail(error.errno or EIO)

    def _mark_soon(self, requests: Sequence[Request]) -> None:
        # Hot: that its region is in the log is all that a write must wait for. Each block by itself took 2 µs.
        if self.cow.territory.ranges:
            self._guard(requests)
        self.log.add_requests(requests)
        if self.cow.mark_soon(requests):
            self.cow.catch_up()

    def catch_up(self) -> bool:
        """Have the COW file say all that it has to say, between batches. False if the tracer has failed."""
        if not self.error:
            try:
                self.cow.catch_up()
            except OSError as error:
                self.fail(error.errno or EIO)
        return not self.error

    def _without_entry(self, requests: Sequence[Request]) -> list[Request]:
        """Requests for blocks that have no entry, as far as is known here."""
        # Hot: for blocks that are in the index already this is all that tracing costs a write. The comprehension is
        # twice as fast as a loop that does the same.
        index = self.cow.index
        get = index.sections.get
        fresh = [
            request
            for request in requests
            if (section := get(request[0] >> SECTION_SPAN)) is None
            or (request[0] & BLOCK_MASK) + request[1] > BLOCK_SIZE
            or not section[(request[0] >> BLOCK_SHIFT) & SECTION_MASK]
        ]
        if index.is_bounded:
            index.used.update(request[0] >> SECTION_SPAN for request in requests)
        return fresh

    def _guard(self, requests: Sequence[Request]) -> None:
        """OSError ESTALE if the file system takes back what it gave the COW file: nothing may be written there again.

        Blocks that are the COW file's own never have an entry, so looking at requests without one is enough unless a
        block is the file's in part.
        """
        touches = self.cow.territory.touches
        if self.cow.territory.ranges and any(touches(offset, offset + length) for offset, length, _ in requests):
            raise OSError(ESTALE, "the blocks of the COW file were written through its file system")

    def _runs(self, requests: Sequence[Request]) -> list[Run]:
        """Runs of blocks of these requests that have no entry."""
        index, blocks = self.cow.index, self.cow.geometry.blocks
        runs: list[Run] = []
        for offset, length, _ in requests:
            block, end = offset >> BLOCK_SHIFT, -(-(offset + length) >> BLOCK_SHIFT)
            if block >= blocks:
                continue  # the device has grown, which ends the series soon
            if end - block == 1 and offset >> SECTION_SPAN in index.sections:
                runs.append((block, end))  # or it would not be here
            else:
                runs += index.runs_without(block, min(end, blocks))
        return merge_runs(runs) if len(runs) > 1 else runs

    def _enter(self, runs: Sequence[Run]) -> None:
        shift = self.log.shift - BLOCK_SHIFT
        self.log.add({region for first, end in runs for region in range(first >> shift, ((end - 1) >> shift) + 1)})
        for window in _windows(runs):
            self._keep(window)
        self._warn()

    def _keep(self, runs: Sequence[Run]) -> None:
        requests: list[Request] = []
        position = 0
        for first, end in runs:
            offset, length = first << BLOCK_SHIFT, (end - first) << BLOCK_SHIFT
            requests.append((offset, min(length, self.cow.geometry.size - offset), position))
            position += length
        _, length, at = requests[-1]
        self._window.view[at + length : position] = bytes(position - at - length)  # behind a short last block
        self.origin.read(self._window, requests)
        self._make_room(position >> BLOCK_SHIFT)
        self.cow.keep(runs, self._window.view[:position])

    # -- room -----------------------------------------------------------------------------------------

    def _make_room(self, blocks: int) -> None:
        if blocks <= self.cow.free_slots or self.auto_expand is None:
            return
        step, reserved = self.auto_expand
        wanted = max(step, -(-blocks * BLOCK_SIZE // step) * step)
        if not self.cow.may_expand(wanted, reserved):
            raise OSError(EFBIG, "the COW file is full, and its file system has no room to let it grow")
        self.cow.expand(wanted)
        self._warned = 0

    def _warn(self) -> None:
        filled = self.cow.filled_percent
        for percent in WARN_AT:
            if self._warned < percent <= filled:
                self._warned = percent
                self._low(percent)

    def expand(self, length: int) -> None:
        """Grow by `length` bytes. What fallocate answers is raised, and is the end of the tracer too."""
        self.check_growth()
        try:
            self.cow.expand(length)
        except OSError as error:
            self.fail(error.errno or EIO)
            raise
        self._warned = 0

    def check_growth(self) -> None:
        """OSError EOPNOTSUPP if the COW file cannot grow: on its own device every new block would have to be kept in
        it first."""
        if not self.cow.can_grow:
            raise OSError(EOPNOTSUPP, f"{self.cow.path} lies on its own device and cannot grow during a snapshot")

    # -- reading the image ------------------------------------------------------------------------------

    def read_image(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        """Fill the buffer with the device as it was. OSError EIO once the tracer has failed."""
        view, get = buffer.view, self.cow.index.sections.get
        unkept: list[Request] = []
        for request in requests:
            offset, length, position = request
            # Hot: most are a block that is not kept, as in `_missing`; the device is asked for all of them at once.
            section = get(offset >> SECTION_SPAN)
            if (section is not None and (offset & BLOCK_MASK) + length <= BLOCK_SIZE
                    and not section[(offset >> BLOCK_SHIFT) & SECTION_MASK]):
                unkept.append(request)
                continue
            for low, high, slot in self._pieces(offset, offset + length):
                at = position + low - offset
                if slot:
                    self.cow.read_bytes((slot << BLOCK_SHIFT) + (low & BLOCK_MASK), view[at : at + high - low])
                else:
                    unkept.append((low, high - low, at))
        if self.cow.index.is_bounded:
            self.cow.index.used.update(request[0] >> SECTION_SPAN for request in requests)
        if unkept:
            self.origin.read(buffer, unkept)
        if self.cow.territory.ranges:
            self._blank(view, requests)
        with contextlib.suppress(OSError):
            self.check()
        if self.error:
            raise OSError(EIO, "the snapshot has failed")

    def _blank(self, view: memoryview, requests: Sequence[Request]) -> None:
        """The COW file's own blocks are no part of the image: they read as zeroes, always the same."""
        for offset, length, position in requests:
            for start, end in self.cow.territory.inside(offset, offset + length):
                view[position + start - offset : position + end - offset] = bytes(end - start)

    def _pieces(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, slot of its first block or 0) of stretches of bytes that lie in one place."""
        first = offset >> BLOCK_SHIFT
        entries = self.cow.index.entries(first, -(-end >> BLOCK_SHIFT))
        start = 0
        for number in range(1, len(entries) + 1):
            before = entries[number - 1]
            if number < len(entries) and entries[number] == (before + 1 if before else 0):
                continue
            slot = entries[start]
            low = max(offset, (first + start) << BLOCK_SHIFT)
            yield low, min(end, (first + number) << BLOCK_SHIFT), slot
            start = number

    def check(self) -> None:
        """Look for a write to the COW file that failed after the fact; it is the end of the tracer."""
        try:
            self.cow.check()
        except OSError as error:
            self.fail(error.errno or EIO)
            raise


def _windows(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Cut runs into groups of at most a window of blocks."""
    group: list[Run] = []
    room = WINDOW_BLOCKS
    for first, end in runs:
        while first < end:
            stop = min(end, first + room)
            group.append((first, stop))
            first, room = stop, room - (stop - first)
            if not room:
                yield group
                group, room = [], WINDOW_BLOCKS
    if group:
        yield group
