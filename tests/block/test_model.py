# SPDX-License-Identifier: Apache-2.0
"""Origin and image behave like two arrays of bytes, whatever is done to them and in whatever order.

A model keeps every byte: what the origin holds, what the image must show, and what the origin held at each snapshot of
the generation. After every step both devices are read back and compared, and the change map is asked: a byte that
differs from an earlier snapshot and is not reported as changed since is a lost backup.

`STASIS_HYPOTHESIS_PROFILE=thorough` runs for long. The seed is in the header of the test report.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stasis.block import chunktable, exports
from stasis.block.cow import WINDOW
from stasis.block.exports import BASE_ALLOCATION, NBD_STATE_ZERO
from stasis.errors import GenerationError
from tests.block.engine import SINCE, Engine, extents, pread, pread_many, pwrite_many

LARGEST = 1 << 20
PORTION = 128 << 10
WHOLE_CHUNKS = 256
"""A reserve of leaves that is used up at once, so that chunks are copied whole."""


def contents(length: int, kind: int) -> bytes:
    """Data of a write: random bytes, zeroes, or pages of both."""
    source = random.Random(kind)
    if kind % 8 == 0:
        return bytes(length)
    if kind % 8 == 1:
        pages = (bytes(4096) if source.random() < 0.5 else source.randbytes(4096) for _ in range(length // 4096 + 1))
        return b"".join(pages)[:length]
    return source.randbytes(length)


ranges = st.tuples(
    st.integers(0, LARGEST - 1),
    st.one_of(st.integers(1, 3), st.sampled_from([512, 4096, 65536]), st.integers(1, 20000), st.integers(1, LARGEST)),
    st.sampled_from([1, 512, 4096, 65536]),
)
"""(offset, length, alignment of both)."""
kinds = st.integers(0, 1000)


@settings(stateful_step_count=40, suppress_health_check=list(HealthCheck))
class Device(RuleBasedStateMachine):
    """One device in one snapshot at a time."""

    def __init__(self) -> None:
        super().__init__()
        # The origin is on a disk, which allows direct I/O; map and log are in memory, where a sync costs nothing.
        self.directory = Path(tempfile.mkdtemp(prefix="stasis-model-"))
        self.state = Path(tempfile.mkdtemp(prefix="stasis-model-", dir="/dev/shm"))
        self.patch = pytest.MonkeyPatch()
        self.engine: Engine | None = None

    @initialize(
        size=st.one_of(st.integers(1, LARGEST), st.sampled_from([4096, 65536, 69632, LARGEST, LARGEST - 1])),
        buffered=st.booleans(),
        tracking_shift=st.integers(12, 17),
        whole=st.booleans(),
        sparse=st.booleans(),
        kind=kinds,
        takes=st.sampled_from([0, 0, 252]),
    )
    def begin(
        self, size: int, buffered: bool, tracking_shift: int, whole: bool, sparse: bool, kind: int, takes: int
    ) -> None:
        self.patch.setattr(chunktable, "LEAF_RESERVE", WHOLE_CHUNKS if whole else 32 << 20)
        self.patch.setattr(exports, "DISCARD_STEP", 128 << 10)
        self.origin = bytearray(size) if sparse else bytearray(contents(size, kind))
        path = self.directory / "origin"
        with path.open("wb") as file:
            file.truncate(size)
            if not sparse:
                file.write(self.origin)
        self.engine = engine = Engine(
            self.state, path, buffered=buffered, tracking_shift=tracking_shift, portion=PORTION, storage="memory"
        )
        self._watch(engine)
        for _ in range(takes):
            engine.changes.switch()
        engine.changes.forget_undo()
        engine.changes.release_held()
        self.image: bytearray | None = None
        self.number = takes
        self.history = {takes: bytes(self.origin)}
        self.generation = engine.changes.generation
        self.touched: dict[int, set[int]] = {takes: set()}
        self.held_touched: dict[int, set[int]] = {}
        self.corrupted = False
        self.task: Iterator[None] | None = None

    def _watch(self, engine: Engine) -> None:
        """The model learns which bytes a step of a discard or a zeroing has cleared when the origin does it."""

        def discard(offset: int, length: int, **options: Any) -> None:
            real[len(options) > 0](offset, length, **options)
            self._wrote(offset, bytes(length))

        real = {False: engine.origin.discard, True: engine.origin.zero}
        self.patch.setattr(engine.origin, "discard", discard)
        self.patch.setattr(engine.origin, "zero", discard)

    def teardown(self) -> None:
        self.patch.undo()
        if self.engine is not None:
            self.engine.close()
        shutil.rmtree(self.directory)
        shutil.rmtree(self.state)

    # -- the model --------------------------------------------------------------------------------

    def _range(self, drawn: tuple[int, int, int]) -> tuple[int, int]:
        offset, length, alignment = drawn
        size, least = len(self.origin), self.device.export.minimum_block
        alignment = max(alignment, least)
        offset = min(offset, size - 1) // alignment * alignment
        length = min(-(-length // alignment) * alignment, size - offset)
        return offset, length

    @property
    def device(self) -> Engine:
        assert self.engine is not None
        return self.engine

    def _blocks(self, offset: int, length: int) -> range:
        shift = self.device.tracking_shift
        return range(offset >> shift, ((offset + length - 1) >> shift) + 1)

    def _wrote(self, offset: int, piece: bytes) -> None:
        self.origin[offset : offset + len(piece)] = piece
        self._touch(offset, len(piece))

    def _touch(self, offset: int, length: int) -> None:
        for touched in self.touched.values():
            touched.update(self._blocks(offset, length))

    # -- the origin -------------------------------------------------------------------------------

    @rule(drawn=st.lists(st.tuples(ranges, kinds), min_size=1, max_size=6), skew=st.sampled_from([0, 28, 4096]))
    def write(self, drawn: list[tuple[tuple[int, int, int], int]], skew: int) -> None:
        writes = [
            (offset, contents(length, kind))
            for (offset, length), kind in ((self._range(each), kind) for each, kind in drawn)
        ]
        # Direct writes of one batch run side by side, so where they overlap any of them may be the last.
        alone = self.device.origin.direct and _overlap(writes)
        for batch in [[each] for each in writes] if alone else [writes]:
            pwrite_many(self.device.export, batch, skew)
        for offset, piece in writes:
            self._wrote(offset, piece)

    @rule(drawn=st.lists(ranges, min_size=1, max_size=6))
    def read(self, drawn: list[tuple[int, int, int]]) -> None:
        wanted = [self._range(each) for each in drawn]
        for (offset, length), got in zip(wanted, pread_many(self.device.export, wanted), strict=True):
            assert got == self.origin[offset : offset + length]

    @rule(drawn=ranges)
    def trim(self, drawn: tuple[int, int, int]) -> None:
        for _ in self.device.export.trim(*self._range(drawn)):
            self.both_read_back()

    @rule(drawn=ranges, punch=st.booleans())
    def write_zeroes(self, drawn: tuple[int, int, int], punch: bool) -> None:
        offset, length = self._range(drawn)
        for _ in self.device.export.write_zeroes(offset, length, punch=punch, fast=False):
            self.both_read_back()
        assert not any(self.origin[offset : offset + length])

    @precondition(lambda self: self.task is None)
    @rule(drawn=ranges, kind=st.integers(0, 2))
    def begin_task(self, drawn: tuple[int, int, int], kind: int) -> None:
        """A long request whose steps have others between them, even a take."""
        offset, length = self._range(drawn)
        export = self.device.export
        self.task = (
            export.trim(offset, length)
            if kind == 2
            else export.write_zeroes(offset, length, punch=bool(kind), fast=False)
        )

    @precondition(lambda self: self.task is not None)
    @rule()
    def step_task(self) -> None:
        assert self.task is not None
        if next(self.task, self) is self:
            self.task = None

    # -- the image --------------------------------------------------------------------------------

    @precondition(lambda self: self.image is not None)
    @rule(drawn=st.lists(ranges, min_size=1, max_size=6))
    def read_image(self, drawn: list[tuple[int, int, int]]) -> None:
        assert self.device.image is not None
        assert self.image is not None
        wanted = [self._range(each) for each in drawn]
        if self.corrupted:
            with pytest.raises(OSError) as caught:
                pread_many(self.device.image, wanted)
            assert caught.value.errno == EIO
            return
        for (offset, length), got in zip(wanted, pread_many(self.device.image, wanted), strict=True):
            assert got == self.image[offset : offset + length]

    @precondition(lambda self: self.image is not None)
    @rule(drawn=ranges, kind=kinds)
    def write_image(self, drawn: tuple[int, int, int], kind: int) -> None:
        offset, length = self._range(drawn)
        piece = contents(length, kind)
        self._change_image(offset, piece, lambda image: pwrite_many(image, [(offset, piece)]))

    @precondition(lambda self: self.image is not None)
    @rule(drawn=ranges)
    def zero_image(self, drawn: tuple[int, int, int]) -> None:
        offset, length = self._range(drawn)

        def call(image: Any) -> None:
            for _ in image.write_zeroes(offset, length, punch=True, fast=False):
                pass

        self._change_image(offset, bytes(length), call)

    def _change_image(self, offset: int, piece: bytes, call: Any) -> None:
        assert self.image is not None
        assert self.device.image is not None
        try:
            call(self.device.image)
        except OSError as error:
            assert error.errno == (EIO if self.corrupted else ENOSPC)
            if not self.corrupted:
                self._expect_full()
                self._partly_written(offset, piece)
            return
        finally:
            if not self.corrupted:
                self._touch_image(offset, len(piece))
        assert not self.corrupted
        self.image[offset : offset + len(piece)] = piece

    def _touch_image(self, offset: int, length: int) -> None:
        self._touch(offset, length)
        for touched in self.held_touched.values():
            touched.update(self._blocks(offset, length))

    def _partly_written(self, offset: int, piece: bytes) -> None:
        """A failed write may have reached the storage in part: each byte is the old or the new one."""
        assert self.image is not None
        assert self.device.image is not None
        got = pread(self.device.image, offset, len(piece))
        old = self.image[offset : offset + len(piece)]
        assert all(now in (before, new) for now, before, new in zip(got, old, piece, strict=True))
        self.image[offset : offset + len(piece)] = got

    # -- snapshots --------------------------------------------------------------------------------

    @precondition(lambda self: self.image is None)
    @rule(
        chunk_shift=st.integers(12, 20),
        small=st.sampled_from([None, None, PORTION, PORTION + 8192, 3 * PORTION]),
        since=st.integers(0, 300),
    )
    def take(self, chunk_shift: int, small: int | None, since: int) -> None:
        since = min(max(since, min(self.history)), self.number)
        self.held_touched = {number: set(blocks) for number, blocks in self.touched.items()}
        self.held_history, self.held_since = dict(self.history), since
        self.device.take(chunk_shift, limit=small or 64 << 20, since=since)
        self.number += 1
        assert self.device.switched.change_number == self.number
        assert self.device.switched.generation == self.generation
        assert self.device.switched.wrapped == (self.number == 255)
        if self.number == 255:
            self.number = 0
            self.history.clear()
            self.touched.clear()
            assert self.device.changes.generation != self.generation
            self.generation = self.device.changes.generation
        self.history[self.number] = bytes(self.origin)
        self.touched[self.number] = set()
        self.image = bytearray(self.origin)
        self.limited, self.corrupted = small is not None, False

    @precondition(lambda self: self.image is not None)
    @rule()
    def destroy(self) -> None:
        self.device.drop()
        self.image = None
        self.corrupted = False

    @rule()
    def worker_dies(self) -> None:
        self.task = None
        self.device.death()
        assert not self.device.opening.fresh

    @precondition(lambda self: self.image is None)
    @rule()
    def worker_restarts(self) -> None:
        self.task = None
        self.device.restart()
        assert not self.device.opening.fresh
        assert not self.device.opening.reason

    @rule(late=st.booleans())
    def clear_log(self, late: bool) -> None:
        tracker = self.device.tracker
        if tracker.start_clearing():
            tracker.changes.sync()
            tracker.end_clearing(synced=not late)

    # -- what must hold after every step ----------------------------------------------------------

    @invariant()
    def both_read_back(self) -> None:
        if self.engine is None:
            return
        assert pread(self.device.export, 0, len(self.origin)) == self.origin
        if self.image is None:
            return
        assert self.device.image is not None
        self._look_for_corruption()
        if not self.corrupted:
            assert pread(self.device.image, 0, len(self.image)) == self.image

    def _look_for_corruption(self) -> None:
        if not self.device.failures or self.corrupted:
            return
        assert self.device.failures == [ENOSPC]
        self.corrupted = True
        self._expect_full()

    def _expect_full(self) -> None:
        """Only a storage that has no room for one more window may overflow."""
        assert self.limited
        # A chunk of up to 1 MiB that cannot be split is stored by one image write.
        assert self.device.limit() - self.device.stored() < max(WINDOW, LARGEST)

    @invariant()
    def no_change_is_missed(self) -> None:
        if self.engine is None:
            return
        changes = self.device.changes
        for since, before in self.history.items():
            reported = _blocks_of(changes.changed_extents(since), 1 << changes.block_shift)
            assert _differing(self.origin, before, 1 << changes.block_shift) <= reported
            assert reported == self.touched[since]
        if self.image is None:
            return
        for since, touched in self.held_touched.items():
            reported = _blocks_of(changes.changed_extents(since, held=True), 1 << changes.block_shift)
            assert _differing(self.image, self.held_history[since], 1 << changes.block_shift) <= reported
            assert reported == touched

    @invariant()
    def numbers_ahead_are_refused(self) -> None:
        if self.engine is not None:
            with pytest.raises(GenerationError):
                self.device.changes.changed_extents(self.number + 1)

    @invariant()
    def status_never_lies(self) -> None:
        if self.engine is None:
            return
        self._holes_are_zero(self.device.export, self.origin)
        bitmap = f"qemu:dirty-bitmap:since-{self.number}"
        block = 1 << self.device.tracking_shift
        assert _dirty_blocks(self.device.export, bitmap, block) == self.touched[self.number]
        if self.image is not None and self.device.image is not None:
            assert _dirty_blocks(self.device.image, SINCE, block) == self.held_touched[self.held_since]
            if not self.corrupted:
                self._holes_are_zero(self.device.image, self.image)

    def _holes_are_zero(self, export: Any, expected: bytearray) -> None:
        for offset, length, flags in extents(export, BASE_ALLOCATION):
            if flags & NBD_STATE_ZERO:
                assert not any(expected[offset : offset + length]), f"{offset}:{length} is no hole"


def _overlap(writes: list[tuple[int, bytes]]) -> bool:
    spans = sorted((offset, offset + len(piece)) for offset, piece in writes)
    return any(left[1] > right[0] for left, right in itertools.pairwise(spans))


def _blocks_of(found: list[tuple[int, int]], block: int) -> set[int]:
    """Blocks of extents, which must be ascending, apart from each other, and made of whole blocks."""
    blocks: set[int] = set()
    end = -1
    for offset, length in found:
        assert offset > end
        assert length > 0
        assert offset % block == 0
        end = offset + length
        blocks.update(range(offset // block, -(-end // block)))
    return blocks


def _differing(left: bytes | bytearray, right: bytes | bytearray, block: int) -> set[int]:
    if left == right:
        return set()
    starts = range(0, len(left), block)
    return {start // block for start in starts if left[start : start + block] != right[start : start + block]}


def _dirty_blocks(export: Any, context: str, block: int) -> set[int]:
    return {
        number
        for offset, length, flags in extents(export, context)
        if flags
        for number in range(offset // block, -(-(offset + length) // block))
    }


TestDevice = pytest.mark.timeout(7200)(Device.TestCase)
