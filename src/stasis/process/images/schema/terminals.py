# SPDX-License-Identifier: Apache-2.0
"""Terminals: their descriptors, settings and unread data."""

from __future__ import annotations

from stasis.process.images.message import HEX, Message, OpenEnum, boolean, bytestring, enumeration, message, uint32
from stasis.process.images.schema.common import FownEntry

__all__ = [
    "TermiosEntry",
    "TtyDataEntry",
    "TtyFileEntry",
    "TtyInfoEntry",
    "TtyPtyEntry",
    "TtyType",
    "WinsizeEntry",
]


class TtyType(OpenEnum):
    UNKNOWN = 0
    PTY = 1
    CONSOLE = 2
    VT = 3
    CTTY = 4
    EXT_TTY = 5
    SERIAL = 6


class WinsizeEntry(Message):
    ws_row: int = uint32(1)
    ws_col: int = uint32(2)
    ws_xpixel: int = uint32(3)
    ws_ypixel: int = uint32(4)


class TermiosEntry(Message):
    c_iflag: int = uint32(1)
    c_oflag: int = uint32(2)
    c_cflag: int = uint32(3)
    c_lflag: int = uint32(4)
    c_line: int = uint32(5)
    c_ispeed: int = uint32(6)
    c_ospeed: int = uint32(7)
    c_cc: list[int] = uint32(8, factory=list)


class TtyPtyEntry(Message):
    index: int = uint32(1)


class TtyDataEntry(Message):
    tty_id: int = uint32(1)
    data: bytes = bytestring(2)


class TtyInfoEntry(Message):
    id: int = uint32(1)
    type: TtyType = enumeration(2, TtyType)
    locked: bool = boolean(3)
    exclusive: bool = boolean(4)
    packet_mode: bool = boolean(5)
    sid: int = uint32(6)
    pgrp: int = uint32(7)
    rdev: int = uint32(8)
    termios: TermiosEntry | None = message(9, TermiosEntry, default=None)
    termios_locked: TermiosEntry | None = message(10, TermiosEntry, default=None)
    winsize: WinsizeEntry | None = message(11, WinsizeEntry, default=None)
    pty: TtyPtyEntry | None = message(12, TtyPtyEntry, default=None)
    dev: int | None = uint32(13, default=None)
    uid: int | None = uint32(14, default=None)
    gid: int | None = uint32(15, default=None)


class TtyFileEntry(Message):
    id: int = uint32(1)
    tty_info_id: int = uint32(2)
    flags: int = uint32(3, show=HEX)
    fown: FownEntry = message(4, FownEntry)
    regf_id: int | None = uint32(6, default=None)
