# SPDX-License-Identifier: Apache-2.0
"""General registers: those of ptrace, and those of an image, which has them ready to run on.

A task is nearly always dumped in a system call that was interrupted for it. What the kernel would do next (repeat the
call, or say EINTR) it cannot do in another task, so it is done here, as CRIU does it.
"""

from __future__ import annotations

from stasis.linux.ptrace import Registers
from stasis.process.images.schema.registers import UserX86RegsEntry

__all__ = ["from_image", "rewind", "to_image"]

# include/linux/errno.h: results inside the kernel that mean "begin again"
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
EINTR = 4
SYSCALL_BYTES = 2
NO_SYSTEM_CALL = (1 << 64) - 1

SAME = (
    *("r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "cs", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
RENAMED = {
    "bp": "rbp", "bx": "rbx", "ax": "rax", "cx": "rcx", "dx": "rdx", "si": "rsi", "di": "rdi", "orig_ax": "orig_rax",
    "ip": "rip", "flags": "eflags", "sp": "rsp",
}  # fmt: skip


def rewind(found: Registers) -> Registers:
    """The same registers with an interrupted system call about to be repeated, or ended with EINTR."""
    values = found.copy()
    if values.orig_rax == NO_SYSTEM_CALL:
        return values
    code = -(values.rax - (1 << 64)) if values.rax >> 63 else 0
    if code in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
        values.rax = values.orig_rax
        values.rip -= SYSCALL_BYTES
    elif code == ERESTART_RESTARTBLOCK:
        values.rax = (1 << 64) - EINTR
    return values


def to_image(found: Registers) -> UserX86RegsEntry:
    """The image's message for registers that were rewound."""
    same = {name: getattr(found, name) for name in SAME}
    return UserX86RegsEntry(**same, **{name: getattr(found, theirs) for name, theirs in RENAMED.items()})


def from_image(entry: UserX86RegsEntry) -> Registers:
    """Registers to run on with. No system call is pending in them."""
    values = Registers()
    for name in SAME:
        setattr(values, name, getattr(entry, name))
    for name, theirs in RENAMED.items():
        setattr(values, theirs, getattr(entry, name))
    values.orig_rax = NO_SYSTEM_CALL
    return values
