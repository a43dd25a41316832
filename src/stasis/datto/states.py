# SPDX-License-Identifier: Apache-2.0
"""The life of a tracer: dattobd's six states and the moves between them. A failure is no state but an errno beside it.

The numbers are those of `state` in the module's status file.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from errno import EINVAL

from stasis.errors import StateError

__all__ = ["MOVES", "Move", "State", "move"]


class State(IntEnum):
    """Bit 0: snapshot (else incremental). Bit 1: active. Bit 2: unverified."""

    DORMANT_INCREMENTAL = 0
    DORMANT_SNAPSHOT = 1
    ACTIVE_INCREMENTAL = 2
    ACTIVE_SNAPSHOT = 3
    UNVERIFIED_INCREMENTAL = 4
    UNVERIFIED_SNAPSHOT = 5

    @property
    def is_snapshot(self) -> bool:
        return bool(self & 1)

    @property
    def is_active(self) -> bool:
        return bool(self & 2)

    @property
    def is_unverified(self) -> bool:
        return bool(self & 4)

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


class Move(Enum):
    """What can happen to a tracer."""

    TO_INCREMENTAL = "transition-to-incremental"
    TO_SNAPSHOT = "transition-to-snapshot"
    SLEEP = "the device is no longer served"
    WAKE = "the device is served"
    FORGET = "the daemon ends"


MOVES: dict[tuple[State, Move], State] = {
    (State.ACTIVE_SNAPSHOT, Move.TO_INCREMENTAL): State.ACTIVE_INCREMENTAL,
    (State.ACTIVE_INCREMENTAL, Move.TO_SNAPSHOT): State.ACTIVE_SNAPSHOT,
    (State.ACTIVE_SNAPSHOT, Move.SLEEP): State.DORMANT_SNAPSHOT,
    (State.ACTIVE_INCREMENTAL, Move.SLEEP): State.DORMANT_INCREMENTAL,
    (State.DORMANT_SNAPSHOT, Move.WAKE): State.ACTIVE_SNAPSHOT,
    (State.DORMANT_INCREMENTAL, Move.WAKE): State.ACTIVE_INCREMENTAL,
    (State.UNVERIFIED_SNAPSHOT, Move.WAKE): State.ACTIVE_SNAPSHOT,
    (State.UNVERIFIED_INCREMENTAL, Move.WAKE): State.ACTIVE_INCREMENTAL,
    **{(state, Move.FORGET): State(4 + state.is_snapshot) for state in State},
}
"""All that is allowed. A tracer begins as active snapshot (setup) or unverified (reload) and can end in any state."""


def move(state: State, what: Move) -> State:
    """The state after a move. StateError (EINVAL) if it is not allowed from here."""
    try:
        return MOVES[state, what]
    except KeyError:
        raise StateError(f"{what.value} is not possible: the tracer is {state}", errno=EINVAL,
                         hint="stasis datto list shows the state of each") from None
