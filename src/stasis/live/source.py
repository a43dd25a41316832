# SPDX-License-Identifier: Apache-2.0
"""A live device as the source of a backup: read in rounds while it is written, then at one instant.

Until `settle` the source is in motion: readers read the device, and `advance` tells what was written meanwhile. From
`settle` on it is the device as it was at the freeze: readers give what was stashed, and the device where tracking says
that it is still the same. docs/design/live-copy.md has the proof.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

from stasis.backup.source import Extent, Mark, OpenBase
from stasis.backup.sources.raw import identity_of
from stasis.block.copy.plan import clip, merge
from stasis.errors import GenerationError, NotFoundError, StasisError
from stasis.linux import blockdev
from stasis.linux.memory import view_at
from stasis.live import tracker
from stasis.live.direct import DirectReader, Place
from stasis.live.stash import Budget, Stash
from stasis.live.tracked import SwitchLike, Tracked

__all__ = ["LiveSource", "SettledReader"]

FINEST = 4096  # a place that cannot be read is narrowed down to this many bytes
NEW_GENERATION = "a backup found tracking lost"


class LiveSource:
    """One device. All calls but those of its readers come from one thread; a context manager."""

    kind = "live"

    def __init__(self, name: str, path: str, tracking: Tracked, budget: Budget, *,
                 skip_unreadable: bool = False) -> None:
        """Open the device. Raises NotFoundError, StasisError."""
        self.name, self.path = name, os.path.abspath(path)
        self.identity = identity_of(self.path)
        self.block_size = tracking.block_size
        self.mark: Mark | None = None
        self.taken: float | None = None
        self.consistency = ""
        self.unreadable: list[Extent] = []
        self.settled = False
        self._tracking, self._skip = tracking, skip_unreadable
        self._base: tuple[int, OpenBase] | None = None
        self._switch: SwitchLike | None = None
        self._owed: list[Extent] = []
        self._lost = ""
        self._reader = _open(self.path)
        self.rdev = os.fstat(self._reader.fd).st_rdev
        self.size: int | None = blockdev.size(self._reader.fd)
        self._stash = Stash(self.path, self.block_size, self.size, budget)

    def __enter__(self) -> LiveSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back device and memory."""
        self._reader.close()
        self._stash.close()

    # -- as a source --------------------------------------------------------------------------------------------------

    def changed_since(self, mark: Mark) -> list[Extent]:
        """What was written since the mark, up to now. GenerationError if unknown."""
        own = self.mark
        if own is not None and mark.generation != own.generation:
            raise GenerationError(f"the tracking of {self.path} started over since the last backup{self._lost}: its "
                                  f"generation is now {own.generation[:8]}, and was {mark.generation[:8]}")
        return self._tracking.changed_since(tracker.Mark(mark.generation, mark.number))

    def zero_extents(self) -> list[Extent]:
        """Not known of a device."""
        return []

    def open_reader(self) -> DirectReader | SettledReader:
        """A reader of the device as it is now or, once settled, as it was at the freeze."""
        return SettledReader(self, self._base) if self.settled else DirectReader(self.path)

    def use_base(self, chunk_size: int, open_base: OpenBase) -> None:
        """Where readers of the settled source get what is not stashed, chunk by chunk."""
        self._base = chunk_size, open_base

    def disturbed(self) -> str:
        """What was read is as of the freeze, or it was an error."""
        return ""

    def distrust(self, reason: str) -> None:
        """Count everything as changed, durably."""
        self._tracking.distrust(reason)

    # -- rounds -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """End the epoch: `mark` names this moment, and `advance` tells what is written from now on."""
        if lost := self._tracking.lost:
            self._lost = f" ({lost})"
            self._tracking.begin_generation(f"{NEW_GENERATION}: {lost}")
        self._tracking.prepare_switch()
        mark = self._tracking.switch().settle()
        self.mark = Mark(mark.generation, mark.number)

    def advance(self) -> list[Extent]:
        """End a round: what was written since the one before, and what `unstash` gave back."""
        self._tracking.check()
        self._owed = merge([*self._owed, *self._whole_blocks(self._tracking.turn())])
        told, self._owed = self._owed, []
        return told

    @property
    def pending_bytes(self) -> int:
        """How much was written since the last round, and is yet to be copied."""
        return self._tracking.count_changed() * self.block_size + sum(length for _, length in self._owed)

    @property
    def was_written(self) -> bool:
        """Whether anything was written since `switch`: what was copied may be two states of the device then."""
        return self._tracking.count_changed() > 0

    def prepare(self, length: int) -> None:
        """Have memory for so many bytes more, and whatever else must not be waited for in a freeze."""
        self._stash.prepare(length)
        self._tracking.prepare_switch()

    def stash_round(self) -> int:
        """End a round, and copy what was written in it into memory. The bytes copied. Raises StashFull."""
        self._owed = self.advance()
        copied = self._copy(self._owed)
        self._owed = []
        return copied

    @property
    def stashed_bytes(self) -> int:
        """How much room is taken by what was copied into memory."""
        return self._stash.used

    def unstash(self) -> None:
        """Hold nothing any more: the next `advance` tells all of it, to be read anew."""
        self._owed = merge([*self._owed, *self.stashed])
        self._stash.clear()
        self.unreadable = []

    # -- the instant --------------------------------------------------------------------------------------------------

    def switch(self) -> None:
        """The epoch switch of the freeze."""
        self._switch = self._tracking.switch()

    def copy_rest(self) -> int:
        """Copy what was written between the last round and `switch` into memory. The bytes copied."""
        assert self._switch is not None
        return self._copy(merge([*self._owed, *self._whole_blocks(self._switch.extents)]))

    def check(self) -> None:
        """GenerationError if tracking was lost, so that nothing can be said of what was copied."""
        self._tracking.check()

    def settle(self, taken: float, consistency: str) -> None:
        """What was copied is the device at this instant (seconds since 1970). The freeze is over: this writes files.

        GenerationError if tracking was lost.
        """
        assert self._switch is not None
        mark = self._switch.settle()
        self.mark = Mark(mark.generation, mark.number)
        self.taken, self.consistency, self.settled = taken, consistency, True

    def give_up(self) -> None:
        """The freeze failed: what `switch` ended goes into the map all the same, and the next attempt copies it."""
        if self._switch is not None:
            self._owed = merge([*self._owed, *self._whole_blocks(self._switch.extents)])
            self._switch.settle()
            self._switch = None

    # -- copying ------------------------------------------------------------------------------------------------------

    def _whole_blocks(self, extents: Sequence[Extent]) -> list[Extent]:
        unit, size = self.block_size, self.size or 0
        whole = ((offset // unit * unit, -(-(offset + length) // unit) * unit) for offset, length in extents)
        return clip(merge((first, end - first) for first, end in whole), 0, size)

    def _copy(self, extents: Sequence[Extent]) -> int:
        for places in self._stash.batches(extents):
            try:
                self._reader.read_places(_joined(places))
            except ConnectionError as error:
                raise self._unread(places[0], error) from error
            except OSError:
                for place in places:
                    self._copy_carefully(place)
        return sum(length for _, length in extents)

    def _copy_carefully(self, place: Place) -> None:
        """One block again after a failure, by halves where that is allowed."""
        offset, address, length = place
        try:
            self._reader.read_places([place])
        except OSError as error:
            if not self._skip or isinstance(error, ConnectionError):
                raise self._unread(place, error) from error
            if length <= FINEST:
                view_at(address, length)[:] = bytes(length)
                self.unreadable.append((offset, length))
                return
            half = length // 2 // FINEST * FINEST or FINEST
            self._copy_carefully((offset, address, half))
            self._copy_carefully((offset + half, address + half, length - half))

    def _unread(self, place: Place, error: OSError) -> StasisError:
        said = os.strerror(error.errno or errno.EIO)
        if isinstance(error, ConnectionError):
            return StasisError(f"{self.path} is gone: {said}", hint="attach it again, and run the backup again",
                               errno=errno.ENODEV)
        return StasisError(f"{self.path} cannot be read between {place[0]} and {place[0] + place[2]}: {said}",
                           hint="--on-read-error skip stores zeroes for what cannot be read", errno=error.errno or 0)

    # -- reading what is settled --------------------------------------------------------------------------------------

    @property
    def stashed(self) -> list[Extent]:
        """What is held in memory: all that was written since the last `advance`, up to the freeze."""
        unit = self.block_size
        return clip(merge((block * unit, unit) for block in self._stash.blocks), 0, self.size or 0)

    def overlay(self, offset: int, view: memoryview) -> list[Extent]:
        """Copy what is held of the range at `offset` into the view; the rest of the range, as extents."""
        return self._stash.overlay(offset, view)

    def changed_after(self, extents: Sequence[Extent]) -> Extent | None:
        """The first of the extents that was written to after the freeze, so that the device no longer has it."""
        assert self.mark is not None
        if not extents:
            return None
        changed = self.changed_since(self.mark)
        for offset, length in extents:
            if hit := clip(changed, offset, offset + length):
                return hit[0]
        return None


class SettledReader:
    """Reads a settled source: the stash over what earlier rounds stored, else over the device as far as it still is
    what it was."""

    def __init__(self, source: LiveSource, base: tuple[int, OpenBase] | None) -> None:
        self._source = source
        self._device: DirectReader | None = None
        self._chunk_size = 0 if base is None else base[0]
        self._fill = None if base is None else base[1]()

    def read_into(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        """Read extents into the buffer, one right behind the other. Raises OSError; StasisError for what is lost."""
        for offset, view in _cut(extents, buffer, self._chunk_size):
            if self._fill is not None and (not offset % self._chunk_size) and self._is_chunk(offset, len(view)):
                self._fill(offset // self._chunk_size, view)
                self._source.overlay(offset, view)
            else:
                self._read_device(offset, view)

    def _is_chunk(self, offset: int, length: int) -> bool:
        return length == min(self._chunk_size, (self._source.size or 0) - offset)

    def _read_device(self, offset: int, view: memoryview) -> None:
        if self._device is None:
            self._device = DirectReader(self._source.path)
        self._device.read_into([(offset, len(view))], view)
        rest = self._source.overlay(offset, view)
        # Only now: a write is marked before its data can have been seen by the read above.
        lost = self._source.changed_after(rest)
        if lost is not None:
            raise StasisError(f"{self._source.path} was written to between {lost[0]} and {sum(lost)} after the freeze, "
                              "before this could be read", hint="run the backup again")

    def abort(self) -> None:
        """Nothing to do: a read of a disk ends by itself."""

    def close(self) -> None:
        """Close the device."""
        if self._device is not None:
            self._device.close()


def _open(path: str) -> DirectReader:
    try:
        return DirectReader(path)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", hint="stasis track list shows the live devices") from None
    except OSError as error:
        raise StasisError(f"{path} cannot be read directly: {error.strerror}", errno=error.errno or 0) from error


def _cut(extents: Sequence[Extent], buffer: memoryview, unit: int) -> Iterator[tuple[int, memoryview]]:
    """The extents with their parts of the buffer, cut where chunks begin; unit 0: not cut."""
    position = 0
    for offset, length in extents:
        end = offset + length
        while offset < end:
            stop = min(end, (offset // unit + 1) * unit) if unit else end
            yield offset, buffer[position : position + stop - offset]
            position, offset = position + stop - offset, stop


def _joined(places: Sequence[Place]) -> list[Place]:
    """Places that lie one behind the other both on the device and in memory, as one."""
    joined: list[Place] = []
    for offset, address, length in places:
        if joined:
            start, begin, before = joined[-1]
            if (start + before, begin + before) == (offset, address):
                joined[-1] = start, begin, before + length
                continue
        joined.append((offset, address, length))
    return joined
