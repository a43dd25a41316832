# SPDX-License-Identifier: Apache-2.0
"""What was backed up before: the backups of this host and a device, and the time that the next one gets."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stasis.backup.repo import Manifest, Repository
    from stasis.errors import DamagedError

__all__ = ["History", "is_good", "time_text"]

Warn = Callable[[str], None]


def is_good(manifest: Manifest) -> bool:
    """Whether a backup has all of its device."""
    return not manifest.statistics.get("bytes_unreadable", 0)


class History:
    """The backups that one host made, oldest first."""

    def __init__(self, repository: Repository, host: str, warn: Warn) -> None:
        self._warn = warn
        self._all = [manifest for manifest in _readable(repository, warn) if manifest.host == host]

    def of(self, device: str) -> list[Manifest]:
        """All backups of a device."""
        return [manifest for manifest in self._all if manifest.device == device]

    def parents(self, device: str) -> list[Manifest]:
        """Those that a later one may be made against."""
        return [manifest for manifest in self.of(device) if is_good(manifest)]

    def next_time(self, device: str, taken: float | None) -> str:
        """The time of a new backup: that of its snapshot, but later than the device's newest backup in any case.

        Backups are ordered by their time, so that a clock that was set back must not put the new one before others.
        """
        moment = datetime.fromtimestamp(time.time() if taken is None else taken, UTC)
        earlier = self.of(device)
        if not earlier or time_text(moment) > earlier[-1].time:
            return time_text(moment)
        newest = datetime.fromisoformat(earlier[-1].time)
        if moment < newest:
            self._warn(f"the clock went backwards: the newest backup of {device} is of {earlier[-1].time}, and now it "
                       f"is {time_text(moment)}; the new one is given a time right behind the newest")
        return time_text(newest + timedelta(microseconds=1))


def _readable(repository: Repository, warn: Warn) -> list[Manifest]:
    """All backups but those whose manifest is damaged: they are no reason not to make another one."""
    damaged: list[DamagedError] = []
    found = repository.backups(damaged.append)
    for error in damaged:
        warn(f"{error.message}; it is left out")
    return found


def time_text(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds; such texts sort as the times do."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
