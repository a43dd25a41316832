# SPDX-License-Identifier: Apache-2.0
"""What Linux offers on files beyond POSIX: holes, extents, unnamed files, sealed memory, writeback errors."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Sequence

from stasis.linux import ioctl, libc
from stasis.linux.holes import data_extents

__all__ = [
    "Vectored",
    "allocate",
    "create_memfd",
    "data_extents",
    "link_opened",
    "link_unnamed",
    "open_unnamed",
    "punch_hole",
    "rename_to_free",
    "reopen",
    "set_immutable",
    "start_writeback",
    "sync_filesystem",
    "transfer_rest",
    "wait_writeback",
    "writeback_error",
    "zero_range",
]

Vectored = Callable[[int, Sequence[memoryview], int], int]
"""os.preadv or os.pwritev."""

# include/uapi/linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# include/uapi/linux/fs.h
SYNC_FILE_RANGE_WAIT_BEFORE = 1
SYNC_FILE_RANGE_WRITE = 2
SYNC_FILE_RANGE_WAIT_AFTER = 4

# include/uapi/linux/fs.h; the size in the number is that of long, what is read and written is an int
FS_IOC_GETFLAGS = ioctl.IOR("f", 1, ctypes.sizeof(ctypes.c_long))
FS_IOC_SETFLAGS = ioctl.IOW("f", 2, ctypes.sizeof(ctypes.c_long))
FS_IMMUTABLE_FL = 0x10

# include/uapi/linux/fcntl.h
AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
RENAME_NOREPLACE = 1  # include/uapi/linux/fs.h

_fallocate = libc.libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_linkat = libc.libc.linkat
_linkat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_renameat2 = libc.libc.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_sync_file_range = libc.libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def _call_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _fallocate(fd, mode, offset, length) < 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise libc.error(code, "fallocate", fd)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the space of length bytes at offset; they read as zeroes, the size stays. EOPNOTSUPP.

    Works on block devices too (since Linux 4.9), where it needs zeroing discards.
    """
    _call_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int, keep_size: bool = True) -> None:
    """Make length bytes at offset read as zeroes and keep them allocated. EOPNOTSUPP."""
    mode = FALLOC_FL_ZERO_RANGE | (FALLOC_FL_KEEP_SIZE if keep_size else 0)
    _call_fallocate(fd, mode, offset, length)


def allocate(fd: int, offset: int, length: int) -> None:
    """Allocate space and raise the size to at least offset + length. ENOSPC, EOPNOTSUPP.

    Unlike posix_fallocate this never falls back to writing a byte into every block.
    """
    _call_fallocate(fd, 0, offset, length)


def transfer_rest(call: Vectored, fd: int, places: Sequence[memoryview], offset: int, done: int) -> None:
    """Go on after a preadv or pwritev of `places` at `offset` that did their first `done` bytes only.

    EIO where nothing more is done, as at the end of the file.
    """
    for place in places:
        ahead = min(done, len(place))
        done -= ahead
        while ahead < len(place):
            count = call(fd, [place[ahead:]], offset + ahead)
            if not count:
                raise OSError(errno.EIO, "the file ends early")
            ahead += count
        offset += len(place)


def writeback_error(fd: int) -> None:
    """Raise the OSError of a failed writeback that the kernel has recorded since fd was opened or last asked.

    sync_file_range with WAIT_BEFORE alone ends in file_check_and_advance_wb_err() (mm/filemap.c) and starts
    no writeback. It waits for a writeback of the first page that happens to run.
    """
    _call_sync_file_range(fd, 0, 1, SYNC_FILE_RANGE_WAIT_BEFORE)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Start to write dirty pages of a range to the disk. Says nothing about when they are durable."""
    _call_sync_file_range(fd, offset, length, SYNC_FILE_RANGE_WRITE)


def wait_writeback(fd: int, offset: int, length: int) -> None:
    """Write dirty pages of a range and wait for them. Not durable: metadata and the disk's own cache are left out."""
    flags = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
    _call_sync_file_range(fd, offset, length, flags)


def _call_sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    while _sync_file_range(fd, offset, length, flags) < 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise libc.error(code, "writeback", fd)


def open_unnamed(directory: str, mode: int = 0o600) -> int:
    """Open a new file for reading and writing that has no name in directory, on its file system.

    Where the file system has no O_TMPFILE the file has a random name for the moment until it is unlinked.
    """
    try:
        return os.open(directory, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
    except OSError as e:
        # EISDIR: the kernel's answer from a file system that does not know O_TMPFILE (open(2), BUGS)
        if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    import tempfile  # here, because it takes longer to load than all the rest, and is hardly ever needed

    fd, path = tempfile.mkstemp(prefix=".unnamed-", dir=directory)
    try:
        os.unlink(path)
        os.fchmod(fd, mode)
    except OSError:
        os.close(fd)
        raise
    return fd


def link_unnamed(fd: int, path: str) -> None:
    """Give a file of O_TMPFILE (without O_EXCL) its name. FileExistsError: nothing is ever replaced.

    By way of /proc, as AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH (open(2), O_TMPFILE).
    """
    link_opened(f"/proc/self/fd/{fd}", path)


def link_opened(source: str, path: str) -> None:
    """Give an open file one more name; `source` is its link in /proc, of whatever process. FileExistsError.

    os.link does not follow such links: it calls link(2), whatever follow_symlinks says.
    """
    libc.check(_linkat(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW), "link", path)


def rename_to_free(old: str, new: str) -> None:
    """Rename where nothing has the new name (renameat2(2), RENAME_NOREPLACE). FileExistsError; EINVAL from a file
    system that does not know how."""
    done = _renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), RENAME_NOREPLACE)
    libc.check(done, "renameat2", new)


def sync_filesystem(path: str) -> None:
    """Make all that was written to the file system of `path` durable, names included."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc.check(libc.libc.syncfs(fd), "syncfs", path)
    finally:
        os.close(fd)


def reopen(fd: int, flags: int) -> int:
    """Open the same file again with other flags; unnamed files too. Permissions are checked again."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def create_memfd(name: str, size: int, seal_shrink: bool = True) -> int:
    """A memory file of size bytes. Sealed against shrinking, a mapping of it can never fault with SIGBUS."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if seal_shrink:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        os.close(fd)
        raise
    return fd


def set_immutable(path: str, immutable: bool) -> None:
    """Have the file system refuse every change of a file, root's included, or allow them again.

    Raises OSError: EPERM without CAP_LINUX_IMMUTABLE, ENOTTY or EOPNOTSUPP where the file system has no such flag.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags = bytearray(8)
        ioctl.call(fd, "FS_IOC_GETFLAGS", FS_IOC_GETFLAGS, flags)
        value = int.from_bytes(flags[:4], "little")
        value = value | FS_IMMUTABLE_FL if immutable else value & ~FS_IMMUTABLE_FL
        ioctl.call(fd, "FS_IOC_SETFLAGS", FS_IOC_SETFLAGS, bytearray(value.to_bytes(8, "little")))
    finally:
        os.close(fd)
