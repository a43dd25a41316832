# SPDX-License-Identifier: Apache-2.0
"""Locks on files. Those of flock(2) and those of open file descriptions belong to the description; POSIX locks belong
to the process, which loses them when it closes any descriptor for the file."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from stasis.errors import BusyError
from stasis.process.files.descriptor import owner, set_owner
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FileLockEntry

if TYPE_CHECKING:
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["LockWriter", "check_locks", "packed_lock", "posix_locks", "take_locks"]

# include/linux/filelock.h, as CRIU has them
FL_POSIX, FL_FLOCK, FL_OFD, FL_LEASE = 1, 2, 4, 8
OLDER = {32: FL_LEASE, 1024: FL_OFD}
"""What older sets of ours have: numbers of the kernel in place of criu's."""
KINDS = {"POSIX": FL_POSIX, "FLOCK": FL_FLOCK, "LEASE": FL_LEASE, "OFDLCK": FL_OFD}
BREAKING = ("BREAKING", "BREAKER")
TYPES = {"READ": fcntl.F_RDLCK, "WRITE": fcntl.F_WRLCK}
F_OFD_SETLK = 37  # include/uapi/linux/fcntl.h
FLOCK = struct.Struct("<hh4xqqi4x")
"""struct flock: type, whence, start, len, pid."""
# fs/locks.c, lock_get_status: a line of fdinfo
LOCK = r"(?m)^lock:\t\d+: (\w+) +(\w+) +(\w+) +(-?\d+) \S+ (\d+) (\d+|EOF)$"


def check_locks(descriptor: Descriptor, *, keep: bool, findings: Findings) -> None:
    """Note locks that are not to be kept, or that cannot be."""
    for kind, mode, _, _, _, _ in re.findall(LOCK, descriptor.info):
        if mode in BREAKING:
            findings.add(descriptor.pid, descriptor.where, "somebody waits for its lease to be given up", passes=True)
        elif kind not in KINDS:
            findings.add(descriptor.pid, descriptor.where, f"it has a lock of the kind {kind}, which is not supported")
        elif not keep:
            findings.add(descriptor.pid, descriptor.where, "the file is locked", "--file-locks")


class LockWriter:
    """Writes each lock once: those of a description for one descriptor, those of a process for one of its."""

    def __init__(self, out: ImageSetWriter) -> None:
        self._out = out
        self._written: set[tuple[object, ...]] = set()

    def keep(self, descriptor: Descriptor, number: int) -> None:
        """The locks that show at a descriptor; `number` is the id of its description."""
        for kind, _, type_, _, start, end in re.findall(LOCK, descriptor.info):
            holder = (descriptor.pid, descriptor.status.st_dev, descriptor.status.st_ino)
            key = (kind, type_, start, end, holder if KINDS[kind] == FL_POSIX else number)
            if key in self._written:
                continue
            self._written.add(key)
            if kind == "LEASE":
                start = "0"  # it is of the whole file
            length = 0 if end == "EOF" else int(end) + 1 - int(start)
            self._out.write("filelocks", FileLockEntry(
                flag=KINDS[kind], type=TYPES[type_], pid=descriptor.pid, fd=descriptor.fd, start=int(start), len=length,
            ))  # fmt: skip


def take_locks(entries: Iterable[FileLockEntry], path: str) -> None:
    """In the process that is to have them, with its descriptors in place. BusyError where somebody else has one."""
    for entry in entries:
        if entry.pid == os.getpid():
            _take(entry, path)


def _take(entry: FileLockEntry, path: str) -> None:
    kind = OLDER.get(entry.flag, entry.flag)
    if entry.type not in TYPES.values() or kind not in KINDS.values():
        raise damaged(path, 0, f"there is no lock of the kind {entry.flag} and type {entry.type}")
    try:
        if kind == FL_FLOCK:
            how = fcntl.LOCK_SH if entry.type == fcntl.F_RDLCK else fcntl.LOCK_EX
            fcntl.flock(entry.fd, how | fcntl.LOCK_NB)
        elif kind == FL_LEASE:
            _take_lease(entry)
        else:
            fcntl.fcntl(entry.fd, F_OFD_SETLK if kind == FL_OFD else fcntl.F_SETLK, packed_lock(entry))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise damaged(path, 0, f"descriptor {entry.fd} cannot be locked: {error.strerror}") from error
        name = os.readlink(f"/proc/self/fd/{entry.fd}")
        raise BusyError(f"{name}, which a process had locked, is locked by another one", errno=error.errno,
                        hint="end that one first") from error  # fmt: skip


def _take_lease(entry: FileLockEntry) -> None:
    """The signals of a lease come to whom the descriptor has as owner; the kernel makes that the process itself."""
    before = owner(entry.fd)
    fcntl.fcntl(entry.fd, fcntl.F_SETLEASE, entry.type)
    set_owner(entry.fd, before)


def packed_lock(entry: FileLockEntry) -> bytes:
    """The argument of F_SETLK for it."""
    return FLOCK.pack(entry.type, os.SEEK_SET, entry.start, entry.len, 0)


def posix_locks(images: ImageSet, pid: int) -> list[FileLockEntry]:
    """The locks that a process has to take again when the last descriptor that is not its own was closed in it."""
    return [entry for entry in images.messages("filelocks") if entry.pid == pid and entry.flag == FL_POSIX]
