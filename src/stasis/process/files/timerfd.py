# SPDX-License-Identifier: Apache-2.0
"""timerfd_create(2): a timer, with the time that was left and the expirations that nobody read."""

from __future__ import annotations

import time

from stasis.linux import timerfd
from stasis.process.files.descriptor import Descriptor, owner, set_flags
from stasis.process.files.kind import FileKind, Opened, Saving
from stasis.process.images.schema.events import TimerfdEntry
from stasis.process.images.schema.files import FdTypes, FileEntry

__all__ = ["Timerfds"]

SECOND = 10**9


class Timerfds(FileKind):
    type = FdTypes.TIMERFD
    field = "tfd"

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:[timerfd]"

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        interval, value = _pair(descriptor.field("it_interval")), _pair(descriptor.field("it_value"))
        ticks = int(descriptor.field("ticks"))
        if ticks and value == (0, 0):
            value = interval  # the kernel starts a periodic timer that expired when its ticks are read
        entry = TimerfdEntry(
            id=number, flags=descriptor.flags, fown=owner(fd), clockid=int(descriptor.field("clockid")), ticks=ticks,
            settime_flags=int(descriptor.field("settime flags"), 8), vsec=value[0], vnsec=value[1],
            isec=interval[0], insec=interval[1],
        )  # fmt: skip
        return FileEntry(type=FdTypes.TIMERFD, id=number, tfd=entry)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found = self.message_of(entry)
        fd = timerfd.timerfd(found.clockid)
        set_flags(fd, found.flags)
        return fd

    def connect(self, opened: Opened) -> None:
        """Start the timers, as late as can be."""
        for number in opened.numbers(FdTypes.TIMERFD):
            _start(opened.open(number), self.message_of(opened.entry(number)))


def _pair(text: str) -> tuple[int, int]:
    seconds, nanoseconds = text.strip("()").split(",")
    return int(seconds), int(nanoseconds)


def _start(fd: int, entry: TimerfdEntry) -> None:
    value = entry.vsec * SECOND + entry.vnsec
    if entry.ticks and not value:
        value = entry.isec * SECOND + entry.insec  # criu has what the kernel tells of one that expired
    if value and entry.settime_flags & timerfd.TFD_TIMER_ABSTIME:
        value += time.clock_gettime_ns(entry.clockid)
    timerfd.timerfd_settime(fd, entry.settime_flags, (entry.isec, entry.insec), divmod(value, SECOND))
    if entry.ticks:
        timerfd.set_ticks(fd, entry.ticks)
