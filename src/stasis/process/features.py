# SPDX-License-Identifier: Apache-2.0
"""What this kernel offers of what dump and restore use: probed, by the names that criu has for it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable

from stasis.errors import UsageError
from stasis.linux import kcmp, libc, ptrace, softdirty, userfaultfd
from stasis.linux.clone3 import fork_as
from stasis.linux.pagemap import PAGE, PageScanner
from stasis.linux.pidfd import Pidfd

__all__ = ["REQUIRED", "has"]

ARCH_MAP_VDSO_64 = 0x2003
SYS_ARCH_PRCTL, SYS_PRCTL = 158, 157
NO_DESCRIPTOR = 0x7FFFFFFF
PR_TIMER_CREATE_RESTORE_IDS, PR_TIMER_CREATE_RESTORE_IDS_GET = 77, 2


def _clone3_set_tid() -> bool:
    """Asked for with a pid that is taken: EEXIST where the caller may choose pids."""
    try:
        pid = fork_as(os.getpid())
    except OSError as error:
        return error.errno == errno.EEXIST
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


def _pagemap_scan() -> bool:
    with PageScanner(os.getpid()) as scanner:
        list(scanner.own_pages(0, PAGE))
        return scanner.has_scan


def _mem_dirty_track() -> bool:
    """What `pre-dump` and `--parent` need; criu asks by this name for soft-dirty bits, one of the two ways."""
    if userfaultfd.has_async():
        return _pagemap_scan()
    return userfaultfd.has_plain() and _soft_dirty()


def _soft_dirty() -> bool:
    """Whether a page has its bit, loses it, and gets it again. In a child: our own bits are somebody else's maybe."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    kept = False
    try:
        with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            kept = _keeps_bits(memory)
    finally:
        os._exit(0 if kept else 1)


def _keeps_bits(memory: mmap.mmap) -> bool:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[0] = 1
    with PageScanner(os.getpid()) as scanner:
        before = softdirty.is_set(scanner, address)
        softdirty.clear(os.getpid())
        between = softdirty.is_set(scanner, address)
        memory[0] = 2
        return before and not between and softdirty.is_set(scanner, address)


def _rseq() -> bool:
    return _traced(lambda pid: ptrace.rseq_configuration(pid) is not None)


def _traced(question: Callable[[int], bool]) -> bool:
    """Ask something of a child that is stopped."""
    pid = os.fork()
    if pid == 0:
        while True:
            os.read(os.pipe()[0], 1)
    try:
        ptrace.seize(pid)
        ptrace.interrupt(pid)
        ptrace.wait_for_stop(pid)
        return question(pid)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def _seccomp_suspend() -> bool:
    def ask(pid: int) -> bool:
        try:
            ptrace.set_options(pid, ptrace.PTRACE_O_SUSPEND_SECCOMP)
        except OSError:
            return False
        return True

    return _traced(ask)


def _kcmp_epoll() -> bool:
    try:
        kcmp.same_epoll_target(os.getpid(), 0, os.getpid(), NO_DESCRIPTOR, 0, 0)
    except OSError as error:
        return error.errno == errno.EBADF
    return True


def _pidfd() -> bool:
    with Pidfd(os.getpid()) as pidfd:
        try:
            os.close(pidfd.get(pidfd.fd))
        except OSError:
            return False
    return True


def _timer_ids() -> bool:
    return libc.syscall(SYS_PRCTL, PR_TIMER_CREATE_RESTORE_IDS, PR_TIMER_CREATE_RESTORE_IDS_GET, 0, 0, 0, 0) >= 0


def _map_vdso() -> bool:
    """EEXIST: it could be mapped, and is already (arch/x86/entry/vdso/vma.c, map_vdso_once)."""
    done = libc.syscall(SYS_ARCH_PRCTL, ARCH_MAP_VDSO_64, 0, 0, 0, 0, 0)
    return done >= 0 or ctypes.get_errno() == errno.EEXIST


PROBES = {
    "clone3_set_tid": _clone3_set_tid, "pagemap_scan": _pagemap_scan, "mem_dirty_track": _mem_dirty_track,
    "get_rseq_conf": _rseq, "seccomp_suspend": _seccomp_suspend, "kcmp_epoll": _kcmp_epoll, "pidfd_store": _pidfd,
    "timer_cr_ids": _timer_ids, "can_map_vdso": _map_vdso,
}  # fmt: skip
REQUIRED = ("clone3_set_tid", "pidfd_store", "can_map_vdso", "kcmp_epoll")
"""Without these there is no dump or no restore; the others are replaced where they are missing."""


def has(name: str) -> bool:
    """Whether a feature is there. UsageError for a name that is not known."""
    if name not in PROBES:
        raise UsageError(f"{name!r} is no feature that is known here", hint=f"known: {', '.join(sorted(PROBES))}")
    return PROBES[name]()
