# SPDX-License-Identifier: Apache-2.0
"""image(n) + what file(n) says changed, read from snapshot n+1, is image(n+1): through every restart and crash."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from stasis.datto.cowreader import CowReader
from stasis.datto.layout import Geometry
from tests.datto.rig import BLOCK, SIZE, Refused, Rig, killed_at, live_through_a_series

HISTORIES = 60 if os.environ.get("STASIS_LONG") else 3
TRANSITIONS = 12


@pytest.fixture
def rig(short_dir: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Rig:
    return Rig(short_dir, monkeypatch, seed)


def _step(rig: Rig, choose: random.Random) -> None:
    offset = choose.choice((choose.randrange(SIZE), choose.randrange(600) * BLOCK, SIZE - choose.randint(1, 5000)))
    what = choose.choice((rig.write, rig.write, rig.write, rig.discard, rig.zero))
    what(offset, choose.choice((1, 512, 4096, 10000, 300000)))


@pytest.mark.parametrize("number", range(HISTORIES))
def test_changes_lead_from_each_image_to_the_next(rig: Rig, seed: int, number: int) -> None:
    choose = random.Random(f"{seed} {number}")
    for _ in range(TRANSITIONS):
        live_through_a_series(rig, choose, _step)
        rig.to_snapshot()
        assert rig.copied == rig.image
        assert set(rig.host.events) <= {"datto_woke"}
    rig.close()


@pytest.mark.parametrize("mode", ["snapshot", "incremental"])
@pytest.mark.parametrize("after", ["die", "cut"])
def test_a_worker_may_die_between_any_two_file_operations(rig: Rig, monkeypatch: pytest.MonkeyPatch, mode: str,
                                                          after: str) -> None:
    killed = calls = 0
    while killed == calls:
        if mode != rig.mode:
            rig.to_incremental()
        killed += killed_at(monkeypatch, calls, lambda: rig.write(SIZE // 2 - 5000, 90000))
        calls += 1
        rig.die() if after == "die" else rig.cut()
        if rig.mode == "snapshot":
            assert rig.read_image() == rig.image
        else:
            rig.to_snapshot()
            assert rig.copied == rig.image
        if mode == "snapshot" == rig.mode and after == "die":
            rig.to_incremental()
            rig.to_snapshot()
            assert rig.copied == rig.image
    assert killed >= (4 if mode == "snapshot" else 3)
    rig.close()


# -- single promises ----------------------------------------------------------------------------------------


def test_a_range_that_is_discarded_or_zeroed_is_whole_in_the_snapshot(rig: Rig) -> None:
    rig.discard(0, 1 << 20)
    rig.zero(1 << 20, 1 << 20)
    assert rig.path.read_bytes()[: 1 << 21] == bytes(1 << 21)
    assert rig.read_image() == rig.image
    rig.to_incremental()
    rig.to_snapshot()
    assert rig.copied == rig.image
    rig.close()


def test_a_block_that_is_kept_is_not_read_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.write(0, 50000)
    monkeypatch.setattr(rig.host.origin, "read", None)
    rig.write(0, 49152)
    rig.write(100, 20)
    assert rig.ask("info")["changed"] == 13
    monkeypatch.undo()
    rig.close()


def test_a_full_file_ends_the_snapshot_and_not_the_write(rig: Rig) -> None:
    assert rig.hosted.tracer is not None
    rig.hosted.tracer.cow.header.fsize = Geometry(SIZE).data_offset + 100 * BLOCK
    for block in range(95):
        rig.write(block * BLOCK, BLOCK)
    assert rig.host.events == ["datto_low", "datto_low"]
    rig.write(90 * BLOCK, 20 * BLOCK)
    assert rig.host.events[2:] == ["datto_failed"]
    assert rig.ask("info")["error"] == -errno.EFBIG
    with pytest.raises(OSError) as caught:
        rig.read_image()
    assert caught.value.errno == errno.EIO
    assert not rig.cow().exists()
    assert not list(rig.directory.glob("datto-*"))
    rig.write(0, 5000)
    assert rig.path.read_bytes()[:5000] == bytes(rig.buffer.view[:5000])
    rig.ask("drop")
    rig.close()


def test_a_full_file_grows_by_itself_if_it_may(rig: Rig) -> None:
    assert rig.hosted.tracer is not None
    cow = rig.hosted.tracer.cow
    cow.header.fsize = Geometry(SIZE).data_offset + 4 * BLOCK
    os.truncate(cow.fd, cow.header.fsize)
    rig.ask("autoexpand", step=1 << 20, reserved=0)
    rig.write(0, 500 * BLOCK)
    assert rig.host.events.count("datto_failed") == 0
    assert cow.header.fsize == Geometry(SIZE).data_offset + 4 * BLOCK + (2 << 20)
    assert rig.read_image() == rig.image
    rig.ask("autoexpand", step=1 << 20, reserved=1 << 60)
    rig.write(0, SIZE)
    assert rig.ask("info")["error"] == -errno.EFBIG
    rig.close()


def test_what_was_written_behind_its_back_ends_the_series(rig: Rig) -> None:
    rig.to_incremental()
    rig.hosted.stop()
    rig.host.tracker.finish(rig.host.origin.identity())
    rig.host.tracker.close()
    rig.host.origin.close()
    with rig.path.open("r+b") as file:
        file.write(b"behind its back")
    before = rig.cow().read_bytes()
    rig.start(rig._state(), continuous=False)
    assert rig.ask("info")["error"] == -errno.EINVAL
    assert rig.cow().read_bytes() == before
    assert not list(rig.directory.glob("datto-*"))
    rig.close()


def test_a_snapshot_is_not_taken_up_after_a_power_cut(rig: Rig) -> None:
    rig.write(0, 5000)
    rig._die()
    rig.host.origin.close()
    rig.boots += 1
    rig.start(rig._state(), continuous=False)
    assert (rig.hosted.tracer, rig.ask("info")["error"]) == (None, -errno.EINVAL)
    rig.close()


def test_a_long_discard_is_only_cut_up_where_contents_are_kept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(rig.host.origin, "discard", lambda offset, length: steps.append(length))
    rig.discard(0, 2 << 20)
    assert steps == [256 << 10] * 8
    steps.clear()
    rig.to_incremental()
    rig.discard(0, 2 << 20)
    assert steps == [2 << 20]
    rig.close()


def test_only_one_file_of_a_device_can_be_taken_up_again(rig: Rig) -> None:
    """What it saw, no other one did: the logs of all others go when it begins."""
    other = rig.directory / "datto-another-1"
    other.write_bytes(b"a log")
    rig.restart()
    assert rig.hosted.tracer is not None
    assert not other.exists()
    assert len(list(rig.directory.glob("datto-*"))) == 1
    rig.close()


def test_the_next_file_needs_a_name_of_its_own(rig: Rig) -> None:
    rig.to_incremental()
    with pytest.raises(Refused) as caught:
        rig.ask("snapshot", cow=str(rig.cow()), size=0)
    assert caught.value.args == (errno.EBUSY,)
    rig.write(0, 1)
    rig.to_snapshot()
    assert rig.copied == rig.image
    rig.close()


def test_another_size_ends_it(rig: Rig) -> None:
    rig.hosted.resized()
    assert rig.ask("info")["error"] == -errno.EIO
    rig.close()


def test_destroy_removes_the_file_and_the_log(rig: Rig) -> None:
    rig.ask("drop")
    assert rig.ask("info")["minor"] == 0
    assert sorted(path.name for path in rig.directory.iterdir()) == ["disk", "intent", "map"]
    rig.write(0, 5)
    rig.close()


def test_a_finished_file_tells_what_changed_in_both_of_its_phases(rig: Rig) -> None:
    rig.write(0, 1)
    rig.to_incremental()
    rig.write(SIZE - 1, 1)
    rig.to_snapshot()
    with CowReader(str(rig.directory / "cow0"), SIZE) as reader:
        assert list(reader.extents()) == [(0, BLOCK), (600 * BLOCK, 512)]
    rig.close()
