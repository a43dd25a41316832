# SPDX-License-Identifier: Apache-2.0
"""The POSIX message queues of an IPC namespace with their messages, which CRIU's images have no place for; the image
`stasis-ipcns-mq-N.img` is our own.

To read a message is to take it out. A process of its own takes all and puts them back at once, in the same order: it
goes on to the end when the dumper is killed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import struct
from typing import TYPE_CHECKING

from stasis.linux import mqueue
from stasis.process.helpers import apart
from stasis.process.images.damage import damaged
from stasis.process.images.schema.ipc import MqueueEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.identities import Identities

__all__ = ["check_queues", "make_queues", "write_queues"]

MESSAGE = struct.Struct("<II")  # priority, length
LARGEST_PRIORITY = 32767  # MQ_PRIO_MAX - 1


def _names() -> list[str]:
    """All queues of this namespace; none where the kernel has no such."""
    try:
        return mqueue.names()
    except OSError:
        return []


def check_queues(root: int, findings: Findings) -> None:
    """Note what cannot be kept of the queues of this namespace."""
    for name in _names():
        fd = mqueue.open_queue(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if pid := mqueue.notified(fd):
                reason = f"process {pid} waits to be told of messages (mq_notify)"
                findings.add(root, f"POSIX message queue /{name}", reason)
        finally:
            os.close(fd)


def write_queues(number: int, out: ImageSetWriter, identities: Identities) -> None:
    """All queues of this namespace."""
    for name in _names():
        fd = mqueue.open_queue(name, os.O_RDWR | os.O_NONBLOCK)
        try:
            status, attributes, contents = os.fstat(fd), mqueue.attributes(fd), _contents(fd)
        finally:
            os.close(fd)
        entry = MqueueEntry(
            name=name, mode=status.st_mode & 0o7777, uid=identities.uid(status.st_uid),
            gid=identities.gid(status.st_gid), maxmsg=attributes.most, msgsize=attributes.size, length=len(contents),
        )  # fmt: skip
        out.image("stasis-ipcns-mq", number).append(entry, contents)


def _contents(fd: int) -> bytes:
    """All messages, which are in the queue afterwards."""
    if not mqueue.attributes(fd).waiting:
        return b""
    name = os.readlink(f"/proc/self/fd/{fd}")
    return apart(f"the messages of {name} cannot be looked at", lambda: _take_and_put_back(fd))


def _take_and_put_back(fd: int) -> bytes:
    taken: list[tuple[int, bytes]] = []
    try:
        taken.extend(mqueue.receive_all(fd))
    finally:
        for message in taken:
            mqueue.send(fd, *message)
    return b"".join(MESSAGE.pack(priority, len(data)) + data for priority, data in taken)


def make_queues(images: ImageSet, number: int) -> None:
    """Make them in this namespace, which has none. OSError."""
    if not images.has("stasis-ipcns-mq", number):
        return
    with contextlib.suppress(ValueError, OSError):  # without CAP_SYS_RESOURCE the limit is what it is
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with images.image("stasis-ipcns-mq", number) as image:
        for record in image:
            entry = record.message
            assert isinstance(entry, MqueueEntry)
            contents = image.read(record.parts[0])
            messages = list(_messages(contents, images.file_path("stasis-ipcns-mq", number)))
            _make(entry, messages)


def _make(entry: MqueueEntry, messages: list[tuple[int, bytes]]) -> None:
    fd = mqueue.make(entry.name, entry.mode & 0o777, mqueue.Attributes(entry.maxmsg, entry.msgsize, 0))
    try:
        for message in messages:
            mqueue.send(fd, *message)
        os.fchown(fd, entry.uid, entry.gid)
    finally:
        os.close(fd)


def _messages(contents: bytes, path: str) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(contents):
        if len(contents) - at < MESSAGE.size:
            raise damaged(path, at, "a message is not whole")
        priority, length = MESSAGE.unpack_from(contents, at)
        at += MESSAGE.size
        if priority > LARGEST_PRIORITY or length > len(contents) - at:
            raise damaged(path, at, "a message is not whole")
        yield priority, contents[at : at + length]
        at += length
