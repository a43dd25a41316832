# SPDX-License-Identifier: Apache-2.0
"""Restores to files: the bytes of the backup or a target that says it is unfinished, and never over what is kept."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.progress import Progress
from stasis.backup.repo import ChunkReader, Repository, Secret, Secrets
from stasis.backup.restore import RestoreOptions, restore, restore_to_stream
from stasis.block.copy.target import Target
from stasis.errors import (
    BusyError,
    DamagedError,
    ExitCode,
    NotFoundError,
    StasisError,
    StateError,
    StorageError,
    VerifyError,
)
from tests.backup.restoring import (
    CHUNK,
    data_in,
    image,
    new_repository,
    objects,
    publish,
    sidecar_of,
    stopping_after,
)

OFTEN = RestoreOptions(checkpoint_seconds=0)
IN_PLACE = RestoreOptions(in_place=True)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with new_repository(tmp_path / "repository") as made:
        yield made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, length) of all that is written to targets from now on."""
    seen: list[tuple[int, int]] = []
    write_data = Target.write_data

    def counted(self: Target, view: memoryview, offset: int) -> None:
        seen.append((offset, len(view)))
        write_data(self, view, offset)

    monkeypatch.setattr(Target, "write_data", counted)
    return seen


# ---- what comes back


@given(
    size=st.one_of(st.integers(0, 6 * CHUNK), st.integers(0, 6).map(lambda chunks: chunks * CHUNK)),
    seed=st.integers(0, 1000),
    chunk_size=st.sampled_from([CHUNK, 4 * CHUNK]),
    protection=st.sampled_from([(None, "none"), (Secret(b"secret", "passphrase"), "zstd")]),
    before=st.one_of(st.none(), st.integers(0, 8 * CHUNK)),
    options=st.builds(RestoreOptions, in_place=st.booleans(), overwrite=st.just(True), verify=st.booleans()),
)
@settings(max_examples=10)
def test_any_backup_comes_back_to_any_file(
    size: int, seed: int, chunk_size: int, protection: tuple[Secret | None, str], before: int | None,
    options: RestoreOptions,
) -> None:  # fmt: skip
    data = image(size, seed)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "target")
        if before is not None:
            target.write_bytes(image(before, seed % 7))
        url = Path(folder, "repository")
        with new_repository(url, chunk_size=chunk_size, secret=protection[0], compression=protection[1]) as repository:
            result = restore(repository, publish(repository, data), target, options)
        assert target.read_bytes() == data
        assert result.bytes_written + result.bytes_zeroed + result.bytes_unchanged == size
        assert result.bytes_verified == (size if options.verify else 0)
        assert not sidecar_of(target).exists()


def test_zeroes_become_holes(repository: Repository, target: Path) -> None:
    data = bytes(100 * CHUNK) + image(CHUNK) + b"x" * CHUNK + bytes(50 * CHUNK + 5)
    result = restore(repository, publish(repository, data), target)
    assert target.read_bytes() == data
    assert result.chunks_fetched == result.bytes_written // CHUNK <= 2
    assert sum(length for _, length in data_in(target)) <= 2 * CHUNK


def test_a_stream_is_the_backup(repository: Repository, tmp_path: Path) -> None:
    data = image(40 * CHUNK + 17)
    manifest = publish(repository, data)
    with (tmp_path / "out").open("wb") as out, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) as cat:
        assert cat.stdin is not None
        restore_to_stream(repository, manifest, cat.stdin.fileno())
    assert (tmp_path / "out").read_bytes() == data


def test_a_backup_in_an_object_store_comes_back(target: Path) -> None:
    data = image(40 * CHUNK + 17)
    with Repository.init("memory:///restore", secret=None, chunk_size=CHUNK) as repository:
        restore(repository, publish(repository, data), target, RestoreOptions(verify=True))
    assert target.read_bytes() == data


