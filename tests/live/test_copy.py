# SPDX-License-Identifier: Apache-2.0
"""A backup of a device that is written all the time holds the device as it was at the freeze, byte for byte."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stasis.backup.repo import Repository
from stasis.errors import BusyError, ExitCode, GenerationError, StasisError, StorageError
from stasis.linux import freeze
from stasis.live.liveset import LiveSet
from stasis.live.options import LiveOptions
from stasis.live.source import LiveSource
from stasis.live.stash import Budget
from tests.backup.restoring import new_repository
from tests.live.difftracker import DiffTracker
from tests.live.disks import (
    MIB,
    Backup,
    Disk,
    Setup,
    back_up,
    formatted,
    image_file,
    loop,
    mounted,
    put_number,
    tool,
    writing,
)
from tests.system.helpers import LONG

pytestmark = [pytest.mark.root, pytest.mark.tool("mkfs.ext4", "losetup")]

ROUNDS = 30 if LONG else 3
DATA = 4 * MIB


@pytest.fixture
def writer(disk: Disk, seed: int) -> Iterator[Callable[[int], None]]:
    """Writes 4 KiB at random places of a file of the disk; every eighth time durably."""
    draw = random.Random(seed)
    fd = os.open(disk.directory / "data", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, draw.randbytes(DATA), 0)

    def write(number: int) -> None:
        os.pwrite(fd, draw.randbytes(4096), draw.randrange(DATA // 4096) * 4096)
        if not number % 8:
            os.fdatasync(fd)

    yield write
    os.close(fd)


def of(disk: Disk, tracker: DiffTracker | None = None) -> tuple[str, Path, DiffTracker]:
    return disk.node, disk.image, tracker or DiffTracker(disk.image)


def kinds(backup: Backup) -> list[str]:
    return [one.kind for one in backup.result.backups]


def test_what_is_stored_is_the_device_at_the_freeze(disk: Disk, writer: Callable[[int], None], repository: Repository,
                                                    tmp_path: Path) -> None:
    device = of(disk)
    with writing(writer):
        for number in range(ROUNDS):
            backup = back_up(repository, tmp_path / "state", [device])
            assert backup.stored == backup.contents
            assert kinds(backup) == ["incremental" if number else "full"]
            assert backup.result.backups[0].consistency == "frozen"
            assert backup.result.warnings == ()


def test_many_rounds_end_in_one_state(disk: Disk, writer: Callable[[int], None], repository: Repository,
                                      tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounds of the job replace what earlier ones stored; the last ones happen in memory."""
    answers = iter([False, False, True] * 2)
    monkeypatch.setattr(LiveSet, "fits", lambda self: next(answers))
    monkeypatch.setattr("stasis.backup.job.precopy.GAINING", float("inf"))
    device = of(disk)
    with writing(writer):
        for _ in range(2):
            backup = back_up(repository, tmp_path / "state", [device])
            assert backup.stored == backup.contents
            assert backup.result.backups[0].statistics["rounds"] == 3


def test_devices_of_a_set_show_one_instant(disk: Disk, repository: Repository, tmp_path: Path) -> None:
    """A number goes to the first file system, durably, and then to the second one: it is never ahead there."""
    with formatted("ext4", tmp_path, "other") as other:
        devices = [of(disk), of(other)]

        def write(number: int) -> None:
            for one in (disk, other):
                put_number(one.directory / "number", number)

        write(0)
        with writing(write):
            backup = back_up(repository, tmp_path / "state", devices)
        assert backup.stored == backup.contents
        first, second = (_number_in(image, tmp_path) for image in backup.stored)
        assert second in (first, first - 1)


def _number_in(image: bytes, where: Path) -> int:
    path = where / "restored.img"
    path.write_bytes(image)
    return int(tool("debugfs", "-R", "cat /number", path))


def test_a_change_between_the_last_round_and_the_freeze_is_laid_over_its_chunk(disk: Disk, repository: Repository,
                                                                               tmp_path: Path) -> None:
    """Only one block of a chunk of four is copied in the freeze; the rest of it comes from the round before."""
    with new_repository(tmp_path / "large", chunk_size=4 * 65536) as large:
        device = of(disk)
        node = disk.directory / "file"
        node.write_bytes(os.urandom(MIB))
        os.sync()
        original = LiveSet.converge

        def converge(group: LiveSet) -> None:
            original(group)
            with node.open("r+b") as file:
                file.seek(300_000)
                file.write(b"late")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LiveSet, "converge", converge)
            backup = back_up(large, tmp_path / "state", [device])
        assert backup.stored == backup.contents
        assert b"late" in backup.stored[0]


def test_what_is_mounted_during_the_rounds_is_frozen_too(disk: Disk, repository: Repository, tmp_path: Path) -> None:
    """A file system in a file of the disk, on a loop device that was not there when the backup began."""
    inner = disk.directory / "inner.img"
    with inner.open("wb") as file:
        file.truncate(4 * MIB)
    tool("mkfs.ext4", "-q", "-F", inner)
    with ExitStack() as later, pytest.MonkeyPatch.context() as patch:
        original = LiveSet.fits

        def mount_and_ask(group: LiveSet) -> bool:
            node = later.enter_context(loop(inner))
            later.enter_context(mounted(node, tmp_path / "inner"))
            return original(group)

        patch.setattr(LiveSet, "fits", mount_and_ask)
        backup = back_up(repository, tmp_path / "state", [of(disk)])
    assert backup.report.frozen == [str(tmp_path / "inner"), str(disk.directory)]
    assert backup.stored == backup.contents


