# SPDX-License-Identifier: Apache-2.0
"""Terminals: pseudo terminals whose both ends are in the tree, and the terminal of the caller, which at the restore
is the terminal of whoever restores."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import struct
from typing import TYPE_CHECKING

from stasis.errors import BusyError, StateError
from stasis.linux import procfs
from stasis.linux.ioctl import IOR, IOW
from stasis.process.files.descriptor import Descriptor, duplicate, owner, set_flags
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.files.regular import path_entry
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.terminals import (
    TermiosEntry,
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
FIONREAD, TIOCGWINSZ, TIOCSWINSZ, TIOCPKT, TIOCEXCL, TIOCSCTTY = 0x541B, 0x5413, 0x5414, 0x5420, 0x540C, 0x540E
TCGETS2, TCSETS2 = IOR("T", 0x2A, 44), IOW("T", 0x2B, 44)
TIOCGPTN, TIOCSPTLCK = IOR("T", 0x30, 4), IOW("T", 0x31, 4)
TIOCGPTLCK, TIOCGPKT, TIOCGEXCL = IOR("T", 0x39, 4), IOR("T", 0x38, 4), IOR("T", 0x40, 4)
TERMIOS = struct.Struct("<4IB19sII")  # struct termios2
WINSIZE = struct.Struct("<4H")
INT = struct.Struct("<i")
MOST_TERMINALS = 4096


class Terminals(FileKind):
    type = FdTypes.TTY
    field = "tty"

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self._described: dict[int, TtyInfoEntry] = {}
        self._pairs: set[int] = set()

    def claims(self, descriptor: Descriptor) -> bool:
        device = descriptor.status.st_rdev
        is_terminal = device == PTMX or os.major(device) in SLAVE_MAJORS
        return descriptor.kind == stat.S_IFCHR and is_terminal

    def check_all(self, looking: Looking) -> None:
        found = [descriptor for descriptor in looking.descriptors if self.claims(descriptor)]
        masters = {_index(one) for one in found if _is_master(one)}
        slaves = {_index(one) for one in found if not _is_master(one)}
        for one in found:
            if _index(one) in masters:
                self._check_pair(one, looking)
            elif _outside_name(one.status) in self.options.outside:
                continue
            elif len(slaves) > 1:
                reason = "it is one of several terminals whose other ends are outside the tree"
                looking.findings.add(one.pid, one.where, reason)
            elif not self.options.shell_job:
                reason = "the other end of the terminal is outside the tree"
                looking.findings.add(one.pid, one.where, reason, "--shell-job")

    def _check_pair(self, one: Descriptor, looking: Looking) -> None:
        fd = duplicate(one)
        try:
            if _get(fd, FIONREAD):
                reason = "what was written to it and not read yet would be lost"
                looking.findings.add(one.pid, one.where, reason, passes=True)
        finally:
            os.close(fd)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        index = _index(descriptor)
        info = index + 1
        if info not in self._described:
            self._described[info] = _describe(fd, info, index, descriptor)
            if not _is_master(descriptor) and _outside_name(descriptor.status) in self.options.outside:
                self._described[info].type = TtyType.EXT_TTY
                self._described[info].dev = descriptor.status.st_dev
        if _is_master(descriptor):
            self._pairs.add(info)
        device = "/dev/ptmx" if _is_master(descriptor) else f"/dev/pts/{index}"
        entry = TtyFileEntry(id=number, tty_info_id=info, flags=descriptor.flags, fown=owner(fd),
                             regf_id=_device_file(device, descriptor, saving))  # fmt: skip
        return FileEntry(type=FdTypes.TTY, id=number, tty=entry)

    def finish(self, saving: Saving) -> None:
        """All processes were here: which session each terminal controls, and which of its groups is in front."""
        stats = [procfs.stat(pid) for pid in saving.descriptors]
        for info in self._described.values():
            assert info.pty is not None
            device = _encoded(os.makedev(SLAVE_MAJORS[0] + info.pty.index // 256, info.pty.index % 256))
            of_terminal = [stat for stat in stats if stat.tty_nr == device]
            is_ours = info.id in self._pairs
            if is_ours and of_terminal and any(stat.pid == of_terminal[0].session for stat in stats):
                info.sid, info.pgrp = of_terminal[0].session, max(of_terminal[0].tpgid, 0)
            saving.out.write("tty-info", info)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found: TtyFileEntry = self.message_of(entry)
        info = _info_of(found, opened)
        masters = opened.state.setdefault(Terminals, {})
        if _is_master_entry(found, opened):
            fd = _open_master(info)
            masters[info.id] = entry.id
            set_flags(fd, found.flags)
            return fd
        if info.id not in masters:
            for other in opened.images.messages("files"):
                mine = other.tty
                if mine is not None and mine.tty_info_id == info.id and _is_master_entry(mine, opened):
                    opened.open(other.id)
        if info.type == TtyType.EXT_TTY:
            name = f"tty[{info.rdev:x}:{info.dev or 0:x}]"
            raise StateError(f"the terminal {name} was left to the restorer to bring",
                             hint=f"give a descriptor for it: --inherit-fd with {name}")  # fmt: skip
        flags = found.flags & (os.O_ACCMODE | os.O_NONBLOCK) | os.O_NOCTTY | os.O_CLOEXEC
        if info.id in masters:
            assert info.pty is not None
            return os.open(f"/dev/pts/{info.pty.index}", flags)
        return os.open(_callers_terminal(), flags)

    def resource(self, entry: FileEntry, opened: Opened) -> str:
        info = _info_of(self.message_of(entry), opened)
        if info.type == TtyType.EXT_TTY:
            return f"tty[{info.rdev:x}:{info.dev or 0:x}]"
        return f"tty[{info.id}]"

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


def _get(fd: int, request: int) -> int:
    return int(INT.unpack(fcntl.ioctl(fd, request, bytes(INT.size)))[0])


def _describe(fd: int, number: int, index: int, descriptor: Descriptor) -> TtyInfoEntry:
    *modes, line, cc, ispeed, ospeed = TERMIOS.unpack(fcntl.ioctl(fd, TCGETS2, bytes(TERMIOS.size)))
    rows, columns, width, height = WINSIZE.unpack(fcntl.ioctl(fd, TIOCGWINSZ, bytes(WINSIZE.size)))
    is_master = _is_master(descriptor)
    return TtyInfoEntry(
        id=number, type=TtyType.PTY, locked=bool(_get(fd, TIOCGPTLCK)) if is_master else False,
        exclusive=bool(_get(fd, TIOCGEXCL)), packet_mode=bool(_get(fd, TIOCGPKT)) if is_master else False,
        sid=0, pgrp=0, rdev=_encoded(descriptor.status.st_rdev),
        termios=TermiosEntry(c_iflag=modes[0], c_oflag=modes[1], c_cflag=modes[2], c_lflag=modes[3], c_line=line,
                             c_ispeed=ispeed, c_ospeed=ospeed, c_cc=list(cc)),
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
        if info.id == found.tty_info_id and info.pty is not None:
            assert isinstance(info, TtyInfoEntry)
            return info
    raise damaged(opened.images.file_path("tty-info"), 0, f"it has no pseudo terminal {found.tty_info_id}")


def _is_master_entry(found: TtyFileEntry, opened: Opened) -> bool:
    return opened.regular(found.regf_id or 0).name.endswith("ptmx")


def _open_master(info: TtyInfoEntry) -> int:
    """A new pseudo terminal with the number and settings of the old one."""
    assert info.pty is not None
    refused: list[int] = []
    try:
        while len(refused) < MOST_TERMINALS:
            fd = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            index = _get(fd, TIOCGPTN)
            if index == info.pty.index:
                _set_up(fd, info)
                return fd
            refused.append(fd)
            if index > info.pty.index:
                break  # the kernel gives the lowest that is free
    finally:
        for fd in refused:
            os.close(fd)
    raise BusyError(f"the terminal /dev/pts/{info.pty.index}, which a process had made, is in use",
                    hint="restore where its number is free")  # fmt: skip


def _set_up(fd: int, info: TtyInfoEntry) -> None:
    found, size = info.termios, info.winsize
    if found is not None:
        cc = bytes(value & 0xFF for value in found.c_cc)
        fcntl.ioctl(fd, TCSETS2, TERMIOS.pack(found.c_iflag, found.c_oflag, found.c_cflag, found.c_lflag,
                                              found.c_line & 0xFF, cc, found.c_ispeed, found.c_ospeed))  # fmt: skip
    if size is not None:
        fields = (size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel)
        fcntl.ioctl(fd, TIOCSWINSZ, WINSIZE.pack(*(field & 0xFFFF for field in fields)))
    fcntl.ioctl(fd, TIOCSPTLCK, INT.pack(info.locked))
    fcntl.ioctl(fd, TIOCPKT, INT.pack(info.packet_mode))


def _callers_terminal() -> str:
    for fd in range(3):
        if os.isatty(fd):
            return os.ttyname(fd)
    raise StateError("a process had the terminal of the shell that it was started from, and there is no terminal here",
                     hint="restore from a terminal, or give a descriptor for it with --inherit-fd")  # fmt: skip
