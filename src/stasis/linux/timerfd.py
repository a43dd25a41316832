# SPDX-License-Identifier: Apache-2.0
"""timerfd_create(2) and its relatives, which Python has from 3.13 on; signalfd(2)."""

import ctypes
import os
import struct

from stasis.linux import libc
from stasis.linux.ioctl import IOW

__all__ = ["TFD_TIMER_ABSTIME", "set_ticks", "signalfd", "timerfd", "timerfd_settime"]

TFD_TIMER_ABSTIME = 1  # include/uapi/linux/timerfd.h
TFD_IOC_SET_TICKS = IOW("T", 0, 8)
ITIMERSPEC = struct.Struct("<qqqq")

libc.libc.signalfd.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


def timerfd(clock: int) -> int:
    """A timer of this clock that does not run, closed at exec."""
    return libc.check(libc.libc.timerfd_create(clock, os.O_CLOEXEC), "timerfd_create")


def timerfd_settime(fd: int, flags: int, interval: tuple[int, int], value: tuple[int, int]) -> None:
    """Have a timer expire after, or with TFD_TIMER_ABSTIME at, `value`: (seconds, nanoseconds), zero for never."""
    buffer = ctypes.create_string_buffer(ITIMERSPEC.pack(*interval, *value), ITIMERSPEC.size)
    libc.check(libc.libc.timerfd_settime(fd, flags, buffer, None), "timerfd_settime", fd)


def set_ticks(fd: int, ticks: int) -> None:
    """How often a timer expired without anybody having read it (Linux 3.17, commit 5442e9fbd7c2)."""
    buffer = ctypes.create_string_buffer(struct.pack("<Q", ticks), 8)
    libc.check(libc.libc.ioctl(fd, ctypes.c_ulong(TFD_IOC_SET_TICKS), buffer), "TFD_IOC_SET_TICKS", fd)


def signalfd(mask: int) -> int:
    """A descriptor that signals of a mask are read from, closed at exec."""
    return libc.check(libc.libc.signalfd(-1, struct.pack("<Q", mask), os.O_CLOEXEC), "signalfd")
