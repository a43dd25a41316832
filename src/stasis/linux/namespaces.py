# SPDX-License-Identifier: Apache-2.0
"""Namespaces: making them at a fork, entering them, and the mounts that a new pid namespace needs."""

from __future__ import annotations

import ctypes
import os

from stasis.linux import libc
from stasis.linux.clone3 import fork_with
from stasis.linux.process import pidfd_open

__all__ = ["CLONE_NEWNS", "CLONE_NEWPID", "FLAGS", "enter", "fork_into_new", "join", "join_fd", "mount_proc", "unshare"]

# include/uapi/linux/sched.h
CLONE_NEWNS, CLONE_NEWPID = 0x20000, 0x20000000
FLAGS = {
    "time": 0x80, "mnt": CLONE_NEWNS, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
    "pid": CLONE_NEWPID, "net": 0x40000000,
}  # fmt: skip
"""CLONE_NEW* by the names in /proc/PID/ns."""
# include/uapi/linux/mount.h
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 2, 4, 8, 1 << 14, 1 << 19

SYS_UNSHARE, SYS_SETNS = 272, 308
_mount = libc.libc.mount
_mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


def fork_into_new(flags: int) -> int:
    """As os.fork, with the child in new namespaces. Call it in a process with one thread. EPERM without
    CAP_SYS_ADMIN."""
    return fork_with("clone3 into new namespaces", flags=flags)


def enter(pid: int, flags: int) -> None:
    """Enter namespaces of a process; that of pids is for children made from then on. Since Linux 5.8 (commit
    303cc571d107). EPERM without CAP_SYS_ADMIN."""
    fd = pidfd_open(pid)
    try:
        libc.check(libc.syscall(SYS_SETNS, fd, flags, 0, 0, 0, 0), "setns", str(pid))
    finally:
        os.close(fd)


def join(path: str, flag: int) -> None:
    """Enter the namespace that a file of /proc/PID/ns stands for."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        join_fd(fd, flag, path)
    finally:
        os.close(fd)


def join_fd(fd: int, flag: int, what: str = "") -> None:
    """Enter the namespace that a descriptor stands for; `what` it is called in an error."""
    libc.check(libc.syscall(SYS_SETNS, fd, flag, 0, 0, 0, 0), "setns", what or None)


def unshare(flags: int) -> None:
    """New namespaces for this process; those of pids and of time are for children made from then on. EPERM without
    CAP_SYS_ADMIN."""
    libc.check(libc.syscall(SYS_UNSHARE, flags, 0, 0, 0, 0, 0), "unshare")


def mount_proc() -> None:
    """In a mount namespace of our own: a /proc for our pid namespace. What is mounted elsewhere still comes here, and
    nothing of ours goes there."""
    libc.check(_mount(None, b"/", None, MS_REC | MS_SLAVE, None), "mount(MS_SLAVE)", "/")
    libc.check(_mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None), "mount", "/proc")
