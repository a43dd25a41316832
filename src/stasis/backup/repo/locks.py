# SPDX-License-Identifier: Apache-2.0
"""Locks of a repository: many shared holders or one exclusive holder, over any store that lists what was put.

A holder first puts an object that announces it, then lists the others; who finds a conflict withdraws. Of two that
conflict the later one sees the earlier one, so never do both win. docs/design/repository.md has the proof, and why a
holder that slept too long is not believed.
"""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from stasis.backup.repo.objects import Codec, Kind
from stasis.backup.repo.store import Store
from stasis.errors import DamagedError, LockedError, NotFoundError

__all__ = ["STALE_SECONDS", "Claim", "Lease", "LockInfo", "acquire", "list_locks", "remove_locks", "store_time"]

FOLDER = "locks"
SHARED, EXCLUSIVE = "shared", "exclusive"
REFRESH_SECONDS = 300
LAPSE_SECONDS = 1200  # the holder stops to trust its lease ten minutes before others stop to respect it
STALE_SECONDS = 1800

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LockInfo:
    """A holder. `since` is RFC 3339; `age` the seconds since it was last refreshed, by the store's clock."""

    id: str
    kind: str
    host: str
    pid: int
    purpose: str
    since: str
    age: float
    stale: bool

    def sentence(self) -> str:
        """Who it is, for a message."""
        return f"{self.purpose} on {self.host} (pid {self.pid}) since {self.since}"


class Claim:
    """The steps of getting a lock, each one alone, so that a test can put them in any order."""

    def __init__(self, store: Store, codec: Codec, kind: str, purpose: str) -> None:
        self.store = store
        self.codec = codec
        self.kind = kind
        self.id = secrets.token_hex(8)
        self.number = 0
        self._content = json.dumps({
            "host": socket.gethostname(), "pid": os.getpid(), "purpose": purpose,
            "since": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }).encode()

    @property
    def name(self) -> str:
        """The object that stands for this holder now."""
        return f"{FOLDER}/{self.kind}-{self.id}-{self.number:06}"

    def announce(self) -> None:
        """Step 1: show up. From here on others see this holder."""
        name = self.name
        self.store.put(name, self.codec.seal(Kind.LOCK, name, self._content))

    def conflicts(self) -> list[LockInfo]:
        """Step 2: who is in the way. The lock is held when there is nobody, and stays held while it is refreshed."""
        others = [lock for lock in list_locks(self.store, self.codec, now=self._modified()) if lock.id != self.id]
        return [lock for lock in others if not lock.stale and EXCLUSIVE in (lock.kind, self.kind)]

    def refresh(self) -> bool:
        """Put the next object and delete the one before it; False when that one is gone, as after `unlock`."""
        old = self.name
        if not self.store.exists(old):
            return False
        self.number += 1
        self.announce()
        self.store.delete(old)
        return True

    def withdraw(self) -> None:
        """Give the lock back, or up."""
        self.store.delete(self.name)

    def _modified(self) -> float:
        info = self.store.stat(self.name)
        if info is None:
            raise LockedError(f"the lock of this command in {self.store.url} was removed by somebody else",
                              hint="somebody ran unlock; run the command again")
        return info.modified


