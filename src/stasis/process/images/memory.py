# SPDX-License-Identifier: Apache-2.0
"""Where each page of a dumped address space lies, through a chain of incremental image sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from stasis.errors import UnsupportedError
from stasis.process.images.damage import damaged
from stasis.process.images.pagemap import PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT, Pagemap

if TYPE_CHECKING:
    from stasis.process.images.imageset import ImageSet

__all__ = ["MemoryReader", "PageSource"]

_ALL: Final = 1 << 64
PORTION: Final = 64 << 20
"""What is read at once at most; progress is told between two."""


class PageSource(NamedTuple):
    """Neighbouring pages and where their bytes are: from `offset` on in the file behind `fd`."""

    start: int
    end: int
    fd: int
    offset: int


class MemoryReader:
    """The memory of one task or shared region. `chain` is ImageSet.chain(): the newest set first.

    Only sets that are needed are looked into. A context manager: it closes the pages files, not the sets.
    """

    def __init__(self, chain: list[ImageSet], number: int, kind: str = "pagemap") -> None:
        self._chain = chain
        self._number = number
        self._kind = kind
        self._maps: dict[int, Pagemap | None] = {}
        self._files: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def sources(self, start: int = 0, end: int = _ALL) -> Iterator[PageSource]:
        """What is kept of the addresses from `start` to `end`, ascending. What lies between reads as zeroes.

        DamagedError where a parent lacks pages that are said to be there.
        """
        todo = [(0, start, end)]
        while todo:
            level, start, end = todo.pop()
            pagemap = self._map(level)
            run = None if pagemap is None else pagemap.find(start)
            if run is None or run.start >= end:
                self._allow_hole(level, start)
                continue
            if run.start > start:
                self._allow_hole(level, start)
                start = run.start
            stop = min(run.end, end)
            if stop < end:
                todo.append((level, stop, end))
            if run.flags & PE_PRESENT:
                for at in range(start, stop, PORTION):
                    source = PageSource(at, min(at + PORTION, stop), self._file(level), run.offset + at - run.start)
                    yield source
                    self._chain[0].meter.add(source.end - at)
            elif run.flags & PE_PARENT:
                todo.append((level + 1, start, stop))
            elif run.flags & PE_LAZY:
                raise UnsupportedError(f"{self._path(level)} leaves the pages at {start:#x} to a page server",
                                       hint="dump without lazy pages")

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes of the memory, zeroes where nothing is kept. For looking at a few bytes."""
        found = bytearray(size)
        begin = address - address % PAGE_SIZE
        for source in self.sources(begin, -(-(address + size) // PAGE_SIZE) * PAGE_SIZE):
            first, last = max(source.start, address), min(source.end, address + size)
            found[first - address : last - address] = os.pread(source.fd, last - first,
                                                               source.offset + first - source.start)
        return bytes(found)

    def _map(self, level: int) -> Pagemap | None:
        if level == len(self._chain):
            raise damaged(self._path(level - 1), 0, "it leaves pages to a parent, and the set has none")
        if level not in self._maps:
            self._maps[level] = Pagemap.read(self._chain[level], self._number, self._kind)
        return self._maps[level]

    def _allow_hole(self, level: int, address: int) -> None:
        if level:
            raise damaged(self._path(level), 0, f"the page at {address:#x}, left to it by a later dump, is not in it")

    def _path(self, level: int) -> str:
        return self._chain[level].file_path(self._kind, self._number)

    def _file(self, level: int) -> int:
        """The pages file of a set, opened once and found to be as large as its pagemap says."""
        if level not in self._files:
            pagemap = self._map(level)
            assert pagemap is not None  # a run was found in it
            self._files[level] = fd = self._chain[level].open_pages(pagemap.pages_id)
            size = os.fstat(fd).st_size
            if size < pagemap.present_pages * PAGE_SIZE:
                path = self._chain[level].file_path("pages", pagemap.pages_id)
                raise damaged(path, size, f"it ends early: {pagemap.path} needs {pagemap.present_pages} pages")
        return self._files[level]
