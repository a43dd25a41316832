# SPDX-License-Identifier: Apache-2.0
"""Fifos: pipes with a name. What is in them is lost when their last reader and writer end, so it is taken along."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

from stasis.process.files.descriptor import Descriptor, owner, set_flags
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.files.pipes import F_GETPIPE_SZ, contents, fill
from stasis.process.files.regular import current_name, is_lost, mount_of, path_entry, why_lost
from stasis.process.images.schema.files import FdTypes, FifoEntry, FileEntry, PipeDataEntry

if TYPE_CHECKING:
    from stasis.process.files.options import FileOptions
    from stasis.process.images.schema.common import FownEntry

__all__ = ["Fifos"]


class Fifos(FileKind):
    type = FdTypes.FIFO
    field = "fifo"

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self._dumped: set[int] = set()
        self._holders: dict[int, int] = {}

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.kind == stat.S_IFIFO and descriptor.link.startswith("/")

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        reason, option = why_lost(descriptor.pid, descriptor.link, descriptor.status, self.options)
        if reason:
            looking.findings.add(descriptor.pid, descriptor.where, reason, option)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        regular, pipe_id = saving.new_id(), descriptor.status.st_ino & 0xFFFFFFFF
        name = current_name(descriptor.pid, descriptor.link, descriptor.status)
        source = f"/proc/{descriptor.pid}/fd/{descriptor.fd}"
        if descriptor.is_deleted:
            saving.ghosts.keep(regular, source, descriptor.status)
        elif is_lost(descriptor.pid, descriptor.link, descriptor.status):
            saving.ghosts.link(regular, source, name, descriptor.status, saving.new_id)
        entry = path_entry(regular, name, descriptor.status, descriptor.flags, mount_of(descriptor, name))
        entry.fown = owner(fd)
        saving.out.write("files", FileEntry(type=FdTypes.REG, id=regular, reg=entry))
        if pipe_id not in self._dumped:
            self._dumped.add(pipe_id)
            data = contents(fd)
            head = PipeDataEntry(pipe_id=pipe_id, bytes=len(data), size=fcntl.fcntl(fd, F_GETPIPE_SZ))
            saving.out.image("fifo-data").append(head, data)
        return FileEntry(type=FdTypes.FIFO, id=number, fifo=FifoEntry(id=number, pipe_id=pipe_id, regf_id=regular))

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found = self.message_of(entry)
        if found.pipe_id not in self._holders:
            # Open for both, it keeps the contents, and no other opening waits for anybody.
            holder = opened.move(opened.open_path(found.regf_id or 0, os.O_RDWR | os.O_NONBLOCK))
            self._holders[found.pipe_id] = holder
            fill(holder, "fifo-data", found.pipe_id, opened)
        flags = opened.regular(found.regf_id or 0).flags
        fd = opened.open_path(found.regf_id or 0, flags & (os.O_ACCMODE | os.O_NONBLOCK))
        set_flags(fd, flags)
        return fd

    def owner(self, entry: FileEntry, opened: Opened) -> FownEntry | None:
        return opened.regular(self.message_of(entry).regf_id or 0).fown

    def done(self, opened: Opened) -> None:
        for fd in self._holders.values():
            os.close(fd)
        self._holders.clear()
