# SPDX-License-Identifier: Apache-2.0
"""What of a task the images have no field for, and what it does without after a restore: told, not refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stasis.linux import libc, procfs
from stasis.process.seals import SEALED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stasis.linux.procfs import Mapping
    from stasis.process.remote import Remote
    from stasis.process.tree import Task

__all__ = ["losses"]

SYS_IOPRIO_GET = 252
IOPRIO_WHO_PROCESS, IOPRIO_CLASS_SHIFT = 1, 13  # include/uapi/linux/ioprio.h
PR_GET_MDWE, PR_GET_MEMORY_MERGE = 66, 68  # include/uapi/linux/prctl.h
ON_REQUEST = {PR_GET_MDWE: "be kept from making memory executable (PR_SET_MDWE)",
              PR_GET_MEMORY_MERGE: "have all of its memory merged (PR_SET_MEMORY_MERGE)"}  # fmt: skip
SPECULATION = ("Speculation_Store_Bypass", "SpeculationIndirectBranch")
NO_SLACK = 0
"""That of threads with real-time priority, and of those that are not ours to ask (without CAP_SYS_NICE)."""
LOCKED = "lo"


def losses(remote: Remote, task: Task, layout: list[Mapping]) -> Iterator[str]:
    """A sentence for each. A restored task has these from who restores it: only what differs from us counts."""
    ours, slack, speculation = os.sched_getaffinity(0), _timer_slack("self"), _speculation(os.getpid(), os.getpid())
    for thread in task.threads:
        where = f"thread {thread.tid} of process {task.pid}"
        if os.sched_getaffinity(thread.tid) != ours:
            yield f"{where} will not be bound to its processors any more"
        if _io_priority(thread.tid) != _io_priority(0):
            yield f"{where} will not have its I/O priority any more"
        if _timer_slack(thread.tid) not in (NO_SLACK, slack):
            yield f"{where} will not have its timer slack any more"
        if _speculation(task.pid, thread.tid) != speculation:
            yield f"{where} will not be protected from speculation as it is (PR_SET_SPECULATION_CTRL)"
    if procfs.read(task.pid, "coredump_filter") != procfs.read(os.getpid(), "coredump_filter"):
        yield f"process {task.pid} will not have its core dump filter any more"
    for request, what in ON_REQUEST.items():
        if _asked(remote, request):
            yield f"process {task.pid} will not {what} any more"
    if _locks_what_comes(remote, layout):
        yield f"process {task.pid} will not lock memory that it maps from then on (MCL_FUTURE)"
    if any(SEALED in mapping.flags for mapping in layout if mapping.path == "[vdso]"):
        yield f"process {task.pid} cannot be restored on kernels like this one, which seal the vdso of every process"


def _io_priority(tid: int) -> int:
    """Class and level; 0 where it follows the nice value."""
    found = libc.check(libc.syscall(SYS_IOPRIO_GET, IOPRIO_WHO_PROCESS, tid, 0, 0, 0, 0), "ioprio_get")
    return found if found >> IOPRIO_CLASS_SHIFT else 0


def _timer_slack(tid: int | str) -> int:
    """In nanoseconds."""
    try:
        with open(f"/proc/{tid}/timerslack_ns") as file:
            return int(file.read())
    except OSError:
        return NO_SLACK


def _speculation(pid: int, tid: int) -> list[str | None]:
    fields = procfs.status(pid, tid)
    return [fields.get(name) for name in SPECULATION]


def _asked(remote: Remote, request: int) -> bool:
    try:
        return remote.call("prctl", request, 0, 0, 0, 0) > 0
    except OSError:
        return False  # a kernel without it


def _locks_what_comes(remote: Remote, layout: list[Mapping]) -> bool:
    """Nobody can ask for it, but our pages in the task came after it, and show it."""
    if not any(LOCKED in mapping.flags for mapping in layout):
        return False
    return any(LOCKED in mapping.flags for mapping in procfs.mappings(remote.pid) if mapping.start == remote.scratch)
