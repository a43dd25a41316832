# SPDX-License-Identifier: Apache-2.0
"""Which pages of an address space an image set holds, and where: `pagemap-*.img` beside `pages-N.img`.

pages-N.img is page after page, in the order of the pagemap's entries that are PRESENT, and of those only.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from stasis.errors import UnsupportedError
from stasis.process.images.damage import damaged
from stasis.process.images.message import UNKNOWN
from stasis.process.images.schema.memory import PagemapEntry, PagemapHead
from stasis.process.images.wire import varint

if TYPE_CHECKING:
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["PAGE_SIZE", "PE_LAZY", "PE_PARENT", "PE_PRESENT", "Pagemap", "PagemapWriter", "Run", "entry_flags",
           "entry_pages"]

PAGE_SIZE: Final = 4096

PE_PARENT: Final = 1
"""The pages are those of the parent image; no bytes here."""
PE_LAZY: Final = 2
"""The pages may be brought in later, when they are touched."""
PE_PRESENT: Final = 4
"""The pages are in this set's pages file."""

_ADDRESS_END: Final = 1 << 64


class Run(NamedTuple):
    """Neighbouring pages with one fate: addresses `start` to `end`, and `offset` into the pages file if PRESENT."""

    start: int
    end: int
    flags: int
    offset: int


def entry_pages(entry: PagemapEntry) -> int:
    """How many pages an entry has. CRIU 4.2 writes field 5 and 0 into field 2, earlier versions field 2 alone."""
    return entry.compat_nr_pages if entry.nr_pages is None else entry.nr_pages


def entry_flags(entry: PagemapEntry) -> int:
    """PE_ flags of an entry. Old images have no flags: their pages are present unless they are in the parent."""
    if entry.flags is not None:
        return entry.flags
    return PE_PARENT if entry.in_parent else PE_PRESENT


