# SPDX-License-Identifier: Apache-2.0
"""A snapshot goes through its life in one direction."""

from __future__ import annotations

import errno

import pytest

from stasis.block.snapshot import MOVES, SnapshotState, move
from stasis.errors import ExitCode, StateError

S = SnapshotState


def test_the_usual_life() -> None:
    state = S.CREATED
    for to in (S.TAKING, S.TAKEN, S.CORRUPTED, S.DESTROYING):
        state = move("id", state, to)
    assert state is S.DESTROYING


def test_a_take_that_fails_can_be_tried_again() -> None:
    assert move("id", move("id", S.TAKING, S.CREATED), S.TAKING) is S.TAKING


@pytest.mark.parametrize("state", [S.TAKING, S.TAKEN, S.CORRUPTED])
def test_a_second_take_is_told_that_it_is_one(state: SnapshotState) -> None:
    with pytest.raises(StateError) as raised:
        move("id", state, S.TAKING)
    assert (raised.value.errno, raised.value.exit_code) == (errno.EALREADY, ExitCode.STATE)
    assert "id" in raised.value.message


def test_every_state_has_its_moves_and_all_lead_to_the_end() -> None:
    assert set(MOVES) == set(SnapshotState)
    assert [state for state in MOVES if S.DESTROYING not in MOVES[state]] == [S.DESTROYING]
    assert MOVES[S.DESTROYING] == frozenset()
