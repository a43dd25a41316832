# SPDX-License-Identifier: Apache-2.0
"""Guessing which chunks will be read next: those behind a sequential reader.

An export does not see which connection a read comes from, and nbdcopy reads through several at a time; so several
sequential readers are told apart by where they are.
"""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["ReadAhead"]

_STREAMS = 16
"""Sequential readers that are remembered at a time."""


class ReadAhead:
    """`touch(chunk number)` for every chunk that is read, in order; returns which to fetch ahead."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._expected: OrderedDict[int, int] = OrderedDict()
        """Chunk that a reader is expected at next: how many were fetched ahead for it."""

    def touch(self, number: int) -> range:
        """A first read guesses nothing; one at an expected chunk looks one chunk ahead, then two, four and so on."""
        depth = self._expected.pop(number, None)
        if depth is None:
            if number + 1 not in self._expected:  # a reader of small pieces touches its chunk many times
                self._expect(number + 1, 0)
            return range(0)
        depth = min(max(1, 2 * depth), self._maximum)
        self._expect(number + 1, depth)
        return range(number + 1, number + 1 + depth)

    def _expect(self, number: int, depth: int) -> None:
        self._expected[number] = depth
        if len(self._expected) > _STREAMS:
            self._expected.popitem(last=False)