class PagemapWriter:
    """Writes a pagemap and owns its pages file; a context manager.

    The caller writes the bytes of PRESENT pages to `fd` itself, in the order of its `add` calls: before or after
    them, and perhaps from within the dumped task. `close` (or leaving the block without an error) checks that the
    sizes agree; ValueError where they do not, or where addresses do not ascend.
    """

    def __init__(self, images: ImageSetWriter, number: int, kind: str = "pagemap") -> None:
        self.pages_id = images.new_pages_id()
        self._image = images.image(kind, number)
        self._image.append(PagemapHead(pages_id=self.pages_id))
        self._file = images.create(f"pages-{self.pages_id}.img")
        self.fd = self._file.fileno()
        self.present_pages = 0
        self._start = self._end = 0
        self._flags = -1

    def add(self, start: int, pages: int, flags: int = PE_PRESENT) -> None:
        """`pages` pages from address `start` on; joined with the run before where they continue it."""
        if start < self._end or start % PAGE_SIZE or pages <= 0:
            raise ValueError(f"{pages} pages at {start:#x} cannot follow what ends at {self._end:#x}")
        if not 0 <= flags <= PE_PARENT | PE_LAZY | PE_PRESENT or start + pages * PAGE_SIZE > _ADDRESS_END:
            raise ValueError(f"{pages} pages at {start:#x} with flags {flags:#x} have no meaning")
        if start != self._end or flags != self._flags:
            self._flush()
            self._start, self._flags = start, flags
        self._end = start + pages * PAGE_SIZE
        if flags & PE_PRESENT:
            self.present_pages += pages

    def _flush(self) -> None:
        pages = (self._end - self._start) // PAGE_SIZE
        if self._flags < 0 or not pages:
            return
        # Both counts: 4.2 reads field 5, earlier versions know field 2 only. This is a PagemapEntry written by hand:
        # a dump of scattered pages has 100000 of them, and this way they take a tenth (2 µs each).
        count = varint(pages)
        compat = count if pages < 1 << 32 else b"\0"
        self._image.append_encoded(b"\x08" + varint(self._start) + b"\x10" + compat + b"\x20" + varint(self._flags)
                                   + b"\x28" + count)

    def close(self) -> None:
        """Write the last run and close both files."""
        self._flush()
        self._flags = -1
        size = os.fstat(self.fd).st_size
        self.abandon()
        if size != self.present_pages * PAGE_SIZE:
            raise ValueError(f"pages-{self.pages_id}.img has {size} bytes for {self.present_pages} pages")

    def abandon(self) -> None:
        """Close both files as they are."""
        self._file.close()
        self._image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class Pagemap:
    """A pagemap that was read and checked: runs ascend and do not overlap, offsets lie in the pages file.

    33 bytes per run: a task may have a hundred thousand.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.pages_id = 0
        self.present_pages = 0
        self._starts = array("Q")
        self._ends = array("Q")
        self._offsets = array("Q")
        self._flags = array("B")

    @classmethod
    def read(cls, images: ImageSet, number: int, kind: str = "pagemap") -> Self | None:
        """The pagemap of a task (or region), None where the set has none. DamagedError, UnsupportedError."""
        found = cls(images.file_path(kind, number))
        records = 0
        for record in images.records(kind, number):
            if isinstance(record.message, PagemapHead):
                found.pages_id = record.message.pages_id
            else:
                found._add(record.message, record.offset)
            records += 1
        if not records and images.has(kind, number):
            raise damaged(found.path, 0, "it does not say in which file its pages are")
        return found if records else None

    def _add(self, entry: PagemapEntry, offset: int) -> None:
        pages, flags = entry_pages(entry), entry_flags(entry)
        start, end = entry.vaddr, entry.vaddr + pages * PAGE_SIZE
        if start % PAGE_SIZE or not pages or end > _ADDRESS_END - PAGE_SIZE:
            raise damaged(self.path, offset, f"{pages} pages at {start:#x} are no range of addresses")
        if self._ends and start < self._ends[-1]:
            raise damaged(self.path, offset, f"addresses go back from {self._ends[-1]:#x} to {start:#x}")
        if flags > PE_PARENT | PE_LAZY | PE_PRESENT or flags & (PE_PARENT | PE_PRESENT) == PE_PARENT | PE_PRESENT:
            raise damaged(self.path, offset, f"flags {flags:#x} have no meaning")
        if flags & PE_PRESENT and UNKNOWN in entry.__dict__:
            raise UnsupportedError(f"{self.path} describes pages in a form that is not known (byte {offset})",
                                   hint="images with compressed pages need the CRIU that wrote them")
        self._append(start, end, flags, pages)

    def _append(self, start: int, end: int, flags: int, pages: int) -> None:
        self._starts.append(start)
        self._ends.append(end)
        self._flags.append(flags)
        self._offsets.append(self.present_pages * PAGE_SIZE)
        if flags & PE_PRESENT:
            self.present_pages += pages
            if self.present_pages * PAGE_SIZE >= 1 << 63:  # loff_t
                raise damaged(self.path, 0, "it has more pages than a file can hold")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Run:
        return Run(self._starts[index], self._ends[index], self._flags[index], self._offsets[index])

    def runs(self) -> Iterator[Run]:
        """All of them, ascending."""
        return (self[index] for index in range(len(self)))

    def present_bytes(self, start: int, end: int) -> int:
        """How many bytes between two addresses lie in this set's pages file."""
        total = 0
        while start < end and (run := self.find(start)) is not None and run.start < end:
            if run.flags & PE_PRESENT:
                total += min(run.end, end) - max(run.start, start)
            start = run.end
        return total

    def find(self, address: int) -> Run | None:
        """The run that holds the address, or the next one behind it; None at the end."""
        index = max(bisect_right(self._starts, address) - 1, 0)
        if index < len(self) and self._ends[index] <= address:
            index += 1
        return self[index] if index < len(self) else None
