# SPDX-License-Identifier: Apache-2.0
"""Pipes: both ends, what is in them, and how much they hold."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

from stasis.linux.splice import tee
from stasis.process.files.descriptor import Descriptor, owner, set_flags
from stasis.process.files.kind import FileKind, Opened, Saving
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdTypes, FileEntry, PipeDataEntry, PipeEntry

if TYPE_CHECKING:
    from stasis.process.files.options import FileOptions

__all__ = ["F_GETPIPE_SZ", "Pipes", "contents", "fill"]

# include/uapi/linux/fcntl.h
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032
SPLICE_F_NONBLOCK = 2


class Pipes(FileKind):
    """Unnamed pipes. Ends that are open nowhere in the tree are not: what was written is read, then the pipe ends."""

    type = FdTypes.PIPE
    field = "pipe"

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self._dumped: set[int] = set()

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.kind == stat.S_IFIFO and descriptor.link.startswith("pipe:")

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        pipe_id = descriptor.status.st_ino & 0xFFFFFFFF
        if pipe_id not in self._dumped:
            self._dumped.add(pipe_id)
            data = contents(fd)
            head = PipeDataEntry(pipe_id=pipe_id, bytes=len(data), size=fcntl.fcntl(fd, F_GETPIPE_SZ))
            saving.out.image("pipes-data").append(head, data)
        entry = PipeEntry(id=number, pipe_id=pipe_id, flags=descriptor.flags, fown=owner(fd))
        return FileEntry(type=FdTypes.PIPE, id=number, pipe=entry)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found = self.message_of(entry)
        pipes = opened.state.setdefault(Pipes, {})
        if found.pipe_id not in pipes:
            pipes[found.pipe_id] = _make(found.pipe_id, opened)
        reader, writer = pipes[found.pipe_id]
        is_writer = found.flags & os.O_ACCMODE == os.O_WRONLY
        # A description of its own for each entry: the same pipe opened anew.
        flags = found.flags & (os.O_ACCMODE | os.O_DIRECT | os.O_NONBLOCK)
        fd = os.open(f"/proc/self/fd/{writer if is_writer else reader}", flags | os.O_CLOEXEC)
        set_flags(fd, found.flags)
        return fd

    def resource(self, entry: FileEntry, opened: Opened) -> str:
        return f"pipe:[{self.message_of(entry).pipe_id}]"

    def done(self, opened: Opened) -> None:
        for pair in opened.state.pop(Pipes, {}).values():
            for fd in pair:
                os.close(fd)


def contents(fd: int) -> bytes:
    """What is in a pipe, which stays in it: teed into another one of the same capacity."""
    source = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        capacity = fcntl.fcntl(writer, F_SETPIPE_SZ, fcntl.fcntl(source, F_GETPIPE_SZ))
        try:
            length = tee(source, writer, capacity, SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return b""
        return _read(reader, length)
    finally:
        for each in (source, reader, writer):
            os.close(each)


def _read(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        data += os.read(fd, length - len(data))
    return data


def _make(pipe_id: int, opened: Opened) -> tuple[int, int]:
    """The pipe with its capacity and contents; our descriptors for it are closed when all files are restored."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    fill(writer, "pipes-data", pipe_id, opened)
    return reader, writer


def fill(writer: int, kind: str, pipe_id: int, opened: Opened) -> None:
    """Give a pipe its capacity and what was in it, from the image that is for it."""
    try:
        image = opened.images.image(kind)
    except FileNotFoundError:
        return
    with image:
        for record in image:
            entry = record.message
            assert isinstance(entry, PipeDataEntry)
            if entry.pipe_id != pipe_id:
                continue
            if entry.size:
                fcntl.fcntl(writer, F_SETPIPE_SZ, entry.size)
            if entry.bytes > fcntl.fcntl(writer, F_GETPIPE_SZ):
                raise damaged(opened.images.file_path(kind), record.offset, "a pipe holds more than it can")
            if entry.bytes:
                os.write(writer, image.read(record.parts[0]))
