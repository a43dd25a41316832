# SPDX-License-Identifier: Apache-2.0
"""memfd_create(2): files that live in memory only, with contents, size and seals."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from stasis.errors import UnsupportedError
from stasis.process.files.descriptor import owner, set_flags
from stasis.process.files.ghosts import DELETED
from stasis.process.files.kind import FileKind
from stasis.process.images.damage import damaged
from stasis.process.images.memory import MemoryReader
from stasis.process.images.pagemap import PE_PRESENT, PagemapWriter
from stasis.process.images.schema.common import FownEntry
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.memory import MemfdFileEntry, MemfdInodeEntry

if TYPE_CHECKING:
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.files.kind import Opened, Saving
    from stasis.process.files.options import FileOptions
    from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["Memfds", "is_memfd", "why_mapping_lost"]

PREFIX = "/memfd:"
PAGE = 4096
PORTION = 1 << 20
LARGEST_FILE = (1 << 63) - 1
SHARED_IDS = 1 << 31  # as those of other shared memory (dump/mm.py)
MFD_HUGETLB, MFD_HUGE_SHIFT = 4, 26  # include/uapi/linux/memfd.h
F_SEAL_FUTURE_WRITE = 0x10
NO_OWNER = FownEntry(uid=0, euid=0, signum=0, pid_type=0, pid=0)


class _Inode(NamedTuple):
    """A memory file that is to be written: `path` leads to it, `link` is what /proc calls it."""

    path: str
    link: str
    status: os.stat_result


def is_memfd(link: str) -> bool:
    """Whether what /proc says of a descriptor or mapping is a memory file."""
    return link.startswith(PREFIX)


class Memfds(FileKind):
    type = FdTypes.MEMFD
    field = "memfd"

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self._dumped: dict[int, _Inode] = {}
        self._holders: dict[int, int] = {}

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.kind == stat.S_IFREG and is_memfd(descriptor.link)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        inode = self._seen(f"/proc/{descriptor.pid}/fd/{descriptor.fd}", descriptor.link, descriptor.status)
        entry = MemfdFileEntry(id=number, flags=descriptor.flags, pos=descriptor.position, fown=owner(fd),
                               inode_id=inode)  # fmt: skip
        return FileEntry(type=FdTypes.MEMFD, id=number, memfd=entry)

    def mapped(self, path: str, link: str, status: os.stat_result, flags: int, number: int) -> FileEntry:
        """The message for a memory file that a process has mapped, or that it is the program of."""
        entry = MemfdFileEntry(id=number, flags=flags, pos=0, fown=NO_OWNER, inode_id=self._seen(path, link, status))
        return FileEntry(type=FdTypes.MEMFD, id=number, memfd=entry)

    def _seen(self, path: str, link: str, status: os.stat_result) -> int:
        inode = status.st_ino & 0xFFFFFFFF
        self._dumped.setdefault(inode, _Inode(path, link, status))
        return inode

    def finish(self, saving: Saving) -> None:
        for number, inode in self._dumped.items():
            fd = os.open(inode.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
                status, shmid = inode.status, (number + SHARED_IDS) & 0xFFFFFFFF
                saving.out.write("memfd", MemfdInodeEntry(
                    name=inode.link.removeprefix(PREFIX).removesuffix(DELETED), uid=status.st_uid, gid=status.st_gid,
                    size=status.st_size, shmid=shmid, seals=seals, inode_id=number, mode=status.st_mode,
                    hugetlb_flag=_huge_flag(status),
                ))  # fmt: skip
                _write(fd, status, shmid, saving.out)
            finally:
                os.close(fd)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found = self.message_of(entry)
        if found.inode_id not in self._holders:
            self._holders[found.inode_id] = opened.move(_make(found.inode_id, opened))
        flags = found.flags & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK)
        fd = os.open(f"/proc/self/fd/{self._holders[found.inode_id]}", flags | os.O_CLOEXEC)
        os.lseek(fd, found.pos, os.SEEK_SET)
        set_flags(fd, found.flags)
        return fd

    def connect(self, opened: Opened) -> None:
        """Seal them: a file that is sealed cannot be opened for writing any more."""
        for inode, fd in self._holders.items():
            if seals := _inode_of(inode, opened).seals:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)

    def done(self, opened: Opened) -> None:
        for fd in self._holders.values():
            os.close(fd)
        self._holders.clear()


def why_mapping_lost(path: str) -> str:
    """Why a memory file that is mapped for writing cannot be mapped again; "" where it can."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & F_SEAL_FUTURE_WRITE
    finally:
        os.close(fd)
    return "its memory file was sealed against writing while it was mapped for it" if sealed else ""


