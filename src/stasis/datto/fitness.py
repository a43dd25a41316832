# SPDX-License-Identifier: Apache-2.0
"""Which file systems, and which files of theirs, can hold a COW file that is written under the file system."""

from __future__ import annotations

import contextlib
import errno
import os

from stasis.errors import NotFoundError, UnsupportedError
from stasis.linux import immutable

__all__ = ["check_file_system", "check_inode"]

FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs")
"""What dattobd names as supported; of others it is not known that blocks of a file stay where they are."""

UNFIT_FLAGS = {
    immutable.FS_ENCRYPT_FL: "is encrypted",
    immutable.FS_VERITY_FL: "is sealed by fs-verity",
    immutable.FS_COMPR_FL: "is compressed",
    immutable.FS_JOURNAL_DATA_FL: "goes through the file system's journal",
    immutable.FS_DAX_FL: "is mapped directly (DAX)",
    immutable.FS_INLINE_DATA_FL: "lies inside its inode",
}
UNFIT_EXTENDED = {
    immutable.FS_XFLAG_REALTIME: "lies on the real-time device",
    immutable.FS_XFLAG_DAX: "is mapped directly (DAX)",
}


def _file_system_of(device: int) -> tuple[str, str]:
    """(kind, options) of the mounted file system with this st_dev. NotFoundError."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        for line in file:
            before, _, behind = line.partition(" - ")
            if before.split(" ")[2] == f"{os.major(device)}:{os.minor(device)}":
                kind, _, options = behind.split()[:3]
                return kind, options
    raise NotFoundError(f"no file system is mounted from device {os.major(device)}:{os.minor(device)}")


def check_file_system(path: str) -> None:
    """Whether the file system that a path lies on will do. UnsupportedError (EINVAL)."""
    directory = os.path.dirname(path)
    kind, options = _file_system_of(os.stat(directory).st_dev)
    if kind not in FILE_SYSTEMS:
        raise UnsupportedError(f"{path} lies on the device that it is to protect, in a {kind} file system",
                               errno=errno.EINVAL, hint="there it must be ext4 or xfs; or name a file on another disk")
    if "data=journal" in options.split(","):
        raise UnsupportedError(f"the file system of {path} writes all data to its journal first (data=journal)",
                               errno=errno.EINVAL, hint="mount it with data=ordered, or name a file on another disk")
    block = os.statvfs(directory).f_frsize
    if not 512 <= block <= 4096:
        raise UnsupportedError(f"the file system of {path} has blocks of {block} bytes", errno=errno.EINVAL,
                               hint="up to 4096 are possible; or name a file on another disk")


def check_inode(fd: int, path: str) -> None:
    """Whether the file system treats this file as any other. UnsupportedError (EOPNOTSUPP)."""
    flags = immutable.file_flags(fd)
    extended = 0
    with contextlib.suppress(OSError):  # ext2 and ext3 before Linux 5.x have none
        extended = immutable.extended_flags(fd)
    unfit = [text for flag, text in UNFIT_FLAGS.items() if flags & flag]
    unfit += [text for flag, text in UNFIT_EXTENDED.items() if extended & flag]
    if unfit:
        raise UnsupportedError(f"{path} {unfit[0]}: its blocks cannot be written under the file system",
                               errno=errno.EOPNOTSUPP, hint="name another directory, or a file on another disk")
