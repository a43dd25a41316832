# SPDX-License-Identifier: Apache-2.0
"""Tasks and threads: core-TID.img, ids-PID.img, pstree.img, fs-PID.img, and what lies in them."""

from __future__ import annotations

from stasis.process.images.message import (
    HEX,
    Message,
    OpenEnum,
    boolean,
    bytestring,
    enumeration,
    int32,
    message,
    sint32,
    string,
    uint32,
    uint64,
)
from stasis.process.images.schema.registers import ThreadInfoX86

__all__ = [
    "CoreEntry",
    "CredsEntry",
    "FsEntry",
    "ItimerEntry",
    "March",
    "PosixTimerEntry",
    "PstreeEntry",
    "RlimitEntry",
    "RseqEntry",
    "SaEntry",
    "SeccompEntry",
    "SeccompFilter",
    "SeccompMode",
    "SiginfoEntry",
    "SignalQueueEntry",
    "TaskCoreEntry",
    "TaskKobjIdsEntry",
    "TaskRlimitsEntry",
    "TaskTimersEntry",
    "ThreadCoreEntry",
    "ThreadSasEntry",
]


class March(OpenEnum):
    UNKNOWN = 0
    X86_64 = 1
    ARM = 2
    AARCH64 = 3
    PPC64 = 4
    S390 = 5
    MIPS = 6
    LOONGARCH64 = 7
    RISCV64 = 8


class SeccompMode(OpenEnum):
    disabled = 0
    strict = 1
    filter = 2


class CredsEntry(Message):
    uid: int = uint32(1)
    gid: int = uint32(2)
    euid: int = uint32(3)
    egid: int = uint32(4)
    suid: int = uint32(5)
    sgid: int = uint32(6)
    fsuid: int = uint32(7)
    fsgid: int = uint32(8)
    cap_inh: list[int] = uint32(9, factory=list)
    cap_prm: list[int] = uint32(10, factory=list)
    cap_eff: list[int] = uint32(11, factory=list)
    cap_bnd: list[int] = uint32(12, factory=list)
    secbits: int = uint32(13)
    groups: list[int] = uint32(14, factory=list)
    lsm_profile: str | None = string(15, default=None)
    lsm_sockcreate: str | None = string(16, default=None)
    apparmor_data: bytes | None = bytestring(17, default=None)
    no_new_privs: int | None = uint32(18, default=None)
    cap_amb: list[int] = uint32(19, factory=list)


class SaEntry(Message):
    sigaction: int = uint64(1, show=HEX)
    flags: int = uint64(2, show=HEX)
    restorer: int = uint64(3, show=HEX)
    mask: int = uint64(4, show=HEX)
    compat_sigaction: bool | None = boolean(5, default=None)
    mask_extended: int | None = uint64(6, default=None, show=HEX)


class SiginfoEntry(Message):
    siginfo: bytes = bytestring(1)


class SignalQueueEntry(Message):
    signals: list[SiginfoEntry] = message(1, SiginfoEntry, factory=list)


class ItimerEntry(Message):
    isec: int = uint64(1)
    iusec: int = uint64(2)
    vsec: int = uint64(3)
    vusec: int = uint64(4)


class PosixTimerEntry(Message):
    it_id: int = uint32(1)
    clock_id: int = uint32(2)
    si_signo: int = uint32(3)
    it_sigev_notify: int = uint32(4)
    sival_ptr: int = uint64(5)
    overrun: int = uint32(6)
    isec: int = uint64(7)
    insec: int = uint64(8)
    vsec: int = uint64(9)
    vnsec: int = uint64(10)
    notify_thread_id: int | None = int32(11, default=None)


class TaskTimersEntry(Message):
    real: ItimerEntry = message(1, ItimerEntry)
    virt: ItimerEntry = message(2, ItimerEntry)
    prof: ItimerEntry = message(3, ItimerEntry)
    posix: list[PosixTimerEntry] = message(4, PosixTimerEntry, factory=list)


class RlimitEntry(Message):
    cur: int = uint64(1)
    max: int = uint64(2)


class TaskRlimitsEntry(Message):
    rlimits: list[RlimitEntry] = message(1, RlimitEntry, factory=list)


class RseqEntry(Message):
    rseq_abi_pointer: int = uint64(1, show=HEX)
    rseq_abi_size: int = uint32(2)
    signature: int = uint32(3, show=HEX)
    rseq_cs_pointer: int | None = uint64(4, default=None, show=HEX)


