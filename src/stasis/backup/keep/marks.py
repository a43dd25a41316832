# SPDX-License-Identifier: Apache-2.0
"""Which names are in use, for repositories of any size in a fixed amount of memory.

Of each name only a hash of 64 bits is kept, in arrays by the first byte of the name. When the memory is used up, the
upper part of the first bytes is dropped, and left to another pass. Two names with one hash are taken for one: prune
then keeps one object too many, and never one too few.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

from stasis.backup.repo.index import NAME_BYTES, ZERO

__all__ = ["FIRST_BYTES", "MARKS_IN_MEMORY", "Marks", "Passes"]

FIRST_BYTES = 256
MARKS_IN_MEMORY = 8 << 20
"""64 MiB of hashes: one pass for 8 TiB of distinct chunks of 1 MiB."""


class Marks:
    """The names whose first byte lies in `low` to `high` - 1; adding may lower `high`.

    First all names are added, then `settle` is called, then names are looked up. The hash is Python's own, keyed by a
    number that is drawn when the process starts, so that nobody can make a name that has the hash of another.
    """

    def __init__(self, low: int = 0, limit: int = MARKS_IN_MEMORY) -> None:
        self.low = low
        self.high = FIRST_BYTES
        self._limit = limit
        self._count = 0
        self._hashes = [array("q") for _ in range(FIRST_BYTES)]
        self._seen: list[bytearray] = []

    def add(self, names: bytes) -> None:
        """Mark names that lie one behind the other; ZERO stands for no object and is left out."""
        low, high, hashes = self.low, self.high, self._hashes
        for start in range(0, len(names), NAME_BYTES):
            first, name = names[start], names[start : start + NAME_BYTES]
            if low <= first < high and name != ZERO:
                hashes[first].append(hash(name))
                self._count += 1
        if self._count > self._limit:
            self._make_room()

    def settle(self) -> None:
        """No more names come."""
        self._sort()
        self._seen = [bytearray(len(hashes)) for hashes in self._hashes]

    def covers(self, name: bytes) -> bool:
        """Whether names that begin as this one belong to this pass."""
        return self.low <= name[0] < self.high

    def __contains__(self, name: bytes) -> bool:
        return self._place(name) is not None

    def __len__(self) -> int:
        return self._count

    def see(self, name: bytes) -> bool:
        """Look a name up and remember that it was looked up; False when it is not marked."""
        place = self._place(name)
        if place is None:
            return False
        self._seen[name[0]][place] = 1
        return True

    def unseen(self) -> int:
        """How many marked names were never seen."""
        return sum(seen.count(0) for seen in self._seen)

    def was_seen(self, name: bytes) -> bool:
        """Whether `see` was called for a name."""
        place = self._place(name)
        return place is not None and self._seen[name[0]][place] == 1

    def _place(self, name: bytes) -> int | None:
        hashes, wanted = self._hashes[name[0]], hash(name)
        place = bisect_left(hashes, wanted)
        return place if place < len(hashes) and hashes[place] == wanted else None

    def _sort(self) -> None:
        """Put each array in order, each hash once."""
        for first, hashes in enumerate(self._hashes):
            self._hashes[first] = array("q", sorted(set(hashes)))
        self._count = sum(map(len, self._hashes))

    def _make_room(self) -> None:
        """First throw out what is there twice; then leave the upper half of the names to a later pass."""
        self._sort()
        while self._count > self._limit * 3 // 4 and self.high - self.low > 1:
            middle = (self.low + self.high) // 2
            for first in range(middle, self.high):
                self._count -= len(self._hashes[first])
                self._hashes[first] = array("q")
            self.high = middle


class Passes:
    """Goes over all first bytes in as many passes as the memory asks for:

        for marks in Passes():
            marks.add(...) for every name; marks.settle(); ...
    """

    def __init__(self, limit: int = MARKS_IN_MEMORY) -> None:
        self._limit = limit
        self._marks: Marks | None = None

    def __iter__(self) -> Passes:
        return self

    def __next__(self) -> Marks:
        low = 0 if self._marks is None else self._marks.high
        if low >= FIRST_BYTES:
            raise StopIteration
        self._marks = Marks(low, self._limit)
        return self._marks
