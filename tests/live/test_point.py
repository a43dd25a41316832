# SPDX-License-Identifier: Apache-2.0
"""A live device at one instant in a file: all of it, then what changed, over the end of a generation, and refusals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import GenerationError, NotFoundError
from stasis.live import point, tracking
from stasis.live.options import LiveOptions
from stasis.live.tracker import Mark, Tracker
from tests.live.writers import MIB, bpf_works, loop_device, read_direct

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

SIZE = 8 * MIB + 4096


@pytest.fixture
def node(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "backing", SIZE) as node:
        yield node


def _write(node: str, offset: int, data: bytes) -> None:
    fd = os.open(node, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def _take(node: str, state: Path, target: Path, since: Mark | None) -> point.Point:
    target.write_bytes(b"")
    return point.take(node, state, str(target), since, LiveOptions())


def test_what_changed_is_a_file_with_holes_around_it(node: str, state: Path, tmp_path: Path) -> None:
    _write(node, MIB, b"x" * 8192)
    first = _take(node, state, tmp_path / "whole", None)
    assert (first.size, first.extents) == (SIZE, [(0, SIZE)])
    assert (tmp_path / "whole").read_bytes() == read_direct(node, 0, SIZE)
    assert (tmp_path / "whole").stat().st_blocks * 512 < MIB
    _write(node, 2 * MIB, bytes(4096))  # zeroes where zeroes were: it changed all the same
    _write(node, SIZE - 1, b"z")
    second = _take(node, state, tmp_path / "changed", first.mark)
    assert [offset for offset, _ in second.extents] == [2 * MIB, 8 * MIB]
    assert second.extents[-1] == (8 * MIB, 4096)
    expected = bytearray(SIZE)
    expected[-1:] = b"z"
    assert (tmp_path / "changed").read_bytes() == expected
    assert _take(node, state, tmp_path / "none", second.mark).extents == []
    tracking.stop(node, state)


def test_a_series_goes_on_where_its_own_switch_ends_the_generation(node: str, state: Path, tmp_path: Path) -> None:
    with tracking.start(node, state) as tracker:
        changes = tracker.changes
        changes.number, changes.previous = 255, 254
        changes._store_header()
        changes.sync()
        generation = changes.generation
    last = _take(node, state, tmp_path / "last", Mark(generation, 254))
    assert (last.mark.number, last.mark.generation != generation) == (0, True)
    _write(node, 3 * MIB, b"after the last number")
    after = _take(node, state, tmp_path / "after", last.mark)
    assert [offset for offset, _ in after.extents] == [3 * MIB]
    with pytest.raises(GenerationError):
        _take(node, state, tmp_path / "old", Mark(generation, 254))
    tracking.stop(node, state)


def test_changes_of_a_device_that_is_not_tracked_are_not_guessed(node: str, state: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        _take(node, state, tmp_path / "none", Mark("a generation", 1))
    first = _take(node, state, tmp_path / "first", None)
    with Tracker.open(node, state) as tracker:
        tracker.distrust("a test")
    with pytest.raises(GenerationError):
        _take(node, state, tmp_path / "second", first.mark)
    assert _take(node, state, tmp_path / "third", None).mark.generation != first.mark.generation
    tracking.stop(node, state)
