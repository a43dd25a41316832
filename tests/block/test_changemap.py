# SPDX-License-Identifier: Apache-2.0
"""The change map answers "changed since N" for every N of its generation, and refuses what it cannot know."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.block import mapformat
from stasis.block.changemap import ChangeMap, Identity
from stasis.block.exports import dirty_status
from stasis.block.settings import Settings, chunk_shift, tracking_block_shift
from stasis.errors import GenerationError, StateError, UsageError

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))
BLOCK = 64 * KIB
SIZE = 100 * BLOCK - 7


@pytest.fixture
def changes(tmp_path: Path) -> Iterator[ChangeMap]:
    with ChangeMap.create(tmp_path / "map", SIZE, 16) as opened:
        yield opened


def switch(changes: ChangeMap) -> int:
    """Take a snapshot that stands; its number."""
    changes.prepare_switch()
    number = changes.switch().change_number
    changes.forget_undo()
    return number


# -- block sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "block", "count"),
    [
        (64 * MIB, 64 * KIB, 1 << 10),
        (4 * GIB, 64 * KIB, 64 << 10),
        (128 * GIB, 64 * KIB, 2 << 20),
        (128 * GIB + 512, 128 * KIB, (1 << 20) + 1),
        (1 * TIB, 512 * KIB, 2 << 20),
        (16 * TIB, 8 * MIB, 2 << 20),
        (128 * TIB, 64 * MIB, 2 << 20),
        (256 * TIB, 64 * MIB, 4 << 20),
        (1, 64 * KIB, 1),
    ],
)
def test_tracking_block_follows_the_size_of_the_device(size: int, block: int, count: int) -> None:
    """The table of blksnap's documentation."""
    shift = tracking_block_shift(size, Settings())
    assert 1 << shift == block
    assert -(-size >> shift) == count


@pytest.mark.parametrize("wanted", [0, -4096, 100000, 32 * KIB, 128 * MIB])
def test_impossible_tracking_blocks_are_refused(wanted: int) -> None:
    with pytest.raises(UsageError):
        tracking_block_shift(GIB, Settings(), wanted)


def test_chunk_is_at_least_what_the_device_likes_best() -> None:
    assert chunk_shift(TIB, Settings()) == 16
    assert chunk_shift(TIB, Settings(), minimum_io_size=512 * KIB) == 19
    assert chunk_shift(TIB, Settings(), minimum_io_size=1 << 30) == 26
    assert chunk_shift(TIB, Settings(chunk_maximum_count_shift=20)) == 20
    assert chunk_shift(TIB, Settings(), wanted=4096) == 12


# -- epochs -------------------------------------------------------------------------------------------


def test_worked_sequence(changes: ChangeMap) -> None:
    """What a consumer of increments sees, take by take."""
    assert changes.change_number == 0
    assert changes.changed_extents(0) == []
    changes.mark(0, 1)
    assert switch(changes) == 1
    assert bytes(changes.held) == b"\1" + bytes(99)
    changes.mark(BLOCK - 1, 2)
    assert bytes(changes.active) == b"\2\2" + bytes(98)
    assert bytes(changes.held) == b"\1" + bytes(99)
    assert switch(changes) == 2
    assert changes.changed_extents(1, held=True) == [(0, 2 * BLOCK)]
    assert changes.changed_extents(0, held=True) == [(0, 2 * BLOCK)]
    assert changes.changed_extents(2) == []
    assert changes.change_number == 2


def test_last_block_ends_with_the_device(changes: ChangeMap) -> None:
    changes.mark(SIZE - 1, 1)
    assert changes.changed_extents(0) == [(99 * BLOCK, BLOCK - 7)]


def test_marks_by_hand_show_now_and_in_the_next_reading(changes: ChangeMap) -> None:
    switch(changes)
    switch(changes)
    changes.mark(3 * BLOCK, 1)
    changes.mark_held(3 * BLOCK, 1)
    assert changes.changed_extents(1, held=True) == [(3 * BLOCK, BLOCK)]
    assert changes.changed_extents(2) == [(3 * BLOCK, BLOCK)]


def test_wrap_draws_a_generation_and_clears(changes: ChangeMap) -> None:
    before = changes.generation
    changes.mark(5 * BLOCK, 1)
    for number in range(1, 255):
        assert switch(changes) == number
    changes.mark(7 * BLOCK, 1)
    result = changes.switch()
    assert (result.change_number, result.generation, result.wrapped) == (255, before, True)
    assert changes.generation != before
    assert changes.held_generation == before
    assert changes.changed_extents(254, held=True, generation=before) == [(7 * BLOCK, BLOCK)]
    changes.sync()
    assert changes.clear_wrapped()
    assert changes.change_number == 0
    assert changes.changed_extents(0) == []
    with pytest.raises(GenerationError):
        changes.changed_extents(255)
    with pytest.raises(GenerationError):
        changes.changed_extents(0, generation=before)
    changes.mark(0, 1)
    assert switch(changes) == 1
    assert changes.changed_extents(0) == [(0, BLOCK)]


