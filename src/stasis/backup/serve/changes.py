# SPDX-License-Identifier: Apache-2.0
"""Which chunks of a backup differ from those of another, told by their indexes alone.

An index is a list of segments, and segments are known by their contents like chunks: where two indexes name the same
segment, thousands of chunks are equal without a look at any of them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Protocol

from stasis.backup.repo.index import NAMES_PER_SEGMENT, ZERO

__all__ = ["Change", "Index", "Run", "differences"]



class Index(Protocol):
    """What is asked of an index here; the repository's has more."""

    @property
    def size(self) -> int: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def count(self) -> int: ...
    def name(self, number: int) -> bytes: ...
    def names(self, first: int, count: int) -> Iterator[bytes]: ...
    def segment_names(self) -> Sequence[bytes]: ...


class Change(enum.IntEnum):
    """What became of a chunk."""

    NONE = 0
    DATA = 1
    ZERO = 2
    """It differs, and is all zeroes now."""


Run = tuple[int, int, Change]
"""(first chunk, number of chunks, what became of them)."""


def differences(base: Index, target: Index, first: int, stop: int) -> Iterator[Run]:
    """What became of the chunks `first` to `stop` of the target, seen from the base: runs that ascend without gaps.

    Neighbours may be of one kind. All that lies behind the end of the base is a change; so is the chunk in which it
    ends, if the target is longer: a chunk of zeroes is called the same whatever its length.
    """
    common = target.count if base.size >= target.size else base.size // base.chunk_size
    yield from _compared(base, target, first, min(stop, common))
    yield from _added(target, max(first, common), stop)


def _compared(base: Index, target: Index, first: int, stop: int) -> Iterator[Run]:
    ours, theirs = target.segment_names(), base.segment_names()
    while first < stop:
        segment = first // NAMES_PER_SEGMENT
        count = min(stop, (segment + 1) * NAMES_PER_SEGMENT) - first
        if ours[segment] == theirs[segment]:
            yield first, count, Change.NONE
        else:
            yield from _runs(first, map(_compare, base.names(first, count), target.names(first, count)))
        first += count


def _compare(before: bytes, now: bytes) -> Change:
    if before == now:
        return Change.NONE
    return Change.ZERO if now == ZERO else Change.DATA


def _added(target: Index, first: int, stop: int) -> Iterator[Run]:
    if first < stop:
        names = target.names(first, stop - first)
        yield from _runs(first, (Change.ZERO if name == ZERO else Change.DATA for name in names))


def _runs(first: int, changes: Iterator[Change]) -> Iterator[Run]:
    """Pack changes of consecutive chunks into runs."""
    start, last = first, None
    for number, change in enumerate(changes, first):
        if change is not last:
            if last is not None:
                yield start, number - start, last
            start, last = number, change
    if last is not None:
        yield start, number + 1 - start, last
