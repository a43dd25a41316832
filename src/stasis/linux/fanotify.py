# SPDX-License-Identifier: Apache-2.0
"""fanotify(7): an instance, and what it is to tell of."""

from __future__ import annotations

import ctypes
import os

from stasis.linux import libc

__all__ = ["fanotify", "mark"]

SYS_FANOTIFY_INIT, SYS_FANOTIFY_MARK = 300, 301
AT_FDCWD = -100
# include/uapi/linux/fanotify.h
FAN_CLOEXEC = 1
FAN_MARK_ADD, FAN_MARK_MOUNT, FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORED_SURV_MODIFY = 1, 0x10, 0x20, 0x40
IN_FDINFO = FAN_MARK_IGNORED_SURV_MODIFY
"""Of the flags that /proc tells of a mark, those that can be given with an ignored mask."""


def fanotify(flags: int, event_flags: int) -> int:
    """An instance that watches nothing; `event_flags` are those of the descriptors that it gives."""
    return libc.check(libc.syscall(SYS_FANOTIFY_INIT, flags | FAN_CLOEXEC, event_flags, 0, 0, 0, 0), "fanotify_init")


def mark(fd: int, path: str, mask: int, *, is_mount: bool, ignored: bool = False, flags: int = 0) -> None:
    """Tell of these events of a file, or of all files below a mount; or with `ignored` not of these."""
    action = FAN_MARK_ADD | (FAN_MARK_MOUNT if is_mount else 0)
    action |= FAN_MARK_IGNORED_MASK | flags & IN_FDINFO if ignored else 0
    where = ctypes.create_string_buffer(os.fsencode(path))
    libc.check(libc.syscall(SYS_FANOTIFY_MARK, fd, action, mask, AT_FDCWD, ctypes.addressof(where), 0),
               "fanotify_mark", path)  # fmt: skip
