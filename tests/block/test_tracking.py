# SPDX-License-Identifier: Apache-2.0
"""When a change map goes on after a restart, when it assumes, and when it begins a new generation and says why."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stasis.block import mapformat, tracking
from stasis.block.changemap import Identity
from stasis.block.mapformat import NO_FS_MARK
from stasis.block.tracking import Opening, Tracker
from stasis.errors import GenerationError

BLOCK, REGION = 1 << 16, 1 << 20
SIZE = 10 * REGION - 5
SECOND = 1_000_000_000

Open = Callable[..., tuple[Tracker, Opening]]


def file_now(**fields: int) -> Identity:
    """An image file that was written just now."""
    return replace(Identity(8, 42, SIZE, time.time_ns()), **fields)


DISK = Identity(0x800, 7, SIZE, 1000)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Open]:
    """Open the tracker of the one device here."""
    opened: list[Tracker] = []

    def call(identity: Identity, size: int = SIZE, shift: int = 16, *, continuous: bool = False,
             fs_mark: bytes = NO_FS_MARK) -> Any:
        result = Tracker.open(tmp_path, size, shift, 20, identity, continuous=continuous, fs_mark=lambda: fs_mark)
        opened.append(result[0])
        return result

    yield call
    for tracker in opened[-1:]:
        tracker.close()


@pytest.fixture
def reboot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def call() -> None:
        monkeypatch.setattr(mapformat, "this_boot", lambda: b"another boot id.")
        monkeypatch.setattr(tracking, "_boot_time", lambda: time.time_ns())

    return call


def ended(start: Open, identity: Identity, *, clean: bool) -> str:
    """A worker that wrote to the first block and ended; the generation."""
    tracker, opening = start(identity)
    assert opening == Opening(True, "")
    tracker.mark([(0, 1, 0)])
    generation = tracker.changes.generation
    if clean:
        tracker.finish(identity)
    tracker.close()
    return generation


@pytest.mark.parametrize("identity", [file_now(), DISK])
def test_clean_end_goes_on(start: Open, identity: Identity) -> None:
    generation = ended(start, identity, clean=True)
    tracker, opening = start(identity)
    assert opening == Opening(False, "")
    assert tracker.changes.generation == generation
    assert tracker.changes.changed_extents(0) == [(0, BLOCK)]
    assert tracker.log.dirty() == []


def test_clean_end_goes_on_after_a_boot(start: Open, reboot: Callable[[], None]) -> None:
    identity = file_now()
    generation = ended(start, identity, clean=True)
    reboot()
    tracker, opening = start(identity)
    assert opening == Opening(False, "")
    assert tracker.changes.generation == generation
    assert tracker.changes.changed_extents(0) == [(0, BLOCK)]


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (file_now(mark=time.time_ns() + SECOND), "while it was not attached"),
        (file_now(inode=43), "another file"),
    ],
)
def test_a_file_that_changed_while_detached_is_not_trusted(start: Open, now: Identity, reason: str) -> None:
    generation = ended(start, file_now(mark=time.time_ns() - SECOND), clean=True)
    tracker, opening = start(now)
    assert opening.fresh
    assert reason in opening.reason
    assert tracker.changes.assumed == opening.reason
    assert tracker.changes.generation != generation


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (replace(DISK, mark=1001), "while it was not attached"),
        (replace(DISK, mark=-1), "while it was not attached"),
        (replace(DISK, inode=8), "another file or device"),
    ],
)
def test_a_disk_that_changed_while_detached_is_not_trusted(start: Open, now: Identity, reason: str) -> None:
    ended(start, DISK, clean=True)
    _, opening = start(now)
    assert opening.fresh
    assert reason in opening.reason


def test_a_disk_is_trusted_after_a_boot_only_if_nobody_wrote(start: Open, reboot: Callable[[], None]) -> None:
    ended(start, DISK, clean=True)
    reboot()
    tracker, opening = start(replace(DISK, inode=1, mark=0))
    assert opening == Opening(False, "")
    tracker.finish(replace(DISK, inode=1, mark=5))
    tracker.close()
    _, opening = start(replace(DISK, inode=1, mark=6))
    assert opening.fresh


@pytest.mark.parametrize(("before", "now", "is_trusted"), [
    (b"m" * 32, b"m" * 32, True),
    (b"m" * 32, b"n" * 32, False),
    (b"m" * 32, NO_FS_MARK, False),
    (NO_FS_MARK, b"m" * 32, False),
    (NO_FS_MARK, NO_FS_MARK, True),
])
def test_a_mount_between_the_end_and_the_boot_is_seen(start: Open, reboot: Callable[[], None], before: bytes,
                                                      now: bytes, is_trusted: bool) -> None:
    """The counter has forgotten it."""
    ended(start, DISK, clean=True)
    tracker, _ = start(DISK)
    tracker.finish(DISK, before)
    tracker.close()
    reboot()
    tracker, opening = start(replace(DISK, inode=1, mark=0), fs_mark=now)
    assert opening.fresh is not is_trusted
    assert is_trusted or "while it was not attached" in opening.reason
    assert tracker.changes.fs_mark == NO_FS_MARK  # nothing is told while it is served


@pytest.mark.parametrize("continuous", [False, True])
def test_another_size_is_a_new_generation(start: Open, continuous: bool) -> None:
    ended(start, file_now(), clean=True)
    tracker, opening = start(file_now(), size=SIZE + REGION, continuous=continuous)
    assert f"from {SIZE} to {SIZE + REGION} bytes" in opening.reason
    assert tracker.changes.capacity == SIZE + REGION


def test_another_tracking_block_is_a_new_generation(start: Open) -> None:
    ended(start, file_now(), clean=True)
    _, opening = start(file_now(), shift=17)
    assert "tracking block changed" in opening.reason


@pytest.mark.parametrize("identity", [file_now(), DISK, replace(DISK, mark=5000)])
def test_death_of_a_worker_assumes_nothing(start: Open, identity: Identity) -> None:
    """The daemon held the origin meanwhile."""
    generation = ended(start, identity, clean=False)
    tracker, opening = start(identity, continuous=True)
    assert opening == Opening(False, "")
    assert tracker.changes.generation == generation
    assert tracker.changes.changed_extents(0) == [(0, BLOCK)]


def test_death_of_worker_and_daemon(start: Open) -> None:
    """A file that was not written since the last tick goes on; a disk that nobody held does not."""
    generation = ended(start, file_now(), clean=False)
    tracker, opening = start(file_now())
    assert opening == Opening(False, "")
    assert tracker.changes.generation == generation
    tracker.close()
    _, opening = start(file_now(mark=time.time_ns() + 10 * SECOND))
    assert "by another program after its worker died" in opening.reason


def test_a_disk_nobody_held_is_not_trusted(start: Open) -> None:
    ended(start, DISK, clean=False)
    _, opening = start(DISK)
    assert "nobody held the device" in opening.reason


def test_a_power_cut_assumes_the_regions_of_the_log(start: Open, reboot: Callable[[], None]) -> None:
    identity = file_now()
    generation = ended(start, identity, clean=False)
    reboot()
    tracker, opening = start(identity)
    assert opening == Opening(False, f"{REGION} bytes in 1 regions assumed changed after an unclean stop")
    assert tracker.changes.generation == generation
    assert tracker.changes.changed_extents(0) == [(0, REGION)]
    assert tracker.changes.info().assumed == opening.reason


def test_the_last_region_is_assumed_up_to_the_end(start: Open, reboot: Callable[[], None]) -> None:
    tracker, _ = start(file_now())
    tracker.mark([(SIZE - 1, 1, 0)])
    tracker.close()
    reboot()
    tracker, opening = start(file_now(mark=time.time_ns() - SECOND))
    assert opening.reason.startswith(f"{REGION - 5} bytes")
    assert tracker.changes.changed_extents(0) == [(9 * REGION, REGION - 5)]


def test_a_file_written_after_its_worker_died_and_before_the_boot(
    start: Open, reboot: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(start, file_now(), clean=False)
    late = file_now(mark=time.time_ns() + 600 * SECOND)
    reboot()
    monkeypatch.setattr(tracking, "_boot_time", lambda: late.mark + SECOND)
    _, opening = start(late)
    assert opening.fresh
    assert "by another program after its worker died" in opening.reason


def test_a_disk_written_since_the_boot_is_not_trusted(start: Open, reboot: Callable[[], None]) -> None:
    ended(start, DISK, clean=False)
    reboot()
    _, opening = start(replace(DISK, mark=8))
    assert "since the machine started" in opening.reason


@pytest.mark.parametrize("name", ["map", "intent"])
@pytest.mark.parametrize("damage", ["gone", "empty", "other", "cut"])
def test_damaged_files_begin_a_generation(start: Open, tmp_path: Path, name: str, damage: str) -> None:
    identity = file_now()
    generation = ended(start, identity, clean=True)
    path = tmp_path / name
    if damage == "gone":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        path.write_bytes(b"something else" * 1000)
    else:
        path.write_bytes(path.read_bytes()[:515])
    tracker, opening = start(identity)
    assert opening.fresh
    assert opening.reason or (name, damage) == ("map", "gone")
    assert tracker.changes.generation != generation
    assert tracker.changes.changed_extents(0) == []


def test_a_log_that_cannot_be_written_breaks_the_map_and_not_the_write(
    start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, _ = start(file_now())
    tracker.mark([(0, 1, 0)])

    def fail(_regions: set[int]) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tracker.log, "_write", fail)
    tracker.mark([(0, 10, 0)])
    assert tracker.changes.changed_extents(0) == [(0, BLOCK)]
    tracker.mark([(5 * REGION, 10, 0)])
    with pytest.raises(GenerationError, match="Input/output error"):
        tracker.changes.changed_extents(0)
    monkeypatch.undo()
    tracker.finish(file_now())
    tracker.close()
    _, opening = start(file_now())
    assert opening.fresh
    assert "write-intent log cannot be written" in opening.reason


def test_marks_by_hand_reach_both_maps(start: Open) -> None:
    tracker, _ = start(file_now())
    tracker.switch()
    tracker.mark_both([(BLOCK, 1)])
    assert tracker.changes.changed_extents(0, held=True) == [(BLOCK, BLOCK)]
    assert tracker.changes.changed_extents(1) == [(BLOCK, BLOCK)]
    assert tracker.log.dirty() == [0]


def test_quiet_regions_leave_the_log(start: Open) -> None:
    """A region that gets a new mark while the map is synced stays."""
    tracker, _ = start(file_now())
    tracker.mark([(0, 1, 0), (3 * REGION, 1, 0)])
    assert tracker.log.dirty() == [0, 3]
    assert tracker.start_clearing()
    assert not tracker.start_clearing()
    tracker.mark([(3 * REGION + BLOCK, 1, 0)])
    tracker.end_clearing(synced=True)
    assert tracker.log.dirty() == [3]
    assert tracker.start_clearing()
    tracker.end_clearing(synced=False)
    assert tracker.log.dirty() == [3]
    assert tracker.start_clearing()
    tracker.end_clearing(synced=True)
    assert tracker.log.dirty() == []
    assert not tracker.start_clearing()
    tracker.mark([(3 * REGION, 1, 0)])
    assert tracker.log.dirty() == []
    tracker.switch()
    tracker.mark([(3 * REGION, 1, 0)])
    assert tracker.log.dirty() == [3]
