# SPDX-License-Identifier: Apache-2.0
"""System V semaphores and message queues (sysvipc(7)): those there are, what is in them, and making them with a given
id. Shared memory has a module of its own."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stasis.linux import libc

__all__ = ["Object", "Queue", "Semaphores", "make_queue", "make_semaphores", "messages", "queues", "semaphores", "send",
           "values"]  # fmt: skip

SYS_SEMGET, SYS_SEMCTL, SYS_MSGGET, SYS_MSGSND, SYS_MSGRCV, SYS_MSGCTL = 64, 66, 68, 69, 70, 71
IPC_CREAT, IPC_EXCL, IPC_NOWAIT, IPC_RMID, IPC_SET, IPC_STAT = 0o1000, 0o2000, 0o4000, 0, 1, 2
GETALL, SETALL = 13, 17  # include/uapi/linux/sem.h
MSG_COPY = 0o40000
"""msgop(2): look at a message by its number; in kernels with CONFIG_CHECKPOINT_RESTORE."""
LONG = struct.Struct("<q")
PERMISSIONS = struct.Struct("<iIIIII24x")  # struct ipc64_perm: key, uid, gid, cuid, cgid, mode
SEMAPHORES_BYTES = 104  # struct semid64_ds
QUEUE = struct.Struct("<48x5QQ24x")  # struct msqid64_ds: permissions, times, cbytes, qnum, qbytes
NEXT_ID = "/proc/sys/kernel/{}_next_id"


class Object(NamedTuple):
    """What all kinds have."""

    key: int
    id: int
    mode: int
    uid: int
    gid: int
    cuid: int
    cgid: int


class Semaphores(NamedTuple):
    """A set of `size` semaphores."""

    object: Object
    size: int


class Queue(NamedTuple):
    """A message queue with `waiting` messages, that may hold `limit` bytes."""

    object: Object
    waiting: int
    limit: int


def semaphores() -> list[Semaphores]:
    """All sets of our namespace."""
    return [Semaphores(_object(fields, 4), int(fields[3])) for fields in _lines("sem")]


def values(number: int, count: int) -> bytes:
    """The values of a set, two bytes each."""
    buffer = ctypes.create_string_buffer(2 * count)
    libc.check(libc.syscall(SYS_SEMCTL, number, 0, GETALL, ctypes.addressof(buffer), 0, 0), "semctl(GETALL)")
    return buffer.raw


def make_semaphores(wanted: Semaphores, contents: bytes) -> None:
    """A new set with id, key, owner and values. EEXIST where id or key are taken."""
    flags = IPC_CREAT | IPC_EXCL | wanted.object.mode & 0o777
    _choose("sem", wanted.object.id)
    number = libc.check(libc.syscall(SYS_SEMGET, wanted.object.key, wanted.size, flags, 0, 0, 0), "semget")
    _refuse_other(SYS_SEMCTL, number, wanted.object.id)
    raw = _permissions(wanted.object).ljust(SEMAPHORES_BYTES, b"\0")
    owner = ctypes.create_string_buffer(raw, len(raw))
    libc.check(libc.syscall(SYS_SEMCTL, number, 0, IPC_SET, ctypes.addressof(owner), 0, 0), "semctl(IPC_SET)")
    buffer = ctypes.create_string_buffer(contents, len(contents))
    libc.check(libc.syscall(SYS_SEMCTL, number, 0, SETALL, ctypes.addressof(buffer), 0, 0), "semctl(SETALL)")


def queues() -> list[Queue]:
    """All message queues of our namespace."""
    return [Queue(_object(fields, 7), int(fields[4]), _limit(int(fields[1]))) for fields in _lines("msg")]


def _limit(number: int) -> int:
    buffer = ctypes.create_string_buffer(QUEUE.size)
    libc.check(libc.syscall(SYS_MSGCTL, number, IPC_STAT, ctypes.addressof(buffer), 0, 0, 0), "msgctl(IPC_STAT)")
    return int(QUEUE.unpack(buffer.raw)[5])


def messages(queue: Queue) -> Iterator[tuple[int, bytes]]:
    """(type, text) of each message of a queue that nobody uses meanwhile; they stay in it. ENOSYS in kernels without
    CONFIG_CHECKPOINT_RESTORE."""
    longest = int(Path("/proc/sys/kernel/msgmax").read_text())
    buffer = ctypes.create_string_buffer(LONG.size + max(longest, queue.limit))
    for number in range(queue.waiting):
        size = libc.check(
            libc.syscall(SYS_MSGRCV, queue.object.id, ctypes.addressof(buffer), len(buffer) - LONG.size, number,
                         MSG_COPY | IPC_NOWAIT, 0), "msgrcv(MSG_COPY)")  # fmt: skip
        yield LONG.unpack_from(buffer.raw)[0], buffer.raw[LONG.size : LONG.size + size]


def make_queue(wanted: Queue) -> None:
    """A new queue with id, key, owner and limit. EEXIST where id or key are taken."""
    _choose("msg", wanted.object.id)
    flags = IPC_CREAT | IPC_EXCL | wanted.object.mode & 0o777
    number = libc.check(libc.syscall(SYS_MSGGET, wanted.object.key, flags, 0, 0, 0, 0), "msgget")
    _refuse_other(SYS_MSGCTL, number, wanted.object.id)
    raw = bytearray(QUEUE.pack(0, 0, 0, 0, 0, wanted.limit))
    raw[: PERMISSIONS.size] = _permissions(wanted.object)
    buffer = ctypes.create_string_buffer(bytes(raw), len(raw))
    libc.check(libc.syscall(SYS_MSGCTL, number, IPC_SET, ctypes.addressof(buffer), 0, 0, 0), "msgctl(IPC_SET)")


def send(number: int, kind: int, text: bytes) -> None:
    """Put a message at the end of a queue. EAGAIN where it is full."""
    raw = LONG.pack(kind) + text
    buffer = ctypes.create_string_buffer(raw, len(raw) or 1)
    libc.check(libc.syscall(SYS_MSGSND, number, ctypes.addressof(buffer), len(text), IPC_NOWAIT, 0, 0), "msgsnd")


def _lines(kind: str) -> Iterator[list[str]]:
    for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
        yield line.split()


def _object(fields: list[str], owner: int) -> Object:
    """From a line of /proc/sysvipc; `owner` is the place of the first of four ids."""
    uid, gid, cuid, cgid = (int(field) for field in fields[owner : owner + 4])
    return Object(int(fields[0]), int(fields[1]), int(fields[2], 8), uid, gid, cuid, cgid)


def _choose(kind: str, number: int) -> None:
    Path(NEXT_ID.format(kind)).write_text(str(number))  # Documentation/admin-guide/sysctl/kernel.rst


def _permissions(wanted: Object) -> bytes:
    return PERMISSIONS.pack(0, wanted.uid, wanted.gid, 0, 0, wanted.mode & 0o777)


def _refuse_other(control: int, number: int, wanted: int) -> None:
    """Take an object away again that has got another id."""
    if number == wanted:
        return
    if control == SYS_SEMCTL:
        libc.syscall(SYS_SEMCTL, number, 0, IPC_RMID, 0, 0, 0)
    else:
        libc.syscall(control, number, IPC_RMID, 0, 0, 0, 0)
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
