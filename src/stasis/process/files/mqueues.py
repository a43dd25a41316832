# SPDX-License-Identifier: Apache-2.0
"""Descriptors of POSIX message queues (mq_overview(7)). A queue lives on without its processes: a restore opens it by
its name again. With an IPC namespace of the tree's own it is made again before, with its messages
(`namespaces/mqueues.py`). criu has no kind for them; in files.img they are what criu leaves to plugins."""

from __future__ import annotations

import os
import stat

from stasis.errors import StateError
from stasis.linux import mqueue
from stasis.process.files.descriptor import Descriptor, duplicate, owner
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import ExtFileEntry, FdTypes, FileEntry, MqueueFileEntry

__all__ = ["MessageQueues"]


class MessageQueues(FileKind):
    type = FdTypes.EXT
    field = "ext"

    def claims(self, descriptor: Descriptor) -> bool:
        may_be = descriptor.kind == stat.S_IFREG and descriptor.link.count("/") == 1
        return may_be and mqueue.is_queue(f"/proc/{descriptor.pid}/fd/{descriptor.fd}")

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        if descriptor.is_deleted:
            looking.findings.add(descriptor.pid, descriptor.where, "the message queue was unlinked")
        fd = duplicate(descriptor)
        try:
            pid = mqueue.notified(fd) if descriptor.flags & os.O_ACCMODE != os.O_WRONLY else 0
        finally:
            os.close(fd)
        if pid in {one.pid for one in looking.descriptors}:
            reason = f"process {pid} waits to be told of messages (mq_notify)"
            looking.findings.add(descriptor.pid, descriptor.where, reason)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        name = descriptor.link.removeprefix("/")
        saving.out.write("stasis-mqueues", MqueueFileEntry(id=number, name=name, flags=descriptor.flags))
        return FileEntry(type=FdTypes.EXT, id=number, ext=ExtFileEntry(id=number, fown=owner(fd)))

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        for found in opened.images.messages("stasis-mqueues"):
            if found.id == entry.id and found.name and "/" not in found.name:
                try:
                    return mqueue.open_queue(found.name, found.flags & (os.O_ACCMODE | os.O_NONBLOCK))
                except OSError as error:
                    what = f"the message queue /{found.name}, which a process had open, cannot be opened"
                    hint = "it must be there, as its messages are not in the images"
                    raise StateError(f"{what}: {error.strerror}", errno=error.errno or 0, hint=hint) from error
        raise damaged(opened.images.file_path("files"), 0, f"file {entry.id} is a plugin's, or of no message queue")
