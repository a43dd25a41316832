# SPDX-License-Identifier: Apache-2.0
"""Which pages of a task have contents of their own: PAGEMAP_SCAN (Linux 6.7), or /proc/PID/pagemap before."""

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import re
import struct
from collections.abc import Iterator

from stasis.linux import libc

__all__ = ["EXCLUSIVE", "FILE_OR_SHARED", "PAGE", "PRESENT", "SWAPPED", "Change", "PageScanner"]

PAGE = 4096
# include/uapi/linux/fs.h
PAGEMAP_SCAN = 0xC0606610
PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC = 1, 2
PAGE_IS_WRITTEN, PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_PFNZERO = 2, 4, 8, 16, 32
PAGE_IS_GUARD = 1 << 8
ARGUMENT = struct.Struct("<12Q")
REGION = struct.Struct("<3Q")
REGIONS = 1024

# Documentation/admin-guide/mm/pagemap.rst
# The bits 56 to 63 of an entry, which are its last byte.
EXCLUSIVE, FILE_OR_SHARED, SWAPPED, PRESENT = 1 << 0, 1 << 5, 1 << 6, 1 << 7
FRAME = (1 << 55) - 1
OWN_RUN, MAYBE_RUN = re.compile(rb"\x01+"), re.compile(rb"\x02+")
PORTION_PAGES = 1 << 16

Run = tuple[int, int]
"""(address, bytes)"""
Change = tuple[int, int, bool]
"""(address, bytes, written since)"""


class PageScanner:
    """An open /proc/PID/pagemap; a context manager. `has_scan`: PAGEMAP_SCAN has not failed so far."""

    def __init__(self, pid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self.has_scan = True
        self._found = ctypes.create_string_buffer(REGIONS * REGION.size)
        self._unreadable = PAGE_IS_GUARD  # told since Linux 6.15 (commit a516403787e0); they count as swapped

    def __enter__(self) -> "PageScanner":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def own_pages(self, start: int, end: int, *, shared: bool = False) -> Iterator[Run]:
        """Runs of pages of [start, end) that are in memory or swap, other than the zero page and a file's own pages.

        `shared`: of memory that is shared and no file's, where the kernel counts all pages as a file's.
        """
        if self.has_scan:
            try:
                yield from self._scan(start, end, 0 if shared else PAGE_IS_FILE)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise
                self.has_scan = False
        yield from self._read(start, end, 0 if shared else FILE_OR_SHARED)

    def changes(self, start: int, end: int, *, arm: bool) -> Iterator[Change]:
        """The same runs of memory that is watched (`userfaultfd.py`), each with whether it was written since it was
        marked. `arm` marks what was written, in one go with looking: no write gets lost.

        EPERM where something of the range is not watched.
        """
        flags = PM_SCAN_CHECK_WPASYNC | (PM_SCAN_WP_MATCHING if arm else 0)
        for first, length, categories in self._regions(start, end, flags, PAGE_IS_FILE, PAGE_IS_WRITTEN):
            yield first, length, bool(categories & PAGE_IS_WRITTEN)

    def _scan(self, start: int, end: int, left_out: int) -> Iterator[Run]:
        for first, length, _ in self._regions(start, end, 0, left_out, 0):
            yield first, length

    def _regions(self, start: int, end: int, flags: int, left_out: int, told: int) -> Iterator[tuple[int, int, int]]:
        regions = self._found
        wanted = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
        while start < end:
            refused = left_out | PAGE_IS_PFNZERO | self._unreadable
            argument = bytearray(ARGUMENT.pack(ARGUMENT.size, flags, start, end, 0, ctypes.addressof(regions), REGIONS,
                                               0, refused, refused, wanted, told or wanted))  # fmt: skip
            try:
                count = fcntl.ioctl(self._fd, PAGEMAP_SCAN, argument)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._unreadable:
                    raise
                self._unreadable = 0
                continue
            # A copy: others may scan before this is read to its end.
            told_now = list(REGION.iter_unpack(memoryview(regions)[: count * REGION.size]))
            for first, last, categories in told_now:
                yield first, last - first, categories
            if count < REGIONS:
                return
            # walk_end, where the kernel stopped for lack of room; or where it did so within, for lack of its own
            start = max(ARGUMENT.unpack(argument)[4], told_now[-1][1])

    def _read(self, start: int, end: int, left_out: int) -> Iterator[Run]:
        last = (start, 0)
        for address, raw in self.entries(start, end):
            for run in OWN_RUN.finditer(_without_zero_pages(raw, raw[7::8].translate(_own_table(left_out)))):
                at, length = address + run.start() * PAGE, (run.end() - run.start()) * PAGE
                if last[0] + last[1] == at and last[1]:
                    last = (last[0], last[1] + length)
                    continue
                if last[1]:
                    yield last
                last = (at, length)
        if last[1]:
            yield last

    def entries(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """(address, entries of 8 bytes for the pages from there on) of all pages in [start, end), in portions."""
        for address in range(start, end, PORTION_PAGES * PAGE):
            count = min(PORTION_PAGES, (end - address) // PAGE)
            raw = os.pread(self._fd, 8 * count, address // PAGE * 8)
            if len(raw) < 8 * count:
                raise libc.error(errno.EIO, "pagemap", self._fd)
            yield address, raw


@functools.cache
def _own_table(left_out: int) -> bytes:
    """For each upper byte of an entry: 0 no contents of its own, 1 some, 2 some or the zero page."""
    return bytes(
        0 if not upper & (PRESENT | SWAPPED) or upper & left_out else 1 if upper & (SWAPPED | EXCLUSIVE) else 2
        for upper in range(256)
    )


def _without_zero_pages(raw: bytes, kinds: bytes) -> bytes:
    """`kinds` with 0 or 1 for each 2, by the page frame, which only CAP_SYS_ADMIN is told (0 for others)."""
    found = bytearray(kinds)
    for run in MAYBE_RUN.finditer(kinds):
        for number in range(run.start(), run.end()):
            frame = int.from_bytes(raw[8 * number : 8 * number + 8], "little") & FRAME
            found[number] = not frame or frame != _zero_frame()
    return bytes(found)


@functools.cache
def _zero_frame() -> int:
    """The page frame that is mapped where anonymous memory was only read; -1 where nobody tells."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, 2 * PAGE, flags=flags) as memory, PageScanner(os.getpid()) as own:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        frames = []
        for at in (0, PAGE):
            frames.append(memory[at])  # 0, and the page is there
            ((_, raw),) = own.entries(start + at, start + at + PAGE)
            frames[-1] += int.from_bytes(raw, "little") & FRAME
    return frames[0] if frames[0] == frames[1] and frames[0] else -1
