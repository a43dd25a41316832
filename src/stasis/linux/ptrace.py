# SPDX-License-Identifier: Apache-2.0
"""ptrace(2) on x86-64: seizing, stopping and stepping tasks, their registers, signals and masks.

Every call must come from the thread that seized the task. A task that is gone gives ESRCH.
"""

import ctypes
import errno
import os
import signal
from typing import NamedTuple

from stasis.linux import libc

__all__ = [
    "FPU_BYTES_MAX",
    "Registers",
    "RseqConfiguration",
    "Stop",
    "cont",
    "cont_to_system_call",
    "detach",
    "dispatches_system_calls",
    "fpu_state",
    "interrupt",
    "pending_signals",
    "poll_stop",
    "registers",
    "rseq_configuration",
    "seccomp_filters",
    "seize",
    "set_fpu_state",
    "set_options",
    "set_registers",
    "set_signal_mask",
    "signal_mask",
    "wait_for_end",
    "wait_for_stop",
]

# include/uapi/linux/ptrace.h, arch/x86/include/asm/ptrace-abi.h
PTRACE_CONT = 7
PTRACE_GETREGS = 12
PTRACE_SETREGS = 13
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SETOPTIONS = 0x4200
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_PEEKSIGINFO = 0x4209
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_SECCOMP_GET_FILTER = 0x420C
PTRACE_SECCOMP_GET_METADATA = 0x420D
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211

PTRACE_PEEKSIGINFO_SHARED = 1

PTRACE_EVENT_STOP = 128

PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_EXITKILL = 1 << 20
PTRACE_O_SUSPEND_SECCOMP = 1 << 21

NT_X86_XSTATE = 0x202  # include/uapi/linux/elf.h
WALL = 0x40000000  # include/uapi/linux/wait.h
SIGINFO_BYTES = 128  # include/uapi/asm-generic/siginfo.h, SI_MAX_SIZE
FPU_BYTES_MAX = 1 << 16
MASK_BYTES = 8
SOCK_FILTER_BYTES = 8  # include/uapi/linux/filter.h

_ptrace = libc.libc.ptrace
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


class Registers(ctypes.Structure):
    """struct user_regs_struct (arch/x86/include/asm/user_64.h)."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]

    def copy(self) -> "Registers":
        """The same values."""
        return Registers.from_buffer_copy(self)


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _PeekSiginfo(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("count", ctypes.c_int32)]


class RseqConfiguration(ctypes.Structure):
    """struct ptrace_rseq_configuration: what a thread has registered with rseq(2); pointer 0 for nothing."""

    _fields_ = [
        ("pointer", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


class Stop(NamedTuple):
    """Why a task stopped or ended: `signal` and, behind it, the ptrace `event`; `exited` carries a wait status."""

    tid: int
    signal: int = 0
    event: int = 0
    exited: int | None = None

    @property
    def is_system_call(self) -> bool:
        """Entering or leaving a system call, told apart from traps by PTRACE_O_TRACESYSGOOD."""
        return self.signal == signal.SIGTRAP | 0x80

    @property
    def is_group_stop(self) -> bool:
        """Stopped by a stop signal, as job control does it, and seen by a tracer that seized it."""
        return self.event == PTRACE_EVENT_STOP and self.signal in (
            signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)  # fmt: skip


def _call(request: int, tid: int, address: int = 0, data: int = 0, name: str = "") -> int:
    ctypes.set_errno(0)
    result = _ptrace(request, tid, address, data)
    if result < 0 and ctypes.get_errno():
        raise libc.error(ctypes.get_errno(), f"ptrace({name})", str(tid))
    return int(result)


def seize(tid: int, options: int = PTRACE_O_TRACESYSGOOD) -> None:
    """Become the tracer of a task without stopping it. EPERM if it is traced already or not ours to trace."""
    _call(PTRACE_SEIZE, tid, 0, options, "PTRACE_SEIZE")


def interrupt(tid: int) -> None:
    """Ask a seized task to stop; `wait_for_stop` tells when it has."""
    _call(PTRACE_INTERRUPT, tid, name="PTRACE_INTERRUPT")


def cont(tid: int, number: int = 0) -> None:
    """Let a stopped task run on, with a signal if one is to be delivered."""
    _call(PTRACE_CONT, tid, 0, number, "PTRACE_CONT")


def cont_to_system_call(tid: int, number: int = 0) -> None:
    """Let a stopped task run until it enters a system call, or leaves the one it is in.

    Unlike a single step this leaves nothing behind when the tracer dies: __ptrace_unlink() clears the flag, but not the
    processor's trap flag, whose trap would then kill the task.
    """
    _call(PTRACE_SYSCALL, tid, 0, number, "PTRACE_SYSCALL")


def detach(tid: int, number: int = 0) -> None:
    """Stop tracing a stopped task; it runs on, or stays stopped where a stop signal is given."""
    _call(PTRACE_DETACH, tid, 0, number, "PTRACE_DETACH")


def set_options(tid: int, options: int) -> None:
    """PTRACE_O_* of a stopped task. PTRACE_O_SUSPEND_SECCOMP needs CAP_SYS_ADMIN."""
    _call(PTRACE_SETOPTIONS, tid, 0, options, "PTRACE_SETOPTIONS")


def wait_for_stop(tid: int) -> Stop:
    """Wait until a traced task stops or ends. ECHILD if it is not traced (any more)."""
    _, status = os.waitpid(tid, WALL)
    return _stop(tid, status)


def wait_for_end(tid: int) -> None:
    """Wait for the end of a task that was killed. The first thread's is told when all others' were asked for."""
    try:
        while wait_for_stop(tid).exited is None:
            cont(tid)
    except (ChildProcessError, ProcessLookupError):
        return  # it was waited for by its parent, or as a thread with its process


def poll_stop(tid: int) -> Stop | None:
    """As `wait_for_stop`, None while it runs."""
    found, status = os.waitpid(tid, WALL | os.WNOHANG)
    return _stop(tid, status) if found else None


def _stop(tid: int, status: int) -> Stop:
    if os.WIFSTOPPED(status):
        return Stop(tid, os.WSTOPSIG(status), status >> 16)
    return Stop(tid, exited=status)


def registers(tid: int) -> Registers:
    """General registers of a stopped task."""
    found = Registers()
    _call(PTRACE_GETREGS, tid, 0, ctypes.addressof(found), "PTRACE_GETREGS")
    return found


def set_registers(tid: int, values: Registers) -> None:
    """Set the general registers of a stopped task."""
    _call(PTRACE_SETREGS, tid, 0, ctypes.addressof(values), "PTRACE_SETREGS")


def fpu_state(tid: int) -> bytes:
    """The XSAVE area of a stopped task, as long as this processor's is."""
    buffer = ctypes.create_string_buffer(FPU_BYTES_MAX)
    vector = _IoVec(ctypes.addressof(buffer), FPU_BYTES_MAX)
    _call(PTRACE_GETREGSET, tid, NT_X86_XSTATE, ctypes.addressof(vector), "PTRACE_GETREGSET")
    return buffer.raw[: vector.length]


