# SPDX-License-Identifier: Apache-2.0
"""Terminals: pseudo terminals whose both ends are in the tree, with what waits in them, and the terminal of the caller,
which at the restore is the terminal of whoever restores."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import struct
from typing import TYPE_CHECKING

from stasis.errors import BusyError, StateError
from stasis.linux import procfs
from stasis.linux.ioctl import IOR, IOW
from stasis.process.files.characters import pack, unpack
from stasis.process.files.descriptor import Descriptor, duplicate, owner, set_flags
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.files.regular import mount_of, path_entry
from stasis.process.files.unread import ROOM, Pair, Settings, Unread, get, held_outside, looked_at
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.terminals import (
    TermiosEntry,
    TtyDataEntry,
    TtyFileEntry,
    TtyInfoEntry,
    TtyPtyEntry,
    TtyType,
    WinsizeEntry,
)

if TYPE_CHECKING:
    from stasis.process.files.options import FileOptions
    from stasis.process.images.imageset import ImageSet

__all__ = ["Terminals", "controlled", "put_in_front", "take_control"]

PTMX = os.makedev(5, 2)
SLAVE_MAJORS = range(136, 144)  # Documentation/admin-guide/devices.txt
# include/uapi/asm-generic/ioctls.h
FIONREAD, TIOCGWINSZ, TIOCSWINSZ, TIOCPKT, TIOCSCTTY = 0x541B, 0x5413, 0x5414, 0x5420, 0x540E
TIOCGLCKTRMIOS, TIOCSLCKTRMIOS, EXTPROC = 0x5456, 0x5457, 0o200000
TIOCGPTN, TIOCSPTLCK = IOR("T", 0x30, 4), IOW("T", 0x31, 4)
TIOCGPTLCK, TIOCGPKT, TIOCGEXCL = IOR("T", 0x39, 4), IOR("T", 0x38, 4), IOR("T", 0x40, 4)
LOCKED = struct.Struct("<4IB19s")  # struct termios
WINSIZE = struct.Struct("<4H")
INT = struct.Struct("<i")
MOST_TERMINALS = 4096
MOST_UNREAD = 1 << 16


class Terminals(FileKind):
    type = FdTypes.TTY
    field = "tty"

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self._described: dict[int, TtyInfoEntry] = {}
        self._masters: dict[int, Descriptor] = {}
        self._slaves: dict[int, Descriptor] = {}

    def claims(self, descriptor: Descriptor) -> bool:
        device = descriptor.status.st_rdev
        is_terminal = device == PTMX or os.major(device) in SLAVE_MAJORS
        return descriptor.kind == stat.S_IFCHR and is_terminal

    def check_all(self, looking: Looking) -> None:
        found = [descriptor for descriptor in looking.descriptors if self.claims(descriptor)]
        masters = {_index(one) for one in found if _is_master(one)}
        slaves = {_index(one) for one in found if not _is_master(one)}
        self._check_pairs([one for one in found if _index(one) in masters], masters - slaves, looking)
        for one in found:
            if mount_of(one, one.link) != -1:
                reason = "it is a terminal of another mount namespace than that of the first process"
                looking.findings.add(one.pid, one.where, reason)
            if _index(one) in masters or _outside_name(one.status) in self.options.outside:
                continue
            if len(slaves - masters) > 1:
                reason = "it is one of several terminals whose other ends are outside the tree"
                looking.findings.add(one.pid, one.where, reason)
            elif not self.options.shell_job:
                reason = "the other end of the terminal is outside the tree"
                looking.findings.add(one.pid, one.where, reason, "--shell-job")

    @staticmethod
    def _check_pairs(pairs: list[Descriptor], alone: set[int], looking: Looking) -> None:
        """What waits in a terminal can be taken along if nobody but the tree reads and writes there."""
        waiting = [one for one in pairs if _waiting(one)]
        outside = held_outside({one.pid for one in looking.descriptors}) if waiting else set()
        for one in waiting:
            if _index(one) in alone:
                reason = "its other end is not open, and what was written to it and not read yet would be lost"
            elif _index(one) in outside:
                reason = "processes outside the tree have it open, who could read what was not read yet meanwhile"
            else:
                reason = _why_not_now(one)
            if reason:
                looking.findings.add(one.pid, one.where, reason, passes=True)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        index = _index(descriptor)
        info = _info_id(descriptor)
        (self._masters if _is_master(descriptor) else self._slaves)[index] = descriptor
        if info not in self._described:
            self._described[info] = _describe(fd, info, index, descriptor)
            if not _is_master(descriptor) and _outside_name(descriptor.status) in self.options.outside:
                self._described[info].type = TtyType.EXT_TTY
                self._described[info].pty = None
        device = "/dev/ptmx" if _is_master(descriptor) else f"/dev/pts/{index}"
        entry = TtyFileEntry(id=number, tty_info_id=info, flags=descriptor.flags, fown=owner(fd),
                             regf_id=_device_file(device, descriptor, saving))  # fmt: skip
        return FileEntry(type=FdTypes.TTY, id=number, tty=entry)

    def finish(self, saving: Saving) -> None:
        """All processes were here: which session each terminal controls, and which of its groups is in front; and what
        waits to be read."""
        stats = [procfs.stat(pid) for pid in saving.descriptors]
        for info in self._described.values():
            index = info.id >> 1
            device = _encoded(os.makedev(SLAVE_MAJORS[0] + index // 256, index % 256))
            of_terminal = [stat for stat in stats if stat.tty_nr == device]
            if index in self._masters and of_terminal and any(stat.pid == of_terminal[0].session for stat in stats):
                info.sid, info.pgrp = of_terminal[0].session, max(of_terminal[0].tpgid, 0)
            saving.out.write("tty-info", info)
        self._keep_unread(saving)

    def _keep_unread(self, saving: Saving) -> None:
        """Of canonical terminals also the beginning of a line, which nothing tells of."""
        pairs = [index for index, slave in self._slaves.items() if index in self._masters and (
            _waiting(self._masters[index]) or _waiting(slave) or _settings(slave).canonical)]  # fmt: skip
        outside = held_outside(saving.descriptors) if pairs else set()
        ours = [index for index in pairs if index not in outside and not _why_not_now(self._slaves[index])]
        masters = [duplicate(self._masters[index]) for index in ours]
        try:
            found = looked_at(masters) if masters else []
        finally:
            for fd in masters:
                os.close(fd)
        for index, unread in zip(ours, found, strict=True):
            for reader, data in ((self._masters[index], unread.output), (self._slaves[index], unread.input)):
                if data:
                    saving.out.write("tty-data", TtyDataEntry(tty_id=_info_id(reader), data=data))

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found: TtyFileEntry = self.message_of(entry)
        info = _info_of(found, opened)
        masters = opened.state.setdefault(Terminals, {})
        if _is_master_entry(found, opened):
            fd = _open_master(info, opened)
            masters[_index_of(info, opened)] = entry.id
            set_flags(fd, found.flags)
            return fd
        if info.type == TtyType.EXT_TTY:
            name = self.resource(entry, opened)
            raise StateError(f"the terminal {name} was left to the restorer to bring",
                             hint=f"give a descriptor for it: --inherit-fd with {name}")  # fmt: skip
        flags = found.flags & (os.O_ACCMODE | os.O_NONBLOCK) | os.O_NOCTTY | os.O_CLOEXEC
        index = _index_of(info, opened)
        self._open_master_of(index, opened)
        return os.open(f"/dev/pts/{index}" if index in masters else _callers_terminal(), flags)

    @staticmethod
    def _open_master_of(index: int, opened: Opened) -> None:
        for other in opened.images.messages("files"):
            if index in opened.state[Terminals]:
                return
            is_master = other.tty is not None and _is_master_entry(other.tty, opened)
            if is_master and _index_of(_info_of(other.tty, opened), opened) == index:
                opened.open(other.id)

    def resource(self, entry: FileEntry, opened: Opened) -> str:
        info = _info_of(self.message_of(entry), opened)
        return f"tty[{info.rdev:x}:{info.dev or 0:x}]"

    def connect(self, opened: Opened) -> None:
        """Terminals that were made get what waited in them; those of the caller have what waits in them."""
        waiting: dict[int, Unread] = {}
        for data in opened.images.messages("tty-data"):
            if len(data.data) > MOST_UNREAD:
                raise damaged(opened.images.file_path("tty-data"), 0, "more waits in a terminal than it can hold")
            info = next((info for info in opened.images.messages("tty-info") if info.id == data.tty_id), None)
            if info is None:
                raise damaged(opened.images.file_path("tty-data"), 0, f"there is no terminal {data.tty_id}")
            before = waiting.get(_index_of(info, opened), Unread(b"", b""))
            is_masters = info.rdev == _encoded(PTMX)
            waiting[_index_of(info, opened)] = (
                before._replace(output=data.data) if is_masters else before._replace(input=data.data)
            )
        for index, number in opened.state.get(Terminals, {}).items():
            master = opened.open(number)
            if index in waiting:
                with Pair(master) as pair:
                    pair.put(waiting[index])
            if _info_of(self.message_of(opened.entry(number)), opened).locked:  # now that the other ends are open
                fcntl.ioctl(master, TIOCSPTLCK, INT.pack(1))

    def done(self, opened: Opened) -> None:
        opened.state.pop(Terminals, None)


def controlled(images: ImageSet) -> dict[int, tuple[str, int]]:
    """By session of the tree: the path of the terminal that controls it, and the process group in front, or 0."""
    found = [info for info in images.messages("tty-info") if info.pty is not None and info.sid]
    return {info.sid: (f"/dev/pts/{info.pty.index}", info.pgrp) for info in found}


def take_control(path: str) -> None:
    """Make a terminal that of the session that this process leads. Processes inherit it at birth only."""
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TIOCSCTTY, 0)
    finally:
        os.close(fd)


def put_in_front(path: str, pgid: int) -> None:
    """Make a process group the one in front of the terminal of this session."""
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    try:
        os.tcsetpgrp(fd, pgid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(fd)


def _is_master(descriptor: Descriptor) -> bool:
    return descriptor.status.st_rdev == PTMX


def _index(descriptor: Descriptor) -> int:
    if _is_master(descriptor):
        return int(descriptor.field("tty-index"))
    return (os.major(descriptor.status.st_rdev) - SLAVE_MAJORS[0]) * 256 + os.minor(descriptor.status.st_rdev)


def _outside_name(status: os.stat_result) -> str:
    """What criu calls a terminal that is left to the restorer."""
    return f"tty[{_encoded(status.st_rdev):x}:{status.st_dev:x}]"


def _encoded(device: int) -> int:
    """As /proc/PID/stat has it (new_encode_dev)."""
    minor = os.minor(device)
    return (minor & 0xFF) | os.major(device) << 8 | (minor & ~0xFF) << 12


def _info_id(descriptor: Descriptor) -> int:
    """As criu counts them: the master's is that of the slave and one more."""
    return _index(descriptor) << 1 | _is_master(descriptor)


