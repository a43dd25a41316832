# SPDX-License-Identifier: Apache-2.0
"""How much memory has been copied, told now and then to whoever shows it.

Memory of a tree is copied by several processes of ours, one after the other or at once. So the count is in memory that
they share from their forks on.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable

__all__ = ["Meter", "Progress"]

Progress = Callable[[int, int], None]
"""Called with bytes that are done, and bytes in all as far as they are known before."""

INTERVAL = 100_000_000
"""Nanoseconds from one call to the next."""


class Meter:
    """Counts for `tell`, in this process and in those that it forks. Without `tell` nothing is counted."""

    def __init__(self, tell: Progress | None = None) -> None:
        self._tell = tell
        if tell is not None:
            self._done, self._total, self._told = range(3)
            self._numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    @property
    def is_read(self) -> bool:
        """Whether anybody wants to know."""
        return self._tell is not None

    def expect(self, total: int) -> None:
        """Begin anew, with about so many bytes before us."""
        if self._tell is not None:
            self._numbers[self._done], self._numbers[self._total] = 0, total
            self._numbers[self._told] = time.monotonic_ns()

    def add(self, amount: int) -> None:
        """So many bytes are done."""
        if self._tell is None:
            return
        self._numbers[self._done] += amount
        now = time.monotonic_ns()
        if now - self._numbers[self._told] >= INTERVAL:
            self._numbers[self._told] = now
            done = self._numbers[self._done]
            self._tell(done, max(done, self._numbers[self._total]))
