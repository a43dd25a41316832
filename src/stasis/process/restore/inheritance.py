# SPDX-License-Identifier: Apache-2.0
"""Memory that a child has had from its parent since a fork, and neither has written to since: one copy for both, also
after a restore.

Images have it twice. So a parent fills its memory before it makes its children, at addresses that no process of the
tree will use, and they inherit it. Each child compares it with its own pages, and writes only those that differ: the
kernel makes copies of these. What lies ready is moved to its place in the end by mremap(2), which moves pages without
copying them. CRIU does the same ("premapping"), and compares as well: no image says which pages were one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stasis.errors import StasisError
from stasis.linux import libc, procfs
from stasis.linux.iobuffer import IoBuffer
from stasis.linux.memory import are_equal, first_difference, view_at
from stasis.linux.syscalls import NUMBERS
from stasis.process.dump.mm import MAP_ANONYMOUS, MAP_BY_FLAG, MAP_GROWSDOWN, MAP_SHARED, VmaStatus
from stasis.process.images import MemoryReader
from stasis.process.remote import PAGE, find_hole

if TYPE_CHECKING:
    from stasis.process.files.opening import FileSet
    from stasis.process.images import ImageSet, PageSource
    from stasis.process.images.schema.memory import VmaEntry
    from stasis.process.remote import Range
    from stasis.process.restore.plan import TaskPlan

__all__ = ["Inheritance", "Piece"]

HUGE = 2 << 20
"""Pieces lie in the same way to this boundary as in the end, so that a huge page stays one (mm/mremap.c)."""
MOST_PIECES = 4096
MOST_BYTES = 1 << 45
"""A quarter of the address space: whoever has reserved more does without."""
PORTION = 1 << 20
PROT_READ, PROT_WRITE, MADV_DONTNEED, MAP_FIXED_NOREPLACE = 1, 2, 4, 0x100000
LOCKED, HUGETLB, NORESERVE = (MAP_BY_FLAG[name] for name in ("lo", "ht", "nr"))
PRIVATE = VmaStatus.ANON_PRIVATE | VmaStatus.FILE_PRIVATE
NEVER = MAP_SHARED | MAP_GROWSDOWN | HUGETLB


class Piece(NamedTuple):
    """Memory that is to be at `start` and lies at `place` now. `file`: the id of the file behind it, 0 for none;
    `offset` into that file. Bytes."""

    start: int
    length: int
    place: int
    file: int
    offset: int
    flags: int

    @property
    def end(self) -> int:
        return self.start + self.length

    def part_for(self, vma: VmaEntry) -> Piece | None:
        """What of it a mapping of a child can take over: up to its end, from the mapping's start on."""
        skipped = vma.start - self.start
        if not 0 <= skipped < self.length or (_file(vma), vma.flags & NORESERVE) != (self.file, self.flags):
            return None
        if self.file and vma.pgoff != self.offset + skipped:
            return None
        length = min(self.end, vma.end) - vma.start
        return Piece(vma.start, length, self.place + skipped, self.file, vma.pgoff, self.flags)


