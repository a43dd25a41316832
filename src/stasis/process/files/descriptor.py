# SPDX-License-Identifier: Apache-2.0
"""A descriptor of a task as it is seen from outside, and what every open file description has, of whatever kind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from typing import NamedTuple

from stasis.linux import procfs
from stasis.linux.pidfd import Pidfd
from stasis.process.images.schema.common import FownEntry

__all__ = ["F_OWNER_TID", "Descriptor", "descriptor_of", "descriptors", "duplicate", "owner", "set_flags", "set_owner"]

O_CLOEXEC = os.O_CLOEXEC
CHANGEABLE = os.O_NONBLOCK | os.O_APPEND | os.O_ASYNC | os.O_DIRECT | os.O_NOATIME
# include/uapi/asm-generic/fcntl.h
F_OWNER_TID = 0
F_GETOWN_EX, F_SETOWN_EX, F_GETSIG, F_SETSIG = 16, 15, 11, 10
OWNER = struct.Struct("<ii")


class Descriptor(NamedTuple):
    """Number `fd` of process `pid`. `link` is what /proc says it is; `flags` are those of the open file description;
    `info` the lines of its fdinfo."""

    pid: int
    fd: int
    link: str
    status: os.stat_result
    flags: int
    position: int
    close_on_exec: bool
    info: str

    @property
    def is_deleted(self) -> bool:
        """Whether its file has no name any more."""
        return self.status.st_nlink == 0

    @property
    def kind(self) -> int:
        """S_IFREG and so on; 0 for what has no file type, as eventfds."""
        return stat.S_IFMT(self.status.st_mode)

    def field(self, name: str) -> str:
        """The value of a line of its fdinfo; "" where this kernel has none of that name."""
        for line in self.info.splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        return ""

    @property
    def where(self) -> str:
        """For messages."""
        return f"descriptor {self.fd} ({self.link})"


def descriptors(pid: int) -> list[Descriptor]:
    """All descriptors of a process that stands still, by number."""
    return [descriptor_of(pid, fd) for fd in sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))]


def descriptor_of(pid: int, fd: int) -> Descriptor:
    """One descriptor."""
    info = procfs.read(pid, f"fdinfo/{fd}").decode(errors="surrogateescape")
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    flags = int(fields["flags"], 8)
    link = f"/proc/{pid}/fd/{fd}"
    return Descriptor(pid, fd, os.readlink(link), os.stat(link), flags & ~O_CLOEXEC, int(fields["pos"]),
                      bool(flags & O_CLOEXEC), info)  # fmt: skip


def owner(fd: int) -> FownEntry:
    """Who gets a signal when something happens on a description, and which; `fd` is a descriptor of ours for it."""
    kind, pid = OWNER.unpack(fcntl.fcntl(fd, F_GETOWN_EX, bytes(OWNER.size)))
    signum = fcntl.fcntl(fd, F_GETSIG)
    return FownEntry(uid=0, euid=0, signum=signum, pid_type=kind if pid else 0, pid=max(pid, 0))


def set_owner(fd: int, entry: FownEntry) -> None:
    """Give a restored description its owner. One that is not there is told of nothing."""
    if entry.pid:
        with contextlib.suppress(ProcessLookupError):
            fcntl.fcntl(fd, F_SETOWN_EX, OWNER.pack(entry.pid_type, entry.pid))
    if entry.signum:
        fcntl.fcntl(fd, F_SETSIG, entry.signum)


def set_flags(fd: int, flags: int) -> None:
    """Give a restored description those of the flags that can be changed."""
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & CHANGEABLE)


def duplicate(descriptor: Descriptor) -> int:
    """A descriptor of ours for the same open file description."""
    with Pidfd(descriptor.pid) as pidfd:
        return pidfd.get(descriptor.fd)
