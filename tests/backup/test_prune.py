# SPDX-License-Identifier: Apache-2.0
"""`prune` deletes all that no backup needs and nothing else, wherever it or anybody else is killed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from stasis.backup.keep import prune as prune_module
from stasis.backup.keep.check import check
from stasis.backup.keep.prune import prune
from stasis.backup.repo import Manifest, Repository, lease
from stasis.errors import LockedError, StorageError
from tests.backup.dictstore import DictStore, Killed, repository_on
from tests.backup.stored import CHUNK, backup_of, content_of

POOL = [random.Random(number).randbytes(CHUNK) for number in range(8)] + [bytes(CHUNK)]


def contents(*numbers: int) -> bytes:
    return b"".join(POOL[number] for number in numbers)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.init(str(tmp_path / "r"), secret=None, chunk_size=CHUNK)


def names(repository: Repository, folder: str) -> list[str]:
    return sorted(info.name for info in repository.store.list(folder))


def test_what_only_a_forgotten_backup_needs_goes(repository: Repository) -> None:
    old, new = backup_of(repository, contents(0, 1, 2)), backup_of(repository, contents(2, 3, 8))
    repository.remove_backup(old.id)
    dry = prune(repository, dry_run=True)
    assert (dry.chunks_removed, dry.segments_removed) == (2, 1)
    assert len(names(repository, "chunks")) == 4
    result = prune(repository)
    assert (result.chunks_removed, result.segments_removed, result.bytes_removed) == (2, 1, dry.bytes_removed)
    assert (result.backups, result.chunks_kept) == (1, 2)
    assert content_of(repository, new) == contents(2, 3, 8)
    assert len(names(repository, "")) == 6  # config, manifest, tags, segment, two chunks
    assert prune(repository).bytes_removed == 0


def test_what_a_killed_writer_left_goes(repository: Repository) -> None:
    kept = backup_of(repository, contents(0))
    repository.chunk_writer().store(memoryview(POOL[5]))
    builder = repository.index_builder(CHUNK)
    builder.set(0, repository.chunk_name(POOL[5]))
    builder.finish()
    repository.sync()
    result = prune(repository)
    assert (result.chunks_removed, result.segments_removed) == (1, 1)
    assert content_of(repository, kept) == contents(0)


def test_prune_of_a_repository_without_backups_empties_it(repository: Repository) -> None:
    repository.remove_backup(backup_of(repository, contents(0, 1)).id)
    prune(repository)
    assert names(repository, "") == ["config"]


def test_prune_waits_for_nobody_unless_told(repository: Repository) -> None:
    with repository.lock_shared("restore"), pytest.raises(LockedError, match="restore on"):
        prune(repository)


def test_prune_makes_room_on_a_disk_that_is_full(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.remove_backup(backup_of(repository, contents(0, 1)).id)
    put = repository.store.put

    def put_without_room(name: str, *parts: bytes) -> bool:
        if any(len(part) for part in parts):
            raise StorageError("no space left")
        return put(name, *parts)

    monkeypatch.setattr(repository.store, "put", put_without_room)
    assert prune(repository).chunks_removed == 2
    assert names(repository, "") == ["config"]


def test_files_that_never_got_their_name_go(repository: Repository) -> None:
    """What a killed writer leaves on a file system without unnamed files."""
    folder = Path(repository.url) / "tmp"
    folder.mkdir(exist_ok=True)
    (folder / ("0" * 32)).write_bytes(b"half")
    assert prune(repository).leftovers_removed == 1
    assert list(folder.iterdir()) == []


def test_an_empty_lock_counts(repository: Repository) -> None:
    repository.store.put(f"locks/shared-{'a' * 16}-000000", b"")
    with pytest.raises(LockedError):
        prune(repository)


def test_objects_that_are_none_of_ours_stay(repository: Repository) -> None:
    for name in ("chunks/00/notes", "segments/x", "readme"):
        repository.store.put(name, b"mine")
    prune(repository)
    assert names(repository, "") == ["chunks/00/notes", "config", "readme", "segments/x"]


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_little_memory_means_more_passes_and_the_same_result(repository: Repository, limit: int) -> None:
    kept = backup_of(repository, contents(0, 1, 2, 3))
    repository.remove_backup(backup_of(repository, contents(4, 5, 6, 7)).id)
    result = prune(repository, marks_in_memory=limit)
    assert (result.chunks_removed, result.chunks_kept) == (4, 4)
    assert (result.passes > 1) == (limit < 4)
    assert content_of(repository, kept) == contents(0, 1, 2, 3)


def test_a_prune_that_lost_its_lock_stops(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_module, "LOOK_SECONDS", 0)
    monkeypatch.setattr(Repository, "parallelism", 2)
    repository.remove_backup(backup_of(repository, contents(0, 1, 2, 3)).id)
    delete = repository.store.delete

    def delete_and_unlock(name: str) -> None:
        delete(name)
        if name.startswith("chunks/"):
            Repository.unlock(repository, stale_only=False)

    monkeypatch.setattr(repository.store, "delete", delete_and_unlock)
    with pytest.raises(LockedError, match="lost its lock"):
        prune(repository)
    assert len(names(repository, "chunks")) >= 4 - repository.parallelism  # those that were on their way


def killed_at(store: DictStore, request: int) -> None:
    """End whoever uses the store before this one of its requests that change it."""
    left = [request]

    def before(kind: str, name: str) -> None:
        if kind in ("put", "delete"):
            left[0] -= 1
            if left[0] < 0:
                raise Killed

    store.before = before


def revive(store: DictStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process: locks of the killed one, which was this process, count as dead."""
    store.before = lambda kind, name: None
    for name in [name for name in store.objects if name.startswith("locks/")]:
        store.delete(name)


