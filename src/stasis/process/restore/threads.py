# SPDX-License-Identifier: Apache-2.0
"""Threads of a restored process: made with their ids, and given what is theirs."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from stasis.linux import procfs, ptrace
from stasis.linux.clone3 import CLONE_ARGS
from stasis.process import fpu, registers
from stasis.process.dump.threads import PR_GET_SECUREBITS, REAL_TIME, STACK, credentials

if TYPE_CHECKING:
    from stasis.process.images.schema.tasks import CoreEntry, CredsEntry, ThreadCoreEntry
    from stasis.process.remote import Remote
    from stasis.process.seccomp import Filters

__all__ = ["give_state", "make_threads"]

# include/uapi/linux/sched.h
CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND = 0x100, 0x200, 0x400, 0x800
CLONE_THREAD, CLONE_SYSVSEM = 0x10000, 0x40000
OF_A_THREAD = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM

# include/uapi/linux/prctl.h, include/uapi/linux/capability.h
PR_SET_PDEATHSIG, PR_SET_NAME, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 1, 15, 24, 28
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 38, 47, 2
SECBIT_NO_SETUID_FIXUP = 1 << 2  # include/uapi/linux/securebits.h
CAPABILITY_VERSION_3 = 0x20080522
NAME_BYTES = 16
SS_DISABLE = 2


def make_threads(remote: Remote, tids: list[int]) -> None:
    """Make the threads of a process beside its first one; each one waits on our page, seized and stopped."""
    for tid in tids:
        where = remote.put(struct.pack("<i", tid), CLONE_ARGS.size)
        at = remote.put(CLONE_ARGS.pack(OF_A_THREAD, 0, 0, 0, 0, 0, 0, 0, where, 1, 0))
        remote.call("clone3", at, CLONE_ARGS.size)
        ptrace.seize(tid)
        ptrace.interrupt(tid)
        ptrace.wait_for_stop(tid)
        remote.thread(tid)


def give_state(remote: Remote, tid: int, core: CoreEntry, filters: Filters) -> None:
    """Everything that a thread has; its registers take effect when `remote` is closed."""
    info, own = core.thread_info, core.thread_core
    assert info is not None
    assert own is not None
    _name(remote, tid, own.comm)
    remote.call("set_tid_address", info.clear_tid_addr, tid=tid)
    remote.call("set_robust_list", own.futex_rla, own.futex_rla_len or 24, tid=tid)
    if own.sas is not None and not own.sas.ss_flags & SS_DISABLE:
        stack = STACK.pack(own.sas.ss_sp, struct.unpack("<i", struct.pack("<I", own.sas.ss_flags))[0], 0,
                           own.sas.ss_size)  # fmt: skip
        remote.call("sigaltstack", remote.put(stack), 0, tid=tid)
    for siginfo in own.signals_p.signals if own.signals_p else ():
        number = struct.unpack_from("<i", siginfo.siginfo)[0]
        remote.call("rt_tgsigqueueinfo", remote.pid, tid, number, remote.put(siginfo.siginfo), tid=tid)
    _schedule(tid, own)
    filters.install(remote, tid, own)
    if own.creds is not None:
        _give_credentials(remote, tid, own.creds)
    remote.call("prctl", PR_SET_PDEATHSIG, own.pdeath_sig or 0, tid=tid)
    if own.rseq_entry is not None:
        entry = own.rseq_entry
        remote.call("rseq", entry.rseq_abi_pointer, entry.rseq_abi_size, 0, entry.signature, tid=tid)
    thread = remote.thread(tid)
    ptrace.set_fpu_state(tid, fpu.from_image(info.fpregs, thread.fpu))
    thread.registers = registers.from_image(info.gpregs)
    thread.signal_mask = own.blk_sigset or 0


def _name(remote: Remote, tid: int, name: str | None) -> None:
    if name is not None:
        remote.call("prctl", PR_SET_NAME, remote.put(os.fsencode(name)[: NAME_BYTES - 1] + b"\0"), tid=tid)


def _schedule(tid: int, own: ThreadCoreEntry) -> None:
    policy = own.sched_policy or 0
    if policy != os.sched_getscheduler(tid):
        priority = (own.sched_prio or 0) if policy in REAL_TIME else 0
        os.sched_setscheduler(tid, policy, os.sched_param(priority))
    if own.sched_nice is not None and os.getpriority(os.PRIO_PROCESS, tid) != own.sched_nice:
        os.setpriority(os.PRIO_PROCESS, tid, own.sched_nice)


def _give_credentials(remote: Remote, tid: int, wanted: CredsEntry) -> None:
    """In the order of CRIU's restorer: what takes rights away comes last. A thread that has them already, as that of an
    ordinary user, needs none of the rights that it takes."""

    def call(name: str, *arguments: int) -> int:
        return remote.call(name, *arguments, tid=tid)

    secure_bits = call("prctl", PR_GET_SECUREBITS)
    current = credentials(procfs.status(remote.pid, tid), secure_bits)
    if current == wanted:
        return
    if current.groups != wanted.groups:
        groups = struct.pack(f"<{len(wanted.groups)}I", *wanted.groups)
        call("setgroups", len(wanted.groups), remote.put(groups + b"\0"))
    if secure_bits != SECBIT_NO_SETUID_FIXUP:  # else the kernel takes and gives capabilities as users change
        call("prctl", PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)
    call("setresgid", wanted.gid, wanted.egid, wanted.sgid)
    call("setresuid", wanted.uid, wanted.euid, wanted.suid)
    call("setfsgid", wanted.fsgid)
    call("setfsuid", wanted.fsuid)
    lost = _capabilities(current.cap_bnd) & ~_capabilities(wanted.cap_bnd)
    for number in range(64):
        if lost >> number & 1:
            call("prctl", PR_CAPBSET_DROP, number)
    call("prctl", PR_SET_SECUREBITS, wanted.secbits)
    halves = [struct.pack("<3I", wanted.cap_eff[at], wanted.cap_prm[at], wanted.cap_inh[at]) for at in range(2)]
    head = remote.put(struct.pack("<Ii", CAPABILITY_VERSION_3, 0))
    call("capset", head, remote.put(b"".join(halves), 8))
    ambient = _capabilities(wanted.cap_amb)
    for number in range(64):
        if ambient >> number & 1:
            call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0)
    if wanted.no_new_privs:
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _capabilities(halves: list[int]) -> int:
    return sum(half << 32 * at for at, half in enumerate(halves[:2]))

