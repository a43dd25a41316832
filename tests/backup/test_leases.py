# SPDX-License-Identifier: Apache-2.0
"""Locks of a repository: never do two that conflict both win, and who lost one finds out."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from stasis.backup.repo import Repository, Secrets, lease, locks
from stasis.backup.repo.lease import Claim
from stasis.errors import LockedError
from tests.backup.dictstore import DictStore, repository_on
from tests.backup.schedule import Schedule
from tests.backup.stored import CHUNK, backup_of


def claim(store: DictStore, kind: str) -> Claim:
    return Claim(store, repository_on(store).codec(), kind, "test")


def held_names(store: DictStore) -> list[str]:
    return sorted(name.split("-")[0] for name in store.objects if name.startswith("locks/"))


@pytest.fixture
def store() -> DictStore:
    return DictStore()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, store: DictStore) -> Schedule:
    """Time that only sleeping takes."""
    schedule = Schedule(0)
    monkeypatch.setattr(lease, "time", schedule)
    store.clock = lambda: schedule.now
    return schedule


def test_many_may_share(store: DictStore) -> None:
    first, second = repository_on(store), repository_on(store)
    with first.lock_shared("a"), second.lock_shared("b"):
        assert [lock.purpose for lock in first.locks()] == ["a", "b"]
    assert held_names(store) == []


@pytest.mark.parametrize(("first", "second"), [("shared", "exclusive"), ("exclusive", "shared"),
                                               ("exclusive", "exclusive")])
def test_exclusive_is_alone(store: DictStore, clock: Schedule, first: str, second: str) -> None:
    holder, other = repository_on(store), repository_on(store)
    with getattr(holder, f"lock_{first}")("first"):
        with pytest.raises(LockedError, match="first on"), getattr(other, f"lock_{second}")("second", wait=10):
            pass
        assert held_names(store) == [f"locks/{first}"]
    with getattr(other, f"lock_{second}")("second"):
        pass


@pytest.mark.parametrize("order", [("a", "p"), ("p", "a")])
def test_of_two_at_the_same_time_the_later_one_sees_the_earlier(store: DictStore, order: tuple[str, str]) -> None:
    steps = {"a": claim(store, "shared"), "p": claim(store, "exclusive")}
    for name in order:
        steps[name].announce()
    assert [bool(steps[name].conflicts()) for name in order] == [True, True]


def test_who_waits_to_be_alone_is_not_starved(tmp_path: Path) -> None:
    """While prune waits for one writer, no other gets in."""
    with Repository.init(str(tmp_path / "r"), secret=None, chunk_size=CHUNK) as mine:
        won = threading.Event()

        def prune() -> None:
            with Repository.open(mine.url, Secrets.none()) as other, other.lock_exclusive("prune", wait=60):
                won.set()

        thread = threading.Thread(target=prune)
        with mine.lock_shared("writer"):
            thread.start()
            while len(mine.locks()) < 2:
                pass
            with pytest.raises(LockedError, match="prune on"), mine.lock_shared("late"):
                pass
            assert not won.is_set()
        thread.join()
        assert won.is_set()


def test_a_lock_that_was_removed_is_missed_before_and_after_publishing(store: DictStore) -> None:
    mine, other = repository_on(store), repository_on(store)
    with mine.lock_shared("create") as held:
        assert held.confirm()
        other.unlock(stale_only=False)
        assert not held.confirm()
        with pytest.raises(LockedError, match="lapsed"):
            backup_of(mine, bytes(range(200)) * 10)
    assert mine.backup_ids() == []


def test_a_lock_that_is_removed_while_the_manifest_is_put(store: DictStore) -> None:
    mine, other = repository_on(store), repository_on(store)

    def before(kind: str, name: str) -> None:
        if kind == "put" and name.startswith("backups/"):
            store.before = lambda kind, name: None
            other.unlock(stale_only=False)

    store.before = before
    with mine.lock_shared("create"), pytest.raises(LockedError, match="lapsed"):
        backup_of(mine, bytes(range(200)) * 10)
    assert mine.backup_ids() == []


def test_a_stale_lock_is_taken_away_and_its_holder_finds_out(store: DictStore, clock: Schedule) -> None:
    sleeper = claim(store, "shared")
    sleeper.announce()
    clock.now += locks.STALE_SECONDS + 1
    with repository_on(store).lock_exclusive("prune"):
        assert not sleeper.exists()
        assert not sleeper.refresh()
        sleeper.withdraw()


@pytest.mark.parametrize("request_number", range(5))
def test_a_holder_that_refreshes_while_its_lock_is_taken_away(store: DictStore, clock: Schedule,
                                                              request_number: int) -> None:
    """Whatever request of the refresh the other one comes before, no lock is left that its holder believes in."""
    sleeper, breaker = claim(store, "shared"), claim(store, "exclusive")
    sleeper.announce()
    clock.now += locks.STALE_SECONDS + 1
    breaker.announce()
    assert breaker.conflicts() == []
    left = [request_number]

    def before(kind: str, name: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            store.before = lambda kind, name: None
            breaker.take_away()

    store.before = before
    believed = sleeper.refresh()
    if store.before is before:  # the refresh has fewer requests
        store.before = lambda kind, name: None
        breaker.take_away()
    assert not (believed and sleeper.exists())


def test_an_exclusive_lock_is_marked_a_while_before_it_is_taken_away(store: DictStore, clock: Schedule) -> None:
    sleeper, writer = claim(store, "exclusive"), claim(store, "shared")
    sleeper.announce()
    clock.now += locks.STALE_SECONDS + 1
    writer.announce()
    assert writer.conflicts() == []
    seen: list[tuple[bool, float]] = []
    started = clock.now
    store.before = lambda kind, name: seen.append((sleeper.name in store.objects, clock.now)) \
        if kind == "delete" and name == sleeper.name else None
    writer.take_away()
    assert seen == [(True, started + lease.BREAK_SECONDS)]
    assert held_names(store) == ["locks/shared"]  # the mark is gone too


def test_a_mark_is_enough_to_stop_the_holder(store: DictStore) -> None:
    holder = claim(store, "exclusive")
    holder.announce()
    store.put(lease.broken_name(holder.id), b"")
    assert not holder.exists()


def test_a_late_listing_shows_a_lock_that_is_being_refreshed(clock: Schedule) -> None:
    store = DictStore(lambda: clock.now, lag=5.0)
    writer, pruner = claim(store, "shared"), claim(store, "exclusive")
    writer.announce()
    clock.now += 100
    pruner.announce()
    clock.now += 10
    conflicts: list[int] = []

    def before(kind: str, name: str) -> None:
        if name.startswith("locks/shared"):  # before each request of the refresh
            store.before = lambda kind, name: None
            conflicts.append(len(pruner.conflicts()))
            store.before = before

    store.before = before
    assert writer.refresh()
    clock.now += store.listing_lag
    writer.drop_older()
    assert conflicts
    assert set(conflicts) == {1}


def test_a_lapsed_lease_is_taken_again(store: DictStore, clock: Schedule) -> None:
    mine = repository_on(store)
    with mine.lock_shared("create") as held:
        repository_on(store).unlock(stale_only=False)
        assert not held.confirm()
        held.renew()
        assert held.confirm()
        assert held_names(store) == ["locks/shared"]
    assert held_names(store) == []


def test_a_lease_is_not_taken_again_while_prune_is_at_work(store: DictStore, clock: Schedule) -> None:
    mine, other = repository_on(store), repository_on(store)
    with mine.lock_shared("create") as held:
        other.unlock(stale_only=False)
        with other.lock_exclusive("prune"), pytest.raises(LockedError, match="prune on"):
            held.renew(wait=5)


def test_what_may_only_be_read_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stasis.errors import PermissionDeniedError

    Repository.init(str(tmp_path / "r"), secret=None, chunk_size=CHUNK).close()

    def refuse(name: str, *parts: object) -> bool:
        raise PermissionDeniedError("read-only")

    with Repository.open(str(tmp_path / "r"), Secrets.none(), read_only=True) as reader:
        monkeypatch.setattr(reader.store, "put", refuse)
        with reader.lock_shared("restore") as held:
            assert held.confirm()
        with pytest.raises(PermissionDeniedError), reader.lock_exclusive("prune"):
            pass
