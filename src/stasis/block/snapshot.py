# SPDX-License-Identifier: Apache-2.0
"""The life cycle of a snapshot: its states, the moves allowed between them, and the one function that moves.

Everything else asks; nothing else decides. The states are written into `snapshot.json`, so their values are a format.
"""

from __future__ import annotations

import errno
from enum import Enum

from stasis.errors import StateError

__all__ = ["MOVES", "SnapshotState", "move"]


class SnapshotState(Enum):
    """Where a snapshot is in its life."""

    CREATED = "created"
    """It has a difference storage and may be given devices."""
    TAKING = "taking"
    """Workers are being held. A daemon that finds a snapshot in this state after its own death aborts it."""
    TAKEN = "taken"
    """Every device has an image of the same instant."""
    CORRUPTED = "corrupted"
    """At least one image can no longer be trusted; it answers EIO. The origins are unharmed."""
    DESTROYING = "destroying"
    """It is being taken apart; nothing leads back from here."""


MOVES: dict[SnapshotState, frozenset[SnapshotState]] = {
    SnapshotState.CREATED: frozenset({SnapshotState.TAKING, SnapshotState.DESTROYING}),
    SnapshotState.TAKING: frozenset({SnapshotState.CREATED, SnapshotState.TAKEN, SnapshotState.DESTROYING}),
    SnapshotState.TAKEN: frozenset({SnapshotState.CORRUPTED, SnapshotState.DESTROYING}),
    SnapshotState.CORRUPTED: frozenset({SnapshotState.CORRUPTED, SnapshotState.DESTROYING}),
    SnapshotState.DESTROYING: frozenset(),
}

_REFUSALS = {
    SnapshotState.TAKEN: "is already taken",
    SnapshotState.CORRUPTED: "is already taken, and corrupted",
    SnapshotState.TAKING: "is being taken",
    SnapshotState.DESTROYING: "is being destroyed",
    SnapshotState.CREATED: "is not taken yet",
}


def move(uuid: str, state: SnapshotState, to: SnapshotState) -> SnapshotState:
    """Return `to` if a snapshot may go there from `state`.

    Raises StateError with errno EALREADY otherwise, as a second take does (blksnap's SNAPSHOT_TAKE).
    """
    if to in MOVES[state]:
        return to
    raise StateError(
        f"snapshot {uuid} {_REFUSALS[state]}",
        hint=f"see stasis snapshot show {uuid}",
        errno=errno.EALREADY,
    )
