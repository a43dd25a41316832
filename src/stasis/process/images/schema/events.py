# SPDX-License-Identifier: Apache-2.0
"""Descriptors of anonymous inodes: eventfd, epoll, inotify, fanotify, signalfd, timerfd, pidfd, BPF maps."""

from __future__ import annotations

from stasis.process.images.message import (
    HEX,
    Message,
    OpenEnum,
    boolean,
    enumeration,
    int32,
    message,
    sint32,
    string,
    uint32,
    uint64,
)
from stasis.process.images.schema.common import FownEntry

__all__ = [
    "BpfmapDataEntry",
    "BpfmapFileEntry",
    "EventfdFileEntry",
    "EventpollFileEntry",
    "EventpollTfdEntry",
    "FanotifyFileEntry",
    "FanotifyInodeMarkEntry",
    "FanotifyMarkEntry",
    "FanotifyMountMarkEntry",
    "FhEntry",
    "InotifyFileEntry",
    "InotifyWdEntry",
    "IrmapCacheEntry",
    "MarkType",
    "PidfdEntry",
    "SignalfdEntry",
    "TimerfdEntry",
]


class FhEntry(Message):
    bytes: int = uint32(1)
    type: int = uint32(2)
    handle: list[int] = uint64(3, factory=list)
    path: str | None = string(4, default=None)
    mnt_id: int | None = uint32(5, default=None)


class IrmapCacheEntry(Message):
    dev: int = uint32(1, show="odev")
    inode: int = uint64(2)
    path: str = string(3)


class EventfdFileEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2)
    fown: FownEntry = message(3, FownEntry)
    counter: int = uint64(4)


class EventpollTfdEntry(Message):
    id: int = uint32(1)
    tfd: int = uint32(2)
    events: int = uint32(3)
    data: int = uint64(4)
    dev: int | None = uint32(5, default=None)
    inode: int | None = uint64(6, default=None)
    pos: int | None = uint64(7, default=None)


class EventpollFileEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2)
    fown: FownEntry = message(3, FownEntry)
    tfd: list[EventpollTfdEntry] = message(4, EventpollTfdEntry, factory=list)


class InotifyWdEntry(Message):
    id: int = uint32(1)
    i_ino: int = uint64(2)
    mask: int = uint32(3, show=HEX)
    ignored_mask: int = uint32(4, show=HEX)
    s_dev: int = uint32(5, show="dev")
    wd: int = uint32(6)
    f_handle: FhEntry = message(7, FhEntry)


class InotifyFileEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2, show=HEX)
    fown: FownEntry = message(4, FownEntry)
    wd: list[InotifyWdEntry] = message(5, InotifyWdEntry, factory=list)


class MarkType(OpenEnum):
    INODE = 1
    MOUNT = 2


class FanotifyInodeMarkEntry(Message):
    i_ino: int = uint64(1)
    f_handle: FhEntry = message(2, FhEntry)


class FanotifyMountMarkEntry(Message):
    mnt_id: int = uint32(1)
    path: str | None = string(2, default=None)


class FanotifyMarkEntry(Message):
    id: int = uint32(1)
    type: MarkType = enumeration(2, MarkType)
    mflags: int = uint32(3, show=HEX)
    mask: int = uint32(4, show=HEX)
    ignored_mask: int = uint32(5, show=HEX)
    s_dev: int = uint32(6, show="dev")
    ie: FanotifyInodeMarkEntry | None = message(7, FanotifyInodeMarkEntry, default=None)
    me: FanotifyMountMarkEntry | None = message(8, FanotifyMountMarkEntry, default=None)


class FanotifyFileEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2, show=HEX)
    fown: FownEntry = message(3, FownEntry)
    faflags: int = uint32(4, show=HEX)
    evflags: int = uint32(5, show=HEX)
    mark: list[FanotifyMarkEntry] = message(6, FanotifyMarkEntry, factory=list)


class SignalfdEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2, show=HEX)
    fown: FownEntry = message(3, FownEntry)
    sigmask: int = uint64(4, show=HEX)


class TimerfdEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2, show=HEX)
    fown: FownEntry = message(3, FownEntry)
    clockid: int = uint32(4)
    ticks: int = uint64(5)
    settime_flags: int = uint32(6, show=HEX)
    vsec: int = uint64(7)
    vnsec: int = uint64(8)
    isec: int = uint64(9)
    insec: int = uint64(10)


class PidfdEntry(Message):
    id: int = uint32(1)
    ino: int = uint32(2)
    flags: int = uint32(3)
    nspid: int = int32(4)
    fown: FownEntry = message(5, FownEntry)


class BpfmapFileEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2, show="open")
    pos: int = uint64(3)
    fown: FownEntry = message(4, FownEntry)
    map_type: int = uint32(5)
    key_size: int = uint32(6)
    value_size: int = uint32(7)
    map_id: int = uint32(8)
    max_entries: int = uint32(9)
    map_flags: int = uint32(10)
    memlock: int = uint64(11)
    frozen: bool = boolean(12)
    map_name: str = string(13)
    ifindex: int = uint32(14)
    mnt_id: int = sint32(15, default=-1)
    map_extra: int | None = uint64(16, default=None)


class BpfmapDataEntry(Message):
    map_id: int = uint32(1)
    keys_bytes: int = uint32(2)
    values_bytes: int = uint32(3)
    count: int = uint32(4)
