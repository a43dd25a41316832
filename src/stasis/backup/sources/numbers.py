# SPDX-License-Identifier: Apache-2.0
"""Extents from the bytes of a change map, few enough to be handled."""

from __future__ import annotations

from collections.abc import Iterator

from stasis.backup.source import Extent

__all__ = ["bounded_extents"]

# More extents than this are joined over ever longer gaps: tracking may call too much changed, never too little.
MOST_EXTENTS = 1 << 16


def bounded_extents(changes: bytes, since: int, block_size: int, size: int) -> list[Extent]:
    """Byte ranges of the blocks whose number is above `since`, ascending; at most MOST_EXTENTS, or what one map joins
    to over gaps that double until it fits."""
    flags = changes.translate(bytes(value > since for value in range(256)))
    unit = block_size
    while flags.count(b"\0\1") >= MOST_EXTENTS:
        flags = bytes(map(max, flags[::2], flags[1::2] + b"\0"))
        unit *= 2
    return [(first * unit, min(end * unit, size) - first * unit) for first, end in _runs(flags)]


def _runs(flags: bytes) -> Iterator[tuple[int, int]]:
    """(first, end) of the runs of ones."""
    position = 0
    while (first := flags.find(1, position)) >= 0:
        stop = flags.find(0, first)
        position = len(flags) if stop < 0 else stop
        yield first, position
