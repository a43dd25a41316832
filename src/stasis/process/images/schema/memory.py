# SPDX-License-Identifier: Apache-2.0
"""Address spaces: mm-PID.img, pagemap-*.img and memfd.img."""

from __future__ import annotations

from stasis.process.images.message import HEX, Message, boolean, int32, message, sint64, string, uint32, uint64
from stasis.process.images.schema.common import FownEntry

__all__ = [
    "AioRingEntry",
    "MemfdFileEntry",
    "MemfdInodeEntry",
    "MmEntry",
    "PagemapEntry",
    "PagemapHead",
    "SealEntry",
    "VmaEntry",
]


class VmaEntry(Message):
    start: int = uint64(1, show=HEX)
    end: int = uint64(2, show=HEX)
    pgoff: int = uint64(3)
    shmid: int = uint64(4)
    prot: int = uint32(5, show="prot")
    flags: int = uint32(6, show="map")
    status: int = uint32(7, show="vma")
    fd: int = sint64(8)
    madv: int | None = uint64(9, default=None, show=HEX)
    fdflags: int | None = uint32(10, default=None, show=HEX)


class SealEntry(Message):
    start: int = uint64(1, show=HEX)
    end: int = uint64(2, show=HEX)


class AioRingEntry(Message):
    id: int = uint64(1)
    nr_req: int = uint32(2)
    ring_len: int = uint32(3)


class MmEntry(Message):
    mm_start_code: int = uint64(1, show=HEX)
    mm_end_code: int = uint64(2, show=HEX)
    mm_start_data: int = uint64(3, show=HEX)
    mm_end_data: int = uint64(4, show=HEX)
    mm_start_stack: int = uint64(5, show=HEX)
    mm_start_brk: int = uint64(6, show=HEX)
    mm_brk: int = uint64(7, show=HEX)
    mm_arg_start: int = uint64(8, show=HEX)
    mm_arg_end: int = uint64(9, show=HEX)
    mm_env_start: int = uint64(10, show=HEX)
    mm_env_end: int = uint64(11, show=HEX)
    exe_file_id: int = uint32(12)
    mm_saved_auxv: list[int] = uint64(13, factory=list)
    vmas: list[VmaEntry] = message(14, VmaEntry, factory=list)
    dumpable: int | None = int32(15, default=None)
    aios: list[AioRingEntry] = message(16, AioRingEntry, factory=list)
    thp_disabled: bool | None = boolean(17, default=None)


class PagemapHead(Message):
    pages_id: int = uint32(1)


class PagemapEntry(Message):
    vaddr: int = uint64(1, show=HEX)
    compat_nr_pages: int = uint32(2)
    in_parent: bool | None = boolean(3, default=None)
    flags: int | None = uint32(4, default=None, show="pagemap")
    nr_pages: int | None = uint64(5, default=None)


class MemfdFileEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2, show="open")
    pos: int = uint64(3)
    fown: FownEntry = message(4, FownEntry)
    inode_id: int = uint32(5)


class MemfdInodeEntry(Message):
    name: str = string(1)
    uid: int = uint32(2)
    gid: int = uint32(3)
    size: int = uint64(4)
    shmid: int = uint32(5)
    seals: int = uint32(6, show="seals")
    inode_id: int = uint64(7)
    hugetlb_flag: int | None = uint32(8, default=None)
    mode: int | None = uint32(9, default=None)
