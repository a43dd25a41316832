# SPDX-License-Identifier: Apache-2.0
"""Keeping a file as it is: the immutable flag, who has it open for writing, and what of it the page cache holds.

For a file whose blocks somebody writes under the file system: nobody else may change where they lie, and no page of it
may be written back, or read, afterwards.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from errno import EAGAIN, EIO

from stasis.linux import ioctl, libc

__all__ = [
    "FS_COMPR_FL",
    "FS_DAX_FL",
    "FS_ENCRYPT_FL",
    "FS_IMMUTABLE_FL",
    "FS_INLINE_DATA_FL",
    "FS_JOURNAL_DATA_FL",
    "FS_VERITY_FL",
    "FS_XFLAG_DAX",
    "FS_XFLAG_REALTIME",
    "drop_cache",
    "extended_flags",
    "file_flags",
    "has_other_writers",
    "resident_pages",
    "set_immutable",
]

# include/uapi/linux/fs.h
FS_IOC_GETFLAGS = ioctl.IOR("f", 1, ctypes.sizeof(ctypes.c_long))
FS_IOC_SETFLAGS = ioctl.IOW("f", 2, ctypes.sizeof(ctypes.c_long))
FS_COMPR_FL = 0x4
FS_IMMUTABLE_FL = 0x10
FS_ENCRYPT_FL = 0x800
FS_JOURNAL_DATA_FL = 0x4000
FS_VERITY_FL = 0x100000
FS_DAX_FL = 0x02000000
FS_INLINE_DATA_FL = 0x10000000
FSXATTR_SIZE = 28
FS_IOC_FSGETXATTR = ioctl.IOR("X", 31, FSXATTR_SIZE)
FS_XFLAG_REALTIME = 0x1
FS_XFLAG_DAX = 0x8000

STEP = 1 << 30

_mincore = libc.libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_mmap = libc.libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mmap.restype = ctypes.c_void_p
_munmap = libc.libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def file_flags(fd: int) -> int:
    """The flags of lsattr(1). OSError ENOTTY or EOPNOTSUPP where the file system has none."""
    value = bytearray(8)
    ioctl.call(fd, "FS_IOC_GETFLAGS", FS_IOC_GETFLAGS, value)
    return int.from_bytes(value[:4], "little")


def extended_flags(fd: int) -> int:
    """`fsx_xflags` of struct fsxattr. OSError as `file_flags`."""
    value = bytearray(FSXATTR_SIZE)
    ioctl.call(fd, "FS_IOC_FSGETXATTR", FS_IOC_FSGETXATTR, value)
    return int.from_bytes(value[:4], "little")


def set_immutable(fd: int, immutable: bool) -> None:
    """Have the file system refuse every change of the file, root's included, or allow them again.

    Descriptors that are open for writing keep what they can do on some file systems (`has_other_writers`). Raises
    OSError: EPERM without CAP_LINUX_IMMUTABLE, ENOTTY or EOPNOTSUPP where there is no such flag.
    """
    flags = file_flags(fd)
    wanted = flags | FS_IMMUTABLE_FL if immutable else flags & ~FS_IMMUTABLE_FL
    if wanted != flags:
        ioctl.call(fd, "FS_IOC_SETFLAGS", FS_IOC_SETFLAGS, bytearray(wanted.to_bytes(8, "little")))


def has_other_writers(fd: int) -> bool:
    """Whether the file is open for writing, or mapped shared and writable, through any other open file than that of fd.

    The kernel grants a lease for writing only if there are none (fcntl(2), F_SETLEASE; check_conflicting_open() in
    fs/locks.c compares i_writecount, which mappings count in too). It is given back at once.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno == EAGAIN:
            return True
        raise libc.error(error.errno, "F_SETLEASE", fd) from error
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def resident_pages(fd: int) -> int:
    """Pages of the file that are in the page cache. The file must be open for reading; needs to own it, or root."""
    size, found = os.fstat(fd).st_size, 0
    for offset in range(0, size, STEP):
        found += _resident(fd, offset, min(STEP, size - offset))
    return found


def _resident(fd: int, offset: int, length: int) -> int:
    address = _mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address == ctypes.c_void_p(-1).value:
        raise libc.error(ctypes.get_errno(), "mmap", fd)
    try:
        states = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        libc.check(_mincore(address, length, states), "mincore")
        return bytes(states).count(1)
    finally:
        _munmap(address, length)


def drop_cache(fd: int, attempts: int = 16) -> None:
    """Write the file's pages back and take all of them out of the page cache. EIO if some cannot be taken out.

    A page that somebody reads at this moment stays, so it is tried again.
    """
    for _ in range(attempts):
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not resident_pages(fd):
            return
    raise OSError(EIO, "pages of the file stay in the page cache: somebody uses them", fd)
