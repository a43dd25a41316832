# SPDX-License-Identifier: Apache-2.0
"""What a map's bytes mean as extents, bounded whatever the map holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.backup.sources import numbers
from stasis.backup.sources.numbers import bounded_extents

BLOCK = 512


@given(st.binary(max_size=200), st.integers(0, 255), st.integers(0, BLOCK - 1))
def test_extents_are_the_blocks_above_the_number(changes: bytes, since: int, short: int) -> None:
    size = max(0, len(changes) * BLOCK - short)
    extents = bounded_extents(changes, since, BLOCK, size)
    covered = {block for offset, length in extents for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))}
    assert covered == {block for block, number in enumerate(changes) if number > since}
    assert all(offset + length <= size for offset, length in extents)


@given(st.binary(max_size=400), st.integers(0, 3))
def test_too_many_extents_are_joined_and_none_is_lost(changes: bytes, since: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "MOST_EXTENTS", 4)
        extents = bounded_extents(changes, since, BLOCK, len(changes) * BLOCK)
    assert len(extents) <= 5
    ends = [offset + length for offset, length in extents]
    assert all(end < offset for end, (offset, _) in zip(ends, extents[1:], strict=False))
    for block, number in enumerate(changes):
        if number > since:
            assert any(offset <= block * BLOCK < offset + length for offset, length in extents)
