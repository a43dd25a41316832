# SPDX-License-Identifier: Apache-2.0
"""Threads that wait in the kernel for a child that borrowed their address space (vfork(2)): they cannot be stopped
before it has ended or is another program, and it would not come so far while it is stopped itself."""

from __future__ import annotations

import struct

from stasis.linux import procfs
from stasis.linux.taskmem import TaskMemory

__all__ = ["is_in_vfork"]

CLONE_VFORK = 0x4000  # include/uapi/linux/sched.h
CLONE, VFORK, CLONE3 = 56, 58, 435  # arch/x86/entry/syscalls/syscall_64.tbl


def is_in_vfork(pid: int, tid: int) -> bool:
    """Whether a thread waits so. By its system call and the flags that it gave (proc_pid_syscall(5)); False where it
    is not ours to look at."""
    try:
        if procfs.stat(pid, tid).state != "D":
            return False
        number, *words = procfs.read(pid, f"task/{tid}/syscall").split()
        flags = int(words[0], 16) if words else 0
        if number == b"%d" % CLONE3:
            flags = _first_word(tid, flags)
        return number == b"%d" % VFORK or (number in (b"%d" % CLONE, b"%d" % CLONE3) and bool(flags & CLONE_VFORK))
    except OSError:
        return False


def _first_word(tid: int, address: int) -> int:
    """The flags of struct clone_args."""
    memory = TaskMemory(tid)
    try:
        return int(struct.unpack("<Q", memory.read(address, 8))[0])
    finally:
        memory.close()
