# SPDX-License-Identifier: Apache-2.0
"""What belongs to a process as a whole: signal handlers, timers, limits, and its place in the tree."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from stasis.linux import procfs
from stasis.process.dump.threads import signal_queue
from stasis.process.images.schema.tasks import (
    ItimerEntry,
    PosixTimerEntry,
    RlimitEntry,
    SaEntry,
    TaskCoreEntry,
    TaskRlimitsEntry,
    TaskTimersEntry,
)
from stasis.process.tree import Task, TaskState

if TYPE_CHECKING:
    from stasis.process.remote import Remote

__all__ = ["SIGNALS", "ns_pid", "task_core", "zombie_core"]

SIGKILL, SIGCHLD, SIGSTOP, HIGHEST_SIGNAL = 9, 17, 19, 64
SIGNALS = tuple(number for number in range(1, HIGHEST_SIGNAL + 1) if number not in (SIGKILL, SIGSTOP))
"""The signals that can have a handler, in the order that images have them."""
ACTION = struct.Struct("<QQQQ")  # struct kernel_sigaction: handler, flags, restorer, mask
ITIMER = struct.Struct("<QQQQ")  # struct itimerval: interval, value
ITIMERSPEC = struct.Struct("<QQQQ")

# include/uapi/linux/prctl.h, include/uapi/linux/membarrier.h
PR_GET_CHILD_SUBREAPER = 37
MEMBARRIER_CMD_GET_REGISTRATIONS = 1 << 9
MEMBARRIER_REGISTER_GLOBAL = 1 << 2
MEMBARRIER_PRIVATE = {1 << 3: 1 << 4, 1 << 5: 1 << 6, 1 << 7: 1 << 8}
"""Barriers within a process: plain, for changed code, for restartable sequences; and how to register for each."""
MEMBARRIER_REGISTRATIONS = MEMBARRIER_REGISTER_GLOBAL | sum(MEMBARRIER_PRIVATE.values())
NO_LOGINUID = (1 << 32) - 1
SIGEV_NAMES = {"signal": 0, "none": 1, "thread": 2}  # include/uapi/asm-generic/siginfo.h
SIGEV_THREAD_ID = 4


def task_core(remote: Remote, task: Task) -> TaskCoreEntry:
    """The part of a core image that only a process's first thread has."""
    pid, stat = task.pid, task.stat
    return TaskCoreEntry(
        task_state=task.state,
        exit_code=stat.exit_code,
        personality=int(procfs.read(pid, "personality"), 16),
        flags=stat.flags,
        blk_sigset=remote.leader.signal_mask,
        comm=stat.comm,
        timers=TaskTimersEntry(
            real=_itimer(remote, 0), virt=_itimer(remote, 1), prof=_itimer(remote, 2), posix=_posix_timers(remote)
        ),
        rlimits=TaskRlimitsEntry(rlimits=[RlimitEntry(cur=soft, max=hard) for soft, hard in procfs.limits(pid)]),
        signals_s=signal_queue(pid, shared=True),
        loginuid=_login_uid(pid),
        oom_score_adj=int(procfs.read(pid, "oom_score_adj")),
        sigactions=_signal_actions(remote),
        child_subreaper=_is_subreaper(remote),
        stop_signo=task.threads[0].stop_signal if task.state is TaskState.STOPPED else None,
        membarrier_registration_mask=_membarrier(remote),
    )


def zombie_core(task: Task) -> TaskCoreEntry:
    """What is left of a process that its parent has not waited for."""
    stat = task.stat
    return TaskCoreEntry(
        task_state=TaskState.ZOMBIE, exit_code=stat.exit_code, personality=0, flags=stat.flags, blk_sigset=0,
        comm=stat.comm,
    )  # fmt: skip


def _signal_actions(remote: Remote) -> list[SaEntry]:
    """A call for each signal that has an action; SIGCHLD's flags count without one, too (SA_NOCLDWAIT)."""
    fields = procfs.status(remote.pid)
    acted_on = int(fields["SigCgt"], 16) | int(fields["SigIgn"], 16) | 1 << (SIGCHLD - 1)
    found = []
    for number in SIGNALS:
        if not acted_on >> (number - 1) & 1:
            found.append(SaEntry(sigaction=0, flags=0, restorer=0, mask=0))
            continue
        remote.call("rt_sigaction", number, 0, remote.scratch, 8)
        handler, flags, restorer, mask = ACTION.unpack(remote.get(ACTION.size))
        found.append(SaEntry(sigaction=handler, flags=flags, restorer=restorer, mask=mask))
    return found


def _itimer(remote: Remote, which: int) -> ItimerEntry:
    remote.call("getitimer", which, remote.scratch)
    interval, interval_us, value, value_us = ITIMER.unpack(remote.get(ITIMER.size))
    return ItimerEntry(isec=interval, iusec=interval_us, vsec=value, vusec=value_us)


def _posix_timers(remote: Remote) -> list[PosixTimerEntry]:
    """Described by /proc/PID/timers (proc_pid_timers(5)): ID, signal, notify, ClockID; the rest is asked for."""
    found = []
    text = procfs.read(remote.pid, "timers").decode()
    for block in f"\n{text}".split("\nID: ")[1:]:
        number, *lines = block.splitlines()
        fields = dict(line.split(": ", 1) for line in lines)
        signo, _, value = fields["signal"].partition("/")
        kind, _, target = fields["notify"].partition("/")
        scope, _, tid = target.partition(".")
        remote.call("timer_gettime", int(number), remote.scratch)
        interval, interval_ns, left, left_ns = ITIMERSPEC.unpack(remote.get(ITIMERSPEC.size))
        found.append(PosixTimerEntry(
            it_id=int(number), clock_id=int(fields["ClockID"]) & 0xFFFFFFFF, si_signo=int(signo),
            it_sigev_notify=SIGEV_NAMES[kind] | (SIGEV_THREAD_ID if scope == "tid" else 0), sival_ptr=int(value, 16),
            overrun=remote.call("timer_getoverrun", int(number)), isec=interval, insec=interval_ns, vsec=left,
            vnsec=left_ns, notify_thread_id=int(tid) if scope == "tid" else None,
        ))  # fmt: skip
    return found


def _is_subreaper(remote: Remote) -> bool:
    remote.call("prctl", PR_GET_CHILD_SUBREAPER, remote.scratch)
    return bool(remote.get_words("<I")[0])


def _membarrier(remote: Remote) -> int:
    """Commands by which the process has registered for memory barriers. Before Linux 6.3 (commit 544a4f2ecd45) nobody
    tells: then it is tried, which is a barrier more and nothing else, and the one for all processes is assumed."""
    try:
        return remote.call("membarrier", MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return 0
    return MEMBARRIER_REGISTER_GLOBAL | sum(
        register for command, register in MEMBARRIER_PRIVATE.items() if _has_barrier(remote, command)
    )


def _has_barrier(remote: Remote, command: int) -> bool:
    try:
        remote.call("membarrier", command, 0, 0)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EINVAL):
            return False  # not registered; no such barrier
        raise
    return True


def _login_uid(pid: int) -> int | None:
    try:
        found = int(procfs.read(pid, "loginuid"))
    except (OSError, ValueError):
        return None  # a kernel without auditing
    return None if found == NO_LOGINUID else found


def ns_pid(fields: dict[str, str], name: str = "NSpid") -> int:
    """A pid as the task's own namespace has it: the last one of the line."""
    return int(fields[name].split()[-1])
