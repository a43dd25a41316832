# SPDX-License-Identifier: Apache-2.0
"""Marks that wait: however they come together, the file is the one that marking each at once would have made."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from stasis.block.intentlog import IntentLog
from stasis.datto import waiting
from stasis.datto.layout import SECTION_BLOCKS
from stasis.datto.opening import create
from tests.datto.cowmodel import CowModel

BLOCK = 4096
SIZE = 3 * SECTION_BLOCKS * BLOCK - BLOCK * 9 - 700
UUID = bytes(range(16))
SECTOR = 512
Range = tuple[int, int]

PIECES = st.tuples(st.integers(0, SIZE // SECTOR - 1), st.integers(1, 40))
"""Offset and length in sectors."""
SINGLE = st.tuples(st.integers(0, SIZE // BLOCK - 1).map(lambda block: block * 8), st.just(8))
LONG = st.tuples(st.integers(0, SIZE // SECTOR - 1), st.integers(1, 2 * SECTION_BLOCKS * 8))
"""So long that a section has more marks than are looked at one by one."""


@settings(max_examples=30)
@given(st.lists(st.integers(0, SIZE // BLOCK), max_size=20, unique=True),
       st.lists(st.lists(st.one_of(PIECES, SINGLE, LONG), max_size=20), max_size=4))
def test_what_waits_becomes_what_marking_at_once_would_have_made(kept: list[int], rounds: list[list[Range]]) -> None:
    model = CowModel(SIZE, SIZE // 10, UUID, 7)
    with tempfile.TemporaryDirectory() as directory:
        cow = create(f"{directory}/cow", SIZE, uuid=UUID, seqid=7, size=SIZE // 10, cache=1 << 20)
        for block in kept:
            cow.keep([(block, block + 1)], memoryview(b"x" * BLOCK))
            model.overwrite(block, b"x" * BLOCK)
        cow.become_index_only()
        model.to_incremental()
        for ranges in rounds:
            requests = [(sector * SECTOR, min(sectors * SECTOR, SIZE - sector * SECTOR), 0)
                        for sector, sectors in ranges]
            assert not cow.mark_soon(requests)
            for offset, length, _ in requests:
                for block in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
                    model.overwrite(block, b"")
            cow.catch_up()
        cow.finish()
        model.clean = True
        assert (Path(directory) / "cow").read_bytes() == model.file()
        cow.close()


def test_what_lies_behind_the_device_does_not_count(tmp_path: Path) -> None:
    """It has grown, which ends the series a moment later."""
    cow = create(str(tmp_path / "cow"), SIZE, uuid=UUID, seqid=7, size=0, cache=1 << 20)
    cow.become_index_only()
    cow.mark_soon([(block * BLOCK, BLOCK, 0) for block in range(SECTION_BLOCKS * 3 - 12, SECTION_BLOCKS * 3 + 2)])
    cow.mark_soon([(SIZE - 100, 3 * SECTION_BLOCKS * BLOCK, 0)])
    cow.catch_up()
    cow.close()
    assert cow.header.changed_blocks == 3


def test_a_plane_of_each_section_is_the_most_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST_SECTIONS", 2)
    cow = create(str(tmp_path / "cow"), SIZE, uuid=UUID, seqid=7, size=0, cache=1 << 20)
    cow.become_index_only()
    span = SECTION_BLOCKS * BLOCK
    assert not cow.mark_soon([(0, BLOCK, 0), (BLOCK * 7, BLOCK, 0)])
    assert cow.mark_soon([(span, BLOCK, 0)])
    cow.catch_up()
    assert not cow.mark_soon([(2 * span, BLOCK, 0)])
    cow.close()


# -- the log -------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.tuples(st.integers(0, 5 << 20), st.integers(1, 2 << 20)), min_size=1, max_size=4)),
       st.sets(st.integers(0, 8)))
def test_regions_are_durable_before_their_writes(batches: list[list[Range]], cleared: set[int]) -> None:
    """Also while all of them are set, and after they were cleared."""
    size = 4 << 20
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "log"
        log = IntentLog.create(path, size, 20)
        log.clear(log.start_clearing())
        since: set[int] = set()
        for number, batch in enumerate(batches):
            log.add_requests([(offset, length, 0) for offset, length in batch])
            touched = {byte >> 20 for offset, length in batch for byte in (*range(offset, offset + length, 1 << 20),
                                                                           offset + length - 1)}
            since |= {region for region in touched if region < 4}
            stored = path.read_bytes()[SECTOR:]
            assert since <= {region for region in range(4) if stored[region]}
            if number in cleared:
                log.clear(log.start_clearing())
                since = set()
        log.close()