def test_a_read_only_mount_is_as_good(disk: Disk, repository: Repository, tmp_path: Path) -> None:
    tool("mount", "-o", "remount,ro", disk.directory)
    backup = back_up(repository, tmp_path / "state", [of(disk)])
    assert backup.stored == backup.contents
    assert backup.result.backups[0].consistency == "frozen"


def test_a_failed_attempt_loses_nothing(disk: Disk, writer: Callable[[int], None], repository: Repository,
                                        tmp_path: Path) -> None:
    """The first freeze is too short for what happens in it; the next one copies what both have left."""
    device, attempts = of(disk), iter(range(9))
    options = LiveOptions(max_freeze=0.4, busy_freeze=30)

    def slow_at_first() -> None:
        if next(attempts) < 3:
            threading.Event().wait(0.5)  # longer than the freeze is allowed to be

    with writing(writer):
        backup = back_up(repository, tmp_path / "state", [device], Setup(options, at_freeze=slow_at_first))
        assert backup.report.attempts > 1
        assert backup.stored == backup.contents
        again = back_up(repository, tmp_path / "state", [device])
        assert kinds(again) == ["incremental"]
        assert again.stored == again.contents


def test_too_busy_is_told_with_figures(disk: Disk, writer: Callable[[int], None], repository: Repository,
                                       tmp_path: Path) -> None:
    device = of(disk)
    back_up(repository, tmp_path / "state", [device])
    options = LiveOptions(max_freeze=0.1, on_busy="fail")
    slow = Setup(options, at_freeze=lambda: threading.Event().wait(0.2) and None)
    with writing(writer):
        with pytest.raises(BusyError, match=r"within 0.1 s of rest.*per second"):
            back_up(repository, tmp_path / "state", [device], slow)
        backup = back_up(repository, tmp_path / "state", [device])  # nothing was lost
    assert kinds(backup) == ["incremental"]
    assert backup.stored == backup.contents


def test_memory_that_is_full_is_told(disk: Disk, writer: Callable[[int], None], repository: Repository,
                                     tmp_path: Path) -> None:
    setup = Setup(LiveOptions(max_freeze=20, memory=1 * MIB))
    with writing(writer), pytest.raises((BusyError, StorageError), match="memory"):
        back_up(repository, tmp_path / "state", [of(disk)], setup)
    (disk.directory / "after").write_text("the file system is thawed")


@pytest.mark.parametrize("switch", [1, 2])
def test_tracking_that_breaks_meanwhile_makes_no_backup(disk: Disk, repository: Repository, tmp_path: Path,
                                                        switch: int) -> None:
    tracker = DiffTracker(disk.image, breaks_at_switch=switch)
    with pytest.raises(GenerationError, match="a test broke it"):
        back_up(repository, tmp_path / "state", [of(disk, tracker)])
    (disk.directory / "after").write_text("the file system is thawed")
    backup = back_up(repository, tmp_path / "state", [of(disk, tracker)])
    assert kinds(backup) == ["full"]
    assert backup.stored == backup.contents


def test_an_error_in_the_freeze_thaws(disk: Disk, repository: Repository, tmp_path: Path) -> None:
    def fail() -> None:
        raise StasisError("the snapshot of the served devices failed")

    with pytest.raises(StasisError, match="snapshot of the served"):
        back_up(repository, tmp_path / "state", [of(disk)], Setup(at_freeze=fail))
    (disk.directory / "after").write_text("the file system is thawed")


def test_a_freeze_that_another_holds_is_told(disk: Disk, repository: Repository, tmp_path: Path) -> None:
    fd = os.open(disk.directory, os.O_RDONLY)
    freeze.freeze(fd)
    try:
        with pytest.raises(BusyError, match="frozen already"):
            back_up(repository, tmp_path / "state", [of(disk)])
    finally:
        freeze.thaw(fd)
        os.close(fd)


# -- devices without a file system ------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[tuple[str, Path, DiffTracker]]:
    with image_file(tmp_path, "raw", 4 * MIB) as image:
        image.write_bytes(os.urandom(4 * MIB))
        with loop(image) as node:
            yield node, image, DiffTracker(image)


def test_a_raw_device_is_as_after_a_power_cut(raw: tuple[str, Path, DiffTracker], repository: Repository,
                                              tmp_path: Path) -> None:
    """What a program wrote without syncing it is in its page cache; it is written out first."""
    fd = os.open(raw[0], os.O_RDWR)
    os.pwrite(fd, b"not synced", 70_000)
    backup = back_up(repository, tmp_path / "state", [raw])
    os.close(fd)
    assert backup.result.backups[0].consistency == "crash"
    assert backup.stored[0][70_000:70_010] == b"not synced"


