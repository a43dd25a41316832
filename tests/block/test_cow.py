# SPDX-License-Identifier: Apache-2.0
"""Copy-on-write and image writes in the corners that random steps seldom reach."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from errno import EPERM
from pathlib import Path

import pytest

from stasis.block import chunktable
from stasis.block.cow import WINDOW
from stasis.block.settings import PART_SIZE
from stasis.linux import files
from tests.block.engine import Engine, is_corrupted, pread, pwrite_many

SIZE = 8 << 20


@pytest.fixture
def engine(tmp_path: Path, seed: int) -> Iterator[Engine]:
    path = tmp_path / "origin"
    path.write_bytes(random.Random(seed).randbytes(SIZE))
    device = Engine(tmp_path, path, storage="memory")
    yield device
    device.close()


def test_a_zero_part_written_leaves_its_neighbours(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the leaves used up, too: a chunk of stored and zero parts gets data in a zero part of the image."""
    monkeypatch.setattr(chunktable, "LEAF_RESERVE", 0)
    pwrite_many(engine.export, [(0, bytes(3 * PART_SIZE))])
    engine.take(16)
    assert engine.image is not None
    expected = bytearray(pread(engine.image, 0, SIZE))
    assert engine.cow is not None
    table, chunk = engine.cow.table, 0
    while not table.leaves_full:
        chunk += 1
        pwrite_many(engine.export, [(chunk << 16, b"x"), (0, b"y" * 8 * PART_SIZE)])
    pwrite_many(engine.image, [(PART_SIZE + 7, b"image")])
    expected[PART_SIZE + 7 : PART_SIZE + 12] = b"image"
    assert pread(engine.image, 0, SIZE) == expected


def test_zeroing_an_image_that_goes_away_is_an_error(engine: Engine) -> None:
    engine.take(16)
    steps = engine.writer.write_zeroes(0, SIZE, punch=True, fast=False)
    next(steps)
    engine.drop()
    with pytest.raises(OSError) as caught:
        next(steps)
    assert caught.value.errno == EPERM
    for call in (engine.writer.write_zeroes(0, 1, punch=True, fast=False), engine.writer.trim(0, 1)):
        with pytest.raises(OSError) as caught:
            next(call)
        assert caught.value.errno == EPERM


def test_a_failed_writeback_of_the_storage_is_not_served(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not stored is still read; what is stored can no longer be trusted."""
    engine.take(16)
    pwrite_many(engine.export, [(0, b"new")])

    def failed(_fd: int) -> None:
        raise OSError(5, "writeback failed")

    monkeypatch.setattr(files, "writeback_error", failed)
    assert engine.image is not None
    assert is_corrupted(engine.image)
    assert len(pread(engine.image, 1 << 20, 4096)) == 4096


def test_each_part_is_copied_once(engine: Engine) -> None:
    engine.take(18)
    assert engine.cow is not None
    for _ in range(3):
        pwrite_many(engine.export, [(start, b"a" * 5000) for start in range(0, SIZE - 5000, 3000)])
    assert engine.cow.counters.read == engine.cow.counters.stored == SIZE


def test_image_writes_of_whole_parts_read_nothing(engine: Engine) -> None:
    engine.take(16)
    assert engine.image is not None
    assert engine.cow is not None
    pwrite_many(engine.image, [(0, b"i" * WINDOW)])
    assert engine.cow.counters.read == 0
    assert engine.stored() >= WINDOW
    pwrite_many(engine.export, [(0, b"o" * WINDOW)])
    assert engine.cow.counters.read == 0
    assert pread(engine.image, 0, WINDOW) == b"i" * WINDOW


def test_a_short_write_to_the_storage_is_finished(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.take(16)
    assert engine.image is not None
    before = pread(engine.image, 0, SIZE)
    write, shortened = os.pwritev, 0

    def short(fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        nonlocal shortened
        if engine.cow is None or fd != engine.cow.storage.fd:
            return write(fd, pieces, offset)
        shortened += 1
        return write(fd, [pieces[0][: max(1, len(pieces[0]) // 3)]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    pwrite_many(engine.export, [(offset, b"new" * 7000) for offset in range(5, SIZE, SIZE // 9)])
    monkeypatch.undo()
    assert shortened
    assert pread(engine.image, 0, SIZE) == before
