# SPDX-License-Identifier: Apache-2.0
"""Processes with the address space of another one: made when its memory is there, as its threads are, and by it or by
one of them. Each is traced from its birth on (CLONE_PTRACE) and ends with the restorer, as all do.

A table or directory of its own begins as a copy. The descriptors that it is to have lie ready in there, behind all
numbers that tables use.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from typing import TYPE_CHECKING

from stasis.linux import procfs, ptrace
from stasis.linux.clone3 import CLONE_ARGS, CLONE_PARENT
from stasis.process.files.locks import F_OFD_SETLK, FL_FLOCK, FL_LEASE, FL_OFD, packed_lock
from stasis.process.files.table import FD_CLOEXEC
from stasis.process.remote import Remote
from stasis.process.restore.spawn import refusal
from stasis.process.restore.tasks import give_process_state
from stasis.process.restore.threads import make_threads

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stasis.process.files.opening import FileSet
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.files import FileLockEntry
    from stasis.process.restore.outfit import Ready
    from stasis.process.restore.plan import TaskPlan

__all__ = ["give_directory", "give_pidfds", "make_beside"]

CLONE_PTRACE = 0x2000  # include/uapi/linux/sched.h: the child of a traced process is traced with the same options
LAST_FD = (1 << 32) - 1
OPTIONS = ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_EXITKILL


def make_beside(remote: Remote, plan: TaskPlan, ready: Ready, images: ImageSet) -> list[tuple[TaskPlan, Remote]]:
    """Make all that have the address space of a process, which has its threads and handlers, and rights still to make
    processes. The process itself and all of them, each with what runs system calls in it."""
    views = {plan.pid: remote}
    for one in plan.beside:
        views[one.pid] = _make(views[one.birth.maker], remote, one)
    for one in plan.beside:
        _give(views[one.pid], one, ready, images)
    for descriptors in ready.beside.values():
        for fd in (*(fd for _, _, fd in descriptors.table or ()), *descriptors.directory):
            remote.call("close", fd)
    return [(one, views[one.pid]) for one in (plan, *plan.beside)]


def _make(maker: Remote, first: Remote, plan: TaskPlan) -> Remote:
    flags = plan.birth.flags | CLONE_PTRACE
    end_signal = 0 if flags & CLONE_PARENT else signal.SIGCHLD  # that of the maker, and no other (clone3_args_valid())
    where = maker.put(struct.pack("<i", plan.pid), CLONE_ARGS.size)
    at = maker.put(CLONE_ARGS.pack(flags, 0, 0, 0, end_signal, 0, 0, 0, where, 1, 0))
    try:
        maker.call("clone3", at, CLONE_ARGS.size)
    except OSError as error:
        raise refusal(plan.pid, error) from error
    ptrace.wait_for_stop(plan.pid)
    ptrace.set_options(plan.pid, OPTIONS)
    made = first.beside(plan.pid)
    if plan.entry.sid == plan.pid:
        made.call("setsid")
    elif os.getpgid(plan.pid) != plan.entry.pgid:
        made.call("setpgid", 0, plan.entry.pgid)
    return made


def _give(remote: Remote, plan: TaskPlan, ready: Ready, images: ImageSet) -> None:
    """Its own table and directory, where it has such, handlers and threads."""
    descriptors, task = ready.beside[plan.pid], plan.core.tc
    assert task is not None
    if descriptors.directory:
        give_directory(remote, plan, descriptors.directory)
    if descriptors.table is not None:
        _fill(remote, descriptors.table)
        _lock(remote, [entry for entry in images.messages("filelocks") if entry.pid == plan.pid])
    give_process_state(remote, task)
    make_threads(remote, [tid for tid in plan.entry.threads if tid != plan.pid])


def give_directory(remote: Remote, plan: TaskPlan, directory: Sequence[int]) -> None:
    """Working directory, root and umask; `directory`: descriptors of the first, and of a root that is another one."""
    assert plan.fs is not None
    remote.call("umask", plan.fs.umask or 0)
    for root in directory[1:]:
        remote.call("fchdir", root)
        remote.call("chroot", remote.put(b".\0"))
    remote.call("fchdir", directory[0])


def give_pidfds(living: Iterable[TaskPlan], files: FileSet) -> None:
    """Descriptors of processes that were made here, in place of what kept their numbers. Each table once."""
    done: set[int] = set()
    for plan in living:
        assert plan.ids is not None
        found = [] if plan.ids.files_id in done else files.late_pidfds(plan.ids.files_id)
        done.add(plan.ids.files_id)
        if found:
            with Remote(plan.pid, procfs.mappings(plan.pid, flags=False)) as remote:
                for entry, pidfd in found:
                    made = remote.call("pidfd_open", pidfd.nspid, pidfd.flags & os.O_NONBLOCK)
                    remote.call("dup3", made, entry.fd, os.O_CLOEXEC if entry.flags & FD_CLOEXEC else 0)
                    remote.call("close", made)


def _fill(remote: Remote, table: Sequence[tuple[int, bool, int]]) -> None:
    """Have each descriptor at its number, and no other."""
    for number, closes, fd in table:
        remote.call("dup3", fd, number, os.O_CLOEXEC if closes else 0)
    position = 0
    for number in sorted(number for number, _, _ in table):
        if number > position:
            remote.call("close_range", position, number - 1, 0)
        position = number + 1
    remote.call("close_range", position, LAST_FD, 0)


def _lock(remote: Remote, entries: Sequence[FileLockEntry]) -> None:
    """Take the locks of a table that no process had when it was filled."""
    for entry in entries:
        if entry.flag == FL_FLOCK:
            how = fcntl.LOCK_SH if entry.type == fcntl.F_RDLCK else fcntl.LOCK_EX
            remote.call("flock", entry.fd, how | fcntl.LOCK_NB)
        elif entry.flag == FL_LEASE:
            remote.call("fcntl", entry.fd, fcntl.F_SETLEASE, entry.type)
        else:
            command = F_OFD_SETLK if entry.flag == FL_OFD else fcntl.F_SETLK
            remote.call("fcntl", entry.fd, command, remote.put(packed_lock(entry)))
