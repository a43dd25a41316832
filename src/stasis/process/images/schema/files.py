# SPDX-License-Identifier: Apache-2.0
"""Open files: files.img, fdinfo-FID.img, pipes, ghosts, remaps and locks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stasis.process.images.message import (
    HEX,
    Message,
    OpenEnum,
    boolean,
    enumeration,
    int32,
    int64,
    message,
    sint32,
    string,
    uint32,
    uint64,
)
from stasis.process.images.schema.common import FownEntry, Timeval

if TYPE_CHECKING:
    from stasis.process.images.schema.events import (
        BpfmapFileEntry,
        EventfdFileEntry,
        EventpollFileEntry,
        FanotifyFileEntry,
        InotifyFileEntry,
        PidfdEntry,
        SignalfdEntry,
        TimerfdEntry,
    )
    from stasis.process.images.schema.memory import MemfdFileEntry
    from stasis.process.images.schema.sockets import InetSkEntry, NetlinkSkEntry, PacketSockEntry, UnixSkEntry
    from stasis.process.images.schema.terminals import TtyFileEntry

__all__ = [
    "ExtFileEntry",
    "FdTypes",
    "FdinfoEntry",
    "FifoEntry",
    "FileEntry",
    "FileLockEntry",
    "GhostChunkEntry",
    "GhostFileEntry",
    "MqueueFileEntry",
    "NsFileEntry",
    "PipeDataEntry",
    "PipeEntry",
    "RegFileEntry",
    "RemapFilePathEntry",
    "RemapType",
    "TunfileEntry",
]


class FdTypes(OpenEnum):
    UND = 0
    REG = 1
    PIPE = 2
    FIFO = 3
    INETSK = 4
    UNIXSK = 5
    EVENTFD = 6
    EVENTPOLL = 7
    INOTIFY = 8
    SIGNALFD = 9
    PACKETSK = 10
    TTY = 11
    FANOTIFY = 12
    NETLINKSK = 13
    NS = 14
    TUNF = 15
    EXT = 16
    TIMERFD = 17
    MEMFD = 18
    BPFMAP = 19
    PIDFD = 20
    CTL_TTY = 65534
    AUTOFS_PIPE = 65535


class RegFileEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2, show="open")
    pos: int = uint64(3)
    fown: FownEntry = message(5, FownEntry)
    name: str = string(6)
    mnt_id: int = sint32(7, default=-1)
    size: int | None = uint64(8, default=None)
    ext: bool | None = boolean(9, default=None)
    mode: int | None = uint32(10, default=None)
    build_id: list[int] = uint32(11, factory=list)
    checksum: int | None = uint32(12, default=None)
    checksum_config: int | None = uint32(13, default=None)
    checksum_parameter: int | None = uint32(14, default=None)


class ExtFileEntry(Message):
    id: int = uint32(1)
    fown: FownEntry = message(5, FownEntry)


class MqueueFileEntry(Message):
    id: int = uint32(1)
    name: str = string(2)
    flags: int = uint32(3, show="open")


class NsFileEntry(Message):
    id: int = uint32(1)
    ns_id: int = uint32(2)
    ns_cflag: int = uint32(3)
    flags: int = uint32(4)


class PipeEntry(Message):
    id: int = uint32(1)
    pipe_id: int = uint32(2)
    flags: int = uint32(3, show=HEX)
    fown: FownEntry = message(4, FownEntry)


class PipeDataEntry(Message):
    pipe_id: int = uint32(1)
    bytes: int = uint32(2)
    size: int | None = uint32(3, default=None)


class FifoEntry(Message):
    id: int = uint32(1)
    pipe_id: int = uint32(2)
    regf_id: int | None = uint32(3, default=None)


class TunfileEntry(Message):
    id: int = uint32(1)
    netdev: str | None = string(2, default=None)
    detached: bool | None = boolean(3, default=None)
    ns_id: int | None = uint32(4, default=None)


class GhostFileEntry(Message):
    uid: int = uint32(1)
    gid: int = uint32(2)
    mode: int = uint32(3)
    dev: int | None = uint32(4, default=None, show="dev")
    ino: int | None = uint64(5, default=None)
    rdev: int | None = uint32(6, default=None, show="odev")
    atim: Timeval | None = message(7, Timeval, default=None)
    mtim: Timeval | None = message(8, Timeval, default=None)
    chunks: bool | None = boolean(9, default=None)
    size: int | None = uint64(10, default=None)
    symlnk_target: str | None = string(11, default=None)


class GhostChunkEntry(Message):
    len: int = uint64(1)
    off: int = uint64(2)


class RemapType(OpenEnum):
    LINKED = 0
    GHOST = 1
    PROCFS = 2


class RemapFilePathEntry(Message):
    orig_id: int = uint32(1)
    remap_id: int = uint32(2)
    remap_type: RemapType | None = enumeration(3, RemapType, default=None)


class FileLockEntry(Message):
    flag: int = uint32(1)
    type: int = uint32(2)
    pid: int = int32(3)
    fd: int = int32(4)
    start: int = int64(5)
    len: int = int64(6)


class FileEntry(Message):
    type: FdTypes = enumeration(1, FdTypes)
    id: int = uint32(2)
    reg: RegFileEntry | None = message(3, RegFileEntry, default=None)
    isk: InetSkEntry | None = message(4, "sockets.InetSkEntry", default=None)
    nsf: NsFileEntry | None = message(5, NsFileEntry, default=None)
    psk: PacketSockEntry | None = message(6, "sockets.PacketSockEntry", default=None)
    nlsk: NetlinkSkEntry | None = message(7, "sockets.NetlinkSkEntry", default=None)
    efd: EventfdFileEntry | None = message(8, "events.EventfdFileEntry", default=None)
    epfd: EventpollFileEntry | None = message(9, "events.EventpollFileEntry", default=None)
    sgfd: SignalfdEntry | None = message(10, "events.SignalfdEntry", default=None)
    tunf: TunfileEntry | None = message(11, TunfileEntry, default=None)
    tfd: TimerfdEntry | None = message(12, "events.TimerfdEntry", default=None)
    ify: InotifyFileEntry | None = message(13, "events.InotifyFileEntry", default=None)
    ffy: FanotifyFileEntry | None = message(14, "events.FanotifyFileEntry", default=None)
    ext: ExtFileEntry | None = message(15, ExtFileEntry, default=None)
    usk: UnixSkEntry | None = message(16, "sockets.UnixSkEntry", default=None)
    fifo: FifoEntry | None = message(17, FifoEntry, default=None)
    pipe: PipeEntry | None = message(18, PipeEntry, default=None)
    tty: TtyFileEntry | None = message(19, "terminals.TtyFileEntry", default=None)
    memfd: MemfdFileEntry | None = message(20, "memory.MemfdFileEntry", default=None)
    bpf: BpfmapFileEntry | None = message(21, "events.BpfmapFileEntry", default=None)
    pidfd: PidfdEntry | None = message(22, "events.PidfdEntry", default=None)


class FdinfoEntry(Message):
    id: int = uint32(1)
    flags: int = uint32(2)
    type: FdTypes = enumeration(3, FdTypes)
    fd: int = uint32(4)
    xattr_security_selinux: str | None = string(5, default=None)
