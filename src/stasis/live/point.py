# SPDX-License-Identifier: Apache-2.0
"""A live device at one instant, copied into a file: all of it, or what changed since an earlier instant.

As with a backup of a live device, what is written while it is copied is copied again in rounds, and the last of it in
a freeze (docs/design/live-copy.md). Every byte that is copied stands in the file where it stands on the device; what is
not copied is a hole. It runs as a process of its own, `python -m stasis.live.point`, because file systems are frozen
meanwhile and memory is locked.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stasis.backup.source import Extent
from stasis.block.copy.plan import merge
from stasis.errors import NotFoundError, StasisError, StorageError
from stasis.linux import files
from stasis.linux.iobuffer import IoBuffer
from stasis.linux.memory import is_zero
from stasis.live import tracking
from stasis.live.liveset import LiveSet
from stasis.live.options import LiveOptions
from stasis.live.source import LiveSource
from stasis.live.stash import Budget
from stasis.live.tracker import Mark, Tracker

__all__ = ["Point", "main", "take"]

WINDOW = 4 << 20
HOLE = 64 << 10
"""Bytes of zeroes that are left out where the file has nothing yet."""
GAINING = 0.9  # as in backup/job/precopy.py


@dataclass(frozen=True)
class Point:
    """The instant: its mark, the device's size in bytes, what was copied, and how long file systems rested."""

    mark: Mark
    size: int
    extents: list[Extent]
    freeze_seconds: float
    warnings: list[str]


def take(device: str, state: Path, target: str, since: Mark | None, options: LiveOptions,
         others: Sequence[str] = ()) -> Point:
    """Copy to `target`, an empty file, what changed since the mark, or everything and track from now on.

    What is in the file is durable. GenerationError if the changes are not known, BusyError if the device is written
    faster than it is copied, or if the file or one of `others` lies on it; the mark before stays good then.
    """
    with contextlib.ExitStack() as stack:
        tracker = stack.enter_context(_open(device, state, since))
        source = stack.enter_context(LiveSource(tracker.identity.name, tracker.identity.path, tracker,
                                                Budget(options.memory)))
        group = stack.enter_context(LiveSet([source], options))
        for path in (target, *others):
            group.refuse_writes_to(os.path.dirname(path), "the directory", "name a place on another device")
        fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, source.size or 0)
        return _Copy(source, tracker, group, fd, options).run(since)


def _open(device: str, state: Path, since: Mark | None) -> Tracker:
    """The tracking, begun where it is not and everything is to be copied."""
    try:
        tracker = Tracker.open(device, state)
    except NotFoundError:
        if since is not None:
            raise
        return tracking.start(device, state)
    if since is None and tracker.lost:
        tracker.begin_generation(f"a copy found tracking lost: {tracker.lost}")
    return tracker


class _Copy:
    def __init__(self, source: LiveSource, tracker: Tracker, group: LiveSet, fd: int, options: LiveOptions) -> None:
        self._source, self._tracker, self._group, self._fd, self._options = source, tracker, group, fd, options
        self._size = source.size or 0
        self._copied: list[Extent] = []

    def run(self, since: Mark | None) -> Point:
        with IoBuffer(WINDOW) as buffer:
            self._source.advance()
            extents = [(0, self._size)] if since is None else self._tracker.changed_since(since)
            self._round(buffer, extents, is_first=True)
            self._rounds(buffer)
            self._group.take(lambda: None)
            self._unstash(buffer)
        os.fsync(self._fd)
        report = self._group.report
        # Not the mark of the switch: where that used up the last number, this one is of the generation that begins.
        return Point(self._tracker.mark, self._size, self._copied, report.seconds, report.warnings)

    def _rounds(self, buffer: IoBuffer) -> None:
        left, before = self._options.rounds, float("inf")
        while not (self._group.fits() and self._group.gather()):
            started, pending = time.monotonic(), float(self._group.pending_bytes)
            self._round(buffer, self._source.advance(), is_first=False)
            left -= 1
            if not left or pending > before * GAINING:
                self._group.relieve(time.monotonic() - started)
                left, pending = self._options.rounds, float("inf")
            before = pending

    def _round(self, buffer: IoBuffer, extents: list[Extent], *, is_first: bool) -> None:
        with contextlib.closing(self._source.open_reader()) as reader:
            for offset, length in _windows(extents):
                view = buffer.view[:length]
                try:
                    reader.read_into([(offset, length)], view)
                except OSError as error:
                    raise StorageError(f"{self._source.path} cannot be read between {offset} and {offset + length}: "
                                       f"{error.strerror}", errno=error.errno) from error
                for start, stop in _pieces(buffer.address, length) if is_first else [(0, length)]:
                    self._write(view[start:stop], offset + start)
        self._copied = merge([*self._copied, *extents])

    def _unstash(self, buffer: IoBuffer) -> None:
        """Write what was copied into memory, late and while everything rested."""
        stashed = self._source.stashed
        for offset, length in _windows(stashed):
            assert not self._source.overlay(offset, buffer.view[:length])
            self._write(buffer.view[:length], offset)
        self._copied = merge([*self._copied, *stashed])

    def _write(self, data: memoryview, offset: int) -> None:
        try:
            done = os.pwritev(self._fd, [data], offset)
            if done < len(data):
                files.transfer_rest(os.pwritev, self._fd, [data], offset, done)
        except OSError as error:
            raise StorageError(f"the copy of {self._source.path} cannot be written: {error.strerror}",
                               errno=error.errno, hint="nothing is lost; make room and try again") from error


def _windows(extents: list[Extent]) -> Iterator[Extent]:
    for offset, length in extents:
        for start in range(offset, offset + length, WINDOW):
            yield start, min(WINDOW, offset + length - start)


def _pieces(address: int, length: int) -> Iterator[Extent]:
    """Start and end of what is not zeroes."""
    for start in range(0, length, HOLE):
        stop = min(start + HOLE, length)
        if not is_zero(address + start, stop - start):
            yield start, stop


# -- as a process -------------------------------------------------------------------------------------


def main() -> None:
    """Do what standard input says as JSON (device, state, target, since, others); print the outcome as JSON."""
    wanted: dict[str, Any] = json.load(sys.stdin)
    since = None if wanted["since"] is None else Mark(*wanted["since"])
    try:
        point = take(wanted["device"], Path(wanted["state"]), wanted["target"], since, LiveOptions(), wanted["others"])
    except StasisError as error:
        print(json.dumps({"error": error.as_dict()}))
    except OSError as error:
        print(json.dumps({"error": StasisError(str(error), errno=error.errno or 0).as_dict()}))
    else:
        print(json.dumps({"point": asdict(point)}))


if __name__ == "__main__":
    main()
