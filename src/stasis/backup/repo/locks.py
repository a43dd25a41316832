# SPDX-License-Identifier: Apache-2.0
"""Who holds a lock of a repository, as the objects in its store tell: one per holder, replaced by the holder now and
then, so that its age shows whether the holder lives.

Ages are differences of times that the store gave, so that no two hosts need to agree on the time.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from stasis.backup.repo.objects import Codec, Kind
from stasis.backup.repo.store import Buffer, Store
from stasis.errors import DamagedError, NotFoundError, StorageError
from stasis.linux import process

__all__ = ["BROKEN", "CLOCK", "EXCLUSIVE", "FOLDER", "SHARED", "STALE_SECONDS", "LockInfo", "list_locks", "lock_names",
           "owner_fields", "put_small", "remove_locks", "store_time"]

FOLDER = "locks"
SHARED, EXCLUSIVE = "shared", "exclusive"
BROKEN = "broken"
"""Kind of the mark that somebody is about to take an exclusive lock away; its holder sees it and stops."""
STALE_SECONDS = 1800
CLOCK = "clock"
TIME_ATTEMPTS = 3


@dataclass(frozen=True)
class LockInfo:
    """A holder. `since` is RFC 3339; `age` the seconds since it was last refreshed, by the store's clock.

    stale: it need not be respected; gone: it is certain to have ended, as its process on this host has.
    """

    id: str
    kind: str
    host: str
    pid: int
    purpose: str
    since: str
    age: float
    stale: bool
    gone: bool = False

    def sentence(self) -> str:
        """Who it is, for a message."""
        return f"{self.purpose} on {self.host} (pid {self.pid}) since {self.since}"


def owner_fields() -> dict[str, Any]:
    """What names this process on this host for good; `_owner_is_gone` reads it."""
    pid = os.getpid()
    return {"pid": pid, "boot": process.boot_id(), "namespace": os.readlink("/proc/self/ns/pid"),
            "started": process.start_time(pid)}


def list_locks(store: Store, codec: Codec, *, without: str = "") -> list[LockInfo]:
    """All holders but one, the oldest first."""
    newest: dict[tuple[str, str], tuple[str, float]] = {}
    for kind, id_, name, modified in _objects(store):
        if kind != BROKEN and id_ != without:
            newest[kind, id_] = max((name, modified), newest.get((kind, id_), ("", 0.0)))
    if not newest:
        return []
    now = store_time(store, codec)
    found = (_read(store, codec, *key, *value, now) for key, value in newest.items())
    return sorted((lock for lock in found if lock is not None), key=lambda lock: lock.since)


def lock_names(store: Store) -> Iterator[tuple[str, str, str]]:
    """Kind, id and name of every object of a holder."""
    return ((kind, id_, name) for kind, id_, name, _ in _objects(store) if kind != BROKEN)


def remove_locks(store: Store, locks: Iterable[LockInfo]) -> None:
    """Remove the objects of holders, by force."""
    ids = {(lock.kind, lock.id) for lock in locks}
    for kind, id_, name in list(lock_names(store)):
        if (kind, id_) in ids:
            store.delete(name)


def put_small(store: Store, name: str, content: Buffer) -> None:
    """Put an object whose name says what matters; empty where there is no room, since prune is what makes room."""
    try:
        store.put(name, content)
    except StorageError:
        store.put(name, b"")


def store_time(store: Store, codec: Codec) -> float:
    """What time it is by the clock of the store, in seconds."""
    for _ in range(TIME_ATTEMPTS):
        name = f"{CLOCK}/{secrets.token_hex(8)}"
        put_small(store, name, codec.seal(Kind.LOCK, name, b"{}"))
        try:
            info = store.stat(name)
        finally:
            store.delete(name)
        if info is not None:  # else prune took it for a leftover
            return info.modified
    raise NotFoundError(f"{name}, written a moment ago, is not in {store.url}")


def _objects(store: Store) -> Iterator[tuple[str, str, str, float]]:
    for info in store.list(FOLDER):
        kind, id_, *_ = (*info.name.rpartition("/")[2].split("-"), "")
        if kind in (SHARED, EXCLUSIVE, BROKEN):  # else it is no lock of ours
            yield kind, id_, info.name, info.modified


def _read(store: Store, codec: Codec, kind: str, id_: str, name: str, modified: float, now: float) -> LockInfo | None:
    """A holder whose content cannot be read is a holder nevertheless; one that is gone meanwhile is none."""
    try:
        fields = json.loads(codec.unseal(Kind.LOCK, name, store.get(name)))
    except NotFoundError:
        refreshed = any((kind, id_) == other[:2] for other in _objects(store))
        return LockInfo(id_, kind, "?", 0, "?", "?", 0.0, False) if refreshed else None
    except (DamagedError, ValueError, RecursionError):
        fields = {}
    age = max(0.0, now - modified)
    gone = _owner_is_gone(fields)
    return LockInfo(id_, kind, str(fields.get("host", "?")), int(fields.get("pid", 0)), str(fields.get("purpose", "?")),
                    str(fields.get("since", "?")), age, gone or age > STALE_SECONDS, gone)


def _owner_is_gone(fields: dict[str, Any]) -> bool:
    """Known for processes of this boot of this host, in this container, and for no others."""
    mine = owner_fields()
    if any(fields.get(key) != mine[key] for key in ("boot", "namespace")):
        return False
    return process.start_time(int(fields.get("pid", 0))) != fields.get("started")
