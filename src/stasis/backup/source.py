# SPDX-License-Identifier: Apache-2.0
"""Where a backup reads from: a device as it was at one instant.

Served and live devices, image files, block devices, snapshots that exist already, dattobd's and standard input are
sources. A backup job knows only this interface. An extent is ``(offset, length)`` in bytes;
lists of extents ascend and do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Extent", "Mark", "MovingGroup", "MovingSource", "OpenBase", "PointInTimeSource", "SourceReader"]

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

    name: the device's name in the repository; kind: "served", "live", "snapshot", "datto", "file",
    "device" or "stdin".
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


class OpenBase(Protocol):
    """Where a settled source finds what it did not keep itself: what was stored of it in an earlier round."""

    def __call__(self) -> Callable[[int, memoryview], None]:
        """For one thread: a call that puts a chunk, by its number, into a view of its length."""


class MovingSource(PointInTimeSource, Protocol):
    """A source that is written to while it is read, until it is brought to rest for its instant.

    consistency: "frozen" or "crash" once it is settled. unreadable: what the source itself could not read for its
    instant, and has zeroes for. pending_bytes: written since the last `advance`. stashed: the whole tracking blocks
    that the source holds itself, once it is settled: all that was written since the last `advance`.
    """

    consistency: str
    unreadable: list[Extent]

    @property
    def pending_bytes(self) -> int: ...

    @property
    def stashed(self) -> list[Extent]: ...

    def begin(self) -> None:
        """Begin to be read: `mark` names this moment, and `advance` tells what is written from now on."""

    def advance(self) -> list[Extent]:
        """What was written since the last call; a read from now on sees it."""

    def use_base(self, chunk_size: int, open_base: OpenBase) -> None:
        """Where readers of the settled source get what is not stashed, chunk by chunk."""


class MovingGroup(Protocol):
    """The moving sources of a run together."""

    def fits(self) -> bool:
        """Whether so little is left that no more rounds are needed."""

    def gather(self) -> bool:
        """Have the sources hold what is left, which fits. False if it did not after all: rounds are needed."""

    def relieve(self, seconds: float) -> None:
        """More is written than copied, the last round took `seconds`: do something about it, or raise BusyError."""
