# SPDX-License-Identifier: Apache-2.0
"""Where the preserved contents of a device lie: the chunk table of one device in one snapshot.

A shared mapping with one writer (the device's worker) and any number of readers that take no lock. Every
entry is one aligned 32-bit store, made after what it points to is in place, and only ever goes from
"not stored" to "stored". Copies are made in parts of 4 KiB, so a small write copies 4 KiB and not a chunk:

* a chunk entry is 0 (nothing stored), ZERO (all zeros), DIRECT | block (stored in one piece), or the
  number of a leaf;
* a leaf has one entry per part: 0 (not stored), ZERO, or the storage block.

A storage block is 4 KiB at `block * 4096` of the difference storage. Memory is 4 bytes per chunk and 4 per
part of chunks that are stored piecewise; when leaves have used up 12 bytes per chunk and 32 MiB, further
chunks are copied whole. Layout: docs/formats/chunk-table.md, proof: docs/design/copy-on-write.md.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from errno import ENOMEM
from pathlib import Path

from stasis.block.settings import PART_SHIFT, PART_SIZE
from stasis.errors import StateError
from stasis.linux import files

MAGIC = b"STASISCT"
VERSION = 1
HEADER = struct.Struct("<8sIIQQII")
HEADER_SIZE = 4096
ERROR_INDEX = 256 // 4
LEAVES_INDEX = 260 // 4

ZERO = 0xFFFFFFFF
DIRECT = 0x80000000
HIGHEST_BLOCK = DIRECT - 2
LEAF_RESERVE = 32 << 20
LEAF_STRETCH = 1 << 20
LARGEST_WHOLE_SHIFT = 18
"""Larger chunks do not fit the window that is copied at a time, so they always need a leaf: they have one each, a
thousandth of what they describe."""

Run = tuple[int, int]
"""Parts [first, end)."""
Piece = tuple[int, int, int]
"""(first part, number of parts, storage block or ZERO or 0)."""


class ChunkTable:
    """The table, opened for its worker or read-only for an image server."""

    def __init__(self, path: Path, fd: int, writable: bool) -> None:
        self.path, self._fd = path, fd
        self._mmap = mmap.mmap(fd, 0, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        magic, version, self.chunk_shift, self.size, self.chunk_count, self.leaf_limit, _ = HEADER.unpack_from(
            self._mmap
        )
        if magic != MAGIC or version != VERSION:
            raise StateError(f"{path} is no chunk table", hint="destroy the snapshot")
        words = memoryview(self._mmap).cast("I")
        self.parts_shift = self.chunk_shift - PART_SHIFT
        self.parts_per_chunk = 1 << self.parts_shift
        self.part_count = -(-self.size >> PART_SHIFT)
        # A chunk that is copied whole may still be torn where a lease of storage ends: a quarter of the leaves
        # is for those.
        whole = self.leaf_limit > self.chunk_count
        self._leaf_threshold = self.leaf_limit + 1 if whole else self.leaf_limit * 3 // 4
        start = HEADER_SIZE // 4
        self._allocated_leaves = 0
        self._header = words[:start]
        self.chunks = words[start : start + self.chunk_count]
        self.leaves = words[start + _padded(self.chunk_count) :]

    @classmethod
    def create(cls, path: Path, size: int, chunk_shift: int) -> ChunkTable:
        """A table with nothing stored. The file is sparse; OSError if it cannot be made."""
        chunks = max(1, -(-size >> chunk_shift))
        leaf_bytes = 4 << (chunk_shift - PART_SHIFT)
        leaves = 1 + chunks
        if chunk_shift <= LARGEST_WHOLE_SHIFT:
            leaves = min(leaves, (LEAF_RESERVE + 12 * chunks) // leaf_bytes)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.truncate(fd, HEADER_SIZE + 4 * _padded(chunks) + leaves * leaf_bytes)
        # Allocated before it is touched: a store into a hole of a mapping on a full disk would be a SIGBUS.
        files.allocate(fd, 0, HEADER_SIZE + 4 * _padded(chunks))
        os.pwrite(fd, HEADER.pack(MAGIC, VERSION, chunk_shift, size, chunks, leaves, 0), 0)
        table = cls(path, fd, writable=True)
        table._header[LEAVES_INDEX] = 1
        return table

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> ChunkTable:
        """Open an existing table: `writable` for its worker only."""
        return cls(path, os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC), writable)

    def close(self) -> None:
        """Unmap."""
        for view in (self._header, self.chunks, self.leaves):
            view.release()
        self._mmap.close()
        os.close(self._fd)

    # -- failure ----------------------------------------------------------------------------------

    @property
    def error(self) -> int:
        """0, or the errno that corrupted this device's snapshot. Sticky."""
        return self._header[ERROR_INDEX]

    def set_error(self, errno: int) -> None:
        """Mark the snapshot of this device as corrupted; the first error stays."""
        if not self._header[ERROR_INDEX]:
            self._header[ERROR_INDEX] = errno

    # -- figures ----------------------------------------------------------------------------------

    @property
    def leaf_count(self) -> int:
        """Leaves in use."""
        return self._header[LEAVES_INDEX] - 1

    @property
    def leaves_full(self) -> bool:
        """Whether chunks must now be copied whole."""
        return bool(self._header[LEAVES_INDEX] >= self._leaf_threshold)

    # -- lookup -----------------------------------------------------------------------------------

    def untouched(self, offset: int, length: int) -> bool:
        """Whether nothing is stored of the chunks that a range of bytes touches: most of an image, most of the time."""
        first, last = offset >> self.chunk_shift, (offset + length - 1) >> self.chunk_shift
        return not self.chunks[first] if first == last else not any(self.chunks[first : last + 1])

    def is_stored(self, part: int) -> bool:
        """Whether one part is stored."""
        entry = self.chunks[part >> self.parts_shift]
        if entry >= DIRECT or not entry:
            return bool(entry)
        return bool(self.leaves[(entry << self.parts_shift) + (part & self.parts_per_chunk - 1)])

    def missing(self, first: int, end: int) -> list[Run]:
        """Runs of parts of [first, end) that are not stored, ascending. Whole chunks once leaves are used up."""
        runs: list[Run] = []
        shift = self.parts_shift
        part = first
        while part < end:
            chunk = part >> shift
            stop = min(end, (chunk + 1) << shift)
            entry = self.chunks[chunk]
            if not entry:
                if self.leaves_full:
                    part, stop = chunk << shift, min((chunk + 1) << shift, self.part_count)
                _append(runs, part, stop)
            elif entry < DIRECT:
                base = (entry << shift) - (chunk << shift)
                for index in range(part, stop):
                    if not self.leaves[base + index]:
                        _append(runs, index, index + 1)
            part = stop
        return runs

    def pieces(self, first: int, end: int) -> list[Piece]:
        """Where the parts [first, end) are: merged pieces, ascending, with block 0 for what is not stored."""
        pieces: list[Piece] = []
        shift, per = self.parts_shift, self.parts_per_chunk
        part = first
        while part < end:
            chunk = part >> shift
            stop = min(end, (chunk + 1) << shift)
            entry = self.chunks[chunk]
            if entry == ZERO or not entry:
                _extend(pieces, part, stop - part, entry)
            elif entry & DIRECT:
                _extend(pieces, part, stop - part, (entry ^ DIRECT) + (part & per - 1))
            else:
                base = (entry << shift) - (chunk << shift)
                for index in range(part, stop):
                    _extend(pieces, index, 1, self.leaves[base + index])
            part = stop
        return pieces

    # -- publishing (worker only) -----------------------------------------------------------------

    def publish(self, first: int, count: int, block: int) -> None:
        """Enter `count` parts from `first` as stored from storage block `block` on, or as ZERO.

        Their contents must be in place. Entering parts of a chunk that is stored in one piece is an error,
        except over ZERO, where the other parts stay zero.
        """
        shift, per = self.parts_shift, self.parts_per_chunk
        end = first + count
        while first < end:
            chunk = first >> shift
            start = chunk << shift
            stop = min(end, start + per)
            entry = self.chunks[chunk]
            if first == start and stop == min(start + per, self.part_count) and entry in (0, ZERO):
                self.chunks[chunk] = ZERO if block == ZERO else DIRECT | block
            else:
                self._publish_parts(chunk, entry, first - start, stop - first, block)
            block = ZERO if block == ZERO else block + stop - first
            first = stop

    def _publish_parts(self, chunk: int, entry: int, index: int, count: int, block: int) -> None:
        fresh = entry in (0, ZERO)
        if not fresh and entry & DIRECT:
            raise ValueError(f"chunk {chunk} is stored in one piece already")
        leaf = self._new_leaf(entry) if fresh else entry
        at = (leaf << self.parts_shift) + index
        for step in range(count):
            self.leaves[at + step] = ZERO if block == ZERO else block + step
        if fresh:
            self.chunks[chunk] = leaf

    def _new_leaf(self, fill: int) -> int:
        leaf = self._header[LEAVES_INDEX]
        if leaf >= self.leaf_limit:
            raise OSError(ENOMEM, "the chunk table has no leaf left")
        if leaf >= self._allocated_leaves:
            self._allocate_leaves(leaf)
        self._header[LEAVES_INDEX] = leaf + 1
        start = leaf << self.parts_shift
        # A worker that died here may have written into this leaf before it was counted: start it afresh.
        for index in range(start, start + self.parts_per_chunk):
            self.leaves[index] = fill
        return leaf

    def _allocate_leaves(self, leaf: int) -> None:
        """Take room for more leaves, a stretch at a time. OSError ENOSPC where there is none."""
        size = 4 << self.parts_shift
        count = min(max(1, LEAF_STRETCH // size), self.leaf_limit - leaf)
        start = HEADER_SIZE + 4 * _padded(self.chunk_count)
        files.allocate(self._fd, start + leaf * size, count * size)
        self._allocated_leaves = leaf + count

    def can_split(self, chunk: int) -> bool:
        """Whether parts of this chunk can be entered one by one."""
        entry = self.chunks[chunk]
        return not self.leaves_full or (0 < entry < DIRECT)


def merge_runs(runs: Iterable[Run]) -> list[Run]:
    """Sort runs and merge those that touch or overlap."""
    merged: list[Run] = []
    for first, end in sorted(runs):
        if merged and first <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((first, end))
    return merged


def part_range(offset: int, length: int) -> Run:
    """Parts that a range of bytes touches."""
    return offset >> PART_SHIFT, -(-(offset + length) >> PART_SHIFT)


def _append(runs: list[Run], first: int, end: int) -> None:
    if runs and runs[-1][1] >= first:
        runs[-1] = (runs[-1][0], end)
    else:
        runs.append((first, end))


def _extend(pieces: list[Piece], first: int, count: int, block: int) -> None:
    if pieces:
        start, before, at = pieces[-1]
        if (block == at == 0) or (block == at == ZERO) or (0 < at < DIRECT and block == at + before):
            pieces[-1] = (start, before + count, at)
            return
    pieces.append((first, count, block))


def _padded(words: int) -> int:
    return -(-words // 1024) * 1024


__all__ = ["DIRECT", "PART_SIZE", "ZERO", "ChunkTable", "Piece", "Run", "merge_runs", "part_range"]