def _waiting(descriptor: Descriptor) -> int:
    """How many bytes can be read. To poll has the kernel hand on what its worker has not yet (n_tty_poll())."""
    fd = duplicate(descriptor)
    try:
        select.select([fd], [], [], 0)
        return get(fd, FIONREAD)
    finally:
        os.close(fd)


def _settings(descriptor: Descriptor) -> Settings:
    fd = duplicate(descriptor)
    try:
        return Settings.of(fd)
    finally:
        os.close(fd)


def _why_not_now(descriptor: Descriptor) -> str:
    """Why what waits in a terminal cannot be taken out and put back."""
    fd = duplicate(descriptor)
    try:
        if not _is_master(descriptor) and get(fd, FIONREAD) >= ROOM:
            return "more was written to it and not read yet than can be put back"
        if Settings.of(fd).lflag & EXTPROC or any(_locked(fd)):
            return "its settings are another machine's or locked, and what was not read yet cannot be put back"
        if _is_master(descriptor) and select.select([], [], [fd], 0)[2]:
            return "its packet mode has something to tell, and what was not read yet would be lost"
        return ""
    finally:
        os.close(fd)


def _locked(fd: int) -> bytes:
    return fcntl.ioctl(fd, TIOCGLCKTRMIOS, bytes(LOCKED.size))