def test_wrap_that_was_never_settled_loses_no_later_mark(changes: ChangeMap) -> None:
    for _ in range(255):
        switch(changes)
    assert switch(changes) == 1
    changes.mark(0, 1)
    changes.clear_wrapped()
    assert changes.changed_extents(1) == [(0, BLOCK)]


def test_writes_between_the_wrap_and_its_clearing_stay(changes: ChangeMap) -> None:
    changes.mark(9 * BLOCK, 1)
    for _ in range(255):
        switch(changes)
    changes.mark(4 * BLOCK, 1)
    changes.sync()
    assert changes.clear_wrapped()
    assert changes.changed_extents(0) == [(4 * BLOCK, BLOCK)]


@pytest.mark.parametrize("takes", [0, 3, 254])
def test_an_undone_switch_never_happened(changes: ChangeMap, takes: int) -> None:
    changes.mark(0, 1)
    for _ in range(takes):
        switch(changes)
    changes.mark(BLOCK, 1)
    before = bytes(changes.active), bytes(changes.held), changes.info(), changes.number
    changes.prepare_switch()
    changes.switch()
    changes.undo_switch()
    assert (bytes(changes.active), bytes(changes.held), changes.info(), changes.number) == before
    assert not changes.clear_wrapped()
    changes.undo_switch()
    assert (bytes(changes.active), bytes(changes.held), changes.info(), changes.number) == before


def test_numbers_ahead_and_other_generations_are_refused(changes: ChangeMap) -> None:
    for since in (-1, 1, 256):
        with pytest.raises(GenerationError):
            changes.changed_extents(since)
    with pytest.raises(GenerationError):
        changes.changed_extents(0, generation="00000000-0000-0000-0000-000000000000")
    with pytest.raises(UsageError):
        changes.changed_extents(0, held=True)


def test_a_broken_map_answers_nothing(changes: ChangeMap) -> None:
    changes.set_broken("the disk of the log is full")
    with pytest.raises(GenerationError) as caught:
        changes.changed_extents(0)
    assert "the disk of the log is full" in str(caught.value)
    assert switch(changes) == 1
    assert changes.is_broken


def test_dirty_bitmap_says_all_where_nothing_is_known(changes: ChangeMap) -> None:
    """A client may keep the name of a bitmap over a wrap, or while the map breaks."""
    changes.mark(0, 1)
    assert dirty_status(changes, 0, False, 0, SIZE) == [(BLOCK, 1), (SIZE - BLOCK, 0)]
    assert dirty_status(changes, 3, False, 0, SIZE) == [(SIZE, 1)]
    changes.set_broken("no log")
    assert dirty_status(changes, 0, False, 0, SIZE) == [(SIZE, 1)]


# -- the file -----------------------------------------------------------------------------------------


def test_map_outlives_its_process(changes: ChangeMap) -> None:
    changes.mark(0, 1)
    switch(changes)
    changes.begin("assumed text", Identity(1, 2, 3, 4))
    with ChangeMap.open(changes.path) as again:
        assert again.info() == changes.info()
        assert again.identity == Identity(1, 2, 3, 4)
        assert again.assumed == "assumed text"
        assert bytes(again.active) == bytes(changes.active)


def test_readers_see_what_the_worker_does(changes: ChangeMap) -> None:
    with ChangeMap.open_readonly(changes.path) as reader:
        switch(changes)
        changes.mark(2 * BLOCK, 1)
        assert reader.changed_extents(1) == [(2 * BLOCK, BLOCK)]


def test_map_is_private(changes: ChangeMap) -> None:
    assert changes.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("keep", [0, 1, 100, mapformat.HEADER_SIZE - 1, mapformat.HEADER_SIZE, 9000])
def test_cut_files_are_damaged(changes: ChangeMap, keep: int) -> None:
    raw = changes.path.read_bytes()
    copy = changes.path.with_name("copy")
    copy.write_bytes(raw[:keep])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StateError) as caught:
        ChangeMap.open(copy)
    assert str(copy) in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_changed_byte_of_the_header_is_noticed(changes: ChangeMap) -> None:
    raw = changes.path.read_bytes()
    copy = changes.path.with_name("copy")
    for index in range(mapformat.HEADER.size):
        damaged = bytearray(raw)
        damaged[index] ^= 0x40
        copy.write_bytes(damaged)
        with pytest.raises(StateError):
            ChangeMap.open(copy)


def test_other_versions_are_refused_by_name(changes: ChangeMap) -> None:
    header = bytearray(changes.path.read_bytes()[: mapformat.HEADER.size])
    struct.pack_into("<I", header, 8, 99)
    header[-4:] = struct.pack("<I", zlib.crc32(bytes(header[:-4])))
    copy = changes.path.with_name("copy")
    copy.write_bytes(header.ljust(changes.path.stat().st_size, b"\0"))
    with pytest.raises(StateError, match="version 99"):
        ChangeMap.open(copy)
