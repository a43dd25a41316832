# SPDX-License-Identifier: Apache-2.0
"""Which chunks are there already. In a folder a `stat` tells; in an object store every question costs a round trip.

There the names of a 256th of the chunks come with one listing per thousand of them. A chunk that is not listed is
simply put: one that came in between is refused by the store, and nothing is lost. A chunk that is listed is asked for
before anything relies on it. So new chunks, of which a first backup has many, cost one request each, and not two.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field

from stasis.backup.repo.objects import Kind, object_name
from stasis.backup.repo.store import Store, is_hexadecimal

__all__ = ["Presence"]

NAMES_PER_PAGE = 1000
MOST_LISTED = 4 << 20  # 8 bytes each
MOST_MINE = 128 << 10  # about 110 bytes each


@dataclass
class _Shard:
    """The chunks whose names begin with the same byte. listed: the first 8 bytes of their names, ascending."""

    lookups: int = 0
    listed: array[int] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Presence:
    """Answers for the chunks of a repository, while a lock keeps prune away. May be used from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._shards = [_Shard() for _ in range(256)]
        self._few = 1
        self._listed = 0
        self._mine: set[bytes] = set()  # stored by this process

    def has(self, name: bytes) -> bool:
        """Whether a chunk is in the store for certain. A chunk that somebody stores at this moment may be missed."""
        if self._store.cheap_lookup:
            return self._exists(name)
        if name in self._mine:
            return True
        shard = self._shards[name[0]]
        if self._listing_pays(shard):
            self._list(shard, name[0])
        if shard.listed is not None and not _in(shard.listed, _short(name)):
            return False
        return self._exists(name)

    def stored(self, name: bytes) -> None:
        """This process has stored a chunk."""
        if self._store.cheap_lookup:
            return
        if len(self._mine) >= MOST_MINE:
            self._mine = set()
        self._mine.add(name)

    def forget(self) -> None:
        """A lock was taken: what was there before it may have been pruned. What was not there is asked for anyway."""
        self._mine = set()

    def _exists(self, name: bytes) -> bool:
        return self._store.exists(object_name(Kind.CHUNK, name))

    def _listing_pays(self, shard: _Shard) -> bool:
        shard.lookups += 1
        return shard.listed is None and shard.lookups > self._few and self._listed < MOST_LISTED

    def _list(self, shard: _Shard, first_byte: int) -> None:
        with shard.lock:
            if shard.listed is not None:
                return
            found = (info.name.rpartition("/")[2] for info in self._store.list(f"chunks/{first_byte:02x}"))
            listed = array("Q", sorted(int(name[:16], 16) for name in found if is_hexadecimal(name, 64)))
            # As many single questions as a listing has pages, then the listing: at most twice the least possible.
            self._few = max(1, len(listed) // NAMES_PER_PAGE)
            self._listed += len(listed)
            shard.listed = listed


def _short(name: bytes) -> int:
    return int.from_bytes(name[:8], "big")


def _in(ascending: array[int], value: int) -> bool:
    place = bisect_left(ascending, value)
    return place < len(ascending) and ascending[place] == value
