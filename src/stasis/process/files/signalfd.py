# SPDX-License-Identifier: Apache-2.0
"""signalfd(2): which signals are read from it. The signals themselves wait in the process, and are dumped with it."""

from __future__ import annotations

from stasis.linux import timerfd
from stasis.process.files.descriptor import Descriptor, owner, set_flags
from stasis.process.files.kind import FileKind, Opened, Saving
from stasis.process.images.schema.events import SignalfdEntry
from stasis.process.images.schema.files import FdTypes, FileEntry

__all__ = ["Signalfds"]


class Signalfds(FileKind):
    type = FdTypes.SIGNALFD
    field = "sgfd"

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:[signalfd]"

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        entry = SignalfdEntry(id=number, flags=descriptor.flags, fown=owner(fd),
                              sigmask=int(descriptor.field("sigmask"), 16))  # fmt: skip
        return FileEntry(type=FdTypes.SIGNALFD, id=number, sgfd=entry)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found = self.message_of(entry)
        fd = timerfd.signalfd(found.sigmask)
        set_flags(fd, found.flags)
        return fd