def set_fpu_state(tid: int, state: bytes) -> None:
    """Set the XSAVE area. EINVAL where a component is not known to this processor."""
    buffer = ctypes.create_string_buffer(state, len(state))
    vector = _IoVec(ctypes.addressof(buffer), len(state))
    _call(PTRACE_SETREGSET, tid, NT_X86_XSTATE, ctypes.addressof(vector), "PTRACE_SETREGSET")


def signal_mask(tid: int) -> int:
    """Blocked signals of a stopped task: bit 0 is signal 1."""
    mask = ctypes.c_uint64()
    _call(PTRACE_GETSIGMASK, tid, MASK_BYTES, ctypes.addressof(mask), "PTRACE_GETSIGMASK")
    return mask.value


def set_signal_mask(tid: int, mask: int) -> None:
    """Set the blocked signals of a stopped task."""
    value = ctypes.c_uint64(mask)
    _call(PTRACE_SETSIGMASK, tid, MASK_BYTES, ctypes.addressof(value), "PTRACE_SETSIGMASK")


def pending_signals(tid: int, *, shared: bool) -> list[bytes]:
    """Raw siginfo of the signals that wait for a thread, or with `shared` for its process; they stay queued."""
    found: list[bytes] = []
    portion = 32
    buffer = ctypes.create_string_buffer(portion * SIGINFO_BYTES)
    while True:
        flags = PTRACE_PEEKSIGINFO_SHARED if shared else 0
        wanted = _PeekSiginfo(len(found), flags, portion)
        count = _call(PTRACE_PEEKSIGINFO, tid, ctypes.addressof(wanted), ctypes.addressof(buffer), "PTRACE_PEEKSIGINFO")
        if not count:
            return found
        found += [buffer.raw[at : at + SIGINFO_BYTES] for at in range(0, count * SIGINFO_BYTES, SIGINFO_BYTES)]


def rseq_configuration(tid: int) -> RseqConfiguration | None:
    """What a stopped thread has registered with rseq(2); None where the kernel cannot tell (before 5.13)."""
    found = RseqConfiguration()
    size = ctypes.sizeof(found)
    try:
        _call(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, ctypes.addressof(found), "PTRACE_GET_RSEQ_CONFIGURATION")
    except OSError as error:
        if error.errno in (errno.EIO, errno.EINVAL):
            return None
        raise
    return found


def dispatches_system_calls(tid: int) -> bool:
    """Whether a stopped thread gets its own system calls as signals (PR_SET_SYSCALL_USER_DISPATCH).

    False where the kernel cannot tell (before 6.4).
    """
    found = (ctypes.c_uint64 * 4)()  # struct ptrace_sud_config: mode, selector, offset, len
    try:
        _call(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, ctypes.sizeof(found), ctypes.addressof(found),
              "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG")
    except OSError as error:
        if error.errno in (errno.EIO, errno.EINVAL):
            return False
        raise
    return bool(found[0])


def seccomp_filters(tid: int) -> list[tuple[bytes, int]]:
    """(program as struct sock_filter, SECCOMP_FILTER_FLAG_*) of each filter of a stopped thread, the oldest first.

    Needs CAP_SYS_ADMIN (EACCES).
    """
    found: list[tuple[bytes, int]] = []
    while True:
        try:
            count = _call(PTRACE_SECCOMP_GET_FILTER, tid, len(found), 0, "PTRACE_SECCOMP_GET_FILTER")
        except OSError as error:
            if error.errno == errno.ENOENT:
                return found
            raise
        buffer = ctypes.create_string_buffer(count * SOCK_FILTER_BYTES)
        _call(PTRACE_SECCOMP_GET_FILTER, tid, len(found), ctypes.addressof(buffer), "PTRACE_SECCOMP_GET_FILTER")
        metadata = (ctypes.c_uint64 * 2)(len(found), 0)
        _call(PTRACE_SECCOMP_GET_METADATA, tid, ctypes.sizeof(metadata), ctypes.addressof(metadata),
              "PTRACE_SECCOMP_GET_METADATA")  # fmt: skip
        found.append((buffer.raw, int(metadata[1])))
