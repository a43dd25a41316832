# SPDX-License-Identifier: Apache-2.0
"""What a process can ask about itself and others: boot, identity, descriptors of processes, prctl."""

import ctypes
import os
import signal
import stat

from stasis.linux import libc

__all__ = [
    "boot_id",
    "children",
    "has_open",
    "is_subreaper",
    "name",
    "open_descriptors",
    "pidfd_open",
    "processes",
    "set_dumpable",
    "set_io_flusher",
    "set_parent_death_signal",
    "set_subreaper",
    "signal_pidfd",
    "start_time",
    "variable",
]

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PR_SET_IO_FLUSHER = 57

# proc_pid_stat(5): place among the fields behind the command name, which may hold spaces and parentheses.
STAT_STARTTIME_BEHIND_NAME = 19

_prctl = libc.libc.prctl
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def boot_id() -> str:
    """The UUID that the kernel drew at this boot."""
    return os.fsdecode(_read("/proc/sys/kernel/random/boot_id")).strip()


def processes() -> list[int]:
    """Process ids that /proc shows now."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def name(pid: int) -> str:
    """The command name of a process (at most 15 characters), "?" if it is gone."""
    try:
        return os.fsdecode(_read(f"/proc/{pid}/comm")).strip()
    except OSError:
        return "?"


def children(pid: int) -> list[int]:
    """Processes that the main thread of pid started and that still are its own; none if pid has ended.

    None either on a kernel without CONFIG_PROC_CHILDREN.
    """
    try:
        return [int(child) for child in os.fsdecode(_read(f"/proc/{pid}/task/{pid}/children")).split()]
    except OSError:
        return []


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of pid: with the pid it names a process for good. None if gone."""
    try:
        status = os.fsdecode(_read(f"/proc/{pid}/stat"))
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[STAT_STARTTIME_BEHIND_NAME])


def variable(pid: int, name: str) -> str | None:
    """A variable of the environment that pid was started with; None without it, or if pid is not ours to look at."""
    try:
        entries = _read(f"/proc/{pid}/environ").split(b"\0")
    except OSError:
        return None
    prefix = f"{name}=".encode()
    return next((os.fsdecode(entry[len(prefix) :]) for entry in entries if entry.startswith(prefix)), None)


def open_descriptors(pid: int) -> list[os.stat_result]:
    """File status of every descriptor of pid; none if it is gone or not ours to look at."""
    directory = f"/proc/{pid}/fd"
    try:
        entries = os.listdir(directory)
    except OSError:
        return []
    found = []
    for entry in entries:
        try:
            found.append(os.stat(f"{directory}/{entry}"))
        except OSError:
            continue  # closed meanwhile
    return found


def has_open(pid: int, *, rdev: int | None = None, inode: tuple[int, int] | None = None) -> bool:
    """Whether pid has the block device rdev, or the file inode (st_dev, st_ino), open."""
    for status in open_descriptors(pid):
        if rdev is not None and stat.S_ISBLK(status.st_mode) and status.st_rdev == rdev:
            return True
        if inode is not None and (status.st_dev, status.st_ino) == inode:
            return True
    return False


def pidfd_open(pid: int) -> int:
    """A descriptor of the process pid, readable once it has ended. ESRCH if there is none."""
    try:
        return os.pidfd_open(pid)
    except OSError as e:
        raise libc.error(e.errno, "pidfd_open", str(pid)) from e


def signal_pidfd(pidfd: int, number: int) -> bool:
    """Send a signal to exactly that process; False if it has ended."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def set_parent_death_signal(number: int = signal.SIGTERM) -> None:
    """Ask for a signal when the thread that started this process ends. Not kept over exec of set-id programs.

    A parent that ended before the call is not noticed: compare os.getppid() afterwards.
    """
    libc.check(_prctl(PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def set_io_flusher() -> None:
    """Keep memory reclaim of this process from waiting for a block device that this process itself serves.

    For every process in the path of a kernel block device (since Linux 5.6). EPERM without CAP_SYS_RESOURCE.
    """
    libc.check(_prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0), "prctl(PR_SET_IO_FLUSHER)")


def set_dumpable() -> None:
    """Let /proc/self be ours again after another user was chosen."""
    libc.check(_prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def set_subreaper(on: bool) -> None:
    """Become the parent of descendants that lose theirs, as init is, or stop being it."""
    libc.check(_prctl(PR_SET_CHILD_SUBREAPER, on, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def is_subreaper() -> bool:
    """Whether this process is one."""
    found = ctypes.c_int()
    libc.check(_prctl(PR_GET_CHILD_SUBREAPER, ctypes.addressof(found), 0, 0, 0), "prctl(PR_GET_CHILD_SUBREAPER)")
    return bool(found.value)
