# SPDX-License-Identifier: Apache-2.0
"""Memory without pauses: what runs while a disk or a process stands still must not wait for it.

Memory that stays in RAM (include/uapi/asm-generic/mman.h), and no search for garbage.
"""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from stasis.linux import libc

__all__ = ["available", "lock", "lock_all", "no_collection"]

MCL_CURRENT = 1
MCL_FUTURE = 2

_mlock = libc.libc.mlock
_mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def lock_all() -> None:
    """Keep all memory of this process in RAM, what it takes later too. EPERM or ENOMEM beyond RLIMIT_MEMLOCK."""
    libc.check(libc.libc.mlockall(MCL_CURRENT | MCL_FUTURE), "mlockall")


def lock(address: int, length: int) -> None:
    """Keep length bytes at a page-aligned address in RAM, all of them taken now. EPERM, ENOMEM, EAGAIN."""
    libc.check(_mlock(address, length), "mlock")


def available() -> int:
    """Bytes that can be taken before anything has to be swapped out (proc_meminfo(5), MemAvailable)."""
    with open("/proc/meminfo") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:")), 0)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside: it would take a part of the time for which others stand still."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
