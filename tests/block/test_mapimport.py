# SPDX-License-Identifier: Apache-2.0
"""A map that a kernel module keeps reads here as the module means it, and never tells of too few changes."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.block.changemap import ChangeMap
from stasis.block.mapimport import ForeignMap, store
from stasis.errors import GenerationError, UsageError

GENERATION = str(uuid.UUID(int=7))


@st.composite
def _maps(draw: st.DrawFn) -> ForeignMap:
    shift, number = draw(st.integers(12, 20)), draw(st.integers(0, 254))
    capacity = draw(st.integers(1, 40)) * (1 << shift) - draw(st.integers(0, (1 << shift) - 1))
    count = -(-capacity >> shift)
    changes = draw(st.none() | st.binary(min_size=count, max_size=count).map(
        lambda data: bytes(min(value, number) for value in data)))
    return ForeignMap(capacity, shift, GENERATION, number, changes, draw(st.booleans()), "told")


@settings(max_examples=60)
@given(_maps(), st.integers(0, 254))
def test_extents_are_those_of_the_module(foreign: ForeignMap, since: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "map"
        store(path, foreign)
        with ChangeMap.open_readonly(path) as read:
            assert (read.generation, read.change_number, read.is_clean) == (GENERATION, foreign.number, True)
            if since > foreign.number:
                with pytest.raises(GenerationError):
                    read.changed_extents(since)
                return
            assert read.changed_extents(since) == [(0, foreign.capacity)]
            if not foreign.held:
                with pytest.raises(UsageError):
                    read.changed_extents(since, held=True)
                return
            found = read.changed_extents(since, held=True)
    covered = {offset >> foreign.shift for start, length in found
               for offset in range(start, start + length, 1 << foreign.shift)}  # fmt: skip
    changes = foreign.changes or bytes((max(foreign.number, 1),)) * foreign.block_count
    assert covered == {block for block, value in enumerate(changes) if value > since}
    assert all(start + length <= foreign.capacity for start, length in found)


def test_readers_of_the_old_file_keep_it(tmp_path: Path) -> None:
    store(tmp_path / "map", ForeignMap(1 << 20, 16, GENERATION, 1, bytes(16), True))
    with ChangeMap.open_readonly(tmp_path / "map") as old:
        store(tmp_path / "map", ForeignMap(1 << 20, 16, GENERATION, 2, bytes((2,)) * 16, True))
        assert old.changed_extents(0, held=True) == []
        with ChangeMap.open_readonly(tmp_path / "map") as new:
            assert new.changed_extents(1, held=True) == [(0, 1 << 20)]


@pytest.mark.parametrize(("number", "count"), [(255, 16), (-1, 16), (1, 15)])
def test_what_fits_no_map_is_refused(tmp_path: Path, number: int, count: int) -> None:
    with pytest.raises(ValueError, match="blocks"):
        store(tmp_path / "map", ForeignMap(1 << 20, 16, GENERATION, number, bytes(count), True))
    assert not (tmp_path / "map").exists()
