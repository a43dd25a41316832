# SPDX-License-Identifier: Apache-2.0
"""System V shared memory (shmget(2)): the segments there are, and making one with a given id."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import NamedTuple

from stasis.linux import libc

__all__ = ["SHM_DEST", "Segment", "make", "remove", "segments"]

SYS_SHMGET, SYS_SHMCTL = 29, 31
IPC_CREAT, IPC_EXCL, IPC_RMID, IPC_SET = 0o1000, 0o2000, 0, 1
SHM_DEST = 0o1000
"""In a mode: the segment goes when nobody has it mapped any more."""
PERMISSIONS = struct.Struct("<iIIIII24x")  # struct ipc64_perm: key, uid, gid, cuid, cgid, mode
SEGMENT_BYTES = 112  # struct shmid64_ds
NEXT_ID = Path("/proc/sys/kernel/shm_next_id")


class Segment(NamedTuple):
    """A line of /proc/sysvipc/shm; `size` is bytes, `creator` the pid of who made it, 0 for one that is to be made."""

    key: int
    id: int
    mode: int
    size: int
    attached: int
    uid: int
    gid: int
    cuid: int
    cgid: int
    creator: int = 0


def segments() -> dict[int, Segment]:
    """All segments of our namespace, by id."""
    found = {}
    for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        key, number, mode, size, creator, _, attached, uid, gid, cuid, cgid, *_ = line.split()
        found[int(number)] = Segment(int(key), int(number), int(mode, 8), int(size), int(attached), int(uid), int(gid),
                                     int(cuid), int(cgid), int(creator))  # fmt: skip
    return found


def make(wanted: Segment) -> None:
    """A new segment with the id, key, size, owner and mode of `wanted`. EEXIST where id or key are taken; EPERM without
    CAP_CHECKPOINT_RESTORE."""
    NEXT_ID.write_text(str(wanted.id))  # Documentation/admin-guide/sysctl/kernel.rst, msg_next_id and others
    flags = IPC_CREAT | IPC_EXCL | wanted.mode & 0o777
    number = libc.check(libc.syscall(SYS_SHMGET, wanted.key, wanted.size, flags, 0, 0, 0), "shmget")
    if number != wanted.id:
        remove(number)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    raw = PERMISSIONS.pack(0, wanted.uid, wanted.gid, 0, 0, wanted.mode & 0o777)
    buffer = ctypes.create_string_buffer(raw, SEGMENT_BYTES)
    libc.check(libc.syscall(SYS_SHMCTL, number, IPC_SET, ctypes.addressof(buffer), 0, 0, 0), "shmctl(IPC_SET)")


def remove(number: int) -> None:
    """The segment goes when nobody has it mapped any more."""
    libc.check(libc.syscall(SYS_SHMCTL, number, IPC_RMID, 0, 0, 0, 0), "shmctl(IPC_RMID)")
