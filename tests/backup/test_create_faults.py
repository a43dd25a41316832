# SPDX-License-Identifier: Apache-2.0
"""Disks that lie about their changes, cannot be read everywhere, or come from a pipe; and what runs beside a backup."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.backup.hooks import Hooks
from stasis.backup.job import CreateOptions, RunLock, SampleOptions, create
from stasis.backup.job.pipeline import MEMORY_BUDGET, RateLimit, lanes_and_window
from stasis.backup.progress import Progress
from stasis.backup.repo import Manifest, Repository
from stasis.backup.sources import RawSource, StreamSource
from stasis.errors import DaemonError, ExitCode, LockedError, NotFoundError, StasisError, UsageError
from tests.backup.tracked import BLOCK, FakeDisk, bad_sector, restored

CHUNK = 65536
SIZE = 20 * CHUNK + 1000


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with Repository.init(str(tmp_path / "repo"), secret=None, chunk_size=CHUNK) as made:
        yield made


@pytest.fixture
def options(tmp_path: Path) -> CreateOptions:
    return CreateOptions(host="host", state_dir=tmp_path / "state", sample=SampleOptions(share=1.0, seed=5))


@pytest.fixture
def disk(seed: int) -> FakeDisk:
    return FakeDisk(random.Random(seed).randbytes(SIZE))


# -- self-check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [False, True], ids=["few chunks changed", "a block of every chunk changed"])
def test_a_write_that_tracking_missed_makes_the_backup_full_and_tracking_distrusted(
    spread: bool, disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    first = create([disk.snapshot()], repository, options).backups[0]
    for chunk in range(21 if spread else 2):
        disk.write(chunk * CHUNK, b"seen")
    disk.write(17 * CHUNK + 5 * BLOCK + 77, b"unseen", seen=False)
    snapshot = disk.snapshot()
    progress = Progress()
    result = create([snapshot], repository, options, progress)
    (backup,) = result.backups
    assert result.exit_code is ExitCode.TRACKING
    assert (backup.kind, backup.parent) == ("full", None)
    assert restored(repository, backup) == snapshot.data
    assert (backup.generation, backup.change_number) == (None, None)
    assert "seed 5" in result.warnings[0]
    assert first.id[:8] in backup.note
    assert len(disk.distrusted) == 1
    # The next one has nothing to go on from, and from then on all is well again.
    again = create([disk.snapshot()], repository, options)
    assert (again.backups[0].kind, again.exit_code) == ("full", ExitCode.OK)
    assert "found to be wrong" in again.backups[0].note
    assert create([disk.snapshot()], repository, options).backups[0].kind == "incremental"


def test_tracking_is_distrusted_even_if_its_daemon_is_gone(
    disk: FakeDisk, repository: Repository, options: CreateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    create([disk.snapshot()], repository, options)
    disk.write(CHUNK, b"unseen", seen=False)
    snapshot = disk.snapshot()

    def gone(reason: str) -> None:
        raise DaemonError("no daemon runs")

    monkeypatch.setattr(snapshot, "distrust", gone)
    result = create([snapshot], repository, options)
    assert result.exit_code is ExitCode.TRACKING
    assert "no daemon runs" in result.warnings[0]
    assert create([disk.snapshot()], repository, options).backups[0].kind == "full"


def test_a_sample_is_a_share_of_the_chunks_and_can_be_left_out(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    create([disk.snapshot()], repository, options)
    samples = ((SampleOptions(minimum=3), 3), (SampleOptions(0.5, minimum=1), 10), (SampleOptions(0.0), 0))
    for sample, compared in samples:
        backup = create([disk.snapshot()], repository, dataclasses.replace(options, sample=sample)).backups[0]
        assert backup.kind == "incremental"
        whole, short = backup.statistics["bytes_compared"], backup.statistics["bytes_compared"] + CHUNK - 1000
        assert compared * CHUNK in (whole, short)


def test_a_snapshot_image_that_is_written_to_meanwhile_is_no_fault_of_tracking(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    create([disk.snapshot()], repository, options)
    snapshot = disk.snapshot()

    def write_to_image(_: object) -> None:
        snapshot.data = b"image" + snapshot.data[5:]
        snapshot.held[0] = disk.number

    snapshot.before_read = write_to_image
    assert create([snapshot], repository, options).exit_code is ExitCode.OK
    assert not disk.distrusted


# -- places that cannot be read ---------------------------------------------------------------------------------------


def test_what_cannot_be_read_fails_the_backup_and_says_where(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    snapshot = disk.snapshot()
    snapshot.before_read = bad_sector(3 * CHUNK)
    with pytest.raises(StasisError, match=r"/dev/fake cannot be read between \d+ and \d+") as caught:
        create([snapshot], repository, options)
    assert "--on-read-error skip" in caught.value.hint
    assert repository.backups() == []


@pytest.mark.parametrize("changed", [3 * BLOCK, CHUNK - BLOCK])
def test_what_cannot_be_read_is_skipped_if_asked_for_and_not_built_upon(
    disk: FakeDisk, repository: Repository, options: CreateOptions, changed: int
) -> None:
    options = dataclasses.replace(options, skip_unreadable=True)
    good = create([disk.snapshot()], repository, options).backups[0]
    disk.write(3 * CHUNK, bytes([7]) * changed)
    snapshot = disk.snapshot()
    bad = 3 * CHUNK + 2 * BLOCK
    snapshot.before_read = bad_sector(bad)
    result = create([snapshot], repository, options)
    (partial,) = result.backups
    assert result.exit_code is ExitCode.PARTIAL
    assert partial.parent == good.id
    assert partial.statistics["bytes_unreadable"] == BLOCK
    assert f"{bad}+{BLOCK}" in partial.note
    expected = snapshot.data[:bad] + bytes(BLOCK) + snapshot.data[bad + BLOCK :]
    assert restored(repository, partial) == expected
    healed = disk.snapshot()
    backup = create([healed], repository, options).backups[0]
    assert backup.parent == good.id
    assert restored(repository, backup) == healed.data


def test_an_interrupted_run_does_not_hand_on_what_it_could_not_read(
    disk: FakeDisk, repository: Repository, options: CreateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stasis.backup.job.pipeline.WINDOW", CHUNK)
    monkeypatch.setattr("stasis.backup.repo.repository.Repository.parallelism", 1)
    options = dataclasses.replace(options, skip_unreadable=True)
    first = disk.snapshot()
    bad = bad_sector(3 * CHUNK)

    def stop_later(extent: tuple[int, int]) -> None:
        if extent[0] >= 5 * CHUNK:
            raise KeyboardInterrupt
        bad(extent)

    first.before_read = stop_later
    with pytest.raises(KeyboardInterrupt):
        create([first], repository, options)
    second = disk.snapshot()
    result = create([second], repository, options)
    assert result.exit_code is ExitCode.OK
    assert result.backups[0].statistics["chunks_resumed"] == 4
    assert restored(repository, result.backups[0]) == second.data


# -- files and streams ------------------------------------------------------------------------------------------------


def _of_file(repository: Repository, options: CreateOptions, path: Path) -> tuple[Manifest, tuple[str, ...]]:
    with RawSource("image", str(path)) as source:
        result = create([source], repository, options)
    assert restored(repository, result.backups[0]) == path.read_bytes()
    return result.backups[0], result.warnings


def test_an_image_file_is_read_whole_but_for_its_holes_and_stored_once(
    tmp_path: Path, repository: Repository, options: CreateOptions, seed: int
) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.seek(4 * CHUNK)
        file.write(random.Random(seed).randbytes(3 * CHUNK))
        file.truncate(SIZE)
    first, warnings = _of_file(repository, options, path)
    assert first.statistics["bytes_read"] == 3 * CHUNK
    assert (first.change_number, warnings) == (None, ())
    second, _ = _of_file(repository, options, path)
    assert (second.kind, second.statistics["chunks_new"]) == ("full", 0)
    assert "not tracked" in second.note


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_a_file_of_any_size_can_be_backed_up(
    size: int, tmp_path: Path, repository: Repository, options: CreateOptions
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * size)
    backup, _ = _of_file(repository, options, path)
    assert backup.size == size


def test_a_file_that_is_written_to_while_it_is_read_is_told(
    tmp_path: Path, repository: Repository, options: CreateOptions
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * SIZE)
    with RawSource("image", str(path)) as source:
        os.utime(path, ns=(1, 1))
        result = create([source], repository, options)
    assert "written to while it was read" in result.warnings[0]
    assert "written to while it was read" in result.backups[0].note


def test_what_is_no_file_or_device_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, error in ((tmp_path, UsageError), (tmp_path / "fifo", UsageError), (tmp_path / "none", NotFoundError)):
        with pytest.raises(error):
            RawSource("image", str(path))


@pytest.mark.parametrize("size", [0, 1, CHUNK, 4096 * CHUNK // 64, 5 * (4 << 20) + 3])
def test_a_stream_is_stored_to_its_end(size: int, repository: Repository, options: CreateOptions, seed: int) -> None:
    data = random.Random(seed).randbytes(size)
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb") as pipe:
            pipe.write(data)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        (backup,) = create([StreamSource("dump", reader)], repository, options).backups
    finally:
        os.close(reader)
        feeder.join()
    assert (backup.size, backup.kind, backup.source_kind) == (size, "full", "stdin")
    assert restored(repository, backup) == data


def test_an_object_store_gets_the_same_backups(disk: FakeDisk, options: CreateOptions, tmp_path: Path) -> None:
    with Repository.init(f"memory:///{tmp_path.name}", secret=None, chunk_size=CHUNK) as repository:
        cut_off = disk.snapshot()
        cut_off.before_read = bad_sector(18 * CHUNK)
        with pytest.raises(StasisError):
            create([cut_off], repository, options)
        for kind in ("full", "incremental"):
            snapshot = disk.snapshot()
            (backup,) = create([snapshot], repository, options).backups
            assert (backup.kind, restored(repository, backup)) == (kind, snapshot.data)
            disk.write(7 * CHUNK - 5, b"changed")


# -- what runs beside -------------------------------------------------------------------------------------------------


def test_two_runs_of_a_device_do_not_meet(tmp_path: Path) -> None:
    with RunLock(tmp_path, "disk") as lock:
        lock.write({"snapshot": "123"})
        with pytest.raises(LockedError, match=f"pid {os.getpid()}"):
            RunLock(tmp_path, "disk")
        RunLock(tmp_path, "other/disk").close()
    with RunLock(tmp_path, "disk") as lock:
        assert lock.read()["snapshot"] == "123"


def test_hooks_see_the_devices_and_the_second_one_always_runs(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    command = f'echo "$STASIS_DEVICES $STASIS_BACKUP_SET $STASIS_SNAPSHOT" >> {seen}'
    hooks = Hooks(command, command, ["a", "b"], "set")
    hooks.before()
    hooks.after()
    hooks.after(failed=True)
    assert seen.read_text() == "a b set \na b set taken\n"
    failing = Hooks("exit 3", command, ["a"], "set")
    with pytest.raises(StasisError, match="status 3"):
        failing.before()
    assert seen.read_text().endswith("a set failed\n")


def test_a_second_hook_that_fails_is_a_warning() -> None:
    hooks = Hooks(None, "kill -9 $$", [], "set")
    hooks.before()
    hooks.after()
    assert "signal 9" in hooks.warnings[0]


def test_a_rate_is_kept_by_all_threads_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit = RateLimit(1000)
    monkeypatch.setattr(limit._given_up, "wait", slept.append)
    for _ in range(3):
        limit.wait(500)
    now[0] += 10
    limit.wait(500)
    assert slept == [0.5, 1.0]


@pytest.mark.parametrize("chunk_size", [1 << 16, 1 << 20, 1 << 24])
def test_memory_is_bounded_whatever_the_chunk_size(chunk_size: int) -> None:
    lanes, window = lanes_and_window(chunk_size, 16)
    assert 1 <= lanes <= 16
    assert lanes * (window + 3) * chunk_size <= MEMORY_BUDGET