class Lease:
    """A lock that is held, and refreshed by a thread. `valid` must be asked before anything that relies on it."""

    def __init__(self, claim: Claim | None) -> None:
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
        """As `valid`, and asks the store whether somebody removed the lock by force."""
        with self._mutex:
            if self._claim is not None and not self._claim.store.exists(self._claim.name):
                self._lapsed = True
        return self.valid()

    def renew(self) -> None:
        """Take a lease that lapsed again. What was relied on must be looked at again. Raises LockedError."""
        if self._claim is None:
            return
        with self._mutex:
            announced = _clock()
            self._claim.withdraw()
            self._claim.number += 1
            self._claim.announce()
            if conflicts := self._claim.conflicts():
                self._claim.withdraw()
                raise _locked(self._claim, conflicts)
            self._refreshed, self._lapsed = announced, False

    def end(self) -> None:
        """Give the lock back."""
        self._ended.set()
        if self._claim is not None:
            self._thread.join()
            self._claim.withdraw()

    def _keep(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            with self._mutex:
                try:
                    self._refresh()
                except Exception as error:  # a store that is away for a while; valid() tells when it is too long
                    logger.warning("the lock of %s could not be refreshed: %s", self._claim and self._claim.name, error)

    def _refresh(self) -> None:
        if self._claim is None or not self.valid():
            return  # somebody may have taken the lock meanwhile: only renew() can tell
        started = _clock()
        refreshed = self._claim.refresh()
        if not refreshed or _clock() - self._refreshed > STALE_SECONDS:
            self._lapsed = True
        self._refreshed = started


def acquire(store: Store, codec: Codec, kind: str, purpose: str, wait: float) -> Lease:
    """Get a lock, trying for `wait` seconds. Raises LockedError, which names the holder."""
    deadline = _clock() + wait
    while True:
        announced = _clock()
        claim = Claim(store, codec, kind, purpose)
        claim.announce()
        try:
            if kind == EXCLUSIVE:
                time.sleep(2 * store.listing_lag)
            conflicts = claim.conflicts()
        except BaseException:
            claim.withdraw()
            raise
        if not conflicts:
            lease = Lease(claim)
            lease.start(announced)
            return lease
        claim.withdraw()
        left = deadline - _clock()
        if left <= 0:
            raise _locked(claim, conflicts)
        time.sleep(min(left, random.uniform(0.2, 2)))  # not in step with whoever withdrew for us


def list_locks(store: Store, codec: Codec, now: float | None = None) -> list[LockInfo]:
    """All holders. `now`: the time by the clock of the store, asked from it if it is not given."""
    newest: dict[tuple[str, str], tuple[str, float]] = {}
    for info in store.list(FOLDER):
        kind, _, rest = info.name.rpartition("/")[2].partition("-")
        key = (kind, rest.partition("-")[0])
        newest[key] = max((info.name, info.modified), newest.get(key, ("", 0.0)))
    if newest and now is None:
        now = store_time(store, codec)
    found = (_read(store, codec, *key, *value, now or 0.0) for key, value in newest.items())
    return sorted((lock for lock in found if lock is not None), key=lambda lock: lock.since)


def remove_locks(store: Store, locks: Iterable[LockInfo]) -> None:
    """Remove the objects of holders, by force."""
    ids = {(lock.kind, lock.id) for lock in locks}
    for info in list(store.list(FOLDER)):
        kind, id_, *_ = (*info.name.rpartition("/")[2].split("-"), "")
        if (kind, id_) in ids:
            store.delete(info.name)


def store_time(store: Store, codec: Codec) -> float:
    """What time it is by the clock of the store, in seconds."""
    name = f"clock/{secrets.token_hex(8)}"
    store.put(name, codec.seal(Kind.LOCK, name, b"{}"))
    try:
        info = store.stat(name)
    finally:
        store.delete(name)
    if info is None:
        raise NotFoundError(f"{name}, written a moment ago, is not in {store.url}")
    return info.modified


def _read(store: Store, codec: Codec, kind: str, id_: str, name: str, modified: float, now: float) -> LockInfo | None:
    """A holder whose content cannot be read is a holder nevertheless; one that is gone meanwhile is none."""
    try:
        fields = json.loads(codec.unseal(Kind.LOCK, name, store.get(name)))
    except NotFoundError:
        return None if not _refreshed_since(store, kind, id_) else LockInfo(id_, kind, "?", 0, "?", "?", 0.0, False)
    except DamagedError:
        fields = {}
    age = max(0.0, now - modified)
    return LockInfo(id_, kind, str(fields.get("host", "?")), int(fields.get("pid", 0)), str(fields.get("purpose", "?")),
                    str(fields.get("since", "?")), age, age > STALE_SECONDS)


def _refreshed_since(store: Store, kind: str, id_: str) -> bool:
    return any(info.name.startswith(f"{FOLDER}/{kind}-{id_}-") for info in store.list(FOLDER))


def _locked(claim: Claim, conflicts: list[LockInfo]) -> LockedError:
    return LockedError(f"the repository {claim.store.url} is locked: {conflicts[0].sentence()}",
                       hint="wait for it to end; if it is dead, stasis backup unlock removes its lock after 30 minutes")


def _clock() -> float:
    """Seconds, those of a suspended machine included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
