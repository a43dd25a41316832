# SPDX-License-Identifier: Apache-2.0
"""Shared memory in chains of dumps: what a set before has of it as it is need not be written again.

Page tables cannot tell what was written to it: each process has its own, one that came and went takes its marks along,
and write(2) to a file in memory passes by all of them. So it is compared with what the set before has, byte by byte:
whoever wrote, and however, what differs is seen. Both are mapped before the tree stands still, and comparing takes a
fraction of the time of writing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, Self

from stasis.linux import procfs
from stasis.linux.mapped import MappedFile, memcmp
from stasis.linux.procfs import Mapping
from stasis.linux.segments import data_segments
from stasis.process.dump.mm import SHARED_IDS, VmaStatus, kind_of
from stasis.process.images.imageset import ImageSet
from stasis.process.images.memory import MemoryReader, PageSource

__all__ = ["Known", "Shared", "shared_memory"]

PAGE = 4096
CHUNK = 256 << 10
"""What is compared by one call, which takes some microseconds."""
FINER = {CHUNK: 32 << 10, 32 << 10: PAGE}


class Shared(NamedTuple):
    """A region: its number in images, and where in /proc it can be opened."""

    number: int
    path: str


def shared_memory(pids: Iterable[int]) -> list[Shared]:
    """What these processes have mapped that is shared and of a size that does not change: anonymous memory, and System
    V segments. A file in memory may become shorter while it is compared."""
    found: dict[int, Shared] = {}
    for pid in pids:
        try:
            layout = procfs.mappings(pid, flags=False)
        except ProcessLookupError:
            continue
        for mapping in layout:
            number = _number(mapping)
            if number and number not in found:
                found[number] = Shared(number, f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
    return [region for region in found.values() if not _is_huge(region.path)]


def _is_huge(path: str) -> bool:
    """Whether it has huge pages, or may have. False where it is gone."""
    try:
        return os.stat(path).st_blksize > PAGE
    except OSError:
        return False


def _number(mapping: Mapping) -> int:
    kind = kind_of(mapping)
    if kind == VmaStatus.ANON_SHARED:
        return mapping.inode + SHARED_IDS
    return mapping.inode if kind == VmaStatus.SYSVIPC else 0


class _Region(NamedTuple):
    identity: tuple[int, int]
    memory: MappedFile
    pieces: list[tuple[int, int, int]]
    """(start, end, address of ours) of what the set before has."""


class Known:
    """What a set and those before it have of the shared memory of processes; a context manager."""

    def __init__(self, path: str | os.PathLike[str], regions: Iterable[Shared]) -> None:
        self._cleanup = ExitStack()
        self._regions: dict[int, _Region] = {}
        self._files: dict[tuple[int, int], MappedFile] = {}
        try:
            chain = self._cleanup.enter_context(ImageSet.open(path)).chain()
            for parent in chain[1:]:
                self._cleanup.callback(parent.close)
            for region in regions:
                self._add(region, chain)
        except BaseException:
            self._cleanup.close()
            raise

    def _add(self, region: Shared, chain: list[ImageSet]) -> None:
        if not chain[0].has("pagemap-shmem", region.number):
            return
        try:
            fd = os.open(region.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # it is gone, or not ours to look at: it is written whole, if at all
        try:
            status = os.fstat(fd)
            if status.st_blksize > PAGE:
                return  # huge pages
            memory = self._cleanup.enter_context(MappedFile(fd, status.st_size))
            for start, end in data_segments(fd):
                memory.prepare(start, min(end, status.st_size) - start)
        finally:
            os.close(fd)
        with MemoryReader(chain, region.number, "pagemap-shmem") as reader:
            pieces = [(source.start, source.end, self._mapped(source)) for source in reader.sources(0, _whole(status))]
        self._regions[region.number] = _Region((status.st_dev, status.st_ino), memory, pieces)

    def _mapped(self, source: PageSource) -> int:
        """Where that is in our memory."""
        status = os.fstat(source.fd)
        key = status.st_dev, status.st_ino
        if key not in self._files:
            self._files[key] = self._cleanup.enter_context(MappedFile(source.fd, status.st_size))
        self._files[key].prepare(source.offset, source.end - source.start)
        return self._files[key].start + source.offset

    def runs(self, number: int, fd: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether the set before has it as it is) of a part of a region, whose descriptor is `fd`."""
        region = self._regions.get(number)
        status = os.fstat(fd)
        if region is None or region.identity != (status.st_dev, status.st_ino):
            yield start, end, False
            return
        yield from _joined(_compared(region, start, end))

    def close(self) -> None:
        """Give everything back."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _whole(status: os.stat_result) -> int:
    """Bytes in whole pages: the rest of the last one is written each time."""
    return status.st_size // PAGE * PAGE


def _compared(region: _Region, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    at = start
    for begin, stop, theirs in region.pieces:
        first, last = max(begin, at), min(stop, end)
        if first >= last:
            continue
        if at < first:
            yield at, first, False
        yield from _compare(region.memory.start + first, theirs + first - begin, first, last - first, CHUNK)
        at = last
    if at < end:
        yield at, end, False


def _compare(ours: int, theirs: int, at: int, length: int, step: int) -> Iterator[tuple[int, int, bool]]:
    """In steps, and where there is a difference in smaller ones, down to a page."""
    differs = memcmp  # a local name: called for each 4 KiB that changed
    for start in range(0, length, step):
        size = min(step, length - start)
        if not differs(ours + start, theirs + start, size):
            yield at + start, at + start + size, True
        elif size <= PAGE:
            yield at + start, at + start + size, False
        else:
            yield from _compare(ours + start, theirs + start, at + start, size, FINER[step])


def _joined(runs: Iterable[tuple[int, int, bool]]) -> Iterator[tuple[int, int, bool]]:
    last: tuple[int, int, bool] | None = None
    for run in runs:
        if last is not None and last[1:] == (run[0], run[2]):
            last = last[0], run[1], run[2]
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
