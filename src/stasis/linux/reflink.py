# SPDX-License-Identifier: Apache-2.0
"""Files that share their blocks until one of them is written (FICLONE, include/uapi/linux/fs.h; ioctl_ficlone(2))."""

from __future__ import annotations

import fcntl
import os

from stasis.linux import files, ioctl, libc

__all__ = ["clone", "clone_unnamed"]

FICLONE = ioctl.IOW(0x94, 9, 4)


def clone(source: int, target: int) -> None:
    """Make the file behind target have all contents of source, at one instant: writers of source wait meanwhile.

    EOPNOTSUPP, EXDEV or EINVAL where the file system cannot, or the two lie on different ones; ETXTBSY for swap files.
    """
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        raise libc.error(error.errno, "FICLONE", source) from error


def clone_unnamed(path: str) -> int:
    """A descriptor of an unnamed clone of a file, beside it. It is gone when that is closed. As `clone`; EROFS too."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        target = files.open_unnamed(os.path.dirname(os.path.abspath(path)))
        try:
            clone(source, target)
        except BaseException:
            os.close(target)
            raise
        return target
    finally:
        os.close(source)
