# SPDX-License-Identifier: Apache-2.0
"""The change tracking of one live device, in the hands of the one command that has its lock.

The programs in the kernel set bits in the active one of two bitmaps. A *turn* makes the other one active, waits until
no program uses the old one, moves its bits into the change map (a file) and clears it. Only the file knows numbers. A
*switch* is a turn that ends an epoch and can be made while file systems are frozen: it writes to no file until it is
settled. docs/design/live-tracking.md has the proof.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from stasis.block import mapformat
from stasis.block.changemap import ChangeMap
from stasis.errors import StasisError, StateError
from stasis.live import bitmap, devicefile, identity, pins
from stasis.live.devicefile import DeviceFile, Record
from stasis.live.errors import TrackingLostError
from stasis.live.identity import SECTOR, Identity
from stasis.live.layout import ELEMENT_SIZE, Lost, Slot
from stasis.live.pins import Hooks

__all__ = ["Mark", "Switch", "Tracker", "TrackingLostError", "count_misses", "map_identity", "new_map"]

Extent = tuple[int, int]

NOTING = ("queue", "remap")
"""Programs whose missed runs lose changes on a disk that takes bios; on others each completion is seen as well."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment in a device's history; numbers of different generations cannot be compared."""

    generation: str
    number: int


class Tracker:
    """A tracked device; a context manager. Sizes and offsets are in bytes."""

    def __init__(self, files: DeviceFile, lock: int | None) -> None:
        """Take up what `files` describe; the lock passes to the tracker. StateError if it is damaged.

        Without a lock it is only to be looked at.
        """
        self._files, self._closing = files, contextlib.ExitStack()
        if lock is not None:
            self._closing.callback(os.close, lock)
        self._carry: list[Extent] = []
        self._hooks: Hooks | None = None
        try:
            self._record = files.read()
            self._changes = ChangeMap.open(files.map) if lock is not None else ChangeMap.open_readonly(files.map)
            self._closing.callback(lambda: self._changes.close())
            self._attach()
        except FileNotFoundError as error:
            self._closing.close()
            raise StateError(f"the change map of {files.name} is gone",
                             hint=f"stasis track stop {files.name}") from error
        except BaseException:
            self._closing.close()
            raise

    @classmethod
    def open(cls, device: str, state: Path) -> Tracker:
        """The tracking of a device by its name or path. NotFoundError, BusyError, StateError. Not if it is lost."""
        files = DeviceFile(state, devicefile.find(state, device))
        return cls(files, files.lock())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let others have it; the programs go on."""
        self._detach()
        self._closing.close()

    def _attach(self) -> None:
        """Open the kernel's part, if it is there and ours."""
        if not self._record.this_boot:
            return
        try:
            hooks = Hooks(pins.directory_of(self._files.directory.parent.parent))
        except OSError:
            return
        if hooks.id != self._record.table or not hooks.field(self._record.slot, Slot.DEVICE):
            hooks.close()
            return
        self._hooks = hooks
        self._bits = memoryview(hooks.map_bits(self._record.slot))
        self._half = hooks.field(self._record.slot, Slot.ELEMENTS) * ELEMENT_SIZE

    def _detach(self) -> None:
        if self._hooks is not None:
            self._bits.release()
            self._hooks.close()
            self._hooks = None

    # -- what is known ------------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """What is recorded of the device."""
        return self._record

    @property
    def identity(self) -> Identity:
        """The device as it was when tracking began."""
        return self._record.identity

    @property
    def changes(self) -> ChangeMap:
        """The change map; it lacks what the bitmaps hold."""
        return self._changes

    @property
    def block_size(self) -> int:
        """Bytes of a tracking block."""
        return 1 << self._record.block_shift

    @property
    def mark(self) -> Mark:
        """The last switch; number 0 if there was none in this generation."""
        return Mark(self._changes.generation, self._changes.change_number)

    @property
    def lost(self) -> str:
        """Why nothing can be concluded from the map; empty if all is well. Looks at the kernel, writes no file."""
        if self._changes.is_broken:
            return str(self._changes.assumed).removeprefix("tracking is broken: ")
        return self._lost_in_kernel() or self._lost_device()

    def _lost_in_kernel(self) -> str:
        if not self._record.this_boot:
            return "the machine was restarted, and tracking was not taken up"
        if self._hooks is None:
            return "its programs were removed from the kernel"
        missing = self._hooks.missing()
        if missing:
            return f"the program {missing} was detached"
        flags = Lost(self._hooks.field(self._record.slot, Slot.LOST))
        if flags:
            return _why(flags)
        if self._record.bio_based and count_misses(self._hooks) != self._record.misses:
            return "the kernel skipped a run of a program"
        return ""

    def _lost_device(self) -> str:
        if now := self._record.leads_elsewhere:
            return f"{self._record.given} leads to {now} now"
        try:
            different = self.identity.difference(identity.identify(self.identity.path))
        except StasisError as error:
            return error.message
        anew = not different and self._kernel().was_set_up(self._record.slot,
                                                           lambda: identity.read_activity(self.identity))
        return _why(Lost.SET_UP) if anew else different

    def check(self) -> None:
        """TrackingLostError if changes may have been missed. Writes no file: file systems may be frozen."""
        if why := self.lost:
            raise TrackingLostError(self.identity.path, why)

    # -- bitmaps ------------------------------------------------------------------------------------

    def _kernel(self) -> Hooks:
        if self._hooks is None:
            raise TrackingLostError(self.identity.path, self.lost)
        return self._hooks

    def _read(self, which: int) -> bytes:
        return bytes(self._bits[which * self._half : (which + 1) * self._half])

    def _clear(self, which: int) -> None:
        self._bits[which * self._half : (which + 1) * self._half] = bytes(self._half)

    def _active(self) -> int:
        return self._kernel().field(self._record.slot, Slot.ACTIVE)

    def _flip(self) -> int:
        """Make the other bitmap active, between two epochs; returns which one was."""
        old = self._active()
        self._kernel().draw_epoch()
        self._kernel().set_field(self._record.slot, Slot.ACTIVE, 1 - old)
        self._kernel().draw_epoch()
        return old

    def _extents(self, bits: bytes) -> list[Extent]:
        return bitmap.to_extents(bitmap.bits_to_runs(bits), self._record.block_shift, self.identity.size)

    def _in_flight(self) -> list[Extent]:
        """Writes in flight, for a disk of which no request tells; in whole blocks."""
        if not self._record.bio_based:
            return []
        size, found = self.identity.size, []
        for sector, sectors in self._kernel().in_flight(self.identity.disk):
            start = max(sector * SECTOR - self.identity.start, 0)
            end = min((sector + sectors) * SECTOR - self.identity.start, size)
            if start < end:
                first, stop = start // self.block_size, -(-end // self.block_size)
                found += bitmap.to_extents([(first, stop - first)], self._record.block_shift, size)
        return bitmap.merge(found)

    def _mark(self, extents: list[Extent]) -> None:
        for extent in extents:
            self._changes.mark(*extent)

    def _drain(self) -> list[Extent]:
        """Move into the map what a switch that was not settled, or a command that was killed, left behind."""
        idle = 1 - self._active()
        if not any(self._bits[idle * self._half : (idle + 1) * self._half].tobytes().strip(b"\0")):
            return []
        self._kernel().wait_for_programs()
        return self._harvest(idle)

    def _harvest(self, which: int) -> list[Extent]:
        """Move the bits of a bitmap that no program uses into the map; killed between, it is done again."""
        extents = self._extents(self._read(which))
        self._mark(extents)
        self._clear(which)
        return extents

    def _begin(self) -> None:
        """A map that was saved for a reboot is in use again."""
        if self._changes.is_clean:
            self._changes.begin(self._changes.assumed, map_identity(self._record))
            self._files.forget_saved()

    # -- rounds -------------------------------------------------------------------------------------

    def turn(self) -> list[Extent]:
        """End a round: (offset, length) of what was written since the one before, whole blocks, ascending.

        A write that completed before this call is in its extents or in earlier ones; one that completes later is in
        later ones. Waits some 10 ms and writes the map: never while file systems are frozen. TrackingLostError if
        the programs are gone.
        """
        self._begin()
        extents = [*self._carry, *self._drain()]
        old = self._flip()
        self._kernel().wait_for_programs()
        extents += self._harvest(old)
        self._carry = self._in_flight()
        return bitmap.merge(extents)

    def count_changed(self) -> int:
        """Blocks written since the last turn or switch. TrackingLostError if the programs are gone."""
        return bitmap.count(self._read(self._active()))

    def changed_since(self, mark: Mark) -> list[Extent]:
        """What was written since the mark, up to now. TrackingLostError; GenerationError for a mark of another time."""
        self.check()
        self._changes.check_since(mark.number, generation=mark.generation)
        newer = [extent for which in (0, 1) for extent in self._extents(self._read(which))]
        # The bitmaps first: bits go from there into the map, never back.
        self._changes.refresh()
        return bitmap.merge([*self._changes.iter_changed(mark.number), *newer, *self._carry])

    def unsaved(self) -> list[Extent]:
        """What was written, or may be by now, and is not in the map's file; whole blocks. Writes nothing."""
        newer = [extent for which in (0, 1) for extent in self._extents(self._read(which))]
        return bitmap.merge([*newer, *self._carry, *self._in_flight()])

    # -- epochs -------------------------------------------------------------------------------------

    def prepare_switch(self) -> None:
        """Do what a switch could not do while file systems are frozen. Writes the map."""
        self._begin()
        self._carry = bitmap.merge([*self._carry, *self._drain()])

    def switch(self) -> Switch:
        """End the epoch. Writes no file and takes less than a millisecond; StateError if one is still to be settled.

        The guarantee about writes is that of `turn`.
        """
        if self._read(1 - self._active()).strip(b"\0"):
            raise StateError(f"the last switch of {self.identity.path} was not settled", hint="prepare_switch() first")
        old = self._flip()
        bits = self._read(old)
        extents = bitmap.merge([*self._carry, *self._extents(bits)])
        self._carry = []
        return Switch(self, old, bits, extents)

    def settle(self, which: int, copied: bytes) -> Mark:
        """Finish a switch (`Switch.settle`): bitmap `which` ended, and held `copied` at that instant."""
        self.check()
        self._begin()
        self._kernel().wait_for_programs()
        bits = self._read(which)
        late = bytes(now & ~then & 0xFF for now, then in zip(bits, copied, strict=True)) if bits != copied else b""
        self._mark(self._extents(bits))
        ended = self._changes.switch()
        # What a program set after the switch was not copied; what is in flight on a disk that takes bios may not be.
        self._carry = bitmap.merge([*self._carry, *self._extents(late), *self._in_flight()])
        self._mark(self._carry)
        self._changes.release_held()
        self._changes.sync()
        if self._changes.clear_wrapped():
            self._changes.sync()
        self._changes.forget_undo()
        self._clear(which)
        return Mark(ended.generation, ended.change_number)

    def mark_changed(self, extents: list[Extent]) -> None:
        """Count byte ranges as written in the current epoch. Writes the map."""
        self._begin()
        for offset, length in extents:
            self._changes.mark(offset, length)

    def read_map(self) -> bytes:
        """One byte per tracking block: the number after which it was last written, as the map will have it."""
        newer = [bitmap.bits_to_runs(self._read(which)) for which in (0, 1)] if self._hooks is not None else []
        self._changes.refresh()
        blocks = bytearray(self._changes.active)
        for first, count in (run for runs in newer for run in runs):
            blocks[first : first + count] = bytes((self._changes.number,)) * count
        return bytes(blocks)

    # -- loss ---------------------------------------------------------------------------------------

    def distrust(self, reason: str) -> None:
        """Believe nothing of the map any more, durably. Writes the map."""
        if self._hooks is not None:
            flags = self._hooks.field(self._record.slot, Slot.LOST)
            self._hooks.set_field(self._record.slot, Slot.LOST, flags | Lost.DISTRUST)
        if not self._changes.is_broken:
            self._changes.set_broken(reason)

    def begin_generation(self, reason: str) -> None:
        """Start over: a new generation, for a full copy. The way out of `lost`: what is gone is attached again.

        The errors of `tracking.start`, if it is.
        """
        if self.lost:
            from stasis.live import tracking  # imported late: it builds trackers

            self._detach()
            self._record = tracking.attach(self._files, self._record)
            self._attach()
        self._changes.close()
        self._changes = new_map(self._files, self._record, reason)
        self._carry = []


