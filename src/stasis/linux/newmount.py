# SPDX-License-Identifier: Apache-2.0
"""Mounts by descriptors (Linux 5.2): file systems that are mounted nowhere yet, copies of mounts, moving them into
place, their attributes, and another root (open_tree(2), fsopen(2), move_mount(2), mount_setattr(2), pivot_root(2))."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping

from stasis.linux import libc

__all__ = [
    "AT_EMPTY_PATH",
    "Attributes",
    "clone_tree",
    "detach",
    "join_group",
    "make_root",
    "move",
    "new_filesystem",
    "reconfigure",
    "set_attributes",
]

SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT, SYS_MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
SYS_FSPICK, SYS_PIVOT_ROOT, SYS_UMOUNT2 = 433, 155, 166
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE, AT_SYMLINK_NOFOLLOW, AT_NO_AUTOMOUNT = -100, 0x1000, 0x8000, 0x100, 0x800
# include/uapi/linux/mount.h
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE, FSCONFIG_CMD_RECONFIGURE = 0, 1, 6, 7
FSPICK_CLOEXEC, FSPICK_EMPTY_PATH = 1, 8
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH, MOVE_MOUNT_SET_GROUP = 4, 0x40, 0x100
MNT_DETACH = 2
ATTRIBUTES = struct.Struct("<4Q")  # struct mount_attr: attr_set, attr_clr, propagation, userns_fd


class Attributes:
    """Bits of mount_setattr(2)."""

    RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
    ATIME_MASK, RELATIME, NOATIME, STRICTATIME = 0x70, 0, 0x10, 0x20
    NODIRATIME = 0x80
    NOSYMFOLLOW = 0x200000
    UNBINDABLE, PRIVATE, SLAVE, SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
    """Kinds of propagation (MS_*)."""


def _call(name: str, what: str, number: int, *arguments: int) -> int:
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    return libc.check(libc.syscall(number, *padded), name, what)


def _text(value: str) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(os.fsencode(value))


def new_filesystem(
    fstype: str, options: Mapping[str, str | None] | None = None, *, source: str = "none", attributes: int = 0
) -> int:
    """A descriptor for a new mount that is nowhere yet. Options without a value are flags. Whatever the kernel refuses
    is its errno."""
    name = _text(fstype)
    context = _call("fsopen", fstype, SYS_FSOPEN, ctypes.addressof(name), FSOPEN_CLOEXEC)
    try:
        for key, value in {"source": source, **(options or {})}.items():
            word = _text(key)
            if value is None:
                _call(f"fsconfig({key})", fstype, SYS_FSCONFIG, context, FSCONFIG_SET_FLAG, ctypes.addressof(word))
                continue
            text = _text(value)
            _call(f"fsconfig({key}={value})", fstype, SYS_FSCONFIG, context, FSCONFIG_SET_STRING,
                  ctypes.addressof(word), ctypes.addressof(text))  # fmt: skip
        _call("fsconfig(CREATE)", fstype, SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE)
        return _call("fsmount", fstype, SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def clone_tree(path: str, *, at: int = AT_FDCWD, recursive: bool = False) -> int:
    """A descriptor for a copy of the mount at `path`, from that directory or file on, without what is mounted below."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT
    flags |= AT_RECURSIVE if recursive else 0
    where = _text(path)
    return _call("open_tree", path, SYS_OPEN_TREE, at, ctypes.addressof(where), flags | (0 if path else AT_EMPTY_PATH))


def move(mount: int, path: str, *, at: int = AT_FDCWD) -> None:
    """Put a mount that is nowhere yet over `path`; "" is `at` itself."""
    empty, where = _text(""), _text(path)
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if path else MOVE_MOUNT_T_EMPTY_PATH)
    _call("move_mount", path, SYS_MOVE_MOUNT, mount, ctypes.addressof(empty), at, ctypes.addressof(where), flags)


def join_group(mount: int, member: int) -> None:
    """Make `mount` a peer, or a slave, as `member` is. Since Linux 5.15 (commit 9ffb14ef61ba)."""
    empty = _text("")
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH | MOVE_MOUNT_SET_GROUP
    _call("move_mount(SET_GROUP)", "mount", SYS_MOVE_MOUNT, member, ctypes.addressof(empty), mount,
          ctypes.addressof(empty), flags)  # fmt: skip


def set_attributes(
    mount: int, *, on: int = 0, off: int = 0, propagation: int = 0, recursive: bool = False, user_namespace: int = 0
) -> None:
    """Change a mount's own attributes, and how mounts below propagate. Since Linux 5.12."""
    raw = ATTRIBUTES.pack(on, off, propagation, user_namespace)
    argument, empty = ctypes.create_string_buffer(raw, len(raw)), _text("")
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _call("mount_setattr", "mount", SYS_MOUNT_SETATTR, mount, ctypes.addressof(empty), flags,
          ctypes.addressof(argument), len(raw))  # fmt: skip


def reconfigure(mount: int, flag: str) -> None:
    """Set an option of the file system of a mount, as "ro"."""
    empty, word = _text(""), _text(flag)
    context = _call("fspick", flag, SYS_FSPICK, mount, ctypes.addressof(empty), FSPICK_CLOEXEC | FSPICK_EMPTY_PATH)
    try:
        _call(f"fsconfig({flag})", flag, SYS_FSCONFIG, context, FSCONFIG_SET_FLAG, ctypes.addressof(word))
        _call("fsconfig(RECONFIGURE)", flag, SYS_FSCONFIG, context, FSCONFIG_CMD_RECONFIGURE)
    finally:
        os.close(context)


def make_root(directory: int) -> None:
    """Make the mount that `directory` is the root of our root, and have nothing of the old one left in sight."""
    dot = _text(".")
    old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchdir(directory)
        _call("pivot_root", ".", SYS_PIVOT_ROOT, ctypes.addressof(dot), ctypes.addressof(dot))
        os.fchdir(old)
        detach(".")
        os.chdir("/")
    finally:
        os.close(old)


def detach(path: str) -> None:
    """Take a mount and what is mounted below out of sight; it ends when nobody uses it any more."""
    where = _text(path)
    _call("umount2", path, SYS_UMOUNT2, ctypes.addressof(where), MNT_DETACH)