def _huge_flag(status: os.stat_result) -> int | None:
    """As memfd_create(2) wants it; None for usual pages."""
    return MFD_HUGETLB | (status.st_blksize.bit_length() - 1) << MFD_HUGE_SHIFT if status.st_blksize > PAGE else None


def _write(fd: int, status: os.stat_result, shmid: int, out: ImageSetWriter) -> None:
    """The pages that are there; the image counts their addresses from the file's beginning."""
    with PagemapWriter(out, shmid, "pagemap-shmem") as pagemap:
        for start, end in _pages(fd, status):
            pagemap.add(start, (end - start) // PAGE, PE_PRESENT)
            for offset in range(start, end, PORTION):
                length = min(PORTION, end - offset)
                os.write(pagemap.fd, os.pread(fd, length, offset).ljust(length, b"\0"))


def _pages(fd: int, status: os.stat_result) -> Iterator[tuple[int, int]]:
    if status.st_blksize > PAGE:  # hugetlbfs tells nothing of holes
        step = status.st_blksize
        for start in range(0, status.st_size, step):
            if any(os.pread(fd, step, start)):
                yield start, start + step
        return
    end = 0
    while end < status.st_size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: nothing more
        end = os.lseek(fd, start, os.SEEK_HOLE)
        start, end = start // PAGE * PAGE, -(-end // PAGE) * PAGE
        yield start, end


def _inode_of(number: int, opened: Opened) -> MemfdInodeEntry:
    for found in opened.images.messages("memfd"):
        if found.inode_id == number and found.size <= LARGEST_FILE:
            assert isinstance(found, MemfdInodeEntry)
            return found
    raise damaged(opened.images.file_path("memfd"), 0, f"it has no memory file {number}")


def _make(number: int, opened: Opened) -> int:
    found = _inode_of(number, opened)
    huge = found.hugetlb_flag or 0
    try:
        fd = os.memfd_create(found.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | huge)
    except OSError as error:
        raise UnsupportedError(f"the memory file {found.name!r} cannot be made: {error.strerror}",
                               errno=error.errno or 0) from error  # fmt: skip
    os.ftruncate(fd, found.size)
    chain = opened.images.chain()
    try:
        with MemoryReader(chain, found.shmid, "pagemap-shmem") as reader:
            _fill(fd, found.size, reader, huge=bool(huge))
    finally:
        for parent in chain[1:]:
            parent.close()
    os.ftruncate(fd, found.size)  # the last page reached behind the end
    os.fchown(fd, found.uid, found.gid)
    if found.mode is not None:
        os.fchmod(fd, stat.S_IMODE(found.mode))
    return fd


def _fill(fd: int, size: int, reader: MemoryReader, *, huge: bool) -> None:
    """Huge pages can be mapped, and not written to."""
    end = -(-size // PAGE) * PAGE
    for source in reader.sources(0, end) if end else ():
        for offset in range(source.start, source.end, PORTION):
            data = os.pread(source.fd, min(PORTION, source.end - offset), source.offset + offset - source.start)
            if not huge:
                os.pwrite(fd, data, offset)
                continue
            try:
                with mmap.mmap(fd, size) as memory:
                    memory[offset : offset + len(data)] = data
            except OSError as error:
                raise UnsupportedError(f"there are too few huge pages for a memory file of {size} bytes",
                                       hint="raise vm.nr_hugepages", errno=error.errno or 0) from error  # fmt: skip
