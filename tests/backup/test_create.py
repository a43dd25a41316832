# SPDX-License-Identifier: Apache-2.0
"""Backups of a tracked disk: which kind is made and why, that every one holds the disk of its snapshot, and that no
failure loses a change."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.job import CreateOptions, CreateResult, SampleOptions, create, plan
from stasis.backup.repo import Manifest, Repository
from stasis.errors import ExitCode, GenerationError, LockedError, StasisError, StorageError, UsageError
from tests.backup.tracked import BLOCK, FakeDisk, FakeSnapshot, restored

CHUNK = 65536
SIZE = 8 * CHUNK + 3 * BLOCK + 512
EXAMPLES = 150 if settings.default.max_examples > 100 else 8


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with Repository.init(str(tmp_path / "repo"), secret=None, chunk_size=CHUNK) as made:
        yield made


@pytest.fixture
def options(tmp_path: Path) -> CreateOptions:
    return CreateOptions(host="host", state_dir=tmp_path / "state", sample=SampleOptions(minimum=4))


@pytest.fixture
def disk(seed: int) -> FakeDisk:
    return FakeDisk(random.Random(seed).randbytes(SIZE))


def one(result: CreateResult) -> Manifest:
    (backup,) = result.backups
    return backup


def back_up(disk: FakeDisk, repository: Repository, options: CreateOptions, **changes: Any) -> Manifest:
    """A backup that must hold what the disk held at its snapshot."""
    snapshot = disk.snapshot()
    backup = one(create([snapshot], repository, dataclasses.replace(options, **changes)))
    assert restored(repository, backup) == snapshot.data
    assert snapshot.readers == 0
    return backup


def test_the_first_backup_is_full_and_the_next_reads_only_what_changed(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    first = back_up(disk, repository, options)
    assert (first.kind, first.parent, first.note) == (
        "full", None, "full because this host has no earlier backup of disk")
    assert first.statistics["bytes_read"] == SIZE
    disk.write(CHUNK + 10, b"new" * 2000)
    second = back_up(disk, repository, options)
    assert (second.kind, second.parent, second.note) == ("incremental", first.id, "")
    assert second.statistics["bytes_read"] == second.statistics["bytes_changed"] == 2 * BLOCK
    assert (second.statistics["chunks_new"], second.statistics["deltas"]) == (1, 1)
    assert second.statistics["bytes_stored"] < 3 * BLOCK
    nothing = back_up(disk, repository, options)
    assert nothing.parent == second.id
    assert nothing.segments == second.segments
    assert nothing.statistics["bytes_read"] == nothing.statistics["bytes_stored"] == 0


def test_known_zeroes_are_not_read(repository: Repository, options: CreateOptions) -> None:
    disk = FakeDisk(bytes(3 * CHUNK) + b"data" * 100 + bytes(5 * CHUNK))
    backup = back_up(disk, repository, options)
    assert backup.statistics["bytes_read"] == CHUNK
    assert backup.statistics["chunks_new"] == 1


def test_a_differential_backup_is_made_against_the_last_full_one_or_the_one_that_is_named(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    full = back_up(disk, repository, options)
    disk.write(0, b"a")
    first = back_up(disk, repository, options)
    disk.write(3 * CHUNK, b"b")
    differential = back_up(disk, repository, options, kind="differential")
    assert (differential.kind, differential.parent) == ("differential", full.id)
    assert differential.statistics["bytes_read"] == 2 * BLOCK
    named = back_up(disk, repository, options, kind="differential", base=first.id[:8])
    assert named.parent == first.id
    assert named.statistics["bytes_read"] == BLOCK


def _other_host(disk: FakeDisk, options: CreateOptions) -> CreateOptions:
    return dataclasses.replace(options, host="other")


def _replaced(disk: FakeDisk, options: CreateOptions) -> None:
    disk.identity = "inode 8"


def _rolled_back(disk: FakeDisk, options: CreateOptions) -> None:
    """The machine, with its state directory, is as it was before the first backup; then its numbers come again."""
    assert options.state_dir is not None
    (options.state_dir / "backup" / "disk.json").unlink()


@pytest.mark.parametrize(("happens", "why"), [
    (lambda disk, _: disk.new_generation(), "generation"),
    (lambda disk, _: disk.resize(SIZE - CHUNK), "the size changed from"),
    (lambda disk, _: disk.resize(SIZE + CHUNK + 1), "the size changed from"),
    (_replaced, "is of another device"),
    (_other_host, "no earlier backup"),
    (_rolled_back, "no record of the snapshot"),
], ids=["generation", "smaller", "larger", "replaced", "host", "rolled back"])
def test_what_cannot_be_gone_on_from_makes_a_full_backup_that_says_why(
    disk: FakeDisk, repository: Repository, options: CreateOptions,
    happens: Callable[[FakeDisk, CreateOptions], CreateOptions | None], why: str
) -> None:
    back_up(disk, repository, options)
    options = happens(disk, options) or options
    for kind in ("incremental", "differential"):
        with pytest.raises(GenerationError) as caught:
            back_up(disk, repository, options, kind=kind)
        assert why in caught.value.message or "no earlier full backup" in caught.value.message
        assert "--kind auto" in caught.value.hint
    backup = back_up(disk, repository, options)
    assert backup.kind == "full"
    assert why in backup.note
    assert back_up(disk, repository, options).parent == backup.id


def test_machines_of_one_name_do_not_make_each_other_s_backups_full(
    disk: FakeDisk, repository: Repository, options: CreateOptions, tmp_path: Path
) -> None:
    """As two that are called localhost, with a disk of the same name each, in one repository."""
    other = FakeDisk(bytes(disk.data))
    theirs = dataclasses.replace(options, state_dir=tmp_path / "theirs")
    kinds = []
    for number in range(3):
        for one_disk, own in ((disk, options), (other, theirs)):
            one_disk.write((number + len(kinds)) * BLOCK, b"x")
            kinds.append(back_up(one_disk, repository, own).kind)
    assert kinds == ["full", "full", *["incremental"] * 4]


def test_after_255_snapshots_a_backup_is_full_and_then_goes_on(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    disk.number = 254
    kinds = []
    for number in range(4):
        disk.write(number * CHUNK, b"x")
        kinds.append((back_up(disk, repository, options).kind, disk.number))
    assert kinds == [("full", 255), ("incremental", 1), ("full", 2), ("incremental", 3)]


def test_a_full_backup_that_is_asked_for_reads_everything_and_stores_nothing_twice(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    back_up(disk, repository, options)
    again = back_up(disk, repository, options, kind="full")
    assert again.statistics["bytes_read"] == SIZE
    assert again.statistics["chunks_new"] == 0


@settings(max_examples=EXAMPLES)
@given(history=st.lists(st.one_of(
    st.tuples(st.just("write"), st.integers(0, SIZE - 1), st.integers(1, 2 * CHUNK)),
    st.sampled_from([(what, 0, 0) for what in ("auto", "full", "differential", "fail", "generation", "forget")]),
), max_size=16), seed=st.integers(0, 1 << 30))
def test_every_backup_of_a_random_history_holds_its_snapshot(
    history: list[tuple[str, int, int]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.mktemp("history")
    draw = random.Random(seed)
    disk = FakeDisk(draw.randbytes(SIZE))
    options = CreateOptions(host="host", state_dir=base / "state")
    expected: dict[str, bytes] = {}
    with Repository.init(str(base / "repo"), secret=None, chunk_size=CHUNK) as repository:
        for what, offset, length in [*history, ("auto", 0, 0)]:
            if what == "write":
                length = min(length, SIZE - offset)
                disk.write(offset, draw.randbytes(length) if draw.random() < 0.8 else bytes(length))
            elif what == "generation":
                disk.new_generation()
            elif what == "forget":
                for gone in draw.sample(repository.backups(), min(1, len(expected))):
                    repository.remove_backup(gone.id)
                    del expected[gone.id]
            else:
                _one_of_history(disk, repository, options, what, draw, expected)
        assert {backup.id: restored(repository, backup) for backup in repository.backups()} == expected


def _one_of_history(disk: FakeDisk, repository: Repository, options: CreateOptions, what: str, draw: random.Random,
                    expected: dict[str, bytes]) -> None:
    snapshot = disk.snapshot()
    if what == "fail":
        snapshot.before_read = failing_after(draw.randrange(4))
    try:
        kind = "auto" if what == "fail" else what
        backup = one(create([snapshot], repository, dataclasses.replace(options, kind=kind)))
    except (StorageError, GenerationError):
        return
    expected[backup.id] = snapshot.data


def failing_after(reads: int, error: BaseException | None = None) -> Callable[[object], None]:
    """A `before_read` that lets some reads pass."""
    left = [reads]

    def check(_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error or StorageError("the difference storage is full")

    return check


# -- failures ---------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """A failure at a chosen place."""


@pytest.mark.parametrize("stage", ["read", "chunk_writer", "index_builder", "sync", "publish", "index"])
def test_a_failure_at_any_stage_publishes_nothing_and_the_next_run_has_all_changes(
    stage: str, disk: FakeDisk, repository: Repository, options: CreateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(disk, repository, options)
    disk.write(0, b"first change")

    def fail(*_: object, **__: object) -> None:
        raise Stop

    snapshot = disk.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(*((snapshot, "before_read") if stage == "read" else (repository, stage)), fail)
        with pytest.raises(Stop):
            create([snapshot], repository, options)
    assert len(repository.backups()) == 1
    disk.write(5 * CHUNK, b"second change")
    backup = back_up(disk, repository, options)
    assert backup.kind == "incremental"
    assert backup.statistics["bytes_changed"] == 2 * BLOCK


def test_an_interrupted_backup_goes_on_where_it_was(
    disk: FakeDisk, repository: Repository, options: CreateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stasis.backup.job.pipeline.WINDOW", CHUNK)
    monkeypatch.setattr("stasis.backup.repo.repository.Repository.parallelism", 1)
    snapshot = disk.snapshot()
    snapshot.before_read = failing_after(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        create([snapshot], repository, options)
    disk.write(CHUNK, b"changed since the interruption")
    again = disk.snapshot()
    again.before_read = failing_after(2)
    with pytest.raises(StorageError):
        create([again], repository, options)
    assert again.reads == [(CHUNK, CHUNK), (5 * CHUNK, CHUNK)]
    backup = back_up(disk, repository, options)
    assert backup.statistics["chunks_resumed"] == 6
    assert backup.statistics["bytes_read"] == SIZE - 6 * CHUNK
    assert not list((options.state_dir or Path()).rglob("*.done"))


def test_what_prune_took_from_an_interrupted_backup_is_read_again(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    snapshot = disk.snapshot()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository, "publish", failing_after(0, Stop()))
        with pytest.raises(Stop):
            create([snapshot], repository, options)
    for info in list(repository.store.list("chunks"))[::2]:
        repository.store.delete(info.name)
    backup = back_up(disk, repository, options)
    assert 0 < backup.statistics["chunks_resumed"] < 9
    assert backup.statistics["chunks_resumed"] + backup.statistics["chunks_new"] == 9


@pytest.mark.parametrize("folder", ["segments", "chunks"])
@pytest.mark.parametrize("changed", [b"", b"x"])
def test_a_parent_that_lacks_something_makes_a_full_backup(
    changed: bytes, folder: str, disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    back_up(disk, repository, options)
    for info in list(repository.store.list(folder)):
        repository.store.delete(info.name)
    with Repository.open(repository.url, _no_secret(), read_only=False) as fresh:
        disk.write(0, changed)
        backup = back_up(disk, fresh, options)
    assert backup.kind == "full"
    assert "cannot be built upon" in backup.note


def _no_secret() -> Any:
    from stasis.backup.repo import Secrets

    return Secrets.from_environment(None, None)


def test_a_damaged_manifest_of_another_backup_is_left_out(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    first, second = back_up(disk, repository, options), back_up(disk, repository, options)
    (Path(repository.url) / "backups" / second.id).write_bytes(b"nonsense")
    result = create([disk.snapshot()], repository, options)
    assert one(result).parent == first.id
    assert any(second.id in warning for warning in result.warnings)


def test_a_lease_that_lapsed_has_every_chunk_looked_for_before_anything_is_published(
    disk: FakeDisk, repository: Repository, options: CreateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with repository.lock_shared("test") as lease:
        snapshot = disk.snapshot()
        taken = repository.sync

        def lose() -> None:
            taken()
            for info in list(repository.store.list("locks")):
                repository.store.delete(info.name)
            repository.store.delete(next(iter(repository.store.list("chunks"))).name)

        monkeypatch.setattr(repository, "sync", lose)
        with pytest.raises(StasisError, match="lapsed"):
            create([snapshot], repository, options, lease=lease)
    assert repository.backups() == []


def test_a_repository_that_is_being_pruned_is_not_written_to(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    with repository.lock_exclusive("prune"), pytest.raises(LockedError):
        create([disk.snapshot()], repository, options)


# -- time, sets, plans ------------------------------------------------------------------------------------------------


def test_a_clock_that_went_backwards_does_not_put_a_backup_before_its_parent(
    disk: FakeDisk, repository: Repository, options: CreateOptions
) -> None:
    first = one(create([disk.snapshot(taken=2_000_000_000)], repository, options))
    disk.write(0, b"x")
    result = create([disk.snapshot(taken=1_900_000_000)], repository, options)
    second = one(result)
    assert second.parent == first.id
    assert (first.time, second.time) == ("2033-05-18T03:33:20.000000Z", "2033-05-18T03:33:20.000001Z")
    assert "clock went backwards" in result.warnings[0]
    assert repository.backups()[-1].id == second.id


def test_devices_of_a_set_are_published_together_or_not_at_all(repository: Repository, options: CreateOptions) -> None:
    disks = [FakeDisk(b"a" * SIZE, "a"), FakeDisk(b"b" * SIZE, "b")]
    broken = disks[1].snapshot()
    broken.before_read = failing_after(0)
    with pytest.raises(StorageError):
        create([disks[0].snapshot(), broken], repository, options)
    assert repository.backups() == []
    backups = create([disk.snapshot() for disk in disks], repository, options).backups
    assert [backup.device for backup in backups] == ["a", "b"]
    assert len({backup.set_id for backup in backups}) == 1
    with pytest.raises(UsageError, match="--base"):
        create([disk.snapshot() for disk in disks], repository, dataclasses.replace(options, base=backups[0].id))


def test_a_plan_says_what_the_backup_then_reads(disk: FakeDisk, repository: Repository, options: CreateOptions) -> None:
    for write in (None, (10, 2 * CHUNK), (SIZE - 5, 5)):
        if write is not None:
            disk.write(write[0], b"y" * write[1])
        snapshot = disk.snapshot()
        (planned,) = plan([snapshot], repository, options)
        assert snapshot.reads == []
        backup = one(create([snapshot], repository, options))
        assert (planned.kind, planned.parent, planned.size) == (backup.kind, backup.parent, SIZE)
        assert planned.bytes_to_read == backup.statistics["bytes_read"]
        assert planned.bytes_changed == backup.statistics["bytes_changed"]


def test_exit_code_of_a_good_backup_is_ok(disk: FakeDisk, repository: Repository, options: CreateOptions) -> None:
    snapshot: FakeSnapshot = disk.snapshot()
    assert create([snapshot], repository, options).exit_code is ExitCode.OK
