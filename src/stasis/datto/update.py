# SPDX-License-Identifier: Apache-2.0
"""Bringing an image of snapshot n up to snapshot n+1: the blocks that the finished COW file lists are copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from errno import EINVAL
from typing import Protocol

from stasis.datto.cowreader import CowReader
from stasis.datto.index import Run
from stasis.datto.layout import BLOCK_SHIFT
from stasis.errors import StateError
from stasis.linux import files

__all__ = ["Result", "Source", "check_follows", "update"]

WINDOW_BLOCKS = 2048
"""Blocks read and written at a time: enough requests in flight to keep a disk busy, and 8 MiB of memory."""


class Source(Protocol):
    """Where the snapshot is read: an NBD client."""

    def read_many(self, requests: Sequence[tuple[int, memoryview]]) -> None: ...


@dataclass(frozen=True, slots=True)
class Result:
    """Blocks of 4 KiB that changed, and how many of them could not be copied."""

    changed: int
    errors: int


def check_follows(reader: CowReader, uuid: str, seqid: int) -> None:
    """Whether the snapshot (uuid, seqid) is the one after that of the COW file. StateError (EINVAL)."""
    header = reader.header
    if header.uuid.hex() != uuid:
        raise StateError("cow file uuid does not match snapshot", errno=EINVAL, hint="it is of another series")
    if header.seqid + 1 != seqid:
        raise StateError("snapshot provided does not immediately follow the snapshot that created the cow file",
                         errno=EINVAL, hint=f"the file is of snapshot {header.seqid}, the snapshot is number {seqid}")
    if not (header.is_clean and header.is_index_only):
        raise StateError(f"{reader.path} is not finished", errno=EINVAL, hint="transition-to-snapshot finishes it")


def update(source: Source, reader: CowReader, target: int,
           progress: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """Copy what changed from `source` to the descriptor `target`, and make it durable.

    `progress` is called with blocks done and blocks in all. A block that cannot be copied is counted and the rest is
    copied; OSError if the image cannot be made durable.
    """
    total = sum(end - first for first, end in reader.changed())
    done = errors = 0
    buffer = memoryview(bytearray(WINDOW_BLOCKS << BLOCK_SHIFT))
    for window in _windows(reader.changed()):
        errors += _copy(source, target, window, buffer, reader.geometry.size)
        done += sum(end - first for first, end in window)
        progress(done, total)
    os.fsync(target)
    return Result(total, errors)


def _windows(runs: Iterator[Run]) -> Iterator[list[Run]]:
    window: list[Run] = []
    room = WINDOW_BLOCKS
    for first, end in runs:
        while first < end:
            stop = min(end, first + room)
            window.append((first, stop))
            first, room = stop, room - (stop - first)
            if not room:
                yield window
                window, room = [], WINDOW_BLOCKS
    if window:
        yield window


def _copy(source: Source, target: int, runs: Sequence[Run], buffer: memoryview, size: int) -> int:
    """Copy runs of blocks; blocks that cannot be are counted."""
    try:
        _copy_at_once(source, target, runs, buffer, size)
        return 0
    except OSError:
        return sum(_copy_one(source, target, block, buffer, size) for first, end in runs for block in range(first, end))


def _copy_at_once(source: Source, target: int, runs: Sequence[Run], buffer: memoryview, size: int) -> None:
    places: list[tuple[int, memoryview]] = []
    position = 0
    for first, end in runs:
        offset = first << BLOCK_SHIFT
        length = min(end << BLOCK_SHIFT, size) - offset
        places.append((offset, buffer[position : position + length]))
        position += length
    source.read_many(places)
    for offset, place in places:
        written = os.pwritev(target, [place], offset)
        if written < len(place):
            files.transfer_rest(os.pwritev, target, [place], offset, written)


def _copy_one(source: Source, target: int, block: int, buffer: memoryview, size: int) -> int:
    try:
        _copy_at_once(source, target, [(block, block + 1)], buffer, size)
        return 0
    except OSError:
        return 1
