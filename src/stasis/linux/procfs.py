# SPDX-License-Identifier: Apache-2.0
"""What /proc tells of a task (proc(5)): status lines, stat fields, threads, children, memory mappings.

A file is read once, whole, with one system call where its size allows. ProcessLookupError when the task is gone.
"""

import os
from typing import NamedTuple

__all__ = ["SELF", "Mapping", "Stat", "children", "limits", "mappings", "read", "stat", "status", "threads", "write"]

PORTION = 1 << 18
INFINITY = (1 << 64) - 1
SELF = 0
"""In place of a pid: the caller, whose number in this /proc may be another one than os.getpid() says."""


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that say who a task is and where its memory lies; addresses in bytes."""

    pid: int
    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    tpgid: int
    flags: int
    nice: int
    start_time: int
    start_code: int
    end_code: int
    start_stack: int
    exit_signal: int
    rt_priority: int
    policy: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int


# Places behind the command name, counted from 0 (proc_pid_stat(5) counts from 1 and with pid and comm).
_STAT_PLACES = {
    "ppid": 1, "pgrp": 2, "session": 3, "tty_nr": 4, "tpgid": 5, "flags": 6, "nice": 16, "start_time": 19,
    "start_code": 23, "end_code": 24, "start_stack": 25, "exit_signal": 35, "rt_priority": 37, "policy": 38,
    "start_data": 42, "end_data": 43, "start_brk": 44, "arg_start": 45, "arg_end": 46, "env_start": 47, "env_end": 48,
    "exit_code": 49,
}  # fmt: skip


class Mapping(NamedTuple):
    """A line of /proc/PID/smaps with its flags: `flags` are the two-letter names of VmFlags; `offset` is bytes."""

    start: int
    end: int
    permissions: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str
    flags: frozenset[str] = frozenset()

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def is_shared(self) -> bool:
        """MAP_SHARED."""
        return self.permissions[3] == "s"


def read(pid: int, name: str) -> bytes:
    """A whole file of /proc/PID. ProcessLookupError if the task is gone or has no memory any more."""
    try:
        fd = os.open(f"/proc/{pid or 'self'}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ProcessLookupError(error.errno, "process is gone", str(pid)) from error
    try:
        portions = []
        while portion := os.read(fd, PORTION):
            portions.append(portion)
        return b"".join(portions)
    finally:
        os.close(fd)


def write(pid: int, name: str, text: str) -> None:
    """Write to a file of /proc/PID, whole."""
    fd = os.open(f"/proc/{pid or 'self'}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, os.fsencode(text))
    finally:
        os.close(fd)


def stat(pid: int, tid: int | None = None) -> Stat:
    """/proc/PID/stat, or that of one thread."""
    text = read(pid, "stat" if tid is None else f"task/{tid}/stat").decode(errors="surrogateescape")
    head, _, tail = text.rpartition(")")
    number, _, comm = head.partition(" (")
    places = tail.split()
    values = {name: int(places[place]) for name, place in _STAT_PLACES.items()}
    return Stat(pid=int(number), comm=comm, state=places[0], **values)


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """/proc/PID/status as field and value, or that of one thread."""
    text = read(pid, "status" if tid is None else f"task/{tid}/status").decode(errors="surrogateescape")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def threads(pid: int) -> list[int]:
    """Thread ids, the leader first."""
    try:
        found = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError as error:
        raise ProcessLookupError(error.errno, "process is gone", str(pid)) from error
    return sorted(found, key=lambda tid: (tid != pid, tid))


def children(pid: int, tid: int) -> list[int]:
    """Processes that a thread has made and that it is the parent of still."""
    try:
        return [int(word) for word in read(pid, f"task/{tid}/children").split()]
    except ProcessLookupError:
        return []  # the thread ended: its children are another one's now


def mappings(pid: int, *, flags: bool = True) -> list[Mapping]:
    """The memory mappings of a process in order of address. Reading the flags costs a walk over its page tables."""
    found: list[Mapping] = []
    lines = read(pid, "smaps" if flags else "maps").decode(errors="surrogateescape").splitlines()
    for line in lines:
        if line[0] in "0123456789abcdef":
            found.append(_mapping(line))
        elif line.startswith("VmFlags:"):
            last = found[-1]
            found[-1] = Mapping(last.start, last.end, last.permissions, last.offset, last.device, last.inode, last.path,
                                frozenset(line[8:].split()))  # fmt: skip
    return found


def _mapping(line: str) -> Mapping:
    range_, permissions, offset, device, inode, *path = line.split(None, 5)
    start, end = (int(part, 16) for part in range_.split("-"))
    major, minor = (int(part, 16) for part in device.split(":"))
    return Mapping(start, end, permissions, int(offset, 16), (major, minor), int(inode), path[0] if path else "")


def limits(pid: int) -> list[tuple[int, int]]:
    """The 16 resource limits in the order of RLIMIT_*, (soft, hard), 2^64-1 for none.

    World readable, where prlimit64(2) on a task of another user needs CAP_SYS_RESOURCE.
    """
    found = {}
    for line in read(pid, "limits").decode().splitlines()[1:]:
        soft, hard = (INFINITY if word == "unlimited" else int(word) for word in line[26:].split()[:2])
        found[line[:26].strip()] = soft, hard
    return [found[name] for name in _LIMITS]


# fs/proc/base.c, lnames: in the order of RLIMIT_*
_LIMITS = (
    "Max cpu time", "Max file size", "Max data size", "Max stack size", "Max core file size", "Max resident set",
    "Max processes", "Max open files", "Max locked memory", "Max address space", "Max file locks",
    "Max pending signals", "Max msgqueue size", "Max nice priority", "Max realtime priority", "Max realtime timeout",
)  # fmt: skip
