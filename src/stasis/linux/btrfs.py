# SPDX-License-Identifier: Apache-2.0
"""Subvolumes of btrfs: find the one that a file lies in, make a snapshot of it, and remove that.

Requests and structures are those of include/uapi/linux/btrfs.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator

from stasis.linux import ioctl, libc

__all__ = ["remove_subvolume", "snapshot", "subvolume_of"]

MAGIC = 0x94
SUBVOL_RDONLY = 1 << 1


class _VolArgs(ctypes.Structure):
    """struct btrfs_ioctl_vol_args."""

    _fields_ = [("fd", ctypes.c_int64), ("name", ctypes.c_char * 4088)]


class _VolArgsV2(ctypes.Structure):
    """struct btrfs_ioctl_vol_args_v2."""

    _fields_ = [
        ("fd", ctypes.c_int64),
        ("transid", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("unused", ctypes.c_uint64 * 4),
        ("name", ctypes.c_char * 4040),
    ]


SNAP_DESTROY = ioctl.IOW(MAGIC, 15, _VolArgs)
SNAP_CREATE_V2 = ioctl.IOW(MAGIC, 23, _VolArgsV2)
SUBVOL_GETFLAGS = ioctl.IOR(MAGIC, 25, 8)


def subvolume_of(path: str) -> str:
    """The top directory of the subvolume that a file lies in.

    ENOTTY: it does not lie on btrfs. EXDEV: the top is not in sight, as only a part of the subvolume is mounted.
    """
    device = os.stat(path).st_dev
    where = os.path.dirname(os.path.realpath(path))
    while os.stat(where).st_dev == device:
        if _is_top(where):
            return where
        if where == "/":
            break
        where = os.path.dirname(where)
    raise libc.error(errno.EXDEV, "BTRFS_IOC_SUBVOL_GETFLAGS", path)


def _is_top(directory: str) -> bool:
    with _opened(directory) as fd:
        try:
            ioctl.get(fd, "BTRFS_IOC_SUBVOL_GETFLAGS", SUBVOL_GETFLAGS, 8)
        except OSError as error:
            if error.errno == errno.EINVAL:  # btrfs_ioctl_subvol_getflags: a directory, but no top
                return False
            raise
        return True


def snapshot(subvolume: str, name: str) -> None:
    """Make a read-only snapshot of a subvolume, as a directory in its top. EROFS, EPERM, EEXIST, ENOSPC."""
    with _opened(subvolume) as fd:
        arguments = _VolArgsV2(fd=fd, flags=SUBVOL_RDONLY, name=os.fsencode(name))
        ioctl.call(fd, "BTRFS_IOC_SNAP_CREATE_V2", SNAP_CREATE_V2, arguments)


def remove_subvolume(parent: str, name: str) -> None:
    """Remove a subvolume or snapshot from a directory. Files of it that are open stay until they are closed. ENOENT."""
    with _opened(parent) as fd:
        ioctl.call(fd, "BTRFS_IOC_SNAP_DESTROY", SNAP_DESTROY, _VolArgs(name=os.fsencode(name)))


@contextlib.contextmanager
def _opened(directory: str) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