class Inheritance:
    """In a process of the restore: what lies ready in it. Its children begin with a copy. `compared`, `shared`: pages
    that were compared with those of the parent, and found to be the same."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.compared = self.shared = 0

    def take_over(self, plan: TaskPlan, chain: list[ImageSet]) -> None:
        """In a child: keep what it has from its parent and make it what it is to be. The rest does not matter: it goes
        with all that the process has."""
        self.compared = self.shared = 0
        inherited = sorted(self.pieces)
        self.pieces = []
        if not inherited:
            return
        with MemoryReader(chain, plan.pid) as reader, IoBuffer(PORTION) as buffer:
            for vma in _candidates(plan):
                piece = _part_for(vma, inherited)
                if piece is not None:
                    self._match(piece, reader, buffer)
                    self.pieces.append(piece)

    def _match(self, piece: Piece, reader: MemoryReader, buffer: IoBuffer) -> None:
        """Write the pages that differ; those that the child does not have are forgotten."""
        position = piece.start
        for source in _portions(reader.sources(piece.start, piece.end)):
            _forget(piece, position, source.start)
            _read(source, buffer.address)
            self._compare(piece.place + source.start - piece.start, buffer.address, source.end - source.start)
            position = source.end
        _forget(piece, position, piece.end)

    def _compare(self, theirs: int, ours: int, length: int) -> None:
        self.compared += length // PAGE
        self.shared += length // PAGE
        done = 0
        while done < length:
            if are_equal(theirs + done, ours + done, PAGE):
                at = first_difference(theirs + done, ours + done, length - done)
                if at is None:
                    return
                done += at // PAGE * PAGE
            ctypes.memmove(theirs + done, ours + done, PAGE)
            self.shared -= 1
            done += PAGE

    def prepare(self, plan: TaskPlan, chain: list[ImageSet], files: FileSet, tree: Iterable[TaskPlan]) -> None:
        """In a parent: have ready what children may share with it. `tree`: all processes, whose addresses are left
        free."""
        ready = {piece.start for piece in self.pieces}
        with MemoryReader(chain, plan.pid) as reader:
            new = (vma for vma in _wanted(plan) if vma.start not in ready)
            wanted = [vma for vma in new if any(True for _ in reader.sources(vma.start, vma.end))]
            if not wanted:
                return
            taken: list[Range] = [vma for one in tree for vma in _vmas(one)]
            taken += procfs.mappings(procfs.SELF, flags=False)
            for piece in _places(wanted, taken):
                _map(piece, files)
                for source in reader.sources(piece.start, piece.end):
                    _read(source, piece.place + source.start - piece.start)
                self.pieces.append(piece)


def _vmas(plan: TaskPlan) -> Sequence[VmaEntry]:
    return plan.mm.vmas if plan.mm is not None else ()


def _file(vma: VmaEntry) -> int:
    return vma.shmid if vma.status & VmaStatus.FILE_PRIVATE else 0


def _candidates(plan: TaskPlan) -> list[VmaEntry]:
    """Mappings that a parent and a child may share pages of: private ones that do not grow downwards."""
    return [vma for vma in _vmas(plan)
            if vma.status & PRIVATE and not vma.status & VmaStatus.KERNELS and not vma.flags & NEVER]  # fmt: skip


def _wanted(plan: TaskPlan) -> list[VmaEntry]:
    """Those of the parent from which a child can take something; of too many the largest ones."""
    of_children = sorted((vma.start, number, vma) for number, vma in
                         enumerate(vma for child in plan.children for vma in _candidates(child)))  # fmt: skip
    found = []
    position = 0
    for vma in _candidates(plan):
        while position < len(of_children) and of_children[position][0] < vma.start:
            position += 1
        piece = Piece(vma.start, vma.end - vma.start, 0, _file(vma), vma.pgoff, vma.flags & NORESERVE)
        at = position
        while at < len(of_children) and of_children[at][0] < vma.end:
            if piece.part_for(of_children[at][2]) is not None:
                found.append(vma)
                break
            at += 1
    return sorted(found, key=lambda vma: vma.start - vma.end)[:MOST_PIECES]


def _part_for(vma: VmaEntry, pieces: Sequence[Piece]) -> Piece | None:
    """What a mapping can take over of pieces, which ascend."""
    at = bisect_right(pieces, vma.start, key=lambda piece: piece.start) - 1
    return pieces[at].part_for(vma) if at >= 0 else None


def _places(wanted: Sequence[VmaEntry], taken: Sequence[Range]) -> list[Piece]:
    """The pieces with their places, one behind the other in the largest hole, as far as there is room."""
    total, fitting = 0, []
    for vma in wanted:
        needed = vma.end - vma.start + 2 * HUGE
        if total + needed <= MOST_BYTES:
            total += needed
            fitting.append(vma)
    try:
        place = find_hole(taken, 2 * total)  # it begins in the middle of the hole
    except StasisError:
        return []
    pieces = []
    for vma in fitting:
        place += (vma.start - place) % HUGE
        pieces.append(Piece(vma.start, vma.end - vma.start, place, _file(vma), vma.pgoff, vma.flags & NORESERVE))
        place += vma.end - vma.start + PAGE  # no neighbours: the kernel would join them
    return pieces


def _map(piece: Piece, files: FileSet) -> None:
    kind = 0 if piece.file else MAP_ANONYMOUS
    fd = files.open_path(piece.file, os.O_RDONLY) if piece.file else -1
    try:
        found = libc.syscall(
            NUMBERS["mmap"], piece.place, piece.length, PROT_READ | PROT_WRITE,
            mmap.MAP_PRIVATE | kind | piece.flags | MAP_FIXED_NOREPLACE, fd, piece.offset if piece.file else 0,
        )  # fmt: skip
        libc.check(found, "mmap", fd if piece.file else None)
    finally:
        if piece.file:
            os.close(fd)


def _forget(piece: Piece, start: int, end: int) -> None:
    """The child has no pages there of its own: zeroes, or what the file has."""
    if start < end:
        place = piece.place + start - piece.start
        libc.check(libc.syscall(NUMBERS["madvise"], place, end - start, MADV_DONTNEED, 0, 0, 0), "madvise")


def _portions(sources: Iterable[PageSource]) -> Iterator[PageSource]:
    for source in sources:
        for start in range(source.start, source.end, PORTION):
            yield source._replace(start=start, end=min(start + PORTION, source.end),
                                  offset=source.offset + start - source.start)  # fmt: skip


def _read(source: PageSource, place: int) -> None:
    view = view_at(place, source.end - source.start)
    done = 0
    while done < len(view):
        count = os.preadv(source.fd, [view[done:]], source.offset + done)
        if not count:
            raise StasisError("an image of pages ended while it was read")
        done += count
