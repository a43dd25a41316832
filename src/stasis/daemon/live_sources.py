# SPDX-License-Identifier: Apache-2.0
"""The live devices of a backup: from their names to sources that are brought to rest together."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stasis.backup.source import Mark, PointInTimeSource
from stasis.daemon.signals import deferred_interrupts

if TYPE_CHECKING:
    from stasis.backup.job import CreateOptions
    from stasis.backup.job.precopy import Precopy
    from stasis.backup.progress import Progress
    from stasis.backup.repo import Repository
    from stasis.live.liveset import LiveSet
    from stasis.live.options import LiveOptions
    from stasis.live.source import LiveSource

__all__ = ["LiveSources", "is_tracked"]

T = TypeVar("T")
TRIES = 6
"""How often the rounds may turn out not to have left little enough."""
APART = "back them up with a command of their own"


def is_tracked(path: str, state: Path) -> bool:
    """Whether a path is a block device that `stasis track start` was told to track."""
    if not (state / "live").is_dir():
        return False
    try:
        number = os.stat(path)
    except OSError:
        return False
    if not stat.S_ISBLK(number.st_mode):
        return False
    from stasis.live import devicefile

    # What the user named is tracked also where that leads to another disk by now: a full backup goes on with that one.
    records = (devicefile.DeviceFile(state, name).read() for name in devicefile.names(state))
    return any(os.path.abspath(path) == record.given or _same(record.identity.path, number.st_rdev)
               for record in records)


def _same(path: str, rdev: int) -> bool:
    try:
        return os.stat(path).st_rdev == rdev
    except OSError:
        return False


class LiveSources:
    """The live devices of one run; a context manager."""

    def __init__(self, wanted: Sequence[tuple[str, str]], state: Path, options: LiveOptions, *,
                 skip_unreadable: bool) -> None:
        """wanted: (name in the repository, path). Opens devices and tracking. Raises StasisError."""
        from stasis.live.source import LiveSource
        from stasis.live.staging import StagingArea
        from stasis.live.stash import Budget
        from stasis.live.tracker import Tracker

        self._options = options
        self._stack = contextlib.ExitStack()
        self._group: LiveSet | None = None
        self._precopy: Precopy | None = None
        self.sources: dict[str, LiveSource] = {}
        area = None if options.staging is None else StagingArea(options.staging, options.staging_limit)
        budget = Budget(options.memory, area)
        with contextlib.ExitStack() as opening:
            opening.callback(budget.close)
            for name, path in wanted:
                tracker = opening.enter_context(Tracker.open(path, state))
                self.sources[name] = opening.enter_context(
                    LiveSource(name, path, tracker, budget, skip_unreadable=skip_unreadable))
                if not tracker.lost:
                    mark = tracker.mark
                    self.sources[name].mark = Mark(mark.generation, mark.number)
            self._stack = opening.pop_all()

    def __enter__(self) -> LiveSources:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, repository: Repository, options: CreateOptions, progress: Progress) -> Precopy:
        """Copy while everything goes on, until little is left. Raises BusyError, StasisError."""
        from concurrent.futures import ThreadPoolExecutor

        from stasis.backup.job.precopy import Precopy

        # The devices' epochs end beside that: each waits twice, for programs in the kernel and for the disk.
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(self._look)
            try:
                precopy = self._precopy = Precopy(list(self.sources.values()), repository, options, progress)
                self._stack.callback(precopy.close)
            finally:
                group = self._group = looking.result()
        if "://" not in repository.url and (below := group.stack.holds(repository.url)) is not None:
            precopy.warnings.append(f"the repository lies on {below.target}, on a device that it holds the backup of: "
                                    "it would be lost with it")
        precopy.run(group, self._options.rounds)
        return precopy

    def _look(self) -> LiveSet:
        """Find what lies on the devices, and have what is needed to bring it to rest."""
        from stasis.live.liveset import LiveSet

        return self._stack.enter_context(LiveSet(list(self.sources.values()), self._options))

    def refuse_writes(self, paths: Sequence[tuple[str, str]]) -> None:
        """Raise BusyError if what a snapshot of served devices writes to, (what, path), would be frozen."""
        assert self._group is not None
        for what, path in paths:
            self._group.refuse_writes_to(path, what, APART)

    def take(self, inside: Callable[[], T]) -> T:
        """Freeze, call `inside`, copy the rest, thaw. The sources are settled then. Raises BusyError, StasisError."""
        from stasis.live.stash import StashFull

        assert self._group is not None
        assert self._precopy is not None
        for left in reversed(range(TRIES)):
            try:
                return self._take(self._group, self._precopy, inside)
            except StashFull:
                if not left:
                    raise
                self._precopy.go_on(self._group, self._options.rounds)
        raise AssertionError("there is at least one try")

    def _take(self, group: LiveSet, precopy: Precopy, inside: Callable[[], T]) -> T:
        with deferred_interrupts():  # a file system is not left frozen for the time of an exception
            result = group.take(inside)
            precopy.warnings += group.report.warnings
            precopy.settle({"freeze_milliseconds": round(group.report.seconds * 1000),
                            "freeze_attempts": group.report.attempts})
            return result

    def planned(self) -> list[PointInTimeSource]:
        """The sources as they are, to be asked what changed."""
        return list(self.sources.values())
