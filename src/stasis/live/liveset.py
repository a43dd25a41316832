# SPDX-License-Identifier: Apache-2.0
"""Several live devices at one instant: copy what changes until little is left, freeze, copy that, thaw.

Nothing in here writes to a file between freeze and thaw: what was copied lies in locked memory, the switch of a change
map is one in memory, and what is to be told is told afterwards.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

from stasis.errors import BusyError
from stasis.linux import blockdev, freeze, memlock, mounts
from stasis.live.freezer import FreezeExpired, Freezer, Frozen
from stasis.live.options import LiveOptions
from stasis.live.source import LiveSource
from stasis.live.stack import Stack
from stasis.live.stash import StashFull
from stasis.live.throttle import Throttle
from stasis.units import format_size

__all__ = ["FreezeReport", "LiveSet"]

T = TypeVar("T")

STASH_ROUNDS = 8
ATTEMPTS = 3
FITTING = 0.6  # of the memory: it has to take what is written in the rounds as well
FIRST_GUESS = 200e6  # bytes per second that are read, until it was measured
OVERHEAD = 0.02  # seconds of a freeze in which nothing has changed
MOST_NAMED = 3
AIM = 0.03  # seconds: another round in memory is cheaper than a freeze that is longer than this
CONVERGED = 0.75  # a round that leaves more than this of what the one before left gains nothing


@dataclass
class FreezeReport:
    """What the freeze came to. seconds: from the first file system that stopped to the last that went on."""

    seconds: float = 0.0
    bytes_copied: int = 0
    attempts: int = 0
    frozen: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class _Disturbed(BusyError):
    """Something was written while everything should have rested."""


class LiveSet:
    """The live devices of one run; a context manager. Rounds until it `fits` and can be gathered, then `take`."""

    def __init__(self, sources: Sequence[LiveSource], options: LiveOptions) -> None:
        """Find the file systems, and start the watchdog. Raises StasisError."""
        self.sources, self.options = list(sources), options
        self.report = FreezeReport()
        self._rate = FIRST_GUESS
        self._sync_seconds = 0.0
        self._late = 0
        self._released = False  # slowed writers are let go at a freeze, which stops them, but not those to raw devices
        self._stages = False
        self._closing = contextlib.ExitStack()
        self._look()

    def _look(self) -> None:
        """Find the file systems as they are mounted now, and start a watchdog for them."""
        self._closing.close()
        devices = [source.rdev for source in self.sources]
        with contextlib.ExitStack() as opening:
            self.stack = opening.enter_context(Stack(devices))
            self._freezer = opening.enter_context(Freezer(self.stack.file_systems))
            self._throttle = Throttle(self._freezer, devices)
            self._own = {device: self.stack.systems_above(device) for device in devices}
            self._raw = self.stack.bare
            if self.options.staging is not None:
                self.refuse_writes_to(str(self.options.staging), "the staging area",
                                      "name a directory on another file system with --staging")
            self._closing = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._closing.close()

    # -- before -------------------------------------------------------------------------------------------------------

    def refuse_writes_to(self, path: str, what: str, hint: str) -> None:
        """Raise BusyError if `path` lies on a file system that will be frozen: writing there would wait for ever."""
        found = self.stack.holds(path)
        if found is not None:
            raise BusyError(f"{what} {path} lies on {found.target}, which must be frozen for this backup", hint=hint)

    @property
    def pending_bytes(self) -> int:
        """What is yet to be copied of all devices."""
        return sum(source.pending_bytes for source in self.sources)

    def fits(self) -> bool:
        """Whether the rest is little enough for rounds in memory. What is staged is copied twice: only if need be."""
        return self.pending_bytes <= (self.options.room if self._stages else self.options.memory) * FITTING

    def relieve(self, seconds: float) -> None:
        """The rounds do not get ahead of the writers: stage the rest, slow them as `on_busy` says, or raise BusyError.

        seconds: how long the last round took.
        """
        if self.options.staging is not None and not self._stages:
            self._stages = True
            if self.fits():
                return
        rate = self.pending_bytes / max(seconds, 0.001)
        if self.options.on_busy == "throttle" and self._throttle.tighten(rate):
            return
        raise BusyError(f"{self._names} change faster than they are copied: {format_size(int(rate))} per second, and "
                        f"{format_size(self.pending_bytes)} are left, with {format_size(self.options.room)} of "
                        f"{'memory' if self.options.staging is None else 'memory and staging area'} for them",
                        hint="choose a time when less is written, allow more with --freeze-memory or --staging, or "
                             "--on-busy throttle; no change is lost")

    @property
    def _names(self) -> str:
        return " and ".join(source.path for source in self.sources)

    # -- the instant --------------------------------------------------------------------------------------------------

    def gather(self) -> bool:
        """Copy what is left into memory while more is written, until little is. False if there is no room for that, or
        too little for what a freeze has to copy: all of it is to be read in another round then."""
        try:
            self.converge()
        except StashFull:
            fitting = False
        else:
            held = sum(source.stashed_bytes for source in self.sources)
            fitting = self._late <= (self.options.room - min(held, self.options.memory)) * FITTING
        if not fitting:
            self._empty()
        return fitting

    def converge(self) -> None:
        """Copy what changed into memory, until the rest fits the freeze that is allowed or nothing is gained.

        Raises StashFull.
        """
        before = float("inf")
        for _ in range(STASH_ROUNDS):
            self._sync()
            pending = self._late = self.pending_bytes
            if self._estimate(pending) <= min(self.options.max_freeze / 2, AIM) or pending > before * CONVERGED:
                break
            before = pending
            self._timed_round()
        self._freezer.await_start()
        for source in self.sources:
            source.prepare(2 * source.pending_bytes)

    def _timed_round(self) -> None:
        started = time.monotonic()
        copied = sum(source.stash_round() for source in self.sources)
        self._measured(copied, time.monotonic() - started)

    def _measured(self, copied: int, seconds: float) -> None:
        if copied >= 1 << 20:
            self._rate = copied / max(seconds, 1e-4)

    def _estimate(self, pending: int) -> float:
        """Seconds that a freeze would take now."""
        return OVERHEAD + self._sync_seconds / 2 + pending / self._rate

    def _sync(self) -> None:
        """Write out what lies in page caches, so that it need not be written in the freeze."""
        started = time.monotonic()
        for file_system in self.stack.file_systems:
            if not file_system.read_only:
                freeze.sync(file_system.fd)
        self._flush_raw()
        self._sync_seconds = time.monotonic() - started

    def take(self, inside: Callable[[], T]) -> T:
        """Freeze, switch, copy the rest, call `inside`, thaw. The sources are settled then.

        inside: takes its own devices' snapshots at the same instant; writes to nothing that is frozen.
        Raises BusyError, FreezeExpired, StashFull, StasisError; all is thawed then, and no change is lost. After
        StashFull it may be tried again when more rounds were made.
        """
        if not self.stack.is_current():  # the rounds may have taken hours
            self._look()
        limits = [self.options.max_freeze] * ATTEMPTS
        if self.options.on_busy == "freeze":
            limits.append(max(self.options.busy_freeze, self.options.max_freeze))
        elif self.options.on_busy == "throttle":
            limits += [self.options.max_freeze] * ATTEMPTS
        for number, limit in enumerate(limits):
            self.report.attempts = number + 1
            try:
                self.converge()
                return self._attempt(limit, inside)
            except StashFull:
                self._empty()
                raise
            except (FreezeExpired, _Disturbed) as error:
                self._give_up()
                if number == len(limits) - 1:
                    raise self._too_busy(error, limit) from error
                if number >= ATTEMPTS - 1 and self.options.on_busy == "throttle":
                    self._throttle.tighten(self._rate)
        raise AssertionError("there is at least one attempt")

    def _give_up(self) -> None:
        for source in self.sources:
            source.give_up()
        if self._released:
            self._throttle.again()
            self._released = False

    def _empty(self) -> None:
        """There was no room: what is held is to be read in other rounds, while less is written if that was allowed."""
        self._give_up()
        for source in self.sources:
            source.unstash()
        if self.options.on_busy == "throttle":
            self._throttle.tighten(self._rate)

    def _too_busy(self, error: BusyError, limit: float) -> BusyError:
        users = list(dict.fromkeys(user for source in self.sources for user in mounts.holders_of(source.rdev)))
        used = f"; in use: {', '.join(users[:MOST_NAMED])}" if users else ""
        return BusyError(f"no point in time could be had of {self._names} within {limit:g} s of rest: {error.message} "
                         f"({format_size(self.pending_bytes)} changed since, read at {format_size(int(self._rate))} "
                         f"per second{used})",
                         hint=error.hint or "choose a time when less is written; no change is lost")

    def _attempt(self, limit: float, inside: Callable[[], T]) -> T:
        with memlock.no_collection():
            started = time.monotonic()
            try:
                self._released = bool(self._freezer.file_systems) and not self._raw
                frozen = self._freezer.freeze(limit, release=self._released)
                result = self._while_frozen(frozen, started, limit, inside)
                taken = time.time()
            except BaseException:
                self._freezer.thaw_quietly()
                raise
            self._freezer.thaw()
            self.report.seconds = time.monotonic() - started
        if not self.stack.is_current():
            raise BusyError(f"a file system was mounted or unmounted on {self._names} while it was copied",
                            hint="run the backup again; no change is lost")
        self._settle(taken, frozen)
        return result

    def _while_frozen(self, frozen: Frozen, started: float, limit: float, inside: Callable[[], T]) -> T:
        for file_system in frozen.unable:
            freeze.sync(file_system.fd)
        self._flush_raw()
        for source in self.sources:
            source.switch()
        copying = time.monotonic()
        copied = 0
        for source in self.sources:
            copied += source.copy_rest()
            if time.monotonic() - started > limit:
                raise FreezeExpired(f"copying {format_size(copied)} took longer than the {limit:g} s that are allowed")
        self._measured(copied, time.monotonic() - copying)
        self.report.bytes_copied = copied
        self._refuse_disturbance()
        result = inside()
        self._refuse_disturbance()
        for source in self.sources:
            source.check()
        return result

    def _refuse_disturbance(self) -> None:
        for source in self.sources:
            if source.was_written:
                raise _Disturbed(f"{source.path} was written to while it should have rested", hint=self._calming())

    def _calming(self) -> str:
        if swaps := self.stack.swaps:
            return (f"what is swapped out to {' and '.join(swaps)} counts: turn it off for the time of the backup "
                    "(swapoff), or put it on another disk; no change is lost")
        return "bring what writes to rest with --pre-snapshot; no change is lost"

    # -- after --------------------------------------------------------------------------------------------------------

    def _settle(self, taken: float, frozen: Frozen) -> None:
        self._closing.close()  # the watchdog has nothing to watch any more; throttles end
        self.report.frozen = [file_system.target for file_system in frozen.resting]
        unable = {file_system.device for file_system in frozen.unable if not file_system.read_only}
        for file_system in frozen.unable:
            if not file_system.read_only:
                self.report.warnings.append(f"{file_system.target} ({file_system.fstype}) cannot be frozen: its part "
                                            "of the copy is as after a power cut")
        for source in self.sources:
            own = self._own.get(source.rdev, frozenset())
            resting = bool(own) and not own & unable
            source.settle(taken, "frozen" if resting else "crash")

    def _flush_raw(self) -> None:
        """Write out the page cache of devices that programs write to without a file system."""
        ours = {source.rdev: source.path for source in self.sources}
        for path in (ours.get(device) or blockdev.node(device) for device in self._raw):
            if path is None:
                continue  # without a node nobody has it open
            with contextlib.suppress(FileNotFoundError), _opened(path) as fd:  # it went: reading it will tell
                os.fsync(fd)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
