# SPDX-License-Identifier: Apache-2.0
"""Memory that processes share and that is no file's: made and filled once, by the first process of the tree.

What the kernel makes for MAP_SHARED | MAP_ANONYMOUS has no name; /proc/PID/map_files gives a descriptor for it, which
the others inherit and map (needs CAP_CHECKPOINT_RESTORE, Linux 5.9, commit 12886f8ab10c). So it is what it was, and
no memfd.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stasis.errors import StasisError
from stasis.process.dump.mm import is_shared_memory
from stasis.process.images import ImageSet, MemoryReader

if TYPE_CHECKING:
    from stasis.process.restore.plan import TaskPlan

__all__ = ["make_shared"]

LARGEST_READ = 1 << 30
# include/uapi/linux/mman.h
MAP_HUGETLB, MAP_HUGE_SHIFT, MAP_HUGE_MASK = 0x40000, 26, 0x3F
HUGE_FLAGS = MAP_HUGETLB | MAP_HUGE_MASK << MAP_HUGE_SHIFT


class _Piece(NamedTuple):
    """Bytes, as far as any process has it mapped; `flags` say how large its pages are."""

    size: int
    flags: int


def make_shared(plans: Sequence[TaskPlan], chain: list[ImageSet]) -> dict[int, int]:
    """A descriptor for each piece of shared memory, by its id."""
    return {number: _make(number, piece, chain) for number, piece in _pieces(plans).items()}


def _pieces(plans: Sequence[TaskPlan]) -> dict[int, _Piece]:
    found: dict[int, _Piece] = {}
    for plan in plans:
        for vma in plan.mm.vmas if plan.mm is not None else ():
            if is_shared_memory(vma):
                size = max(found.get(vma.shmid, _Piece(0, 0)).size, vma.pgoff + vma.end - vma.start)
                found[vma.shmid] = _Piece(size, vma.flags & HUGE_FLAGS)
    return found


def _make(number: int, piece: _Piece, chain: list[ImageSet]) -> int:
    page = 1 << (piece.flags >> MAP_HUGE_SHIFT & MAP_HUGE_MASK) if piece.flags else mmap.PAGESIZE
    size = -(-piece.size // page) * page
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | piece.flags)
    except OSError as error:
        raise StasisError(f"{size} bytes of shared memory cannot be made: {error.strerror}", errno=error.errno or 0,
                          hint="raise vm.nr_hugepages" if piece.flags else "") from error  # fmt: skip
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fd = os.open(f"/proc/self/map_files/{start:x}-{start + size:x}", os.O_RDWR | os.O_CLOEXEC)
    view = memoryview(memory)
    with MemoryReader(chain, number, "pagemap-shmem") as reader:
        for source in reader.sources(0, piece.size):
            _read(source.fd, view[source.start : source.end], source.offset)
    return fd


def _read(fd: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done : done + LARGEST_READ]], offset + done)
        if not count:
            raise StasisError("the pages of shared memory end early")
        done += count
