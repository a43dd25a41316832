# SPDX-License-Identifier: Apache-2.0
"""What copying a live device needs of its change tracking (`stasis.live.tracker` has it; tests have a model).

A write that completed before a `turn` or `switch` is in its extents or in earlier ones; one that completes later is in
later ones, even if it was queued before. docs/design/live-copy.md says what follows from that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from stasis.backup.source import Extent
    from stasis.live.tracker import Mark

__all__ = ["SwitchLike", "Tracked"]


class SwitchLike(Protocol):
    """An epoch that was ended."""

    @property
    def extents(self) -> list[Extent]:
        """What was written between the last turn and the switch."""

    def settle(self) -> Mark:
        """Make the switch durable; writes files. GenerationError if tracking was lost up to it."""


class Tracked(Protocol):
    """The tracking of one device. block_size is in bytes; lost says why nothing is known, "" if all is well."""

    @property
    def block_size(self) -> int:
        """Unit of tracking."""

    @property
    def lost(self) -> str:
        """Why nothing can be concluded from the map."""

    def check(self) -> None:
        """GenerationError if changes may have been missed. Writes no file."""

    def changed_since(self, mark: Mark, /) -> list[Extent]:
        """What was written since the mark, up to now. GenerationError where that is not known."""

    def count_changed(self) -> int:
        """Blocks written since the last turn or switch."""

    def turn(self) -> list[Extent]:
        """End a round: what was written since the one before. Writes files."""

    def prepare_switch(self) -> None:
        """Do ahead of `switch` what takes time."""

    def switch(self) -> SwitchLike:
        """End the epoch, without writing to any file."""

    def distrust(self, reason: str) -> None:
        """Believe nothing of the map any more, durably."""

    def begin_generation(self, reason: str) -> None:
        """Start over, so that a full copy can be gone on from."""