def _describe(fd: int, number: int, index: int, descriptor: Descriptor) -> TtyInfoEntry:
    found = Settings.of(fd)
    *locked, locked_line, locked_cc = LOCKED.unpack(_locked(fd))
    rows, columns, width, height = WINSIZE.unpack(fcntl.ioctl(fd, TIOCGWINSZ, bytes(WINSIZE.size)))
    is_master = _is_master(descriptor)
    return TtyInfoEntry(
        id=number, type=TtyType.PTY, locked=bool(get(fd, TIOCGPTLCK)) if is_master else False,
        exclusive=bool(get(fd, TIOCGEXCL)), packet_mode=bool(get(fd, TIOCGPKT)) if is_master else False,
        sid=0, pgrp=0, rdev=_encoded(descriptor.status.st_rdev), dev=descriptor.status.st_dev,
        termios=TermiosEntry(c_iflag=found.iflag, c_oflag=found.oflag, c_cflag=found.cflag, c_lflag=found.lflag,
                             c_line=found.line, c_ispeed=found.ispeed, c_ospeed=found.ospeed, c_cc=pack(found.cc)),
        termios_locked=TermiosEntry(c_iflag=locked[0], c_oflag=locked[1], c_cflag=locked[2], c_lflag=locked[3],
                                    c_line=locked_line, c_ispeed=0, c_ospeed=0, c_cc=pack(locked_cc)),
        winsize=WinsizeEntry(ws_row=rows, ws_col=columns, ws_xpixel=width, ws_ypixel=height),
        pty=TtyPtyEntry(index=index),
    )  # fmt: skip


