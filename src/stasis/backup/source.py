# SPDX-License-Identifier: Apache-2.0
"""Where a backup reads from: a device as it was at one instant.

Served devices, image files, block devices, snapshots that exist already and standard input are sources; so will be
live devices and dattobd's files. A backup job knows only this interface. An extent is ``(offset, length)`` in bytes;
lists of extents ascend and do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Extent", "Mark", "PointInTimeSource", "SourceReader"]

Extent = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in the history of a device: change number `number` of generation `generation`."""

    generation: str
    number: int


class SourceReader(Protocol):
    """One way to read a source; a thread has one of its own."""

    def read_into(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        """Read extents into the buffer, one right behind the other from its start on. Raises OSError."""

    def abort(self) -> None:
        """Called from another thread when the backup is given up: a read that waits should end, in whatever way."""

    def close(self) -> None:
        """Give back what the reader holds."""


class PointInTimeSource(Protocol):
    """A device at one instant. Nothing that is written to it later shows.

    name: the device's name in the repository; kind: "served", "snapshot", "file", "device" or "stdin".
    path: the origin, for people; size: in bytes; None where it is known only at the end (standard input).
    identity: tells the device from another one of the same name (path and inode or disk sequence number).
    mark: names this instant for a later `changed_since`; None where nothing is tracked.
    block_size: unit of change tracking in bytes, 0 where nothing is tracked.
    taken: when the instant was, in seconds since 1970; None for one that begins with the backup.
    """

    name: str
    kind: str
    path: str
    size: int | None
    identity: str
    mark: Mark | None
    block_size: int
    taken: float | None

    def changed_since(self, mark: Mark) -> list[Extent]:
        """What changed between `mark` and this instant. GenerationError says why that is not known."""

    def zero_extents(self) -> list[Extent]:
        """What is known to read as zeroes; empty where that is not known."""

    def open_reader(self) -> SourceReader:
        """A reader; may be called from any thread."""

    def disturbed(self) -> str:
        """How the source was seen to be written to after all while it was read; empty if it was not."""

    def distrust(self, reason: str) -> None:
        """Change tracking was found to be wrong: make every later `changed_since` of older marks fail."""
