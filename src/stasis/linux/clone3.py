# SPDX-License-Identifier: Apache-2.0
"""clone3(2): a child with a pid of our choice."""

import ctypes
import os
import signal
import struct

from stasis.linux import libc

__all__ = ["CLONE_ARGS", "CLONE_PARENT", "fork_as", "fork_with"]

SYS_CLONE3 = 435
CLONE_PARENT = 0x8000  # include/uapi/linux/sched.h
CLONE_ARGS = struct.Struct("<11Q")
"""flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup."""


def fork_as(pid: int, flags: int = 0) -> int:
    """As os.fork, with the child's pid given. Call it in a process with one thread. With CLONE_PARENT it is a child
    of the caller's parent.

    EEXIST where the pid is taken, a zombie included; EPERM without CAP_CHECKPOINT_RESTORE (Linux 5.9, 124ea650d307).
    """
    wanted = ctypes.c_int(pid)
    return fork_with(f"clone3 with pid {pid}", flags=flags, set_tid=(ctypes.addressof(wanted), 1))


def fork_with(what: str, *, flags: int = 0, set_tid: tuple[int, int] = (0, 0)) -> int:
    """As os.fork, by clone3. Call it in a process with one thread. set_tid: address and number of wanted pids.

    Raises OSError, which says `what` failed.
    """
    end_signal = 0 if flags & CLONE_PARENT else signal.SIGCHLD  # that of the caller, and no other (clone3_args_valid())
    arguments = CLONE_ARGS.pack(flags, 0, 0, 0, end_signal, 0, 0, 0, *set_tid, 0)
    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    ctypes.pythonapi.PyOS_BeforeFork()
    result = libc.syscall(SYS_CLONE3, ctypes.addressof(buffer), len(arguments), 0, 0, 0, 0)
    if result == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    code = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if result < 0:
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return int(result)
