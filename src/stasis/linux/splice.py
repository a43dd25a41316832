# SPDX-License-Identifier: Apache-2.0
"""tee(2): what is in a pipe, copied without taking it out."""

import ctypes

from stasis.linux import libc

__all__ = ["tee"]

_tee = libc.libc.tee
_tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
_tee.restype = ctypes.c_ssize_t


def tee(source: int, target: int, length: int, flags: int = 0) -> int:
    """Duplicate up to `length` bytes of one pipe into another; returns how many. EAGAIN where there are none."""
    return libc.check(_tee(source, target, length, flags), "tee", source)
