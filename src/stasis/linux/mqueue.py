# SPDX-License-Identifier: Apache-2.0
"""POSIX message queues (mq_overview(7)): opening and making them, their attributes, messages in and out.

A queue of the caller's IPC namespace is also a file of the mqueue file system, which has its owner and mode.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from stasis.linux import libc
from stasis.linux.newmount import new_filesystem

__all__ = ["Attributes", "attributes", "is_queue", "make", "names", "notified", "open_queue", "receive_all", "send",
           "unlink"]  # fmt: skip

SYS_MQ_OPEN, SYS_MQ_UNLINK, SYS_MQ_TIMEDSEND, SYS_MQ_TIMEDRECEIVE, SYS_MQ_GETSETATTR = 240, 241, 242, 243, 245
MQUEUE_MAGIC = 0x19800202  # include/uapi/linux/magic.h
ATTRIBUTES = struct.Struct("<4q32x")  # struct mq_attr
STATFS_BYTES = 120


class Attributes(NamedTuple):
    """How many messages a queue holds and how large one may be, in bytes; how many wait in it."""

    most: int
    size: int
    waiting: int


def is_queue(path: str) -> bool:
    """Whether an open file is a message queue."""
    found = ctypes.create_string_buffer(STATFS_BYTES)
    name = ctypes.c_char_p(os.fsencode(path))
    return not libc.libc.statfs(name, found) and struct.unpack_from("<q", found)[0] == MQUEUE_MAGIC


def names() -> list[str]:
    """Of all queues of our namespace, without the slash. OSError on kernels without them."""
    mount = new_filesystem("mqueue")
    try:
        return sorted(os.listdir(f"/proc/self/fd/{mount}"))  # it is no directory that is open, but a place (O_PATH)
    finally:
        os.close(mount)


def open_queue(name: str, flags: int) -> int:
    """A descriptor for the queue `name`, without a slash. It is closed on exec, as all of queues. O_CLOEXEC must not be
    asked for: the description would keep it, and /proc show it of all its descriptors. OSError: ENOENT."""
    raw = ctypes.create_string_buffer(os.fsencode(name))
    return _open(name, raw, flags, 0)


def make(name: str, mode: int, wanted: Attributes) -> int:
    """A new queue, and a descriptor for it. OSError: EEXIST, and EINVAL or EMFILE beyond the limits."""
    raw = ctypes.create_string_buffer(os.fsencode(name))
    attributes = ctypes.create_string_buffer(ATTRIBUTES.pack(0, wanted.most, wanted.size, 0))
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK
    fd = _open(name, raw, flags, mode, ctypes.addressof(attributes))
    os.fchmod(fd, mode)  # whatever our umask is
    return fd


def _open(name: str, raw: ctypes.Array[ctypes.c_char], flags: int, mode: int, attributes: int = 0) -> int:
    done = libc.syscall(SYS_MQ_OPEN, ctypes.addressof(raw), flags, mode, attributes, 0, 0)
    return libc.check(done, "mq_open", f"/{name}")


def attributes(fd: int) -> Attributes:
    """What a queue holds and may hold."""
    found = ctypes.create_string_buffer(ATTRIBUTES.size)
    libc.check(libc.syscall(SYS_MQ_GETSETATTR, fd, 0, ctypes.addressof(found), 0, 0, 0), "mq_getattr", fd)
    _, most, size, waiting = ATTRIBUTES.unpack(found.raw[: ATTRIBUTES.size])
    return Attributes(most, size, waiting)


def notified(fd: int) -> int:
    """The pid of the process that is to be told of the next message (mq_notify(3)); 0 for none."""
    match = re.search(rb"NOTIFY_PID:(\d+)", os.pread(fd, 200, 0))
    return int(match[1]) if match else 0


def receive_all(fd: int) -> Iterator[tuple[int, bytes]]:
    """Take all messages, (priority, data), out of a queue that was opened with O_NONBLOCK."""
    size = attributes(fd).size
    data, priority = ctypes.create_string_buffer(size), ctypes.c_uint()
    while True:
        where = ctypes.addressof(data), size, ctypes.addressof(priority)
        length = libc.syscall(SYS_MQ_TIMEDRECEIVE, fd, *where, 0, 0)
        if length < 0 and ctypes.get_errno() == errno.EAGAIN:
            return
        libc.check(length, "mq_receive", fd)
        yield priority.value, data.raw[:length]


def send(fd: int, priority: int, data: bytes) -> None:
    """Put a message in. OSError: EAGAIN where the queue is full."""
    raw = ctypes.create_string_buffer(data, max(len(data), 1))
    done = libc.syscall(SYS_MQ_TIMEDSEND, fd, ctypes.addressof(raw), len(data), priority, 0, 0)
    libc.check(done, "mq_send", fd)


def unlink(name: str) -> None:
    """Take a queue's name away; it ends when nobody has it open. OSError: ENOENT."""
    raw = ctypes.create_string_buffer(os.fsencode(name))
    libc.check(libc.syscall(SYS_MQ_UNLINK, ctypes.addressof(raw), 0, 0, 0, 0, 0), "mq_unlink", f"/{name}")
