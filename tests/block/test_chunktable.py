# SPDX-License-Identifier: Apache-2.0
"""The chunk table finds what was published, however it was published, and survives its worker."""

from __future__ import annotations

import errno
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from stasis.block import chunktable
from stasis.block.chunktable import ZERO, ChunkTable, merge_runs, part_range
from stasis.block.settings import PART_SIZE
from stasis.errors import StateError

PARTS = 150
SIZE = PARTS * PART_SIZE - 99

publications = st.lists(
    st.tuples(st.integers(0, PARTS - 1), st.integers(1, 40), st.booleans()),
    max_size=60,
)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[ChunkTable]:
    opened = ChunkTable.create(tmp_path / "table", SIZE, 16)
    yield opened
    opened.close()


def looked_up(table: ChunkTable, first: int, end: int) -> dict[int, int]:
    """Part to block, from the pieces of a range; checks that they cover it in order."""
    found, at = {}, first
    for start, count, block in table.pieces(first, end):
        assert start == at
        assert count > 0
        at += count
        for part in range(start, start + count):
            if block:
                found[part] = ZERO if block == ZERO else block + part - start
    assert at == end
    return found


@settings(suppress_health_check=list(HealthCheck))
@given(drawn=publications, shift=st.integers(12, 20), first=st.integers(0, PARTS - 1), count=st.integers(1, PARTS))
def test_what_was_published_is_found(drawn: list[tuple[int, int, bool]], shift: int, first: int, count: int) -> None:
    """Against a dictionary: only what is missing is published, as copy-on-write does it."""
    with tempfile.TemporaryDirectory() as directory:
        table = ChunkTable.create(Path(directory, "table"), SIZE, shift)
        model: dict[int, int] = {}
        free = 1
        for start, length, zero in drawn:
            for low, high in table.missing(start, min(start + length, PARTS)):
                table.publish(low, high - low, ZERO if zero else free)
                for part in range(low, high):
                    assert part not in model
                    model[part] = ZERO if zero else free + part - low
                free += high - low
        end = min(first + count, PARTS)
        expected = {part: block for part, block in model.items() if first <= part < end}
        reader = ChunkTable.open(Path(directory, "table"))
        for each in (table, reader):
            assert looked_up(each, first, end) == expected
            assert [part for part in range(first, end) if each.is_stored(part)] == sorted(expected)
        absent = [part for low, high in table.missing(first, end) for part in range(low, high)]
        assert absent == [part for part in range(first, end) if part not in model]
        reader.close()
        table.close()


@pytest.mark.parametrize("shift", [12, 16, 18, 20])
def test_random_parts_never_use_up_the_leaves(tmp_path: Path, shift: int) -> None:
    """Every second part of a device, with room for few leaves: later chunks are whole, and nothing fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunktable, "LEAF_RESERVE", 4096)
        size = 1024 << shift
        table = ChunkTable.create(tmp_path / "table", size, shift)
        parts, free = size // PART_SIZE, 1
        for part in range(0, parts, max(2, table.parts_per_chunk // 4)):
            for low, high in table.missing(part, part + 1):
                for start in range(low, high, 64):  # as many as are copied at a time
                    stop = min(high, start + 64)
                    table.publish(start, stop - start, free)
                    free += stop - start
            assert table.is_stored(part)
        table.close()


def test_zero_chunk_may_be_written_in_parts(table: ChunkTable) -> None:
    table.publish(0, 16, ZERO)
    table.publish(3, 2, 700)
    assert table.pieces(0, 16) == [(0, 3, ZERO), (3, 2, 700), (5, 11, ZERO)]


def test_neighbouring_places_are_one_piece(table: ChunkTable) -> None:
    table.publish(0, 16, 100)
    table.publish(16, 16, 116)
    table.publish(32, 4, 132)
    assert table.pieces(2, 40) == [(2, 34, 102), (36, 4, 0)]


def test_a_chunk_in_one_piece_is_not_entered_again(table: ChunkTable) -> None:
    table.publish(0, 16, 100)
    with pytest.raises(ValueError, match="one piece already"):
        table.publish(3, 1, 200)
    assert table.pieces(0, 16) == [(0, 16, 100)]


def test_without_a_leaf_left_the_entry_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunktable, "LEAF_RESERVE", 0)
    table = ChunkTable.create(tmp_path / "table", 64 << 16, 16)
    used = 0
    while table.leaf_count < table.leaf_limit - 1:
        table.publish(used * 16, 1, 1 + used)
        used += 1
    with pytest.raises(OSError) as caught:
        table.publish(used * 16, 1, 1 + used)
    assert caught.value.errno == errno.ENOMEM
    assert table.pieces(used * 16, used * 16 + 16) == [(used * 16, 16, 0)]
    table.close()


def test_the_next_worker_goes_on(table: ChunkTable) -> None:
    table.publish(5, 1, 42)
    again = ChunkTable.open(table.path, writable=True)
    again.publish(20, 1, 43)
    assert again.leaf_count == 2
    assert looked_up(table, 0, PARTS) == {5: 42, 20: 43}
    again.close()


def test_first_error_stays(table: ChunkTable) -> None:
    assert table.error == 0
    table.set_error(errno.ENOSPC)
    table.set_error(errno.EIO)
    reader = ChunkTable.open(table.path)
    assert reader.error == errno.ENOSPC
    reader.close()


def test_table_is_private_and_never_made_twice(table: ChunkTable) -> None:
    assert table.path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        ChunkTable.create(table.path, SIZE, 16)


def test_another_file_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(bytes(8192))
    with pytest.raises(StateError):
        ChunkTable.open(path)


def test_a_large_device_costs_little_until_it_is_written(tmp_path: Path) -> None:
    """64 TiB in chunks of 64 MiB: 4 bytes per chunk at once, leaves when they are needed."""
    table = ChunkTable.create(tmp_path / "table", 64 << 40, 26)
    assert table.path.stat().st_blocks * 512 <= 5 << 20
    last = (64 << 40) // PART_SIZE - 1
    table.publish(last, 1, 9)
    assert table.pieces(last - 1, last + 1) == [(last - 1, 1, 0), (last, 1, 9)]
    assert table.path.stat().st_blocks * 512 <= 7 << 20
    table.close()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=30))
def test_merged_runs_hold_the_same_parts(drawn: list[tuple[int, int]]) -> None:
    runs = [(first, first + count) for first, count in drawn]
    merged = merge_runs(runs)
    assert {part for run in runs for part in range(*run)} == {part for run in merged for part in range(*run)}
    assert all(left[1] < right[0] for left, right in itertools.pairwise(merged))


def test_parts_of_a_range() -> None:
    assert part_range(0, 1) == (0, 1)
    assert part_range(4095, 2) == (0, 2)
    assert part_range(4096, 4096) == (1, 2)
