# SPDX-License-Identifier: Apache-2.0
"""inotify(7), and the file handles by which /proc names what is watched (open_by_handle_at(2))."""

import ctypes
import os
import struct

from stasis.linux import libc

__all__ = ["add_watch", "inotify", "open_by_handle", "remove_watch"]


def inotify(flags: int = os.O_CLOEXEC) -> int:
    """An instance that watches nothing."""
    return libc.check(libc.libc.inotify_init1(flags), "inotify_init1")


def add_watch(fd: int, path: str, mask: int) -> int:
    """Watch what the path leads to; the watch's number, which is the one above the highest that was ever given."""
    return libc.check(libc.libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(mask)), "inotify_add_watch",
                      path)  # fmt: skip


def remove_watch(fd: int, watch: int) -> None:
    libc.check(libc.libc.inotify_rm_watch(fd, watch), "inotify_rm_watch", fd)


def open_by_handle(mount: int, kind: int, handle: bytes, flags: int) -> int:
    """Open the file of a handle on the file system that `mount` lies on. ESTALE where it is gone; needs
    CAP_DAC_READ_SEARCH."""
    buffer = ctypes.create_string_buffer(struct.pack("<Ii", len(handle), kind) + handle)
    return libc.check(libc.libc.open_by_handle_at(mount, buffer, flags), "open_by_handle_at", mount)
