# SPDX-License-Identifier: Apache-2.0
"""What does not fit into memory is staged in a file, which lies on nothing that is frozen."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stasis.backup.repo import Repository
from stasis.errors import BusyError, ExitCode, StorageError
from stasis.live.liveset import LiveSet
from stasis.live.options import LiveOptions
from stasis.live.source import LiveSource
from stasis.live.stack import Stack
from stasis.live.staging import StagingArea
from tests.live.difftracker import DiffTracker
from tests.live.disks import MIB, Disk, Setup, back_up, fast_folder, image_file, loop, mounted, tool
from tests.live.writers import bpf_works, state_directory
from tests.runner import Stasis
from tests.system.helpers import LONG

pytestmark = [pytest.mark.root, pytest.mark.tool("mkfs.ext4", "losetup")]


@pytest.fixture
def area(tmp_path: Path) -> Iterator[Path]:
    """A small file system for what is staged."""
    with mounted("none", tmp_path / "area", "-t", "tmpfs", "-o", "size=24m") as directory:
        yield directory


@pytest.fixture
def late(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MiB are written when all rounds are done, right before each freeze."""
    original = LiveSet.converge

    def converge(group: LiveSet) -> None:
        original(group)
        (disk.directory / "late").write_bytes(os.urandom(16 * MIB))

    monkeypatch.setattr(LiveSet, "converge", converge)


def options(area: Path | None, memory: int = 8 * MIB, limit: int | None = None) -> Setup:
    return Setup(LiveOptions(max_freeze=20, busy_freeze=30, memory=memory, staging=area, staging_limit=limit, rounds=2))


@pytest.mark.parametrize("memory", [0, 8 * MIB] if LONG else [8 * MIB])
def test_what_is_staged_is_the_device_at_the_freeze(disk: Disk, late: None, repository: Repository, area: Path,
                                                    tmp_path: Path, memory: int) -> None:
    device = disk.node, disk.image, DiffTracker(disk.image)
    for kind in ("full", "incremental"):
        backup = back_up(repository, tmp_path / "state", [device], options(area, memory))
        assert backup.result.backups[0].kind == kind
        assert backup.stored == backup.contents
        assert backup.staged >= 16 * MIB - memory
        assert os.listdir(area) == []
        assert os.statvfs(area).f_bfree == os.statvfs(area).f_blocks