def test_what_a_raw_device_has_in_its_page_cache_at_the_freeze_is_copied(
    raw: tuple[str, Path, DiffTracker], repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was written after the last round, and nobody synced it."""
    original, fd = LiveSet.converge, os.open(raw[0], os.O_RDWR)

    def converge(group: LiveSet) -> None:
        original(group)
        os.pwrite(fd, b"only in memory", 80_000)

    monkeypatch.setattr(LiveSet, "converge", converge)
    backup = back_up(repository, tmp_path / "state", [raw])
    os.close(fd)
    assert backup.stored[0][80_000:80_014] == b"only in memory"
    assert backup.stored == backup.contents


def test_a_raw_device_that_never_rests_is_refused(raw: tuple[str, Path, DiffTracker], repository: Repository,
                                                  tmp_path: Path) -> None:
    """Two states in one copy are no copy: it says who writes, and what to do."""
    fd, numbers = os.open(raw[0], os.O_RDWR | os.O_DSYNC), iter(range(1 << 30))
    setup = Setup(LiveOptions(max_freeze=5, busy_freeze=5),
                  at_freeze=lambda: os.pwrite(fd, b"%d" % next(numbers), 4096) and None)
    try:
        with pytest.raises(BusyError, match="was written to while it should have rested") as raised:
            back_up(repository, tmp_path / "state", [raw], setup)
    finally:
        os.close(fd)
    assert "--pre-snapshot" in raised.value.hint


def test_swap_on_the_device_is_named(raw: tuple[str, Path, DiffTracker], repository: Repository, tmp_path: Path,
                                     disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel swaps out to it whatever is frozen."""
    other = tmp_path / "swapfile"
    other.write_bytes(b"")
    inside = disk.directory / "swapfile"
    inside.write_bytes(b"")
    monkeypatch.setattr("stasis.linux.mounts.swaps", lambda: [raw[0], str(inside), str(other)])
    fd, numbers = os.open(raw[0], os.O_RDWR | os.O_DSYNC), iter(range(1 << 30))
    setup = Setup(LiveOptions(max_freeze=5, on_busy="fail"),
                  at_freeze=lambda: os.pwrite(fd, b"%d" % next(numbers), 4096) and None)
    with pytest.raises(BusyError) as raised:
        back_up(repository, tmp_path / "state", [raw, of(disk)], setup)
    os.close(fd)
    assert f"swapped out to {raw[0]} and {inside} counts" in raised.value.hint


# -- places that cannot be read ---------------------------------------------------------------------------------------


def test_places_that_cannot_be_read_are_named(raw: tuple[str, Path, DiffTracker], repository: Repository,
                                              tmp_path: Path) -> None:
    """A loop device gives EIO for what its file has lost."""
    os.truncate(raw[1], 3 * MIB + 8192)
    with pytest.raises(StasisError, match=f"{raw[0]} cannot be read between") as raised:
        back_up(repository, tmp_path / "state", [raw])
    assert "--on-read-error skip" in raised.value.hint
    backup = back_up(repository, tmp_path / "state", [raw], Setup(skip_unreadable=True))
    assert backup.stored[0] == backup.contents[0].ljust(4 * MIB, b"\0")
    assert backup.result.backups[0].statistics["bytes_unreadable"] == MIB - 8192
    assert backup.result.exit_code == ExitCode.PARTIAL


def test_places_that_cannot_be_read_in_the_freeze_are_zeroes(raw: tuple[str, Path, DiffTracker], tmp_path: Path,
                                                             repository: Repository) -> None:
    """They changed since the last round, so that what that round stored is of no use."""
    original = LiveSource.switch

    def switch(source: LiveSource) -> None:
        with raw[1].open("r+b") as file:
            file.seek(3 * MIB)
            file.write(os.urandom(65536))
        original(source)
        os.truncate(raw[1], 3 * MIB + 8192)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveSource, "switch", switch)
        backup = back_up(repository, tmp_path / "state", [raw], Setup(skip_unreadable=True))
    assert backup.stored[0][: 3 * MIB + 8192] == backup.contents[0]
    assert backup.stored[0][3 * MIB + 8192 : 3 * MIB + 65536] == bytes(65536 - 8192)
    assert backup.result.backups[0].statistics["bytes_unreadable"] == 65536 - 8192


def test_a_device_that_vanishes_is_told(raw: tuple[str, Path, DiffTracker], monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        source = stack.enter_context(LiveSource("raw", raw[0], raw[2], Budget(64 * MIB), skip_unreadable=True))
        group = stack.enter_context(LiveSet([source], LiveOptions()))
        source.begin()
        raw[1].write_bytes(os.urandom(4 * MIB))
        monkeypatch.setattr("stasis.linux.blockdev.disk_sequence", lambda fd: 1 << 40)
        monkeypatch.setattr("stasis.live.direct.DirectReader._read_straight", _fail)
        with pytest.raises(StasisError, match="is gone"):
            group.take(lambda: None)


def _fail(*_: object) -> None:
    raise OSError(5, "Input/output error")
