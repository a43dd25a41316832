# SPDX-License-Identifier: Apache-2.0
"""The histories of test_history.py with COW files on the device itself: what lies between the files is never touched,
images never change, and power cuts lose what the device had not made durable.

A stand-in takes the file system's part: it gives out scattered blocks at the device's end, and shows a file that was
given back as it lies there.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stasis.block.origin import Request
from stasis.datto import filing
from stasis.datto.claim import Claim
from stasis.datto.extents import Territory
from stasis.datto.layout import Geometry, Header
from stasis.datto.mapped import MappedCowFile
from stasis.datto.ondevice import Places
from stasis.datto.pinned import Pinned
from tests.datto import rig as rigs
from tests.datto.rig import BLOCK, Rig, live_through_a_series

HISTORIES = 60 if os.environ.get("STASIS_LONG") else 3
TRANSITIONS = 12
USER = 600 * BLOCK
FILE = 640 * BLOCK
SIZE = USER + 2 * FILE + 512
PIECE = 16 * BLOCK


class _Beside(rigs._Background):
    """Knows whether somebody is beside the loop: only there a file system may be waited for."""

    jobs = 0

    def run(self, job: Any, done: Any) -> None:
        def counted() -> None:
            _Beside.jobs += 1
            try:
                job()
            finally:
                _Beside.jobs -= 1

        super().run(counted, done)


class _FileSystem(Places):
    """Gives every other file the same half of the space behind the user's blocks."""

    def make(self, path: str, header: Header, geometry: Geometry, cache: int, node: str, in_use: int) -> MappedCowFile:
        assert _Beside.jobs
        start = USER + (header.seqid % 2) * FILE
        order = random.Random(header.seqid).sample(range(FILE // PIECE), FILE // PIECE)
        stretches = tuple((number * PIECE, start + place * PIECE, PIECE) for number, place in enumerate(order))
        header.fsize = FILE
        pinned = Pinned(path, path, header.seqid, node, header.uuid.hex(), header.seqid, FILE, stretches)
        claim = Claim(Territory(pinned.blocks.ranges(), BLOCK))
        self._claimed(claim)
        self._write_through(start)
        claim.is_filling = False
        blocks = self._open_blocks(pinned)
        cow = MappedCowFile(pinned, blocks, geometry, header, cache, self, fresh=True)
        cow.write_header()
        cow.sync()
        pinned.save(self._directory())
        return cow

    def _write_through(self, start: int) -> None:
        """Fill the file as a file system does: through the served device."""
        with rigs.IoBuffer(FILE) as zeroes:
            self._host.export.write(zeroes, [(start, FILE, 0)])

    def _do(self, operation: str, pinned: Pinned, **fields: Any) -> None:
        assert _Beside.jobs
        if operation == "release":
            blocks = self._open_blocks(pinned)
            data = memoryview(bytearray(pinned.size))
            blocks.read(data, 0)
            os.close(blocks.fd)
            Path(pinned.path).write_bytes(data)


class OnDeviceRig(Rig):
    """The same device with its COW files behind the user's blocks."""

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        return super().ask(request, **fields, **({"node": "x"} if request in ("prepare", "snapshot") else {}))

    def own(self) -> list[tuple[int, int]]:
        tracer = self.hosted.tracer
        return list(tracer.cow.territory.ranges) if tracer is not None else []

    def to_snapshot(self) -> None:
        super().to_snapshot()
        self.image = _blank(self.image, self.own())

    def _lose(self, path: Path, page: int) -> None:
        if path != self.cow():
            super()._lose(path, page)
            return
        now = bytearray(self.path.read_bytes())
        kept = self.durable[self.path.stat().st_ino]
        for start in range(USER, USER + 2 * FILE, BLOCK):
            if self.random.random() < 0.5:
                now[start : start + BLOCK] = kept[start : start + BLOCK]
        with self.path.open("r+b") as file:
            file.write(now)


def _blank(image: bytes, ranges: list[tuple[int, int]]) -> bytes:
    blank = bytearray(image)
    for start, end in ranges:
        blank[start:end] = bytes(end - start)
    return bytes(blank)


def _user(image: bytes) -> bytes:
    return _blank(image, [(USER, USER + 2 * FILE)])


@pytest.fixture
def rig(short_dir: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Rig:
    monkeypatch.setattr(rigs, "SIZE", SIZE)
    monkeypatch.setattr(filing, "Places", _FileSystem)
    monkeypatch.setattr(rigs, "_Background", _Beside)
    rig = OnDeviceRig(short_dir, monkeypatch, seed)
    assert isinstance(rig.hosted.tracer and rig.hosted.tracer.cow, MappedCowFile)
    rig.image = _blank(rig.image, rig.own())
    return rig


def _step(rig: Rig, choose: random.Random) -> None:
    offset = choose.choice((choose.randrange(USER), choose.randrange(600) * BLOCK, USER - choose.randint(1, 5000)))
    what = choose.choice((rig.write, rig.write, rig.write, rig.discard, rig.zero))
    what(offset, min(choose.choice((1, 512, 4096, 10000, 300000)), USER - offset))


@pytest.mark.parametrize("number", range(HISTORIES))
def test_changes_lead_from_each_image_to_the_next(rig: OnDeviceRig, seed: int, number: int) -> None:
    choose = random.Random(f"{seed} {number}")
    for _ in range(TRANSITIONS):
        live_through_a_series(rig, choose, _step)
        finished = rig.number
        rig.to_snapshot()
        assert _user(rig.copied) == _user(rig.image)
        assert [pinned.seqid for pinned in Pinned.all(rig.directory)] == [rig.number + 1]
        assert (rig.directory / f"cow{finished}").exists()
        assert set(rig.host.events) <= {"datto_woke"}
    rig.close()


def test_nothing_but_its_own_blocks_is_ever_written(rig: OnDeviceRig) -> None:
    before = rig.path.read_bytes()
    own = rig.own()
    tracer = rig.hosted.tracer
    assert tracer is not None
    rig.write(0, USER)
    written = bytes(rig.buffer.view[:USER])
    after = rig.path.read_bytes()
    assert after[:USER] == written
    assert _blank(after, [(0, USER), *own]) == _blank(before, [(0, USER), *own])
    rig.close()


@pytest.mark.parametrize("mode", ["snapshot", "incremental"])
@pytest.mark.parametrize("what", ["write", "discard", "zero"])
def test_whoever_writes_to_its_blocks_ends_the_tracer_first(rig: OnDeviceRig, mode: str, what: str) -> None:
    if mode != rig.mode:
        rig.to_incremental()
    start, end = rig.own()[0]
    getattr(rig, what)(end - 512, 512)
    assert rig.ask("info")["error"] == -errno.ESTALE
    now = rig.path.read_bytes()[end - 512 : end]
    assert now == (bytes(rig.buffer.view[:512]) if what == "write" else bytes(512))
    before = rig.path.read_bytes()[start:end]
    rig.write(0, 100000)  # nothing is kept any more
    assert rig.path.read_bytes()[start:end] == before
    rig.ask("drop")
    rig.close()


def _unmarked(rig: OnDeviceRig, before: bytes, since: int) -> list[int]:
    """Blocks that differ from what was there before and that the change map does not list."""
    now, listed = rig.path.read_bytes(), set[int]()
    for start, length in rig.host.tracker.changes.changed_extents(since):
        listed |= set(range(start // BLOCK, -(-(start + length) // BLOCK)))
    return [block for block in range(-(-SIZE // BLOCK)) if block not in listed
            and now[block * BLOCK : (block + 1) * BLOCK] != before[block * BLOCK : (block + 1) * BLOCK]]


def test_a_backup_by_the_change_map_finds_every_block_that_is_written_under_it(rig: OnDeviceRig) -> None:
    """Its random sample of what did not change would call tracking broken otherwise."""
    for step in (lambda: rig.write(0, 100000), lambda: rig.write(USER // 2, 3 * BLOCK), rig.to_incremental,
                 lambda: rig.write(5000, 300000), rig.to_snapshot, lambda: rig.ask("rest"), lambda: rig.write(0, 1),
                 rig.to_incremental, lambda: rig.ask("rest")):
        before = rig.path.read_bytes()
        since = rig.host.tracker.switch().change_number
        step()
        assert not _unmarked(rig, before, since)
    rig.ask("drop")
    rig.close()


class _Keeper:
    """Stands for the snapshot engine."""

    def __init__(self, path: Path) -> None:
        self._path, self._kept = path, dict[int, bytes]()

    def preserve(self, requests: Sequence[Request]) -> None:
        with self._path.open("rb") as file:
            for offset, length, _ in requests:
                for block in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
                    file.seek(block * BLOCK)
                    self._kept.setdefault(block, file.read(BLOCK))

    def image(self) -> bytes:
        image = bytearray(self._path.read_bytes())
        for block, contents in self._kept.items():
            image[block * BLOCK : block * BLOCK + len(contents)] = contents
        return bytes(image)


def test_a_snapshot_of_the_device_keeps_what_lay_where_it_writes(rig: OnDeviceRig,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, before = _Keeper(rig.path), rig.path.read_bytes()
    monkeypatch.setattr(rig.host.export, "cow", keeper)
    rig.write(0, 100000)
    rig.to_incremental()
    rig.write(USER // 2, 100000)
    rig.to_snapshot()
    rig.write(7 * BLOCK, BLOCK)
    assert keeper.image() == before
    rig.close()


def test_a_change_map_learns_of_all_blocks_when_they_are_given_back(rig: OnDeviceRig) -> None:
    """They are anybody's from then on."""
    tracker = rig.host.tracker
    tracker.switch()
    own = rig.own()
    rig.write(0, 100000)
    assert not all(tracker.changes.is_marked(start, end - start) for start, end in own)
    rig.ask("drop")
    assert all(tracker.changes.is_marked(start, end - start) for start, end in own)
    rig.close()


def test_a_file_whose_finish_nobody_asked_for_is_given_back_later(rig: OnDeviceRig) -> None:
    """The daemon died in the middle of a transition."""
    rig.to_incremental()
    finished = rig.cow()
    rig.number += 1
    rig.ask("prepare_next", cow=str(rig.cow()), size=0, node="x")
    rig.ask("follow")
    assert not finished.exists()
    rig.to_incremental()
    rig.number += 1
    rig.ask("snapshot", cow=str(rig.cow()), size=0)
    assert finished.exists()
    assert [pinned.seqid for pinned in Pinned.all(rig.directory)] == [3]
    rig.close()


def test_it_does_not_grow_during_a_snapshot(rig: OnDeviceRig) -> None:
    for request, fields in (("expand", {"length": BLOCK}), ("autoexpand", {"step": BLOCK, "reserved": 0})):
        with pytest.raises(rigs.Refused) as caught:
            rig.ask(request, **fields)
        assert caught.value.args == (errno.EOPNOTSUPP,)
    assert rig.ask("info")["error"] == 0
    rig.close()
