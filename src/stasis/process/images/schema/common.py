# SPDX-License-Identifier: Apache-2.0
"""What messages of several areas hold: owners of descriptors, times."""

from __future__ import annotations

from stasis.process.images.message import Message, OpenEnum, enumeration, int32, string, uint32, uint64

__all__ = [
    "FownEntry",
    "SysctlEntry",
    "SysctlType",
    "Timespec",
    "Timeval",
]


class FownEntry(Message):
    uid: int = uint32(1)
    euid: int = uint32(2)
    signum: int = uint32(3)
    pid_type: int = uint32(4)
    pid: int = uint32(5)


class Timeval(Message):
    tv_sec: int = uint64(1)
    tv_usec: int = uint64(2)


class Timespec(Message):
    tv_sec: int = uint64(1)
    tv_nsec: int = uint64(2)


class SysctlType(OpenEnum):
    CTL_STR = 5
    CTL_32 = 6


class SysctlEntry(Message):
    type: SysctlType = enumeration(1, SysctlType)
    iarg: int | None = int32(2, default=None)
    sarg: str | None = string(3, default=None)
