# SPDX-License-Identifier: Apache-2.0
"""The way into libc, and the one place that turns a failed call into an OSError naming call and file."""

import ctypes
import os
from collections.abc import Callable

__all__ = ["check", "describe", "error", "libc", "syscall"]

libc = ctypes.CDLL(None, use_errno=True)

# ctypes passes integers as 32-bit ints unless told otherwise; system calls take longs (addresses, offsets).
_syscall = libc.syscall
_syscall.argtypes = (ctypes.c_long,) * 7
_syscall.restype = ctypes.c_long
syscall: Callable[..., int] = _syscall


def describe(fd: int) -> str:
    """What the descriptor fd is open on, for messages; "fd N" if /proc does not tell."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"fd {fd}"


def error(code: int | None, call: str, what: int | str | None = None) -> OSError:
    """An OSError for errno code (0 if None) of the named call; what is a path or an open descriptor."""
    path = describe(what) if isinstance(what, int) else what
    return OSError(code or 0, f"{call}: {os.strerror(code or 0)}", path)


def check(result: int, call: str, what: int | str | None = None) -> int:
    """Pass a result of 0 or more on; raise OSError from the thread's saved errno for a negative one."""
    if result >= 0:
        return result
    raise error(ctypes.get_errno(), call, what)
