# SPDX-License-Identifier: Apache-2.0
"""The contents of memory: written by the task itself, from its own pages straight into the image file.

One copy and no buffer of ours: on the machine where this was measured 512 MiB took 170 ms, and 256 to 370 ms by every
way of reading them from outside. Where the task cannot open the image or may not write so much, or has pages that it
cannot read, they are read through /proc/PID/mem.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from stasis.errors import StasisError
from stasis.linux import files, procfs
from stasis.linux.pagemap import Change, PageScanner
from stasis.linux.procfs import Mapping
from stasis.linux.segments import data_segments
from stasis.process.dump.mm import Vma, VmaStatus
from stasis.process.dump.shared import Known
from stasis.process.images.pagemap import PE_PARENT, PE_PRESENT, PagemapWriter
from stasis.process.images.setwriter import ImageSetWriter
from stasis.process.meter import Meter
from stasis.process.remote import Remote

__all__ = ["PAGE", "Look", "dump_private_pages", "dump_shared_pages", "write_shared"]

PAGE = 4096
PORTION = 64 << 20
"""What the task writes by one call; progress is told between two."""
BUFFER = 1 << 20
RLIMIT_FSIZE = 1
UNLIMITED = (1 << 64) - 1
PROT_READ = 1
AT_FDCWD = -100

WORTH_A_CALL = 128 << 10
"""A shorter run is read from outside sooner than the task is made to write it (40 µs)."""

MOST_PENDING = 1024
"""Pieces that one pwritev(2) takes (UIO_MAXIOV)."""

WORTH_ALLOCATING = 4 << 20
"""On ext4, 512 MiB were written in 70 ms into blocks that were allocated, and in 110 ms without."""

Run = tuple[int, int]
Look = Callable[[Mapping, PageScanner], Iterable[Change] | None]
"""What was written of a mapping since the parent set; None: it is not in there."""


def dump_private_pages(
    remote: Remote, found: Sequence[Vma], out: ImageSetWriter, look: Look | None = None
) -> tuple[int, int]:
    """Write what only this task has: private mappings, and its vdso. How many pages, and how many the parent has."""
    with (
        PageScanner(remote.pid) as scanner,
        PagemapWriter(out, remote.pid) as pagemap,
        _Sink(remote, out, pagemap) as to,
    ):
        for vmas, changes in _pieces(found, scanner, look):
            if changes is not None:
                to.write_changes(changes, readable=_is_readable(vmas[0]))
            else:
                for vma, start, length in _own_pages(scanner, vmas):
                    to.write(start, length, readable=_is_readable(vma))
        to.flush()
        return to.pages, to.left


def _is_readable(vma: Vma) -> bool:
    return bool(vma.entry.prot & PROT_READ)


def dump_shared_pages(pid: int, vma: Vma, out: ImageSetWriter, known: Known | None = None) -> int:
    """Write shared memory that is no file's, once for all tasks; addresses count from its start. Returns pages.

    From the memory itself, not through a task's page tables: they do not know what only another task has touched.
    """
    path = f"/proc/{pid}/map_files/{vma.entry.start:x}-{vma.entry.end:x}"
    return write_shared(path, vma.entry.shmid, out, known=known)


def write_shared(
    path: str, number: int, out: ImageSetWriter, last_page: bytes = b"", known: Known | None = None
) -> int:
    """Write what a file in memory holds as the pages of `number`. Where it ends within a page, `last_page` is that
    page: a file's descriptor gives nothing behind its end, and a mapping does. `known`: what the set before has, and
    need not be written. Returns pages."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    pages = 0
    try:
        size = os.fstat(fd).st_size // PAGE * PAGE
        with PagemapWriter(out, number, "pagemap-shmem") as pagemap:
            for start, end, is_same in _shared_runs(fd, number, known):
                if is_same:
                    pagemap.add(start, (end - start) // PAGE, PE_PARENT)
                    continue
                pagemap.add(start, (end - start) // PAGE, PE_PRESENT)
                pages += (end - start) // PAGE
                whole = min(end, size)
                _send(fd, pagemap.fd, start, whole, out.meter)
                if whole < end:
                    os.write(pagemap.fd, last_page or os.pread(fd, PAGE, whole).ljust(PAGE, b"\0"))
    finally:
        os.close(fd)
    return pages


def _shared_runs(fd: int, number: int, known: Known | None) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether the set before has it)"""
    for start, end in data_segments(fd):
        if known is None:
            yield start, end, False
        else:
            yield from known.runs(number, fd, start, end)


def _send(source: int, target: int, start: int, end: int, meter: Meter) -> None:
    while start < end:
        try:
            sent = os.sendfile(target, source, start, min(end - start, PORTION))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            sent = os.write(target, os.pread(source, min(end - start, BUFFER), start))  # huge pages
        if not sent:
            raise StasisError("shared memory became smaller while it was read")
        start += sent
        meter.add(sent)


def _pieces(
    found: Sequence[Vma], scanner: PageScanner, look: Look | None
) -> Iterator[tuple[list[Vma], Iterable[Change] | None]]:
    """Private memory in the order of addresses: a mapping with what was written of it since the parent set, or all
    neighbours of which that is not known, which are looked at with one call."""
    neighbours: list[Vma] = []
    for vma in found:
        if not vma.has_private_pages:
            continue
        changes = look(vma.mapping, scanner) if look is not None else None
        is_next = changes is None and neighbours and neighbours[-1].entry.end == vma.entry.start
        if neighbours and (not is_next or _is_whole(vma) or _is_whole(neighbours[-1])):
            yield neighbours, None
            neighbours = []
        if changes is None:
            neighbours.append(vma)
        else:
            yield [vma], changes
    if neighbours:
        yield neighbours, None


def _is_whole(vma: Vma) -> bool:
    """What the kernel mapped is taken as it is: page tables do not tell that it is the task's."""
    return bool(vma.entry.status & (VmaStatus.VDSO | VmaStatus.AIORING))


def _own_pages(scanner: PageScanner, neighbours: Sequence[Vma]) -> Iterator[tuple[Vma, int, int]]:
    """(mapping, address, bytes) of runs of pages to be written, of mappings without gaps between them."""
    waiting = iter(neighbours)
    vma = next(waiting)
    if _is_whole(vma):
        yield vma, vma.entry.start, vma.mapping.length
        return
    for start, length in scanner.own_pages(vma.entry.start, neighbours[-1].entry.end):
        end = start + length
        while start < end:
            while vma.entry.end <= start:
                vma = next(waiting)
            stop = min(end, vma.entry.end)
            yield vma, start, stop - start
            start = stop


class _Sink:
    """The pages file of one pagemap, open here and, where that works, in the task."""

    def __init__(self, remote: Remote, out: ImageSetWriter, pagemap: PagemapWriter, base: int = 0) -> None:
        self.pages = 0
        self.left = 0
        self._meter = out.meter
        self._remote = remote
        self._pagemap = pagemap
        self._base = base
        self._position = 0
        self._remote_fd = self._open_remotely(f"{out.staging}/pages-{pagemap.pages_id}.img")
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def _open_remotely(self, path: str) -> int:
        """The file's descriptor in the task, -1 where the task is not to write."""
        limits = procfs.limits(self._remote.pid)
        if limits[RLIMIT_FSIZE][0] != UNLIMITED:
            return -1  # beyond it the task would get SIGXFSZ
        try:
            where = self._remote.put(os.fsencode(path) + b"\0")
            fd = self._remote.open("openat", AT_FDCWD, where, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (OSError, ValueError):
            return -1  # another root directory, user or limit than ours
        if self._is_our_file(fd):
            return fd
        self._remote.close_fd(fd)
        return -1

    def _is_our_file(self, fd: int) -> bool:
        try:
            theirs = os.stat(f"/proc/{self._remote.pid}/fd/{fd}")
        except OSError:
            return False
        return os.path.samestat(theirs, os.fstat(self._pagemap.fd))

    def write(self, start: int, length: int, *, readable: bool) -> None:
        """Append a run of pages; they ascend."""
        self._pagemap.add(start - self._base, length // PAGE, PE_PRESENT)
        self.pages += length // PAGE
        if self._remote_fd >= 0 and readable and length >= WORTH_A_CALL:
            self._write_remotely(start, length)
        else:
            self._write_ourselves(start, length)

    def write_changes(self, changes: Iterable[Change], *, readable: bool) -> None:
        """The same of what was written since the parent set; the rest is left to it."""
        for start, length, written in changes:
            if written:
                self.write(start, length, readable=readable)
            else:
                self._pagemap.add(start, length // PAGE, PE_PARENT)
                self.left += length // PAGE
                self._meter.add(length)

    def _write_remotely(self, start: int, length: int) -> None:
        self.flush()
        if length >= WORTH_ALLOCATING:
            self._allocate(length)
        while length:
            written = self._remote.call("pwrite64", self._remote_fd, start, min(length, PORTION), self._position)
            start, length, self._position = start + written, length - written, self._position + written
            self._meter.add(written)

    def _allocate(self, length: int) -> None:
        """Get the disk's blocks for a long run at once, where the file system can: then a write only copies."""
        try:
            files.allocate(self._pagemap.fd, self._position, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise

    def _write_ourselves(self, start: int, length: int) -> None:
        """Read it; it is written with what comes behind."""
        while length:
            data = self._remote.memory.read(start, min(length, BUFFER))
            self._pending.append(data)
            self._pending_bytes += len(data)
            start, length = start + len(data), length - len(data)
            if self._pending_bytes >= BUFFER or len(self._pending) >= MOST_PENDING:
                self.flush()

    def flush(self) -> None:
        """Write what was read."""
        if not self._pending:
            return
        written = os.pwritev(self._pagemap.fd, self._pending, self._position)
        while written < self._pending_bytes:
            rest = b"".join(self._pending)[written:]
            written += os.pwrite(self._pagemap.fd, rest, self._position + written)
        self._position += written
        self._meter.add(written)
        self._pending.clear()
        self._pending_bytes = 0

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        if self._remote_fd >= 0:
            self._remote.close_fd(self._remote_fd)
