# SPDX-License-Identifier: Apache-2.0
"""`copy` brings backups into another repository with all their bytes, whatever its key and chunk size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from stasis.backup.keep.copy import CopiedBackup, copy
from stasis.backup.keep.stats import stats
from stasis.backup.repo import Manifest, Repository, Secret, keys
from stasis.errors import UsageError
from tests.backup.stored import CHUNK, backup_of, content_of


@pytest.fixture(autouse=True)
def _cheap_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_N", 16)


def made(path: Path, chunk_size: int, secret: Secret | None = None) -> Repository:
    return Repository.init(str(path), secret=secret, chunk_size=chunk_size)


def chain(repository: Repository, sizes: tuple[int, ...]) -> dict[str, bytes]:
    """Backups of one device, each with a change against the one before; contents by id."""
    source = random.Random(3)
    content = bytearray(source.randbytes(sizes[0]))
    found: dict[str, bytes] = {}
    parent: Manifest | None = None
    for size in sizes:
        content = (content + source.randbytes(size))[:size]
        content[5 * CHUNK : 6 * CHUNK] = source.randbytes(CHUNK)
        content[9 * CHUNK : 11 * CHUNK] = bytes(2 * CHUNK)
        parent = backup_of(repository, bytes(content), parent=parent.id if parent else None,
                           kind="incremental" if parent else "full", tags=("a",))
        found[parent.id] = bytes(content)
    return found


@pytest.mark.parametrize("secret", [None, Secret(b"other")], ids=["open", "encrypted"])
@pytest.mark.parametrize(("source_chunk", "target_chunk"), [(CHUNK, CHUNK), (CHUNK, 4 * CHUNK), (4 * CHUNK, CHUNK)])
def test_copies_hold_the_same_bytes(tmp_path: Path, source_chunk: int, target_chunk: int,
                                    secret: Secret | None) -> None:
    with made(tmp_path / "a", source_chunk) as source, made(tmp_path / "b", target_chunk, secret) as target:
        sizes = (21 * CHUNK, 21 * CHUNK + 1000, 19 * CHUNK + 1, 25 * CHUNK)
        expected = chain(source, sizes)
        copied = list(copy(source, source.backups(), target))
        assert [one.source for one in copied] == list(expected)
        previous: CopiedBackup | None = None
        for one in copied:
            there, here = target.backup(one.id), source.backup(one.source)
            assert content_of(target, there) == expected[one.source]
            assert (there.host, there.device, there.time, there.tags) == (here.host, here.device, here.time, ("a",))
            assert there.parent == (previous.id if previous else None)
            assert there.kind == here.kind
            previous = one


def test_of_the_second_backup_only_what_differs_is_read(tmp_path: Path) -> None:
    with made(tmp_path / "a", CHUNK) as source, made(tmp_path / "b", CHUNK, Secret(b"x")) as target:
        chain(source, (40 * CHUNK, 40 * CHUNK))
        first, second = copy(source, source.backups(), target)
        assert first.bytes_read == 38 * CHUNK
        assert second.bytes_read == CHUNK


def test_what_is_there_is_skipped(tmp_path: Path) -> None:
    with made(tmp_path / "a", CHUNK) as source, made(tmp_path / "b", CHUNK) as target:
        chain(source, (12 * CHUNK, 12 * CHUNK))
        first = list(copy(source, source.backups()[:1], target))
        again = list(copy(source, source.backups(), target))
        assert [one.skipped for one in again] == [True, False]
        assert again[0].id == first[0].id
        assert len(target.backups()) == 2


def test_an_incremental_without_its_parent_is_full_in_the_copy(tmp_path: Path) -> None:
    with made(tmp_path / "a", CHUNK) as source, made(tmp_path / "b", CHUNK) as target:
        expected = chain(source, (12 * CHUNK, 12 * CHUNK))
        (one,) = copy(source, source.backups()[1:], target)
        there = target.backup(one.id)
        assert (there.kind, there.parent) == ("full", None)
        assert content_of(target, there) == expected[one.source]


def test_a_repository_is_not_copied_into_itself(tmp_path: Path) -> None:
    with made(tmp_path / "a", CHUNK) as source, pytest.raises(UsageError, match="copied from"):
        list(copy(source, [], source))


def test_stats_count_what_is_there(tmp_path: Path) -> None:
    with made(tmp_path / "a", CHUNK) as source:
        assert stats(source).ratio is None
        chain(source, (16 * CHUNK, 16 * CHUNK))
        result = stats(source)
        assert (result.backups, result.devices, result.hosts, result.chunks) == (2, 1, 1, 15)
        assert result.bytes_protected == 32 * CHUNK
        assert result.bytes_stored == sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())
        assert result.ratio is not None
        assert 2 < result.ratio < 2.3