def test_prune_killed_before_any_of_its_requests_leaves_every_backup_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    request, ended = 0, False
    while not ended:
        store = DictStore()
        mine = repository_on(store)
        kept = backup_of(mine, contents(0, 1))
        mine.remove_backup(backup_of(mine, contents(1, 2, 3)).id)
        killed_at(store, request)
        try:
            prune(repository_on(store))
            ended = True
        except Killed:
            request += 1
        revive(store, monkeypatch)
        assert check(mine, read_share=1).problems == []
        assert content_of(mine, kept) == contents(0, 1)
        prune(mine)
        assert len(names(mine, "chunks")) == 2
    assert request > 10


def test_forget_and_publish_killed_before_any_of_their_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(mine: Repository, old: Manifest) -> None:
        mine.remove_backup(old.id)

    def publish(mine: Repository, old: Manifest) -> None:
        with mine.lock_shared("create"):
            backup_of(mine, contents(2, 3))

    for act in (forget, publish):
        request, ended = 0, False
        while not ended:
            store = DictStore()
            mine = repository_on(store)
            old, kept = backup_of(mine, contents(4, 5)), backup_of(mine, contents(0, 1))
            killed_at(store, request)
            try:
                act(repository_on(store), old)
                ended = True
            except Killed:
                request += 1
            revive(store, monkeypatch)
            assert check(mine, read_share=1).problems == []
            prune(mine)
            assert check(mine, read_share=1).garbage_objects == 0
            assert content_of(mine, kept) == contents(0, 1)
        assert request > 1


class Histories(RuleBasedStateMachine):
    """Any history of publishing, forgetting, pruning and being killed: what is kept restores to exactly its bytes."""

    kept = Bundle("kept")

    def __init__(self) -> None:
        super().__init__()
        self.store = DictStore()
        self.repository = repository_on(self.store)
        self.expected: dict[str, bytes] = {}

    @rule(target=kept, chunks=st.lists(st.integers(0, 8), min_size=1, max_size=5), tail=st.integers(0, 2))
    def publish(self, chunks: list[int], tail: int) -> str:
        content = contents(*chunks)[: len(chunks) * CHUNK - tail * 1000]
        with self.repository.lock_shared("create"):
            backup = backup_of(self.repository, content)
        self.expected[backup.id] = content
        return backup.id

    @rule(id_=consumes(kept))
    def forget(self, id_: str) -> None:
        self.repository.remove_backup(id_)
        del self.expected[id_]

    @rule(limit=st.sampled_from([1, 4, 1000]))
    def prune(self, limit: int) -> None:
        prune(self.repository, marks_in_memory=limit)
        used = {chunk for content in self.expected.values() for chunk in _chunks(content)}
        assert len(names(self.repository, "chunks")) == len(used)

    @rule(request=st.integers(0, 25), chunks=st.lists(st.integers(0, 8), min_size=1, max_size=5))
    def killed_while_publishing(self, request: int, chunks: list[int]) -> None:
        killed_at(self.store, request)
        known = set(self.expected)
        try:
            with self.repository.lock_shared("create"):
                backup_of(self.repository, contents(*chunks))
        except Killed:
            pass
        self._next_process()
        for id_ in set(self.repository.backup_ids()) - known:
            self.expected[id_] = contents(*chunks)  # killed after it was published, or not at all

    @rule(request=st.integers(0, 25))
    def killed_while_pruning(self, request: int) -> None:
        killed_at(self.store, request)
        try:
            prune(self.repository)
        except Killed:
            pass
        self._next_process()

    def _next_process(self) -> None:
        self.store.before = lambda kind, name: None
        for name in [name for name in self.store.objects if name.startswith("locks/")]:
            self.store.delete(name)
        self.repository = repository_on(self.store)

    @invariant()
    def every_backup_has_its_bytes(self) -> None:
        assert set(self.repository.backup_ids()) == set(self.expected)
        for id_, content in self.expected.items():
            assert content_of(self.repository, self.repository.backup(id_)) == content
        assert check(self.repository).problems == []


def _chunks(content: bytes) -> list[bytes]:
    cut = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
    return [chunk for chunk in cut if any(chunk)]


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=1000 if os.environ.get("STASIS_LONG") else 20, stateful_step_count=15)


def test_the_lock_of_a_process_that_ended_holds_nobody_up(repository: Repository) -> None:
    claim = lease.Claim(repository.store, repository.codec(), "shared", "create")
    claim._content = claim._content.replace(b'"started": ', b'"started": 1')  # another process that had this pid
    claim.announce()
    assert repository.locks()[0].gone
    prune(repository)
    assert not claim.exists()
