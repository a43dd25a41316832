# SPDX-License-Identifier: Apache-2.0
"""A backup that was reported complete keeps its chunks, in whatever order the requests of hosts come.

The proof in docs/design/prune.md, tried on the code: with drawn orders, clocks that jump, hosts that sleep, and
listings that are late.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from stasis.backup.keep import prune as prune_module
from stasis.backup.keep import used
from stasis.backup.keep.check import check
from stasis.backup.keep.prune import prune
from stasis.backup.repo import Lease, Repository, lease, locks, repository, tags
from stasis.errors import LockedError
from tests.backup.dictstore import DictStore, repository_on
from tests.backup.schedule import Schedule
from tests.backup.stored import CHUNK, backup_of, content_of

ORDERS = 3000 if os.environ.get("STASIS_LONG") else 40
CONTENTS = [random.Random(number).randbytes(CHUNK) for number in range(4)]


@dataclass
class World:
    """Hosts on one store. complete: what publish reported, by backup id."""

    schedule: Schedule
    store: DictStore
    complete: dict[str, bytes] = field(default_factory=dict)

    def open(self) -> Repository:
        return repository_on(self.store)

    def write(self, seed: int) -> Callable[[], None]:
        """A writer: three chunks that others have or had too, and a refresh of its lock in between."""
        draw = random.Random(seed)

        def run() -> None:
            with self.open() as mine, mine.lock_shared("create", wait=100_000) as held:
                content = b"".join(draw.choices(CONTENTS, k=3))
                if draw.random() < 0.5:
                    refresh(held)
                backup = backup_of(mine, content)
                self.complete[backup.id] = content
        return run

    def prune(self) -> None:
        with self.open() as mine:
            prune(mine, wait=100_000)

    def assert_whole(self) -> None:
        with self.open() as mine:
            assert {backup.id for backup in mine.backups()} >= set(self.complete)
            for id_, content in self.complete.items():
                assert content_of(mine, mine.backup(id_)) == content
            assert check(mine, read_share=1).problems == []


def refresh(held: Lease) -> None:
    """What the thread of a lease does every five minutes."""
    held._refresh()


def serial(call, items, threads):  # type: ignore[no-untyped-def]
    """In place of `in_threads`: each request of a host is a step of its own."""
    return map(call, items)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    def make_world(seed: int, lag: float = 0.0) -> World:
        schedule = Schedule(seed)
        for module in (lease, repository, tags, prune_module):
            monkeypatch.setattr(module, "time", schedule)
        monkeypatch.setattr(lease, "random", schedule.source)
        monkeypatch.setattr(Lease, "_pause", lambda self, seconds: schedule.sleep(seconds))
        # A tenth of the real times, so that who waits asks less often.
        monkeypatch.setattr(lease, "LAPSE_SECONDS", 120)
        monkeypatch.setattr(lease, "BREAK_SECONDS", 60)
        monkeypatch.setattr(locks, "STALE_SECONDS", 180)
        for module in (used, prune_module):
            monkeypatch.setattr(module, "in_threads", serial)
        return World(schedule, DictStore(lambda: schedule.now, lag=lag, seed=seed))
    return make_world


def garbage(world: World) -> None:
    """All contents are stored, and nobody needs them."""
    with world.open() as mine:
        gone = backup_of(mine, b"".join(CONTENTS))
        mine.remove_backup(gone.id)


def run(world: World) -> dict[str, BaseException]:
    garbage(world)
    seed = world.schedule.source.randrange(1 << 30)
    errors = world.schedule.run(first=world.write(seed), second=world.write(seed + 1), prune=world.prune)
    world.store.before = lambda kind, name: None
    world.schedule.sleep(world.store.listing_lag)
    return errors


@pytest.mark.parametrize("lag", [0.0, 3.0])
def test_any_order_of_requests(make: Callable[..., World], seed: int, lag: float) -> None:
    pruned = 0
    for order in range(ORDERS):
        world = make(seed + order, lag)
        world.store.before = world.schedule.point
        assert run(world) == {}
        world.assert_whole()
        assert len(world.complete) == 2
        pruned += len([name for name in world.store.objects if name.startswith("chunks/")]) < 4
    assert pruned > ORDERS // 20  # prune came before a writer, or between them


@pytest.mark.parametrize("lag", [0.0, 3.0])
def test_locks_that_seem_dead_because_the_clock_of_the_store_jumps(make: Callable[..., World], seed: int,
                                                                   lag: float) -> None:
    failed = 0
    for order in range(ORDERS):
        world = make(seed + order, lag)
        jump = random.Random(order).randrange(10, 120)

        def before(kind: str, name: str, world: World = world, left: list[int] = [jump]) -> None:  # noqa: B006
            world.schedule.point()
            left[0] -= 1
            if left[0] == 0:
                world.store.clock = lambda: world.schedule.now + 720

        world.store.before = before
        errors = run(world)
        assert all(isinstance(error, LockedError) for error in errors.values()), errors
        failed += len(errors)
        world.assert_whole()
    assert failed > 0 or lag


@pytest.mark.parametrize("lag", [0.0, 3.0])
def test_a_writer_that_sleeps_for_hours_anywhere(make: Callable[..., World], seed: int, lag: float) -> None:
    failed = 0
    for order in range(ORDERS):
        world = make(seed + order, lag)
        asleep_at = random.Random(order).randrange(5, 80)

        def before(kind: str, name: str, world: World = world, left: list[int] = [asleep_at]) -> None:  # noqa: B006
            world.schedule.point()
            left[0] -= 1
            if left[0] == 0:
                world.schedule.freeze("first", 720)

        world.store.before = before
        errors = run(world)
        assert all(isinstance(error, LockedError) for error in errors.values()), errors
        failed += "first" in errors
        world.assert_whole()
    assert failed > 0 or lag
