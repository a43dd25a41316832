# SPDX-License-Identifier: Apache-2.0
"""Locks of a repository: many shared holders or one exclusive holder, over any store that lists what was put.

A holder first puts an object that announces it, then lists the others; of two that conflict the later one sees the
earlier one, so never do both win. Who takes away the lock of a holder that seems dead deletes its object first, and a
holder asks the store for its object before and after anything that counts: so one that only slept finds out.
docs/design/prune.md has the proof.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import socket
import threading
import time
from datetime import UTC, datetime

from stasis.backup.repo.locks import (
    BROKEN,
    EXCLUSIVE,
    FOLDER,
    SHARED,
    LockInfo,
    list_locks,
    lock_names,
    owner_fields,
    put_small,
)
from stasis.backup.repo.objects import Codec, Kind
from stasis.backup.repo.store import Store
from stasis.errors import LockedError, StasisError

__all__ = ["BREAK_SECONDS", "Claim", "Lease", "acquire"]

REFRESH_SECONDS = 300
LAPSE_SECONDS = 1200  # the holder stops to trust its lease ten minutes before others stop to respect it
BREAK_SECONDS = 600
"""From the mark on an exclusive lock to its end: longer than a request that its holder began in good faith can last,
with all repetitions that a store which does not answer makes necessary."""
RENEW_SECONDS = 600  # a prune that took the lock away is given this long to end

logger = logging.getLogger(__name__)


class Claim:
    """The steps of getting a lock, each one alone, so that a test can put them in any order."""

    def __init__(self, store: Store, codec: Codec, kind: str, purpose: str) -> None:
        self.store = store
        self.codec = codec
        self.kind = kind
        self.id = secrets.token_hex(8)
        self.number = 0
        self._older: str | None = None
        self._ignored: dict[str, LockInfo] = {}
        self._content = json.dumps({
            "host": socket.gethostname(), "purpose": purpose, "since": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **owner_fields(),
        }).encode()

    @property
    def name(self) -> str:
        """The object that stands for this holder now."""
        return f"{FOLDER}/{self.kind}-{self.id}-{self.number:06}"

    def announce(self) -> None:
        """Step 1: show up. From here on others see this holder."""
        name = self.name
        put_small(self.store, name, self.codec.seal(Kind.LOCK, name, self._content))

    def conflicts(self) -> list[LockInfo]:
        """Step 2: who is in the way; the lock is ours when there is nobody, and stays so while it is refreshed."""
        others = [lock for lock in list_locks(self.store, self.codec, without=self.id)
                  if EXCLUSIVE in (lock.kind, self.kind)]
        self._ignored |= {lock.id: lock for lock in others if lock.stale}
        return [lock for lock in others if not lock.stale]

    def take_away(self) -> None:
        """Step 3: delete the locks that were not respected, so that their holders find out.

        An exclusive holder leaves no shared lock at all: a holder that came after its announcement sees that. It looks
        again until nothing is left, as a holder that lives may have refreshed its lock in between.
        """
        if self.kind == SHARED and not self._ignored:
            return
        marks = self._warn()
        while names := [name for kind, id_, name in lock_names(self.store) if self._is_in_the_way(kind, id_)]:
            for name in names:
                self.store.delete(name)
            time.sleep(self.store.listing_lag)
        for mark in marks:
            self.store.delete(mark)

    def _is_in_the_way(self, kind: str, id_: str) -> bool:
        return id_ in self._ignored or (self.kind == EXCLUSIVE and kind == SHARED)

    def _warn(self) -> list[str]:
        """Mark the locks of exclusive holders that may be alive, and give these time to notice."""
        marks = [broken_name(lock.id) for lock in self._ignored.values() if lock.kind == EXCLUSIVE and not lock.gone]
        for mark in marks:
            put_small(self.store, mark, self.codec.seal(Kind.LOCK, mark, b"{}"))
        if marks:
            time.sleep(BREAK_SECONDS)
        return marks

    def refresh(self) -> bool:
        """Put the next object; False when the lock was taken away meanwhile. `drop_older` is to follow.

        The old object is looked for after the new one is there: whoever deleted the old one before that looks again,
        and deletes the new one too.
        """
        self.drop_older()
        self._older = self.name
        self.number += 1
        self.announce()
        return self.store.exists(self._older)

    def drop_older(self) -> None:
        """Delete the object that was refreshed; not before a listing is sure to show the new one."""
        if self._older is not None:
            self.store.delete(self._older)
        self._older = None

    def exists(self) -> bool:
        """Whether nobody took the lock away, or is about to."""
        if not self.store.exists(self.name):
            return False
        return self.kind == SHARED or not self.store.exists(broken_name(self.id))

    def withdraw(self) -> None:
        """Give the lock back, or up."""
        self.drop_older()
        self.store.delete(self.name)
        if self.kind == EXCLUSIVE:
            self.store.delete(broken_name(self.id))


class Lease:
    """A lock that is held, and refreshed by a thread. `confirm` must be asked before anything that relies on it."""

    def __init__(self, claim: Claim | None) -> None:
        """Without a claim, for who may only read: nothing is held, and nothing was lost."""
        self._claim = claim
        self._refreshed = _clock()
        self._lapsed = False
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="stasis-lease", daemon=True)

    def start(self, announced: float) -> None:
        """Keep the lock from now on. `announced`: what `_clock` said before the announcement."""
        self._refreshed = announced
        if self._claim is not None:
            self._thread.start()

    def valid(self) -> bool:
        """Whether the lock was held without a break since it was taken, and will be for some minutes."""
        return self._claim is None or not (self._lapsed or _clock() - self._refreshed > LAPSE_SECONDS)

    def confirm(self) -> bool:
        """As `valid`, and asks the store whether somebody took the lock away."""
        if self._claim is not None:
            with self._mutex:
                if not self._claim.exists():
                    self._lapsed = True
        return self.valid()

    def conflicts(self) -> list[LockInfo]:
        """Who is in the way."""
        if self._claim is None:
            return []
        with self._mutex:
            return self._claim.conflicts()

    def renew(self, wait: float = RENEW_SECONDS) -> None:
        """Take a shared lock that lapsed again. What was relied on must be looked at again. Raises LockedError."""
        if self._claim is None:
            return
        deadline = _clock() + wait
        while conflicts := self._try_again(self._claim):
            if _clock() >= deadline:
                raise _locked(self._claim, conflicts)
            time.sleep(random.uniform(0.2, 2))

    def _try_again(self, claim: Claim) -> list[LockInfo]:
        with self._mutex:
            announced = _clock()
            claim.withdraw()
            claim.number += 1
            claim.announce()
            conflicts = claim.conflicts()
            if conflicts:
                claim.withdraw()
                return conflicts
            claim.take_away()
            self._refreshed, self._lapsed = announced, False
            return []

    def end(self) -> None:
        """Give the lock back."""
        self._ended.set()
        if self._claim is not None:
            self._thread.join()
            try:
                self._claim.withdraw()
            except StasisError as error:  # nothing depends on it: it counts as dead in half an hour
                logger.warning("the lock %s could not be given back: %s", self._claim.name, error)

    def _keep(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            try:
                self._refresh()
            except StasisError as error:  # a store that is away for a while; valid() tells when it is too long
                logger.warning("the lock of %s could not be refreshed: %s", self._claim and self._claim.name, error)

    def _refresh(self) -> None:
        if self._claim is None or not self.valid():
            return  # somebody may have taken the lock meanwhile
        with self._mutex:
            started = _clock()
            if not self._claim.refresh():
                self._lapsed = True
            self._refreshed = started
        if self._claim.store.listing_lag:
            self._pause(self._claim.store.listing_lag)
        with self._mutex:
            self._claim.drop_older()

    def _pause(self, seconds: float) -> None:
        """Not under the mutex: others ask meanwhile whether the lock is held."""
        self._ended.wait(seconds)


def acquire(store: Store, codec: Codec, kind: str, purpose: str, wait: float) -> Lease:
    """Get a lock, trying for `wait` seconds. Raises LockedError, which names the holder."""
    deadline = _clock() + wait
    while True:
        announced = _clock()
        claim = Claim(store, codec, kind, purpose)
        claim.announce()
        lease = Lease(claim)
        lease.start(announced)
        try:
            conflicts = _wait_in_place(lease, claim, deadline)
            if not conflicts:
                claim.take_away()
                if lease.confirm():
                    return lease
        except BaseException:
            lease.end()
            raise
        lease.end()
        left = deadline - _clock()
        if left <= 0 and conflicts:
            raise _locked(claim, conflicts)
        time.sleep(max(0.0, min(left, random.uniform(0.2, 2))))  # not in step with whoever withdrew for us


def _wait_in_place(lease: Lease, claim: Claim, deadline: float) -> list[LockInfo]:
    """Who is in the way still. Who wants to be alone stays announced, so that the others come to an end; of two who
    want to be alone the one with the larger id makes room."""
    if claim.kind == EXCLUSIVE:
        time.sleep(2 * claim.store.listing_lag)
    while conflicts := lease.conflicts():
        rivals = [lock for lock in conflicts if lock.kind == EXCLUSIVE]
        if claim.kind == SHARED or _clock() >= deadline or any(lock.id < claim.id for lock in rivals):
            return conflicts
        time.sleep(random.uniform(0.1, 1))
    return []


def broken_name(id_: str) -> str:
    """The mark that an exclusive lock is being taken away."""
    return f"{FOLDER}/{BROKEN}-{id_}-0"


def _locked(claim: Claim, conflicts: list[LockInfo]) -> LockedError:
    return LockedError(f"the repository {claim.store.url} is locked: {conflicts[0].sentence()}",
                       hint="wait for it to end; if it is dead, its lock counts for nothing after 30 minutes, and "
                            "stasis repo unlock --all removes it at once")


def _clock() -> float:
    """Seconds, those of a suspended machine included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