def test_rounds_that_gain_nothing_end_in_the_area(disk: Disk, repository: Repository, area: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """More is left after each round than fits into memory: without an area that is an error, with figures."""
    original = LiveSource.advance
    names = itertools.cycle("abcd")

    def advance(source: LiveSource) -> list[tuple[int, int]]:
        (disk.directory / next(names)).write_bytes(os.urandom(2 * MIB))
        os.sync()
        return original(source)

    monkeypatch.setattr(LiveSource, "advance", advance)
    monkeypatch.setattr(LiveSet, "pending_bytes", property(lambda group: 2 * MIB))
    device = disk.node, disk.image, DiffTracker(disk.image)
    with pytest.raises(BusyError, match=r"2 MiB are left, with 1 MiB of memory for them"):
        back_up(repository, tmp_path / "state", [device], options(None, MIB))
    backup = back_up(repository, tmp_path / "state", [device], options(area, MIB))
    assert backup.stored == backup.contents
    assert backup.result.backups[0].statistics["rounds"] == 3
    assert backup.staged > 0


@pytest.mark.parametrize(("limit", "memory"), [(None, 0), (8 * MIB, 0), (1, 8 * MIB)] if LONG else [(None, 0)])
def test_an_area_that_is_full_is_told(disk: Disk, late: None, repository: Repository, area: Path, tmp_path: Path,
                                      limit: int | None, memory: int) -> None:
    """The file system takes writes again, and no change is lost."""
    device = disk.node, disk.image, DiffTracker(disk.image)
    back_up(repository, tmp_path / "state", [device], options(None, 64 * MIB))
    (area / "other").write_bytes(bytes((24 - 9) * MIB if limit is None else 0))
    with pytest.raises(StorageError, match=rf"the staging area {area} is full: what changed on {disk.node}") as raised:
        back_up(repository, tmp_path / "state", [device], options(area, memory, limit))
    assert "--staging" in raised.value.hint
    assert raised.value.exit_code == ExitCode.STORAGE
    (disk.directory / "after").write_text("the file system is thawed")
    backup = back_up(repository, tmp_path / "state", [device], options(None, 64 * MIB))
    assert backup.result.backups[0].kind == "incremental"
    assert backup.stored == backup.contents


def test_an_area_on_what_is_frozen_is_refused(disk: Disk, repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(BusyError, match=f"the staging area {disk.directory} lies on {disk.directory}, which must be"):
        back_up(repository, tmp_path / "state", [(disk.node, disk.image, DiffTracker(disk.image))],
                options(disk.directory))


def test_an_area_that_is_hidden_meanwhile_is_refused(disk: Disk, repository: Repository, area: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked at when the backup began. By then a part of the disk is mounted there, and a new file system."""
    inner = disk.directory / "inner.img"
    with inner.open("wb") as file:
        file.truncate(4 * MIB)
    tool("mkfs.ext4", "-q", "-F", inner)
    with ExitStack() as later:
        original = LiveSet.fits

        def mount_and_ask(group: LiveSet) -> bool:
            node = later.enter_context(loop(inner))
            later.enter_context(mounted(node, tmp_path / "inner"))
            later.enter_context(mounted(disk.directory, area, "--bind"))
            return original(group)

        monkeypatch.setattr(LiveSet, "fits", mount_and_ask)
        with pytest.raises(BusyError, match=f"the staging area {area} lies on"):
            back_up(repository, tmp_path / "state", [(disk.node, disk.image, DiffTracker(disk.image))], options(area))


def test_an_overlay_is_where_its_upper_directory_is(disk: Disk, tmp_path: Path) -> None:
    for name in ("upper", "work"):
        (disk.directory / name).mkdir()
    (tmp_path / "lower").mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={disk.directory}/upper,workdir={disk.directory}/work"
    with mounted("overlay", tmp_path / "over", "-t", "overlay", "-o", layers) as over, \
            Stack([os.stat(disk.node).st_rdev]) as stack:
        found = stack.holds(str(over))
        assert found is not None
        assert found.target == str(disk.directory)
        assert stack.holds(str(tmp_path / "lower")) is None


def test_an_overlay_that_hides_its_own_upper_directory_lies_nowhere(disk: Disk, tmp_path: Path) -> None:
    """As the root of a live system, which was mounted where another root was."""
    (tmp_path / "lower" / "files").mkdir(parents=True)
    with mounted("tmpfs", tmp_path / "memory", "-t", "tmpfs") as memory:
        for name in ("files", "work"):
            (memory / name).mkdir()
        layers = f"lowerdir={tmp_path / 'lower'},upperdir={memory / 'files'},workdir={memory / 'work'}"
        with (
            mounted("overlay", tmp_path / "over", "-t", "overlay", "-o", layers) as over,
            mounted(over, memory, "--bind"),
            Stack([os.stat(disk.node).st_rdev]) as stack,
        ):
            assert stack.holds(str(over)) is None
            assert stack.holds(str(memory / "files")) is None


def test_an_area_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"the staging area {tmp_path}/none cannot be used: No such file"):
        StagingArea(tmp_path / "none")
    with pytest.raises(StorageError, match="No such file"):
        _ = LiveOptions(staging=tmp_path / "none").room


def test_places_that_cannot_be_read_are_staged_as_zeroes(tmp_path: Path, repository: Repository, area: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    original = LiveSource.switch
    with image_file(tmp_path, "raw", 4 * MIB) as image:
        image.write_bytes(os.urandom(4 * MIB))
        with loop(image) as node:
            def switch(source: LiveSource) -> None:
                with image.open("r+b") as file:
                    file.write(os.urandom(65536))
                    file.seek(3 * MIB)
                    file.write(os.urandom(65536))
                original(source)
                os.truncate(image, 3 * MIB + 8192)

            monkeypatch.setattr(LiveSource, "switch", switch)
            setup = options(area, 0)
            setup.skip_unreadable = True
            backup = back_up(repository, tmp_path / "state", [(node, image, DiffTracker(image))], setup)
    assert backup.stored[0][: 3 * MIB + 8192] == backup.contents[0]
    assert backup.stored[0][3 * MIB + 8192 : 3 * MIB + 65536] == bytes(65536 - 8192)
    assert backup.staged > 0


@pytest.mark.skipif(not bpf_works(), reason="needs BTF")
def test_as_a_user_gives_it(stasis: Stasis, disk: Disk, area: Path, tmp_path: Path) -> None:
    with state_directory(stasis.state_dir), fast_folder(tmp_path) as folder:
        stasis("repo", "init", folder / "repo", "--no-encryption")
        stasis("track", "start", disk.node)
        create = ("backup", "create", disk.node, "--repo", folder / "repo", "--max-freeze", "20s",
                  "--freeze-memory", "1M")
        assert "lies on" in stasis.fail(ExitCode.BUSY, *create, "--staging", disk.directory)
        assert "--staging" in stasis.fail(ExitCode.USAGE, *create, "--staging-size", "1M")
        stasis(*create, "--staging", area, "--staging-size", "16M")
        stasis("track", "stop", disk.node)
