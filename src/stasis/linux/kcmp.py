# SPDX-License-Identifier: Apache-2.0
"""kcmp(2): whether two tasks share a kernel object."""

import ctypes
import struct
from enum import IntEnum

from stasis.linux import libc

__all__ = ["Kcmp", "compare", "same_epoll_target", "same_file"]

SYS_KCMP = 312  # arch/x86/entry/syscalls/syscall_64.tbl


class Kcmp(IntEnum):
    """Kinds of objects (include/uapi/linux/kcmp.h)."""

    FILE = 0
    VM = 1
    FILES = 2
    FS = 3
    SIGHAND = 4
    IO = 5
    SYSVSEM = 6
    EPOLL_TFD = 7


def compare(kind: Kcmp, first: int, second: int) -> int:
    """0 if the tasks share the object; 1 or 2 for an order among objects that stays while the machine runs.

    Needs the right to trace both.
    """
    return libc.check(libc.syscall(SYS_KCMP, first, second, kind, 0, 0, 0), "kcmp")


def same_file(first: int, first_fd: int, second: int, second_fd: int) -> bool:
    """Whether descriptors of two tasks are one open file description."""
    return libc.check(libc.syscall(SYS_KCMP, first, second, Kcmp.FILE, first_fd, second_fd, 0), "kcmp") == 0


def same_epoll_target(pid: int, fd: int, epoll_pid: int, epoll_fd: int, target_fd: int, offset: int) -> bool:
    """Whether descriptor `fd` of `pid` is the description that an epoll watches under `target_fd`; several with the
    same number are told apart by `offset` (Linux 4.13, commit 0791e3644e5e)."""
    slot = struct.pack("<III", epoll_fd, target_fd, offset)
    buffer = ctypes.create_string_buffer(slot, len(slot))
    arguments = (pid, epoll_pid, Kcmp.EPOLL_TFD, fd, ctypes.addressof(buffer), 0)
    return libc.check(libc.syscall(SYS_KCMP, *arguments), "kcmp") == 0
