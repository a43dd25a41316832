# SPDX-License-Identifier: Apache-2.0
"""What differs between two backups, as extents that ascend and can be asked for from any offset on.

The rules are those of Kubernetes' changed block tracking (KEP-3314, GetMetadataDelta): extents ascend, do not overlap,
lie within the size of the target, and a caller who was interrupted starts again at the end of the last one it has.
Nothing is kept but the extent at hand: memory does not grow with the devices or with what differs.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from stasis.backup.repo.index import ZERO
from stasis.backup.serve.cache import ChunkCache, Key
from stasis.backup.serve.changes import Change, Index, differences
from stasis.errors import UsageError

__all__ = ["EXACT_BLOCK", "Difference", "diff"]

EXACT_BLOCK = 4096
"""Unit in bytes in which contents are compared."""
_AHEAD = 4
"""Chunks that are fetched before they are compared, from either backup."""


class Difference(NamedTuple):
    """`length` bytes at `offset` of the target; `zero` if they are all zeroes there."""

    offset: int
    length: int
    zero: bool


def diff(
    base: Index, target: Index, *, offset: int = 0, limit: int | None = None, contents: ChunkCache | None = None
) -> Iterator[Difference]:
    """What differs in the target at `offset` and behind, in at most `limit` extents; neighbours differ in `zero`.

    What lies behind the end of the base is a difference, the part that the target lacks is not. Whole chunks are
    told; with `contents` the chunks that differ are read through it and compared block by block. Raises UsageError
    for an offset behind the end of the target, or a negative limit.
    """
    if not 0 <= offset <= target.size:
        raise UsageError(f"offset {offset} is not within the backup of {target.size} bytes")
    if limit is not None and limit < 0:
        raise UsageError(f"{limit} is no number of extents")
    found = _changed(base, target, offset // target.chunk_size)
    if contents is not None:
        found = _Comparison(base, target, contents).refine(found)
    return itertools.islice(_merged(_clipped(found, offset, target.size)), limit)


def _changed(base: Index, target: Index, first: int) -> Iterator[Difference]:
    size = target.chunk_size
    for start, count, change in differences(base, target, first, target.count):
        if change is not Change.NONE:
            yield Difference(start * size, count * size, change is Change.ZERO)


def _clipped(found: Iterable[Difference], start: int, end: int) -> Iterator[Difference]:
    for offset, length, zero in found:
        low, high = max(offset, start), min(offset + length, end)
        if low < high:
            yield Difference(low, high - low, zero)


def _merged(found: Iterable[Difference]) -> Iterator[Difference]:
    held: Difference | None = None
    for extent in found:
        if held and held.offset + held.length == extent.offset and held.zero == extent.zero:
            held = Difference(held.offset, held.length + extent.length, held.zero)
            continue
        if held:
            yield held
        held = extent
    if held:
        yield held


@dataclass(frozen=True)
class _Comparison:
    """Compares the contents of chunks that differ."""

    base: Index
    target: Index
    contents: ChunkCache

    def refine(self, found: Iterable[Difference]) -> Iterator[Difference]:
        waiting: deque[int] = deque()
        for number in self._numbers(found):
            waiting.append(number)
            for index in (self.base, self.target):
                key = _key(index, number)
                if key is not None:
                    self.contents.prefetch(key)
            if len(waiting) > min(_AHEAD, self.contents.window // 4):
                yield from self._compare(waiting.popleft())
        for number in waiting:
            yield from self._compare(number)

    def _numbers(self, found: Iterable[Difference]) -> Iterator[int]:
        size = self.target.chunk_size
        for offset, length, _ in found:
            yield from range(offset // size, (offset + length) // size)

    def _compare(self, number: int) -> Iterator[Difference]:
        before, now = self._load(self.base, number), self._load(self.target, number)
        start = number * self.target.chunk_size
        for position in range(0, len(now), EXACT_BLOCK):
            block = now[position : position + EXACT_BLOCK]
            if block != before[position : position + len(block)]:
                yield Difference(start + position, len(block), not block.strip(b"\0"))

    def _load(self, index: Index, number: int) -> bytes:
        """The chunk as far as the device has it."""
        length = max(0, min(index.chunk_size, index.size - number * index.chunk_size))
        data = bytearray(length)
        key = _key(index, number)
        if key is not None:
            self.contents.copy([(key, 0, length, 0)], memoryview(data))
        return bytes(data)


def _key(index: Index, number: int) -> Key | None:
    """What to fetch for a chunk; None for zeroes and behind the end."""
    if number >= index.count or (name := index.name(number)) == ZERO:
        return None
    return name, min(index.chunk_size, index.size - number * index.chunk_size)
