# SPDX-License-Identifier: Apache-2.0
"""eventfd(2): a counter."""

from __future__ import annotations

import os

from stasis.process.files.descriptor import Descriptor, owner, set_flags
from stasis.process.files.kind import FileKind, Opened, Saving
from stasis.process.images.schema.events import EventfdFileEntry
from stasis.process.images.schema.files import FdTypes, FileEntry

__all__ = ["Eventfds"]

COUNTER_BYTES = 8
UNTOLD = "this kernel does not tell which eventfds are semaphores: none will be (it needs Linux 6.5)"


class Eventfds(FileKind):
    """The image has no place for EFD_SEMAPHORE. It is bit 0, which is free in the flags: an eventfd is open for
    reading and writing (2), and F_SETFL, which readers use the flags for, ignores it."""

    type = FdTypes.EVENTFD
    field = "efd"

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:[eventfd]"

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        told = descriptor.field("eventfd-semaphore")
        if not told and UNTOLD not in saving.warnings:
            saving.warnings.append(UNTOLD)
        semaphore = os.EFD_SEMAPHORE if told == "1" else 0
        entry = EventfdFileEntry(id=number, flags=descriptor.flags | semaphore, fown=owner(fd),
                                 counter=int(descriptor.field("eventfd-count"), 16))  # fmt: skip
        return FileEntry(type=FdTypes.EVENTFD, id=number, efd=entry)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found = self.message_of(entry)
        fd = os.eventfd(0, os.EFD_CLOEXEC | found.flags & os.EFD_SEMAPHORE)
        if found.counter:
            os.write(fd, found.counter.to_bytes(COUNTER_BYTES, "little"))
        set_flags(fd, found.flags)
        return fd
