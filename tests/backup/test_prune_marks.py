# SPDX-License-Identifier: Apache-2.0
"""Marks know every name they were given, in as many passes as their memory asks for."""

from __future__ import annotations

import random
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from stasis.backup.keep.marks import FIRST_BYTES, Marks, Passes

NAMES = st.sets(st.binary(min_size=32, max_size=32).filter(any), max_size=60)


@given(used=NAMES, others=NAMES, limit=st.integers(1, 80), repeats=st.integers(1, 3))
def test_every_name_is_found_in_exactly_one_pass(used: set[bytes], others: set[bytes], limit: int,
                                                 repeats: int) -> None:
    covered = []
    for marks in Passes(limit):
        for name in [*used, bytes(32)] * repeats:
            marks.add(name)
        marks.settle()
        covered += range(marks.low, marks.high)
        mine = {name for name in used | others if marks.covers(name)}
        assert {name for name in mine if name in marks} == mine & used
        assert len(marks) == len(mine & used)
    assert covered == [*range(FIRST_BYTES)]


@given(used=NAMES, seen=NAMES)
def test_what_was_not_seen_is_known(used: set[bytes], seen: set[bytes]) -> None:
    marks = Marks()
    marks.add(b"".join(used))
    marks.settle()
    assert {name for name in seen if marks.see(name)} == used & seen
    assert marks.unseen() == len(used - seen)
    assert {name for name in used if marks.was_seen(name)} == used & seen


def test_memory_follows_the_limit_and_not_the_names(seed: int) -> None:
    source = random.Random(seed)
    tracemalloc.start()
    try:
        for marks in Passes(20_000):
            for _ in range(40):
                marks.add(source.randbytes(32 * 4096))
            marks.settle()
            break
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert marks.high < FIRST_BYTES
    assert peak < 4 << 20
