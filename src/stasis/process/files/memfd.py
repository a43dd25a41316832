# SPDX-License-Identifier: Apache-2.0
"""memfd_create(2): files that live in memory only, with contents, size and seals."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stasis.process.files.descriptor import Descriptor, duplicate, owner, set_flags
from stasis.process.files.ghosts import DELETED
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.images.damage import damaged
from stasis.process.images.memory import MemoryReader
from stasis.process.images.pagemap import PE_PRESENT, PagemapWriter
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.memory import MemfdFileEntry, MemfdInodeEntry

if TYPE_CHECKING:
    from stasis.process.files.options import FileOptions
    from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["Memfds"]

PREFIX = "/memfd:"
PAGE = 4096
PORTION = 1 << 20
LARGEST_FILE = (1 << 63) - 1


class Memfds(FileKind):
    type = FdTypes.MEMFD
    field = "memfd"

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self._dumped: dict[int, Descriptor] = {}
        self._holders: dict[int, int] = {}

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.kind == stat.S_IFREG and descriptor.link.startswith(PREFIX)

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        if descriptor.status.st_blksize > PAGE:
            looking.findings.add(descriptor.pid, descriptor.where, "memory files of huge pages are not supported yet")

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        inode = descriptor.status.st_ino & 0xFFFFFFFF
        self._dumped.setdefault(inode, descriptor)
        entry = MemfdFileEntry(id=number, flags=descriptor.flags, pos=descriptor.position, fown=owner(fd),
                               inode_id=inode)  # fmt: skip
        return FileEntry(type=FdTypes.MEMFD, id=number, memfd=entry)

    def finish(self, saving: Saving) -> None:
        for inode, descriptor in self._dumped.items():
            fd = duplicate(descriptor)
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            finally:
                os.close(fd)
            status = descriptor.status
            saving.out.write("memfd", MemfdInodeEntry(
                name=descriptor.link.removeprefix(PREFIX).removesuffix(DELETED), uid=status.st_uid, gid=status.st_gid,
                size=status.st_size, shmid=inode, seals=seals, inode_id=inode, mode=status.st_mode,
            ))  # fmt: skip
            _write(f"/proc/{descriptor.pid}/fd/{descriptor.fd}", status.st_size, inode, saving.out)

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
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _inode_of(inode, opened).seals)

    def done(self, opened: Opened) -> None:
        for fd in self._holders.values():
            os.close(fd)
        self._holders.clear()


def _write(link: str, size: int, shmid: int, out: ImageSetWriter) -> None:
    """The pages that are there; the image counts their addresses from the file's beginning."""
    fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with PagemapWriter(out, shmid, "pagemap-shmem") as pagemap:
            for start, end in _pages(fd, size):
                pagemap.add(start, (end - start) // PAGE, PE_PRESENT)
                for offset in range(start, end, PORTION):
                    length = min(PORTION, end - offset)
                    os.write(pagemap.fd, os.pread(fd, length, offset).ljust(length, b"\0"))
    finally:
        os.close(fd)


def _pages(fd: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
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
    fd = os.memfd_create(found.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, found.size)
    end = -(-found.size // PAGE) * PAGE
    chain = opened.images.chain()
    try:
        with MemoryReader(chain, found.shmid, "pagemap-shmem") as reader:
            for source in reader.sources(0, end) if end else ():
                for offset in range(source.start, source.end, PORTION):
                    length = min(PORTION, source.end - offset)
                    os.pwrite(fd, os.pread(source.fd, length, source.offset + offset - source.start), offset)
    finally:
        for parent in chain[1:]:
            parent.close()
    os.ftruncate(fd, found.size)  # the last page reached behind the end
    os.fchown(fd, found.uid, found.gid)
    if found.mode is not None:
        os.fchmod(fd, stat.S_IMODE(found.mode))
    return fd
