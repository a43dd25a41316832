# SPDX-License-Identifier: Apache-2.0
"""Registers of an x86-64 thread: general, floating point and vector state, TLS descriptors."""

from __future__ import annotations

from stasis.process.images.message import HEX, Message, OpenEnum, boolean, enumeration, message, string, uint32, uint64

__all__ = [
    "CpuVendor",
    "CpuinfoEntry",
    "CpuinfoX86Entry",
    "ThreadInfoX86",
    "UserDescT",
    "UserX86CetEntry",
    "UserX86FpregsEntry",
    "UserX86RegsEntry",
    "UserX86RegsMode",
    "UserX86XsaveEntry",
]


class UserX86RegsMode(OpenEnum):
    NATIVE = 1
    COMPAT = 2


class UserX86RegsEntry(Message):
    r15: int = uint64(1)
    r14: int = uint64(2)
    r13: int = uint64(3)
    r12: int = uint64(4)
    bp: int = uint64(5)
    bx: int = uint64(6)
    r11: int = uint64(7)
    r10: int = uint64(8)
    r9: int = uint64(9)
    r8: int = uint64(10)
    ax: int = uint64(11)
    cx: int = uint64(12)
    dx: int = uint64(13)
    si: int = uint64(14)
    di: int = uint64(15)
    orig_ax: int = uint64(16)
    ip: int = uint64(17)
    cs: int = uint64(18)
    flags: int = uint64(19)
    sp: int = uint64(20)
    ss: int = uint64(21)
    fs_base: int = uint64(22)
    gs_base: int = uint64(23)
    ds: int = uint64(24)
    es: int = uint64(25)
    fs: int = uint64(26)
    gs: int = uint64(27)
    mode: UserX86RegsMode = enumeration(28, UserX86RegsMode, default=UserX86RegsMode.NATIVE)


class UserX86CetEntry(Message):
    cet: int = uint64(1)
    ssp: int = uint64(2)


class UserX86XsaveEntry(Message):
    xstate_bv: int = uint64(1)
    ymmh_space: list[int] = uint32(2, factory=list)
    bndreg_state: list[int] = uint64(3, factory=list)
    bndcsr_state: list[int] = uint64(4, factory=list)
    opmask_reg: list[int] = uint64(5, factory=list)
    zmm_upper: list[int] = uint64(6, factory=list)
    hi16_zmm: list[int] = uint64(7, factory=list)
    pkru: list[int] = uint32(8, factory=list)
    cet: UserX86CetEntry | None = message(9, UserX86CetEntry, default=None)


class UserX86FpregsEntry(Message):
    cwd: int = uint32(1)
    swd: int = uint32(2)
    twd: int = uint32(3)
    fop: int = uint32(4)
    rip: int = uint64(5)
    rdp: int = uint64(6)
    mxcsr: int = uint32(7)
    mxcsr_mask: int = uint32(8)
    st_space: list[int] = uint32(9, factory=list)
    xmm_space: list[int] = uint32(10, factory=list)
    padding: list[int] = uint32(11, factory=list)
    xsave: UserX86XsaveEntry | None = message(13, UserX86XsaveEntry, default=None)


class UserDescT(Message):
    entry_number: int = uint32(1)
    base_addr: int = uint32(2)
    limit: int = uint32(3)
    seg_32bit: bool = boolean(4)
    contents_h: bool = boolean(5)
    contents_l: bool = boolean(6)
    read_exec_only: bool = boolean(7)
    limit_in_pages: bool = boolean(8)
    seg_not_present: bool = boolean(9)
    usable: bool = boolean(10)


class ThreadInfoX86(Message):
    clear_tid_addr: int = uint64(1, show=HEX)
    gpregs: UserX86RegsEntry = message(2, UserX86RegsEntry, show=HEX)
    fpregs: UserX86FpregsEntry = message(3, UserX86FpregsEntry)
    tls: list[UserDescT] = message(4, UserDescT, factory=list)


class CpuVendor(OpenEnum):
    UNKNOWN = 0
    INTEL = 1
    AMD = 2


class CpuinfoX86Entry(Message):
    vendor_id: CpuVendor = enumeration(1, CpuVendor)
    cpu_family: int = uint32(2)
    model: int = uint32(3)
    stepping: int = uint32(4)
    capability_ver: int = uint32(5)
    capability: list[int] = uint32(6, factory=list)
    model_id: str | None = string(7, default=None)
    xfeatures_mask: int | None = uint64(8, default=None)
    xsave_size: int | None = uint32(9, default=None)
    xsave_size_max: int | None = uint32(10, default=None)


class CpuinfoEntry(Message):
    x86_entry: list[CpuinfoX86Entry] = message(1, CpuinfoX86Entry, factory=list)