def test_nothing_is_pruned_while_it_is_restored(
    repository: Repository, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, held = publish(repository, image(8 * CHUNK)), []
    fetch = ChunkReader.fetch

    def look(self: ChunkReader, name: bytes, into: memoryview) -> None:
        held.append([(lock.kind, lock.purpose) for lock in repository.locks()])
        fetch(self, name, into)

    monkeypatch.setattr(ChunkReader, "fetch", look)
    restore(repository, manifest, target)
    assert held
    assert all(locks == [("shared", "restore")] for locks in held)
    assert repository.locks() == []


def test_progress_ends_at_the_size(repository: Repository, target: Path) -> None:
    progress = Progress()
    restore(repository, publish(repository, image(9 * CHUNK + 1)), target, RestoreOptions(verify=True), progress)
    status = progress.status()
    assert (status.phase, status.bytes_done, status.bytes_total) == ("reading back", 9 * CHUNK + 1, 9 * CHUNK + 1)


def test_a_new_target_is_readable_by_its_owner_only(repository: Repository, target: Path) -> None:
    restore(repository, publish(repository, b"x"), target)
    assert target.stat().st_mode & 0o777 == 0o600


# ---- in place


def test_only_the_pages_that_differ_are_written_in_place(
    repository: Repository, target: Path, written: list[tuple[int, int]]
) -> None:
    data = bytearray(random.Random(1).randbytes(20 * CHUNK + 100))
    manifest = publish(repository, bytes(data))
    for offset in (0, 5 * CHUNK + 5000, 20 * CHUNK + 99):
        data[offset] ^= 1
    target.write_bytes(data)
    result = restore(repository, manifest, target, IN_PLACE)
    assert sorted(written) == [(0, 4096), (5 * CHUNK + 4096, 4096), (20 * CHUNK, 100)]
    assert (result.chunks_fetched, result.bytes_written) == (3, 2 * 4096 + 100)
    assert target.read_bytes() != data


def test_in_place_over_the_same_reads_nothing_from_the_repository(
    repository: Repository, target: Path, written: list[tuple[int, int]]
) -> None:
    data = image(20 * CHUNK)
    manifest = publish(repository, data)
    target.write_bytes(data)
    for chunk in objects(repository, "chunks"):
        chunk.unlink()
    result = restore(repository, manifest, target, IN_PLACE)
    assert (written, result.bytes_unchanged) == ([], len(data))


def test_data_where_the_backup_has_zeroes_goes_in_place(repository: Repository, target: Path) -> None:
    manifest = publish(repository, bytes(10 * CHUNK))
    target.write_bytes(bytes(3 * CHUNK) + b"x" * CHUNK + bytes(6 * CHUNK))
    result = restore(repository, manifest, target, IN_PLACE)
    assert not any(target.read_bytes())
    assert result.bytes_zeroed == CHUNK
    assert (3 * CHUNK, CHUNK) not in data_in(target)


# ---- stopping and going on


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_stopped_restore_goes_on(
    repository: Repository, target: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, in_place: bool
) -> None:
    data = random.Random(2).randbytes(64 * CHUNK)
    manifest = publish(repository, data)
    if in_place:
        target.write_bytes(bytes(64 * CHUNK))
    options = RestoreOptions(in_place=in_place, checkpoint_seconds=0)
    monkeypatch.setattr(Repository, "parallelism", 1)
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with stopping_after(monkeypatch, 40, error), pytest.raises(expected):
        restore(repository, manifest, target, options)
    position = json.loads(sidecar_of(target).read_text())["position"]
    assert position == 32 * CHUNK  # of a batch that was not finished only the chunks in place are found again
    result = restore(repository, manifest, target, options)
    assert (result.position_at_start, result.chunks_fetched) == (position, 24 if in_place else 32)
    assert target.read_bytes() == data
    assert not sidecar_of(target).exists()


@given(stops=st.lists(st.integers(0, 30), max_size=4), seed=st.integers(0, 100), in_place=st.booleans())
@settings(max_examples=6)
def test_restores_stopped_anywhere_end_as_the_backup(stops: list[int], seed: int, in_place: bool) -> None:
    data = image(90 * CHUNK + seed, seed)
    options = RestoreOptions(in_place=in_place, checkpoint_seconds=0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        target = Path(folder, "target")
        with new_repository(Path(folder, "repository")) as repository:
            manifest = publish(repository, data)
            for fetches in stops:
                try:
                    with stopping_after(patch, fetches, OSError(errno.EIO, "broken")):
                        restore(repository, manifest, target, options)
                except StorageError:
                    assert sidecar_of(target).exists()
                else:
                    break
            restore(repository, manifest, target, RestoreOptions(in_place=in_place, overwrite=True))
        assert target.read_bytes() == data


def test_an_unfinished_restore_of_another_backup_is_not_continued(
    repository: Repository, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = publish(repository, image(8 * CHUNK, 1)), publish(repository, image(8 * CHUNK, 2))
    with stopping_after(monkeypatch, 1, OSError(errno.EIO, "broken")), pytest.raises(StorageError):
        restore(repository, first, target)
    with pytest.raises(StateError, match=f"backup {first.id[:12]}") as caught:
        restore(repository, second, target)
    assert str(sidecar_of(target)) in caught.value.hint
    restore(repository, second, target, RestoreOptions(overwrite=True))
    assert target.read_bytes() == image(8 * CHUNK, 2)


def test_a_full_target_keeps_what_it_has(repository: Repository, target: Path) -> None:
    data = random.Random(3).randbytes(32 * CHUNK)
    manifest = publish(repository, data)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * CHUNK, before[1]))  # writes beyond it fail with EFBIG
    try:
        with pytest.raises(StorageError, match=r"File too large") as caught:
            restore(repository, manifest, target, OFTEN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "make room" in caught.value.hint
    assert caught.value.exit_code == ExitCode.STORAGE
    restore(repository, manifest, target)
    assert target.read_bytes() == data


# ---- damage


SPOILS = {
    "flipped": lambda path, other: path.write_bytes(path.read_bytes()[:-40] + b"?" + path.read_bytes()[-39:]),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path, other: path.write_bytes(b""),
    "another": lambda path, other: path.write_bytes(other.read_bytes()),
    "gone": lambda path, other: path.unlink(),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("secret", [None, Secret(b"secret", "passphrase")], ids=["plain", "encrypted"])
def test_a_damaged_chunk_is_named_and_never_written(
    tmp_path: Path, target: Path, secret: Secret | None, spoil: str
) -> None:
    data = b"".join(bytes([number]) * CHUNK for number in range(1, 9))
    with new_repository(tmp_path / "repository", secret=secret) as repository:
        manifest = publish(repository, data)
        name = repository.index(manifest).name(4).hex()
        chunk, other = sorted(objects(repository, "chunks"), key=lambda path: path.name != name)[:2]
        chunk.chmod(0o600)
        SPOILS[spoil](chunk, other)
        with pytest.raises(DamagedError, match=name):
            restore(repository, manifest, target)
        assert sidecar_of(target).exists()
        found = target.read_bytes()
        assert found[4 * CHUNK : 5 * CHUNK] == bytes(CHUNK)
        with pytest.raises(DamagedError, match=name), (tmp_path / "stream").open("wb") as stream:
            restore_to_stream(repository, manifest, stream.fileno())
        assert (tmp_path / "stream").read_bytes() == data[: 4 * CHUNK]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_damaged_index_leaves_the_target_alone(repository: Repository, target: Path, spoil: str) -> None:
    manifest = publish(repository, image(8 * CHUNK))
    (segment,) = objects(repository, "segments")
    publish(repository, image(8 * CHUNK, 2))
    (other,) = set(objects(repository, "segments")) - {segment}
    segment.chmod(0o600)
    SPOILS[spoil](segment, other)
    with repository.open(repository.url, Secrets.none()) as opened, pytest.raises(DamagedError, match=segment.name):
        restore(opened, opened.resolve(manifest.id), target)
    assert not target.exists()


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_damaged_manifest_is_no_backup(repository: Repository, spoil: str) -> None:
    manifest, other = publish(repository, image(CHUNK)), publish(repository, image(CHUNK, 2))
    by_id = {path.name: path for path in objects(repository, "backups")}
    by_id[manifest.id].chmod(0o600)
    SPOILS[spoil](by_id[manifest.id], by_id[other.id])
    with pytest.raises((DamagedError, NotFoundError), match=manifest.id):
        repository.resolve(manifest.id)


def test_what_does_not_come_back_from_the_medium_is_seen(
    repository: Repository, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(4).randbytes(8 * CHUNK)
    manifest = publish(repository, data)

    def forget(self: Target) -> None:
        os.pwrite(self.descriptor, b"?", 5 * CHUNK)

    with monkeypatch.context() as patch:
        patch.setattr(Target, "drop_cache", forget)
        with pytest.raises(VerifyError, match=f"at offset {5 * CHUNK}"):
            restore(repository, manifest, target, RestoreOptions(verify=True))
    assert json.loads(sidecar_of(target).read_text())["position"] == 0
    restore(repository, manifest, target)
    assert target.read_bytes() == data


# ---- refusals


@pytest.mark.parametrize(
    ("contents", "options", "error", "words"),
    [
        (bytes(0x438) + b"\x53\xef" + bytes(3 * CHUNK), IN_PLACE, BusyError, "ext4 file system"),
        (bytes(0x438) + b"\x53\xef" + bytes(3 * CHUNK), RestoreOptions(), BusyError, "ext4 file system"),
        (b"a letter" * 10_000, RestoreOptions(), BusyError, "holds data"),
        (bytes(CHUNK), RestoreOptions(), StorageError, "too small"),
        (b"\1" * CHUNK, IN_PLACE, StorageError, "too small"),
    ],
)
def test_what_may_be_wanted_is_not_overwritten(
    repository: Repository, target: Path, contents: bytes, options: RestoreOptions, error: type[StasisError], words: str
) -> None:
    manifest = publish(repository, image(3 * CHUNK))
    target.write_bytes(contents)
    with pytest.raises(error, match=words) as caught:
        restore(repository, manifest, target, options)
    assert "--overwrite" in caught.value.hint
    assert target.read_bytes() == contents
    assert not sidecar_of(target).exists()
    restore(repository, manifest, target, RestoreOptions(in_place=options.in_place, overwrite=True))
    assert target.read_bytes() == image(3 * CHUNK)


def test_an_empty_file_is_no_loss(repository: Repository, target: Path) -> None:
    target.touch()
    restore(repository, publish(repository, image(3 * CHUNK)), target)
    assert target.read_bytes() == image(3 * CHUNK)


def test_a_link_leads_to_the_target(repository: Repository, target: Path) -> None:
    target.symlink_to(target.with_name("real"))
    restore(repository, publish(repository, image(CHUNK)), target)
    assert target.is_symlink()
    assert target.with_name("real").read_bytes() == image(CHUNK)
