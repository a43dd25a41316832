# SPDX-License-Identifier: Apache-2.0
"""What a restored process has as a whole: signal handlers, timers, limits."""

from __future__ import annotations

import errno
import resource
import signal
import struct
from typing import TYPE_CHECKING

from stasis.errors import PermissionDeniedError, UnsupportedError
from stasis.linux import procfs
from stasis.process.dump.tasks import (
    ACTION,
    ITIMER,
    ITIMERSPEC,
    MEMBARRIER_REGISTRATIONS,
    SIGEV_THREAD_ID,
    SIGNALS,
)

if TYPE_CHECKING:
    from stasis.process.images.schema.memory import MmEntry
    from stasis.process.images.schema.tasks import ItimerEntry, PosixTimerEntry, TaskCoreEntry
    from stasis.process.remote import Remote

__all__ = ["arm_timers", "give_process_state", "make_timers", "set_dumpable"]

# include/uapi/linux/prctl.h
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_TIMER_CREATE_RESTORE_IDS = 4, 36, 77
SIGEVENT = struct.Struct("<QiiI44x")  # struct sigevent: value, signal, notify, thread id
MOST_TIMER_IDS = 4096


def give_process_state(remote: Remote, task: TaskCoreEntry) -> None:
    """All but what needs its threads."""
    _act_on_signals(remote, task)
    for siginfo in task.signals_s.signals if task.signals_s else ():
        number = struct.unpack_from("<i", siginfo.siginfo)[0]
        remote.call("rt_sigqueueinfo", remote.pid, number, remote.put(siginfo.siginfo))
    if task.child_subreaper:
        remote.call("prctl", PR_SET_CHILD_SUBREAPER, 1)
    if task.personality != int(procfs.read(remote.pid, "personality"), 16):
        remote.call("personality", task.personality)
    _register_for_barriers(remote, task.membarrier_registration_mask or 0)
    _limit(remote.pid, task)


def _register_for_barriers(remote: Remote, mask: int) -> None:
    for bit in range(MEMBARRIER_REGISTRATIONS.bit_length()):
        if mask & MEMBARRIER_REGISTRATIONS & 1 << bit:
            remote.call("membarrier", 1 << bit, 0, 0)


def _act_on_signals(remote: Remote, task: TaskCoreEntry) -> None:
    """Only where something is to be done or undone; SIGCHLD has flags that count without an action."""
    fields = procfs.status(remote.pid)
    acted_on = int(fields["SigCgt"], 16) | int(fields["SigIgn"], 16) | 1 << (signal.SIGCHLD - 1)
    for number, wanted in zip(SIGNALS, task.sigactions, strict=False):
        if wanted.sigaction or acted_on >> (number - 1) & 1:
            action = ACTION.pack(wanted.sigaction, wanted.flags, wanted.restorer, wanted.mask)
            remote.call("rt_sigaction", number, remote.put(action), 0, 8)


def make_timers(remote: Remote, task: TaskCoreEntry) -> None:
    """The POSIX timers, which may be for threads; none runs yet. A kernel that cannot be asked for ids counts up."""
    for timer in sorted(task.timers.posix if task.timers is not None else (), key=lambda timer: timer.it_id):
        _make_timer(remote, timer)


def set_dumpable(remote: Remote, mm: MmEntry) -> None:
    """Once the credentials are there, which take it away (commit_creds())."""
    if mm.dumpable in (0, 1):
        remote.call("prctl", PR_SET_DUMPABLE, mm.dumpable)


def _limit(pid: int, task: TaskCoreEntry) -> None:
    wanted = task.rlimits.rlimits if task.rlimits else []
    for number, (limit, now) in enumerate(zip(wanted, procfs.limits(pid), strict=False)):
        if (limit.cur, limit.max) != now:
            try:
                resource.prlimit(pid, number, (_signed(limit.cur), _signed(limit.max)))
            except (PermissionError, ValueError) as error:
                raise PermissionDeniedError(
                    f"process {pid} had a higher limit (number {number}) than this user may give it", hint="run as root"
                ) from error
    if task.oom_score_adj is not None and int(procfs.read(pid, "oom_score_adj")) != task.oom_score_adj:
        _set_oom_score(pid, task.oom_score_adj)


def _set_oom_score(pid: int, score: int) -> None:
    try:
        procfs.write(pid, "oom_score_adj", str(score))
    except PermissionError as error:
        raise PermissionDeniedError(
            f"process {pid} had the lower oom_score_adj {score}, which needs CAP_SYS_RESOURCE", hint="run as root"
        ) from error


def _signed(value: int) -> int:
    """Infinity as Python has it."""
    return value - (1 << 64) if value >> 63 else value


def _make_timer(remote: Remote, timer: PosixTimerEntry) -> None:
    """With its id: asked for where the kernel can (6.16), else by making timers until it comes."""
    clock = struct.unpack("<i", struct.pack("<I", timer.clock_id))[0]
    notify = timer.it_sigev_notify
    target = timer.notify_thread_id or 0 if notify & SIGEV_THREAD_ID else 0
    event = remote.put(SIGEVENT.pack(timer.sival_ptr, timer.si_signo, notify, target), 8)
    exact = _can_choose_ids(remote)
    for _ in range(MOST_TIMER_IDS):
        place = remote.put(struct.pack("<i", timer.it_id))
        remote.call("timer_create", clock, event, place)
        (made,) = remote.get_words("<i")
        if made == timer.it_id:
            break
        remote.call("timer_delete", made)
    else:
        raise UnsupportedError(f"the timer {timer.it_id} of process {remote.pid} cannot be made with its number")
    if exact:
        remote.call("prctl", PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0)


def _can_choose_ids(remote: Remote) -> bool:
    try:
        remote.call("prctl", PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def arm_timers(remote: Remote, task: TaskCoreEntry) -> None:
    """Let the timers run; last, so that none comes before the task can take it."""
    if task.timers is None:
        return
    for which, timer in enumerate((task.timers.real, task.timers.virt, task.timers.prof)):
        if timer.vsec or timer.vusec or timer.isec or timer.iusec:
            remote.call("setitimer", which, remote.put(_packed(timer)), 0)
    for posix in task.timers.posix:
        if posix.vsec or posix.vnsec:
            value = ITIMERSPEC.pack(posix.isec, posix.insec, posix.vsec, posix.vnsec)
            remote.call("timer_settime", posix.it_id, 0, remote.put(value), 0)


def _packed(timer: ItimerEntry) -> bytes:
    """One that has run out and whose signal waits has no time left; the kernel arms it when the signal is taken, and
    cannot for one that it did not send. So it begins anew."""
    value = (timer.vsec, timer.vusec) if timer.vsec or timer.vusec else (timer.isec, timer.iusec)
    return ITIMER.pack(timer.isec, timer.iusec, *value)
