# SPDX-License-Identifier: Apache-2.0
"""Bitmaps of tracking blocks as byte ranges, and back. Bit n of a bitmap is bit n mod 8 of byte n / 8."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["PIECE", "bits_to_runs", "count", "merge", "to_extents"]

Extent = tuple[int, int]

PIECE = 4096
"""A bitmap is looked at in pieces of so many bytes; what has no bit set costs a comparison."""

EXPANDED = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]


def bits_to_runs(bits: bytes) -> list[tuple[int, int]]:
    """(first block, blocks) of each run of set bits, ascending; neighbouring runs are one."""
    runs: list[tuple[int, int]] = []
    empty = bytes(PIECE)
    for start in range(0, len(bits), PIECE):
        piece = bits[start : start + PIECE]
        if piece != empty[: len(piece)]:
            _runs_of_piece(piece, start * 8, runs)
    return runs


def _runs_of_piece(piece: bytes, base: int, runs: list[tuple[int, int]]) -> None:
    flags = b"".join(map(EXPANDED.__getitem__, piece))
    position = 0
    while (first := flags.find(b"\1", position)) >= 0:
        stop = flags.find(b"\0", first)
        position = len(flags) if stop < 0 else stop
        if runs and sum(runs[-1]) == base + first:
            runs[-1] = (runs[-1][0], base + position - runs[-1][0])
        else:
            runs.append((base + first, position - first))


def to_extents(runs: Iterable[tuple[int, int]], shift: int, size: int) -> list[Extent]:
    """Byte ranges of runs of blocks on a device of `size` bytes."""
    return [(first << shift, min((first + blocks) << shift, size) - (first << shift)) for first, blocks in runs]


def count(bits: bytes) -> int:
    """How many bits are set."""
    return int.from_bytes(bits, "little").bit_count()


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """The union of ranges: ascending, none adjoining another."""
    merged: list[Extent] = []
    for offset, length in sorted(extents):
        if merged and offset <= sum(merged[-1]):
            first = merged[-1][0]
            merged[-1] = (first, max(sum(merged[-1]), offset + length) - first)
        elif length:
            merged.append((offset, length))
    return merged
