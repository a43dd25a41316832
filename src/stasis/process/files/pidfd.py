# SPDX-License-Identifier: Apache-2.0
"""Descriptors of processes (pidfd_open(2)): of processes of the tree, and of such as are dead."""

from __future__ import annotations

import os
import time

from stasis.errors import StateError
from stasis.linux import process
from stasis.process.files.descriptor import Descriptor, owner, set_flags
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.images.schema.events import PidfdEntry
from stasis.process.images.schema.files import FdTypes, FileEntry

__all__ = ["Pidfds"]

LONGEST_WAIT = 10.0
PAUSE = 0.001


class Pidfds(FileKind):
    """The process may not be there yet when descriptors are made: those for it come when the table is placed, and
    are each process's own then."""

    type = FdTypes.PIDFD
    field = "pidfd"

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:[pidfd]"

    def check_all(self, looking: Looking) -> None:
        pids = {descriptor.pid for descriptor in looking.descriptors}
        for descriptor in looking.descriptors:
            if self.claims(descriptor) and (pid := _pid(descriptor)) > 0 and pid not in pids:
                looking.findings.add(descriptor.pid, descriptor.where, f"it is of process {pid}, outside the tree")

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        entry = PidfdEntry(id=number, ino=descriptor.status.st_ino & 0xFFFFFFFF,
                           flags=descriptor.flags & ~os.O_ACCMODE,  # criu hands them to pidfd_open(2)
                           nspid=_pid(descriptor), fown=owner(fd))  # fmt: skip
        return FileEntry(type=FdTypes.PIDFD, id=number, pidfd=entry)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found = self.message_of(entry)
        fd = _of_dead() if found.nspid <= 0 else process.pidfd_open(os.getpid())
        set_flags(fd, found.flags)
        return fd

    def late(self, entry: FileEntry, opened: Opened) -> int | None:
        found = self.message_of(entry)
        if found.nspid <= 0 or found.nspid in opened.made_late:
            return None  # what `restore` made keeps the number for one that is there later
        deadline = time.monotonic() + LONGEST_WAIT
        while True:
            try:
                return _with_flags(process.pidfd_open(found.nspid), found.flags)
            except ProcessLookupError as error:
                if time.monotonic() > deadline:
                    raise StateError(f"process {found.nspid}, which a process had a descriptor of, was not restored",
                                     hint="dump the tree that has both", errno=error.errno or 0) from error  # fmt: skip
                time.sleep(PAUSE)


def _pid(descriptor: Descriptor) -> int:
    """In the innermost namespace; -1 of a dead process."""
    return int((descriptor.field("NSpid") or descriptor.field("Pid")).split()[-1])


def _with_flags(fd: int, flags: int) -> int:
    set_flags(fd, flags)
    return fd


def _of_dead() -> int:
    """A descriptor of a process that ended, and that its parent has waited for."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    fd = process.pidfd_open(pid)
    os.waitpid(pid, 0)
    return fd
