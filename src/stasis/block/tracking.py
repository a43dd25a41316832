# SPDX-License-Identifier: Apache-2.0
"""Marking changes: the change map and the write-intent log of one device, kept in the order that loses nothing.

The rule: when a write reaches the origin, its blocks carry the active number, and each such mark is either
durable in the map or lies in a region that is durably set in the log. docs/design/change-maps.md has the proof.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stasis.block.changemap import ChangeMap, Identity, SwitchResult
from stasis.block.intentlog import IntentLog
from stasis.block.mapformat import NO_FS_MARK
from stasis.errors import StateError

Request = tuple[int, int, int]

TICK_SLACK_NS = 3_000_000_000
"""An image file changed this long after the last tick was changed by somebody else."""

LOST_TICKS_NS = 120_000_000_000
"""A power cut loses the ticks that the kernel had not written yet: some 35 s of them, more on a busy disk."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How a map was taken up: `reason` is empty when nothing had to be assumed.

    `same_boot` says that the machine has run without a break since the map was last in use.
    """

    fresh: bool
    reason: str
    same_boot: bool = field(default=True, compare=False)


class Tracker:
    """The change map and write-intent log of one device; one writer, the device's worker."""

    def __init__(self, changes: ChangeMap, log: IntentLog) -> None:
        self.changes, self.log = changes, log
        self._clearing: list[int] | None = None

    @classmethod
    def open(
        cls, directory: Path, size: int, shift: int, region_shift: int, identity: Identity, *, continuous: bool,
        fs_mark: Callable[[], bytes] = lambda: NO_FS_MARK,
    ) -> tuple[Tracker, Opening]:
        """Take up the map in `directory`, or begin a new generation where it cannot be trusted, and say why.

        `continuous`: the origin was held without a gap since its last worker, so nobody else wrote to it. `fs_mark`:
        see `Origin.fs_mark`; it is only asked for where nothing else tells.
        """
        path, log_path = directory / "map", directory / "intent"
        with contextlib.ExitStack() as undo:
            changes, reason = _take_up(path, size, shift, identity, continuous, fs_mark)
            log: IntentLog | None = None
            if changes is not None:
                undo.callback(changes.close)
                log, reason = _take_up_log(log_path, changes)
                if log is None:
                    undo.close()
                    changes = None
            undo.pop_all()
        fresh = changes is None or log is None
        if changes is None or log is None:
            log = IntentLog.create(log_path, size, region_shift)
            changes = ChangeMap.create(path, size, shift)
            log.clear(log.start_clearing())
        tracker, same_boot = cls(changes, log), changes.same_boot
        if not fresh:
            reason = tracker._assume_changed()
        changes.begin(reason, identity)
        return tracker, Opening(fresh, reason, same_boot)

    def _assume_changed(self) -> str:
        """After an unclean start: count the regions of the log as changed if the page cache was lost."""
        if self.changes.is_clean or self.changes.same_boot:
            return self.changes.assumed if not self.changes.is_clean else ""
        regions = self.log.dirty()
        for region in regions:
            start = region << self.log.shift
            length = min(1 << self.log.shift, self.changes.capacity - start)
            self.changes.mark(start, length)
        self.changes.sync()
        assumed = sum(
            min(1 << self.log.shift, self.changes.capacity - (region << self.log.shift)) for region in regions
        )
        return f"{assumed} bytes in {len(regions)} regions assumed changed after an unclean stop"

    # -- marks ------------------------------------------------------------------------------------

    def mark(self, requests: Sequence[Request]) -> None:
        """Mark the blocks of (offset, length, …) requests before they are written. May wait for the log's disk."""
        # Hot: one comparison per write whose block carries the number already (nearly all of them).
        changes = self.changes
        active, number, shift = changes.active, changes.number, changes.block_shift
        fresh = [
            request
            for request in requests
            if active[request[0] >> shift] != number or (request[0] + request[1] - 1) >> shift != request[0] >> shift
        ]
        if fresh:
            self._mark_fresh([(offset, length) for offset, length, _ in fresh])

    def _mark_fresh(self, ranges: Sequence[tuple[int, int]], *, held: bool = False) -> None:
        changes, shift = self.changes, self.log.shift
        todo = ranges if held else [each for each in ranges if not changes.is_marked(*each)]
        regions = {
            region for offset, length in todo for region in range(offset >> shift, ((offset + length - 1) >> shift) + 1)
        }
        if not regions:
            return
        try:
            self.log.add(regions)
        except OSError as error:
            # The origin must not suffer: it goes on, and the map says that it can no longer be relied on.
            self.changes.set_broken(f"the write-intent log cannot be written ({error.strerror})")
        for offset, length in todo:
            changes.mark(offset, length)
            if held:
                changes.mark_held(offset, length)

    def mark_both(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Mark ranges as changed now and, while a snapshot holds its map, in that too."""
        self._mark_fresh(ranges, held=self.changes.is_held)

    # -- epochs -----------------------------------------------------------------------------------

    def switch(self) -> SwitchResult:
        """End the epoch; only between batches. `settle` must follow before the number is told to anybody."""
        return self.changes.switch()

    def settle(self) -> None:
        """Make the last switch durable. After a wrap the cleared map is made durable too."""
        self.changes.sync()
        if self.changes.clear_wrapped():
            self.changes.sync()

    # -- clearing the log -------------------------------------------------------------------------

    def start_clearing(self) -> bool:
        """Begin a round of clearing: False if there is nothing to clear. Then `changes.sync`, then `end_clearing`."""
        if self._clearing is not None:
            return False
        regions = self.log.start_clearing()
        if not regions:
            return False
        self._clearing = regions
        return True

    def end_clearing(self, synced: bool) -> None:
        """The map is durable (or could not be made so): clear the regions that got no new marks meanwhile."""
        regions, self._clearing = self._clearing or [], None
        if synced:
            self.log.clear(regions)

    # -- resize --------------------------------------------------------------------------------------

    def begin_anew(self, size: int, shift: int, region_shift: int, identity: Identity, reason: str) -> None:
        """A new generation for a device whose size changed. OSError if it cannot be made; the old one then stays."""
        log = IntentLog.create(self.log.path, size, region_shift)
        try:
            changes = ChangeMap.create(self.changes.path, size, shift)
        except OSError:
            log.close()
            raise
        log.clear(log.start_clearing())
        self.close()
        self.changes, self.log, self._clearing = changes, log, None
        changes.begin(reason, identity)

    # -- the end ----------------------------------------------------------------------------------

    def finish(self, identity: Identity, fs_mark: bytes = NO_FS_MARK) -> None:
        """End in order; the next start takes the map up as it is."""
        self.changes.finish(identity, fs_mark)
        self.log.clear(self.log.start_clearing())

    def close(self) -> None:
        """Close both files as they are."""
        self.changes.close()
        self.log.close()


def _take_up(path: Path, size: int, shift: int, identity: Identity, continuous: bool, fs_mark: Callable[[], bytes]
             ) -> tuple[ChangeMap | None, str]:
    """The map to go on with, or None and why not."""
    try:
        changes = ChangeMap.open(path)
    except FileNotFoundError:
        return None, ""
    except StateError as error:
        return None, f"new generation: {error.message}"
    reason = _distrust(changes, size, shift, identity, continuous, fs_mark)
    if reason:
        changes.close()
        return None, f"new generation: {reason}"
    return changes, ""


def _distrust(changes: ChangeMap, size: int, shift: int, identity: Identity, continuous: bool,
              fs_mark: Callable[[], bytes]) -> str:
    """Why a map must not be used any more; empty if it may."""
    if changes.is_broken:
        return str(changes.assumed)
    if changes.capacity != size:
        return f"the size changed from {changes.capacity} to {size} bytes"
    if changes.block_shift != shift:
        return f"the tracking block changed from {1 << changes.block_shift} to {1 << shift} bytes"
    if continuous:
        return ""
    before = changes.identity
    if before.inode and before.inode != identity.inode and (changes.same_boot or _is_file(identity)):
        return "it is another file or device than before"
    if not changes.is_clean:
        return _distrust_unclean(changes, identity)
    if _is_file(identity):
        changed = before.mark != identity.mark
    elif changes.same_boot:
        changed = before.mark < 0 or before.mark != identity.mark
    else:  # the counter began at zero with the boot, and does not know what was written before
        changed = identity.mark != 0 or changes.fs_mark != fs_mark()
    return "it may have been written to while it was not attached" if changed else ""


def _distrust_unclean(changes: ChangeMap, identity: Identity) -> str:
    """After a death without an end in order, and a time in which nobody held the origin."""
    if _is_file(identity):
        latest = changes.last_tick + TICK_SLACK_NS
        if not changes.same_boot:
            latest = min(changes.last_tick + LOST_TICKS_NS, _boot_time())
        return "it was written to by another program after its worker died" if identity.mark > latest else ""
    if changes.same_boot:
        return "its worker died and nobody held the device since"
    return "it was written to since the machine started" if identity.mark > 0 else ""


def _is_file(identity: Identity) -> bool:
    return identity.mark > 1 << 50  # nanoseconds since 1970, against sectors written since boot


def _boot_time() -> int:
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _take_up_log(path: Path, changes: ChangeMap) -> tuple[IntentLog | None, str]:
    try:
        log = IntentLog.open(path)
    except FileNotFoundError:
        return None, "new generation: the write-intent log is gone"
    except StateError as error:
        return None, f"new generation: {error.message}"
    if len(log.regions) << log.shift < changes.capacity:
        log.close()
        return None, "new generation: the write-intent log is of another size"
    return log, ""
