# SPDX-License-Identifier: Apache-2.0
"""`stasis map` for tracked devices: what the daemon answers for served ones, without a daemon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stasis.block.mapformat import MapInfo
from stasis.errors import NotFoundError, UsageError
from stasis.live import devicefile
from stasis.live.devicefile import DeviceFile
from stasis.live.tracker import Mark, Tracker

__all__ = ["changed", "info", "is_tracked", "mark", "read"]

Extent = tuple[int, int]


def is_tracked(device: str, state: Path) -> bool:
    """Whether a name or path is that of a tracked device."""
    try:
        devicefile.find(state, device)
    except (NotFoundError, PermissionError):
        return False
    return True


def _look(device: str, state: Path) -> Tracker:
    return Tracker(DeviceFile(state, devicefile.find(state, device)), None)


def info(device: str, state: Path) -> MapInfo:
    """The figures of a map. NotFoundError, StateError."""
    with _look(device, state) as tracker:
        return tracker.changes.info()


def read(device: str, state: Path) -> bytes:
    """The whole map, one byte per tracking block, with what the programs marked up to now."""
    with _look(device, state) as tracker:
        tracker.check()
        return tracker.read_map()


def changed(device: str, state: Path, since: int, generation: str | None) -> list[Extent]:
    """Byte ranges written after switch `since`. GenerationError if that is not known."""
    with _look(device, state) as tracker:
        return tracker.changed_since(Mark(generation or tracker.mark.generation, since))


def mark(device: str, state: Path, ranges: Sequence[Extent]) -> None:
    """Count ranges as written. UsageError for one that is not within the device, BusyError."""
    with Tracker.open(device, state) as tracker:
        for offset, length in ranges:
            if offset < 0 or length <= 0 or offset + length > tracker.identity.size:
                raise UsageError(f"the range {offset}:{length} does not lie within {device}, "
                                 f"which has {tracker.identity.size} bytes", hint="no range was marked")
        tracker.mark_changed(list(ranges))
