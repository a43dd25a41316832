# SPDX-License-Identifier: Apache-2.0
"""What belongs to a thread alone: registers, signals for it, scheduling, credentials, and what the kernel does for it
at its end."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

from stasis.linux import libc, procfs, ptrace
from stasis.process import fpu, registers
from stasis.process.images.schema.registers import ThreadInfoX86
from stasis.process.images.schema.tasks import (
    CredsEntry,
    RseqEntry,
    SeccompMode,
    SiginfoEntry,
    SignalQueueEntry,
    ThreadCoreEntry,
    ThreadSasEntry,
)
from stasis.process.namespaces.identities import Identities

if TYPE_CHECKING:
    from stasis.process.remote import Remote

__all__ = ["robust_list", "signal_queue", "thread_core", "thread_info"]

# include/uapi/linux/prctl.h
PR_GET_PDEATHSIG = 2
PR_GET_SECUREBITS = 27
PR_GET_TID_ADDRESS = 40

SYS_GET_ROBUST_LIST = 274
SCHED_NORMAL, SCHED_FIFO, SCHED_RR, SCHED_BATCH, SCHED_IDLE = 0, 1, 2, 3, 5
REAL_TIME = (SCHED_FIFO, SCHED_RR)
SS_AUTODISARM = 1 << 31
STACK = struct.Struct("<QiiQ")  # struct sigaltstack
CAPABILITY_SETS = {"cap_inh": "CapInh", "cap_prm": "CapPrm", "cap_eff": "CapEff", "cap_bnd": "CapBnd",
                   "cap_amb": "CapAmb"}  # fmt: skip


def thread_info(remote: Remote, tid: int) -> ThreadInfoX86:
    """Registers as the thread will run on with them."""
    thread = remote.thread(tid)
    remote.call("prctl", PR_GET_TID_ADDRESS, remote.scratch, tid=tid)
    return ThreadInfoX86(
        clear_tid_addr=remote.get_words("<Q")[0],
        gpregs=registers.to_image(registers.rewind(thread.registers)),
        fpregs=fpu.to_image(thread.fpu),
    )


def thread_core(remote: Remote, tid: int) -> ThreadCoreEntry:
    """Everything but the registers."""
    pid = remote.pid
    fields = procfs.status(pid, tid)
    stat = procfs.stat(pid, tid)
    address, length = robust_list(tid)
    remote.call("sigaltstack", 0, remote.scratch, tid=tid)
    sp, flags, _, size = STACK.unpack(remote.get(STACK.size))
    remote.call("prctl", PR_GET_PDEATHSIG, remote.scratch, tid=tid)
    return ThreadCoreEntry(
        futex_rla=address,
        futex_rla_len=length,
        sched_nice=stat.nice,
        sched_policy=stat.policy,
        sched_prio=stat.rt_priority if stat.policy in REAL_TIME else 0,
        blk_sigset=remote.thread(tid).signal_mask,
        sas=ThreadSasEntry(ss_sp=sp, ss_size=size, ss_flags=flags & 0xFFFFFFFF),
        pdeath_sig=remote.get_words("<I")[0] or None,
        signals_p=signal_queue(tid, shared=False),
        creds=credentials(fields, remote.call("prctl", PR_GET_SECUREBITS, tid=tid)),
        seccomp_mode=SeccompMode(int(fields.get("Seccomp", "0"))),
        comm=stat.comm,
        rseq_entry=rseq(tid),
    )


def robust_list(tid: int) -> tuple[int, int]:
    """(address, length) of a thread's list of robust futexes; zeroes where it has none."""
    head, length = ctypes.c_uint64(), ctypes.c_uint64()
    libc.check(
        libc.syscall(SYS_GET_ROBUST_LIST, tid, ctypes.addressof(head), ctypes.addressof(length), 0, 0, 0),
        "get_robust_list",
    )
    return head.value, length.value if head.value else 0


def signal_queue(tid: int, *, shared: bool) -> SignalQueueEntry:
    """Signals that wait, with all that came with them."""
    return SignalQueueEntry(
        signals=[SiginfoEntry(siginfo=raw) for raw in ptrace.pending_signals(tid, shared=shared)]
    )


def rseq(tid: int) -> RseqEntry | None:
    """The thread's restartable sequences; None where it has none or the kernel cannot tell."""
    found = ptrace.rseq_configuration(tid)
    if found is None or not found.pointer:
        return None
    return RseqEntry(rseq_abi_pointer=found.pointer, rseq_abi_size=found.size, signature=found.signature)


def credentials(fields: dict[str, str], secure_bits: int) -> CredsEntry:
    """From /proc/PID/task/TID/status."""
    inside = Identities.inside()
    uid, euid, suid, fsuid = (inside.uid(int(word)) for word in fields["Uid"].split())
    gid, egid, sgid, fsgid = (inside.gid(int(word)) for word in fields["Gid"].split())
    entry = CredsEntry(
        uid=uid, euid=euid, suid=suid, fsuid=fsuid, gid=gid, egid=egid, sgid=sgid, fsgid=fsgid,
        secbits=secure_bits, groups=[inside.gid(int(word)) for word in fields["Groups"].split()],
        no_new_privs=int(fields.get("NoNewPrivs", "0")),
    )  # fmt: skip
    for name, key in CAPABILITY_SETS.items():
        setattr(entry, name, _halves(int(fields[key], 16)))
    return entry


def _halves(value: int) -> list[int]:
    return [value & 0xFFFFFFFF, value >> 32]

