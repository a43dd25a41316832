# SPDX-License-Identifier: Apache-2.0
"""Runs of pages with whether they were written, kept small: there may be many of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from stasis.linux.pagemap import Change

__all__ = ["Changes"]


class Changes:
    """Runs of pages in order of address, each with whether it was written. 16 bytes each."""

    def __init__(self, runs: Iterable[Change] = ()) -> None:
        self._values = array("Q")
        for start, length, written in runs:
            self.add(start, length, written=written)

    def add(self, start: int, length: int, *, written: bool) -> None:
        """Append a run."""
        self._values.extend((start, length | written))

    def extend(self, others: Changes) -> None:
        """Append all runs of others, which lie behind."""
        self._values.extend(others._values)

    def __iter__(self) -> Iterator[Change]:
        values = iter(self._values)
        for start, length in zip(values, values, strict=True):
            yield start, length & ~1, bool(length & 1)

    @property
    def written(self) -> int:
        """Bytes in runs that were written."""
        return sum(length for _, length, written in self if written)