class ThreadSasEntry(Message):
    ss_sp: int = uint64(1, show=HEX)
    ss_size: int = uint64(2)
    ss_flags: int = uint32(3)


class ThreadCoreEntry(Message):
    futex_rla: int = uint64(1, show=HEX)
    futex_rla_len: int = uint32(2)
    sched_nice: int | None = sint32(3, default=None)
    sched_policy: int | None = uint32(4, default=None)
    sched_prio: int | None = uint32(5, default=None)
    blk_sigset: int | None = uint64(6, default=None, show=HEX)
    sas: ThreadSasEntry | None = message(7, ThreadSasEntry, default=None)
    pdeath_sig: int | None = uint32(8, default=None)
    signals_p: SignalQueueEntry | None = message(9, SignalQueueEntry, default=None)
    creds: CredsEntry | None = message(10, CredsEntry, default=None)
    seccomp_mode: SeccompMode | None = enumeration(11, SeccompMode, default=None)
    seccomp_filter: int | None = uint32(12, default=None)
    comm: str | None = string(13, default=None)
    blk_sigset_extended: int | None = uint64(14, default=None, show=HEX)
    rseq_entry: RseqEntry | None = message(15, RseqEntry, default=None)
    cg_set: int | None = uint32(16, default=None)


class TaskCoreEntry(Message):
    task_state: int = uint32(1, show="task_state")
    exit_code: int = uint32(2)
    personality: int = uint32(3)
    flags: int = uint32(4)
    blk_sigset: int = uint64(5, show=HEX)
    comm: str = string(6)
    timers: TaskTimersEntry | None = message(7, TaskTimersEntry, default=None)
    rlimits: TaskRlimitsEntry | None = message(8, TaskRlimitsEntry, default=None)
    cg_set: int | None = uint32(9, default=None)
    signals_s: SignalQueueEntry | None = message(10, SignalQueueEntry, default=None)
    old_seccomp_mode: SeccompMode | None = enumeration(11, SeccompMode, default=None)
    old_seccomp_filter: int | None = uint32(12, default=None)
    loginuid: int | None = uint32(13, default=None)
    oom_score_adj: int | None = int32(14, default=None)
    sigactions: list[SaEntry] = message(15, SaEntry, factory=list)
    child_subreaper: bool | None = boolean(18, default=None)
    blk_sigset_extended: int | None = uint64(20, default=None, show=HEX)
    stop_signo: int | None = uint32(21, default=None)
    membarrier_registration_mask: int | None = uint32(22, default=None)


class TaskKobjIdsEntry(Message):
    vm_id: int = uint32(1)
    files_id: int = uint32(2)
    fs_id: int = uint32(3)
    sighand_id: int = uint32(4)
    pid_ns_id: int | None = uint32(5, default=None)
    net_ns_id: int | None = uint32(6, default=None)
    ipc_ns_id: int | None = uint32(7, default=None)
    uts_ns_id: int | None = uint32(8, default=None)
    mnt_ns_id: int | None = uint32(9, default=None)
    user_ns_id: int | None = uint32(10, default=None)
    cgroup_ns_id: int | None = uint32(11, default=None)
    time_ns_id: int | None = uint32(12, default=None)


class CoreEntry(Message):
    mtype: March = enumeration(1, March)
    thread_info: ThreadInfoX86 | None = message(2, ThreadInfoX86, default=None)
    tc: TaskCoreEntry | None = message(3, TaskCoreEntry, default=None)
    ids: TaskKobjIdsEntry | None = message(4, TaskKobjIdsEntry, default=None)
    thread_core: ThreadCoreEntry | None = message(5, ThreadCoreEntry, default=None)


class PstreeEntry(Message):
    pid: int = uint32(1)
    ppid: int = uint32(2)
    pgid: int = uint32(3)
    sid: int = uint32(4)
    threads: list[int] = uint32(5, factory=list)


class FsEntry(Message):
    cwd_id: int = uint32(1)
    root_id: int = uint32(2)
    umask: int | None = uint32(3, default=None)


class SeccompFilter(Message):
    filter: bytes = bytestring(1)
    prev: int | None = uint32(2, default=None)
    flags: int | None = uint32(3, default=None)


class SeccompEntry(Message):
    seccomp_filters: list[SeccompFilter] = message(1, SeccompFilter, factory=list)
