# SPDX-License-Identifier: Apache-2.0
"""epoll(7): what it watches. /proc tells the number under which a description was added, which may have been closed
or given to another file since; kcmp(2) tells which descriptor leads there now."""

from __future__ import annotations

import fcntl
import os
import re
import select
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stasis.linux import epoll
from stasis.linux.kcmp import same_epoll_target, same_file
from stasis.process.files.descriptor import Descriptor, owner, set_flags
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.images.damage import damaged
from stasis.process.images.schema.events import EventpollFileEntry, EventpollTfdEntry
from stasis.process.images.schema.files import FdTypes, FileEntry

if TYPE_CHECKING:
    from stasis.process.files.options import FileOptions
    from stasis.process.images.schema.common import FownEntry

__all__ = ["Epolls"]

LINK = "anon_inode:[eventpoll]"
# fs/eventpoll.c, ep_show_fdinfo
TARGET = re.compile(r"tfd:\s*(\d+)\s+events:\s*([0-9a-f]+)\s+data:\s*([0-9a-f]+)"
                    r"(?:\s+pos:\s*(\d+)\s+ino:\s*([0-9a-f]+)\s+sdev:\s*([0-9a-f]+))?")  # fmt: skip


class Epolls(FileKind):
    type = FdTypes.EVENTPOLL
    field = "epfd"

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self._waiting: list[tuple[Descriptor, int, FownEntry]] = []

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == LINK

    def check_all(self, looking: Looking) -> None:
        for descriptor in looking.descriptors:
            if self.claims(descriptor):
                for target in _targets(descriptor, looking.descriptors, 0):
                    if isinstance(target, str):
                        looking.findings.add(descriptor.pid, descriptor.where, target)
                    elif _is_process(descriptor.pid, target.tfd, looking.descriptors):
                        reason = f"it watches descriptor {target.tfd}, a process, which is not supported yet"
                        looking.findings.add(descriptor.pid, descriptor.where, reason)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> None:
        self._waiting.append((descriptor, number, owner(fd)))

    def finish(self, saving: Saving) -> None:
        everywhere = [descriptor for table in saving.descriptors.values() for descriptor in table]
        for descriptor, number, fown in self._waiting:
            targets = [target for target in _targets(descriptor, everywhere, number) if not isinstance(target, str)]
            entry = EventpollFileEntry(id=number, flags=descriptor.flags, fown=fown, tfd=targets)
            saving.out.write("files", FileEntry(type=FdTypes.EVENTPOLL, id=number, epfd=entry))

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        with select.epoll() as found:
            fd = os.dup(found.fileno())
        set_flags(fd, self.message_of(entry).flags)
        return fd

    def connect(self, opened: Opened) -> None:
        for number in opened.numbers(FdTypes.EVENTPOLL):
            entry = self.message_of(opened.entry(number))
            table = _table_with(number, entry, opened)
            for target in entry.tfd:
                _add(opened.open(number), opened.open(table[target.tfd]), target)


def _is_process(pid: int, fd: int, everywhere: Sequence[Descriptor]) -> bool:
    """Whether it is a descriptor of a living process: those are made after epolls are filled."""
    return any((one.pid, one.fd, one.link) == (pid, fd, "anon_inode:[pidfd]") and one.field("NSpid") != "-1"
               for one in everywhere)  # fmt: skip


def _targets(found: Descriptor, everywhere: Sequence[Descriptor], number: int) -> Iterable[EventpollTfdEntry | str]:
    """What an epoll watches, or why that cannot be kept."""
    holders = [other for other in everywhere if other.link == LINK
               and same_file(found.pid, found.fd, other.pid, other.fd)]  # fmt: skip
    seen: Counter[int] = Counter()
    for tfd, events, data, pos, ino, sdev in TARGET.findall(found.info):
        target = EventpollTfdEntry(id=number, tfd=int(tfd), events=int(events, 16), data=int(data, 16))
        if ino:
            target.dev, target.inode, target.pos = int(sdev, 16), int(ino, 16), int(pos)
        offset = seen[target.tfd]
        seen[target.tfd] += 1
        now = _number_now(holders, everywhere, target, offset)
        if now < 0:
            yield f"it watches what was descriptor {tfd}, which none of the processes that have the epoll has open"
            continue
        target.tfd = now
        yield target


def _number_now(
    holders: Sequence[Descriptor], everywhere: Sequence[Descriptor], target: EventpollTfdEntry, offset: int
) -> int:
    """The number under which a process that holds the epoll has the target open now; -1 if none has."""
    for holder in holders:
        own = [other for other in everywhere if other.pid == holder.pid]
        for other in sorted(own, key=lambda one: one.fd != target.tfd):
            if target.inode is not None and other.status.st_ino != target.inode:
                continue
            if same_epoll_target(other.pid, other.fd, holder.pid, holder.fd, target.tfd, offset):
                return other.fd
    return -1


def _table_with(number: int, entry: EventpollFileEntry, opened: Opened) -> dict[int, int]:
    """The ids by descriptor of a table that has the epoll and all that it watches."""
    for table in opened.tables.values():
        ids = {each.fd: each.id for each in table}
        if number in ids.values() and all(target.tfd in ids for target in entry.tfd):
            return ids
    if not entry.tfd:
        return {}
    raise damaged(opened.images.file_path("files"), 0, f"epoll {number} watches descriptors that no process has")


def _add(fd: int, target_fd: int, target: EventpollTfdEntry) -> None:
    """Watch a description under a number that may be in use here for something else."""
    try:
        kept = fcntl.fcntl(target.tfd, fcntl.F_DUPFD_CLOEXEC, target_fd)
    except OSError:
        kept = -1  # it is free
    os.dup2(target_fd, target.tfd, inheritable=False)
    try:
        epoll.add(fd, target.tfd, target.events, target.data)
    finally:
        if kept >= 0:
            os.dup2(kept, target.tfd, inheritable=False)
            os.close(kept)
        else:
            os.close(target.tfd)