def _device_file(device: str, descriptor: Descriptor, saving: Saving) -> int:
    number = saving.new_id()
    entry = path_entry(number, device, descriptor.status, descriptor.flags)
    saving.out.write("files", FileEntry(type=FdTypes.REG, id=number, reg=entry))
    return number


def _info_of(found: TtyFileEntry, opened: Opened) -> TtyInfoEntry:
    for info in opened.images.messages("tty-info"):
        if info.id == found.tty_info_id:
            assert isinstance(info, TtyInfoEntry)
            return info
    raise damaged(opened.images.file_path("tty-info"), 0, f"it has no terminal {found.tty_info_id}")


def _index_of(info: TtyInfoEntry, opened: Opened) -> int:
    if info.pty is None:
        raise damaged(opened.images.file_path("tty-info"), 0, f"its terminal {info.id} is no pseudo terminal")
    return info.pty.index


def _is_master_entry(found: TtyFileEntry, opened: Opened) -> bool:
    return opened.regular(found.regf_id or 0).name.endswith("ptmx")


def _open_master(info: TtyInfoEntry, opened: Opened) -> int:
    """A new pseudo terminal with the number and settings of the old one."""
    wanted = _index_of(info, opened)
    refused: list[int] = []
    try:
        while len(refused) < MOST_TERMINALS:
            fd = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            index = get(fd, TIOCGPTN)
            if index == wanted:
                _set_up(fd, info, opened.images.file_path("tty-info"))
                return fd
            refused.append(fd)
            if index > wanted:
                break  # the kernel gives the lowest that is free
    finally:
        for fd in refused:
            os.close(fd)
    raise BusyError(f"the terminal /dev/pts/{wanted}, which a process had made, is in use",
                    hint="restore where its number is free")  # fmt: skip


def _set_up(fd: int, info: TtyInfoEntry, path: str) -> None:
    found, locked, size = info.termios, info.termios_locked, info.winsize
    if found is not None:
        cc = unpack(found.c_cc, path)
        Settings(found.c_iflag, found.c_oflag, found.c_cflag, found.c_lflag, found.c_line & 0xFF, cc,
                 found.c_ispeed, found.c_ospeed).set(fd)  # fmt: skip
    if locked is not None:
        kept = LOCKED.pack(locked.c_iflag, locked.c_oflag, locked.c_cflag, locked.c_lflag, locked.c_line & 0xFF,
                           unpack(locked.c_cc, path))  # fmt: skip
        if any(kept):  # to lock takes a right, CAP_SYS_ADMIN
            fcntl.ioctl(fd, TIOCSLCKTRMIOS, kept)
    if size is not None:
        fields = (size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel)
        fcntl.ioctl(fd, TIOCSWINSZ, WINSIZE.pack(*(field & 0xFFFF for field in fields)))
    fcntl.ioctl(fd, TIOCSPTLCK, INT.pack(0))
    fcntl.ioctl(fd, TIOCPKT, INT.pack(info.packet_mode))


def _callers_terminal() -> str:
    for fd in range(3):
        if os.isatty(fd):
            return os.ttyname(fd)
    raise StateError("a process had the terminal of the shell that it was started from, and there is no terminal here",
                     hint="restore from a terminal, or give a descriptor for it with --inherit-fd")  # fmt: skip
