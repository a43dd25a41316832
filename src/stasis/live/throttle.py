# SPDX-License-Identifier: Apache-2.0
"""Slowing those who write to a device, for the time of a copy (`--on-busy throttle`).

Only writes to the disks that are copied are limited, by io.max of the cgroups that are seen to write there. What was in
force before is left with the watchdog, which puts it back whatever becomes of us.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from stasis.linux import iomax

__all__ = ["Throttle"]

LOOK_SECONDS = 0.25
LOWEST = 256 << 10  # bytes per second: slow, but not a standstill


class Keeper(Protocol):
    """Who writes `text` to the file behind a descriptor at the end, whatever happens."""

    def restore_later(self, descriptor: int, text: str) -> None:
        """Take charge of it."""


class Throttle:
    """The limits that we set. They end with the watchdog."""

    def __init__(self, keeper: Keeper, devices: Sequence[int], top: Path | None = None,
                 pause: Callable[[float], None] = time.sleep) -> None:
        """devices: numbers of those that are copied. top: where cgroups are; None looks for it."""
        self._keeper, self._devices, self._pause = keeper, list(devices), pause
        self._top = top
        self.limits: dict[tuple[Path, int], int] = {}
        self._before: dict[tuple[Path, int], str] = {}

    def tighten(self, rate: float) -> bool:
        """Let those who write do so at half of what they were seen to, and of what we let them before.

        rate: bytes per second that is too much for all of them together. False if nobody can be slowed any more.
        """
        top = self._top or iomax.root()
        if top is None:
            return False
        disks = sorted({iomax.whole_disk(device) for device in self._devices})
        before = {(group, disk): iomax.written(group, disk) for group in iomax.cgroups(top) for disk in disks}
        self._pause(LOOK_SECONDS)
        slowed = False
        for (group, disk), count in before.items():
            # Who is slow by now may show nothing in so short a time.
            speed = max((iomax.written(group, disk) - count) / LOOK_SECONDS, self.limits.get((group, disk), 0))
            if speed > 0:
                slowed |= self._slow(group, disk, min(speed, rate) / 2)
        return slowed

    def again(self) -> None:
        """The keeper was told to write what it keeps before its end: set the same limits once more."""
        for (group, disk), limit in self.limits.items():
            self._set(group, disk, limit, leave=True)

    def _slow(self, group: Path, disk: int, speed: float) -> bool:
        key = group, disk
        known = self.limits.get(key)
        limit = max(LOWEST, int(speed if known is None else min(speed, known / 2)))
        if limit == known or not self._set(group, disk, limit, leave=known is None):
            return False
        self.limits[key] = limit
        return True

    def _set(self, group: Path, disk: int, limit: int, *, leave: bool) -> bool:
        """leave: the keeper does not have what was there before us."""
        try:
            fd = os.open(group / "io.max", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if leave:
                before = self._before.setdefault((group, disk), iomax.limit_line(group, disk))
                self._keeper.restore_later(fd, before)
            os.write(fd, iomax.limit_line(group, disk, limit).encode())
        except OSError:
            return False
        finally:
            os.close(fd)
        return True
