# SPDX-License-Identifier: Apache-2.0
"""Namespaces of a tree that has its own: mounts, names, users, pids, time, and what is mounted."""

from __future__ import annotations

from stasis.process.images.message import HEX, Message, OpenEnum, boolean, int32, message, string, uint32
from stasis.process.images.schema.common import Timespec

__all__ = [
    "AutofsEntry",
    "BinfmtMiscEntry",
    "FsType",
    "MntEntry",
    "PidnsEntry",
    "TimensEntry",
    "UidGidExtent",
    "UsernsEntry",
    "UtsnsEntry",
]


class FsType(OpenEnum):
    UNSUPPORTED = 0
    PROC = 1
    SYSFS = 2
    DEVTMPFS = 3
    BINFMT_MISC = 4
    TMPFS = 5
    DEVPTS = 6
    SIMFS = 7
    PSTORE = 8
    SECURITYFS = 9
    FUSECTL = 10
    DEBUGFS = 11
    CGROUP = 12
    AUFS = 13
    MQUEUE = 14
    FUSE = 15
    AUTO = 16
    OVERLAYFS = 17
    AUTOFS = 18
    TRACEFS = 19
    CGROUP2 = 23


class MntEntry(Message):
    fstype: int = uint32(1)
    mnt_id: int = uint32(2)
    root_dev: int = uint32(3, show="dev")
    parent_mnt_id: int = uint32(4)
    flags: int = uint32(5, show=HEX)
    root: str = string(6)
    mountpoint: str = string(7)
    source: str = string(8)
    options: str = string(9)
    shared_id: int | None = uint32(10, default=None)
    master_id: int | None = uint32(11, default=None)
    with_plugin: bool | None = boolean(12, default=None)
    ext_mount: bool | None = boolean(13, default=None)
    fsname: str | None = string(14, default=None)
    internal_sharing: bool | None = boolean(15, default=None)
    deleted: bool | None = boolean(16, default=None)
    sb_flags: int | None = uint32(17, default=None, show=HEX)
    ext_key: str | None = string(18, default=None)


class AutofsEntry(Message):
    fd: int = int32(1)
    pgrp: int = int32(2)
    timeout: int = int32(3)
    minproto: int = int32(4)
    maxproto: int = int32(5)
    mode: int = int32(6)
    uid: int | None = int32(7, default=None)
    gid: int | None = int32(8, default=None)
    read_fd: int | None = int32(9, default=None)


class BinfmtMiscEntry(Message):
    name: str = string(1)
    enabled: bool = boolean(2)
    interpreter: str = string(3)
    flags: str | None = string(4, default=None)
    extension: str | None = string(5, default=None)
    magic: str | None = string(6, default=None)
    mask: str | None = string(7, default=None)
    offset: int | None = int32(8, default=None)


class UtsnsEntry(Message):
    nodename: str = string(1)
    domainname: str = string(2)


class UidGidExtent(Message):
    first: int = uint32(1)
    lower_first: int = uint32(2)
    count: int = uint32(3)


class UsernsEntry(Message):
    uid_map: list[UidGidExtent] = message(1, UidGidExtent, factory=list)
    gid_map: list[UidGidExtent] = message(2, UidGidExtent, factory=list)


class PidnsEntry(Message):
    ext_key: str | None = string(1, default=None)


class TimensEntry(Message):
    monotonic: Timespec = message(1, Timespec)
    boottime: Timespec = message(2, Timespec)