class Switch:
    """An epoch that was ended, still to be settled."""

    def __init__(self, tracker: Tracker, which: int, bits: bytes, extents: list[Extent]) -> None:
        self.extents = extents
        self._tracker, self._which, self._bits = tracker, which, bits

    def settle(self) -> Mark:
        """Make it durable, after the thaw and before anybody is told of the mark. TrackingLostError if tracking was
        lost up to here. If it is never called, the mark before stays good and nothing is lost."""
        return self._tracker.settle(self._which, self._bits)


def new_map(files: DeviceFile, record: Record, reason: str) -> ChangeMap:
    """A new generation in place of whatever map there was, durable and in use."""
    changes = files.new_map(record.identity.size, record.block_shift)
    changes.begin(reason, map_identity(record))
    return changes


def map_identity(record: Record) -> mapformat.Identity:
    """The device as the map's header describes it."""
    who = record.identity
    return mapformat.Identity(who.rdev, who.sequence, who.size, identity.read_counters(who))


def count_misses(hooks: Hooks) -> int:
    """Runs that the kernel skipped, of the programs that note writes in flight."""
    try:
        return sum(hooks.program(name).misses for name in NOTING)
    except OSError:
        return -1


def _why(flags: Lost) -> str:
    reasons = {
        Lost.OPAQUE: "a command was sent to it that may have changed anything",
        Lost.IN_FLIGHT: "more writes were in flight than can be noted",
        Lost.RANGE: "a write did not fit into its bitmap",
        Lost.DISTRUST: "its map was declared wrong",
        Lost.SET_UP: "the disk was set up anew",
    }
    return next(text for flag, text in reasons.items() if flag in flags)

