# SPDX-License-Identifier: Apache-2.0
"""`check` names every object that was altered in any way, and nothing else."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stasis.backup.keep.check import CheckResult, check
from stasis.backup.keep.prune import prune
from stasis.backup.repo import Repository, Secret, Secrets, keys
from stasis.backup.repo.chunks import object_name
from stasis.backup.repo.objects import Kind
from stasis.errors import DamagedError, RepositoryError, StasisError
from tests.backup.stored import CHUNK, backup_of, content_of

SECRET = Secret(b"secret")
Alter = Callable[[Path, Path], None]


@pytest.fixture(scope="module", params=[None, SECRET], ids=["open", "encrypted"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that holds at least two objects of every kind."""
    path = tmp_path_factory.mktemp("original") / "repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "SCRYPT_N", 16)
        with Repository.init(str(path), secret=request.param, chunk_size=CHUNK) as repository:
            source = random.Random(1)
            first = backup_of(repository, source.randbytes(3 * CHUNK + 100), tags=("a",))
            backup_of(repository, source.randbytes(2 * CHUNK) + bytes(CHUNK), device="other")
            repository.set_tags(first.id, ["b"])
            if request.param is not None:
                repository.add_key(Secret(b"second"))
            lock = repository.lock_shared("test")
            lock.__enter__()
            kept = next((path / "locks").iterdir())
            content = kept.read_bytes()
            lock.__exit__(None, None, None)
            kept.write_bytes(content)
    return path


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil. Its lock is left out: this process, which it names, lives and would be respected."""
    return Path(shutil.copytree(original, tmp_path / "repository", ignore=shutil.ignore_patterns("shared-*")))


@pytest.fixture
def with_lock(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "repository"))


def opened(path: Path) -> Repository:
    secret = SECRET if (path / "keys").exists() else None
    return Repository.open(str(path), Secrets.of(secret))


def found(path: Path, **options: float) -> CheckResult:
    with opened(path) as repository:
        return check(repository, read_share=1.0, **options)  # type: ignore[arg-type]


def objects(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file())


def flip(place: float) -> Alter:
    def alter(path: Path, other: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)
    return alter


def cut(share: float) -> Alter:
    return lambda path, other: os.truncate(path, int(share * path.stat().st_size))


def swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def append(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def delete(path: Path, other: Path) -> None:
    path.unlink()


ALTERATIONS = {"first byte": flip(0), "header": flip(0.02), "middle": flip(0.5), "last byte": flip(1), "cut": cut(0.7),
               "emptied": cut(0), "longer": append, "swapped": swap, "deleted": delete}
# What removing a key, ending a command and changing tags do; without a config there is no repository (see below).
DELETION_IS_LEGAL = ("keys/", "locks/", "tags/", "config")


def test_nothing_is_wrong_with_the_original(original: Path) -> None:
    result = found(original)
    assert (result.problems, result.unknown, result.garbage_objects) == ([], [], 0)
    assert (result.backups, result.segments, result.chunks_read) == (2, 2, 6)


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_every_altered_object_is_named(with_lock: Path, alteration: str) -> None:
    copied, missed = with_lock, []
    for path in objects(copied):
        name = str(path.relative_to(copied))
        if alteration == "deleted" and name.startswith(DELETION_IS_LEGAL):
            continue
        same_kind = [other for other in objects(copied / Path(name).parts[0]) if other != path] or [
            other for other in objects(copied) if other != path]
        before = path.read_bytes()
        ALTERATIONS[alteration](path, same_kind[-1])
        if not _is_named(copied, name):
            missed.append(name)
        path.write_bytes(before)
    assert not missed


def _is_named(path: Path, name: str) -> bool:
    try:
        problems = found(path).problems
    except StasisError as error:  # it cannot even be opened
        return name in error.message or name.split("/")[0] in error.message
    return [problem.object for problem in problems] == [name]


def test_all_damaged_objects_are_named_at_once_with_the_backups_that_need_them(copied: Path) -> None:
    with opened(copied) as repository:
        first, second = repository.backups()
        lost = repository.index(second).name(0)
        cut = repository.index(first).name(0)
    altered = {object_name(Kind.CHUNK, lost): second.id, object_name(Kind.CHUNK, cut): None,
               object_name(Kind.SEGMENT, bytes.fromhex(first.segments[0])): first.id}
    for name in altered:
        os.truncate(copied / name, 30)
    (copied / object_name(Kind.CHUNK, lost)).unlink()
    result = found(copied)
    # The cut chunk belongs to the first backup too, but only the segment that is gone would say so.
    assert {problem.object: (problem.backups or [None])[0] for problem in result.problems} == altered
    assert result.damaged_backups == sorted([first.id, second.id])


def test_a_config_that_is_missing_is_no_repository(copied: Path) -> None:
    (copied / "config").unlink()
    with pytest.raises(RepositoryError, match="no repository"):
        opened(copied)


def test_a_manifest_that_comes_back_after_its_chunks_were_pruned_is_seen_through(copied: Path) -> None:
    with opened(copied) as repository:
        old = repository.backups()[0]
        manifest = (copied / "backups" / old.id).read_bytes()
        repository.remove_backup(old.id)
        assert prune(repository).chunks_removed == 4
        (copied / "backups" / old.id).write_bytes(manifest)
        problems = check(repository).problems
    assert [problem.object.split("/")[0] for problem in problems] == ["segments"]
    assert problems[0].backups == [old.id]


def test_a_lost_manifest_stops_prune_until_the_backup_is_forgotten(copied: Path) -> None:
    with opened(copied) as repository:
        lost, kept = repository.backups()
        content = content_of(repository, kept)
        (copied / "backups" / lost.id).unlink()
        with pytest.raises(DamagedError, match=lost.id):
            prune(repository)
        repository.remove_backup(lost.id)
        assert prune(repository).chunks_removed == 4
        assert content_of(repository, kept) == content
        assert check(repository, read_share=1).problems == []


def test_prune_deletes_nothing_when_it_does_not_know_what_is_in_use(copied: Path) -> None:
    segment = objects(copied / "segments")[0]
    os.truncate(segment, 50)
    before = objects(copied / "chunks")
    with opened(copied) as repository, pytest.raises(DamagedError, match="nothing was pruned") as caught:
        prune(repository)
    assert segment.name in caught.value.message
    assert objects(copied / "chunks") == before


def test_garbage_is_counted_and_is_no_error(copied: Path) -> None:
    with opened(copied) as repository:
        repository.chunk_writer().store(memoryview(random.Random(9).randbytes(CHUNK)))
        repository.sync()
    (copied / "notes.txt").write_text("mine")
    result = found(copied)
    assert (result.garbage_objects, result.unknown, result.problems) == (1, ["notes.txt"], [])


def test_a_subset_is_drawn_again_by_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Repository.init(str(tmp_path / "r"), secret=None, chunk_size=CHUNK) as repository:
        backup_of(repository, random.Random(1).randbytes(64 * CHUNK))
        read: list[bytes] = []
        reader = type(repository.chunk_reader())
        monkeypatch.setattr(reader, "fetch", lambda self, name, into: read.append(name))
        first = check(repository, read_share=0.3)
        assert first.seed is not None
        drawn = set(read)
        assert 5 <= len(drawn) == first.chunks_read <= 40
        read.clear()
        assert check(repository, read_share=0.3, seed=first.seed).seed == first.seed
        assert set(read) == drawn
        read.clear()
        check(repository)
        assert read == []


def test_a_check_in_many_passes_finds_the_same(copied: Path) -> None:
    objects(copied / "chunks")[2].unlink()
    (result, in_passes) = (found(copied), found(copied, marks_in_memory=2))
    assert [each.object for each in in_passes.problems] == [each.object for each in result.problems]
    assert len(result.problems) == 1
    assert in_passes.chunks == result.chunks


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of repositories are checked here, none of which has to survive a power cut."""
    monkeypatch.setattr(keys, "SCRYPT_N", 16)
    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, lambda fd: None)
