# SPDX-License-Identifier: Apache-2.0
"""fanotify(7): the marks of files and mounts again. Events that wait to be read would be lost, so one with events is
refused, and so are those that decide about what others do, and marks of whole file systems."""

from __future__ import annotations

import re
import select
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stasis.errors import StateError
from stasis.linux import fanotify
from stasis.process.files.descriptor import owner, set_flags
from stasis.process.files.inotify import handle_entry
from stasis.process.files.kind import FileKind
from stasis.process.images.damage import damaged
from stasis.process.images.schema.events import (
    FanotifyFileEntry,
    FanotifyInodeMarkEntry,
    FanotifyMarkEntry,
    FanotifyMountMarkEntry,
    MarkType,
)
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.roots import mounts, places

if TYPE_CHECKING:
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.files.kind import Looking, Opened, Saving

__all__ = ["Fanotifies"]

# fs/notify/fdinfo.c
SETTINGS = re.compile(r"^fanotify flags:([0-9a-f]+) event-flags:([0-9a-f]+)$", re.MULTILINE)
INODE = re.compile(r"^fanotify ino:([0-9a-f]+) sdev:([0-9a-f]+) mflags:([0-9a-f]+) mask:([0-9a-f]+) "
                   r"ignored_mask:([0-9a-f]+) fhandle-bytes:([0-9a-f]+) fhandle-type:([0-9a-f]+) f_handle:([0-9a-f]+)",
                   re.MULTILINE)  # fmt: skip
MOUNT = re.compile(r"^fanotify mnt_id:([0-9a-f]+) mflags:([0-9a-f]+) mask:([0-9a-f]+) ignored_mask:([0-9a-f]+)",
                   re.MULTILINE)  # fmt: skip
FAN_CLASSES = 0xC
PERMISSIONS = 0x70000  # FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM


class Fanotifies(FileKind):
    type = FdTypes.FANOTIFY
    field = "ffy"

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:[fanotify]"

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        def lost(reason: str, *, passes: bool = False) -> None:
            looking.findings.add(descriptor.pid, descriptor.where, reason, passes=passes)

        settings = SETTINGS.search(descriptor.info)
        lines = sum(line.startswith("fanotify ") for line in descriptor.info.splitlines())
        if settings is None or lines != 1 + len(INODE.findall(descriptor.info)) + len(MOUNT.findall(descriptor.info)):
            lost("it has marks of a kind that images have no place for")
            return
        marks = list(_marks(descriptor, 0))
        if int(settings[1], 16) & FAN_CLASSES or any(mark.mask & PERMISSIONS for mark in marks):
            lost("it decides about what other processes may do")
        for mark in marks:
            if (mark.ie.f_handle.path if mark.ie else mark.me.path if mark.me else None) is None:
                lost("a file or mount that it marks cannot be found any more")
        if _has_events(descriptor):
            lost("events wait in it", passes=True)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        settings = SETTINGS.search(descriptor.info)
        assert settings is not None, "check found it"
        entry = FanotifyFileEntry(id=number, flags=descriptor.flags, fown=owner(fd), faflags=int(settings[1], 16),
                                  evflags=int(settings[2], 16), mark=list(_marks(descriptor, number)))  # fmt: skip
        return FileEntry(type=FdTypes.FANOTIFY, id=number, ffy=entry)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found: FanotifyFileEntry = self.message_of(entry)
        return fanotify.fanotify(found.faflags, found.evflags)

    def connect(self, opened: Opened) -> None:
        """Mark when nothing is made or opened any more by the restore itself."""
        for number in opened.numbers(FdTypes.FANOTIFY):
            entry = self.message_of(opened.entry(number))
            for mark in entry.mark:
                _mark(opened.open(number), mark, opened)
            set_flags(opened.open(number), entry.flags)


def _has_events(descriptor: Descriptor) -> bool:
    from stasis.process.files.descriptor import duplicate

    fd = duplicate(descriptor)
    with open(fd, "rb", buffering=0) as file:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        return bool(poll.poll(0))


def _marks(descriptor: Descriptor, number: int) -> Iterator[FanotifyMarkEntry]:
    for words in INODE.findall(descriptor.info):
        inode, device, flags, mask, ignored, length, kind = (int(word, 16) for word in words[:7])
        handle = handle_entry(descriptor.pid, device, kind, bytes.fromhex(words[7])[:length])
        yield FanotifyMarkEntry(id=number, type=MarkType.INODE, mflags=flags, mask=mask, ignored_mask=ignored,
                                s_dev=device, ie=FanotifyInodeMarkEntry(i_ino=inode, f_handle=handle))  # fmt: skip
    for words in MOUNT.findall(descriptor.info):
        mount, flags, mask, ignored = (int(word, 16) for word in words)
        path = next((one.target for place in places() for one in mounts(place) if one.number == mount), None)
        yield FanotifyMarkEntry(id=number, type=MarkType.MOUNT, mflags=flags, mask=mask, ignored_mask=ignored, s_dev=0,
                                me=FanotifyMountMarkEntry(mnt_id=mount, path=path))  # fmt: skip


def _mark(fd: int, mark: FanotifyMarkEntry, opened: Opened) -> None:
    path = mark.ie.f_handle.path if mark.ie is not None else mark.me.path if mark.me is not None else None
    if path is None:
        raise damaged(opened.images.file_path("files"), 0, f"fanotify {mark.id} has a mark without a path")
    mount = mark.ie.f_handle.mnt_id if mark.ie is not None else mark.me.mnt_id if mark.me is not None else None
    path = opened.path(path, mount or -1)
    is_mount = mark.me is not None
    try:
        if mark.mask:
            fanotify.mark(fd, path, mark.mask, is_mount=is_mount)
        if mark.ignored_mask:
            fanotify.mark(fd, path, mark.ignored_mask, is_mount=is_mount, ignored=True, flags=mark.mflags)
    except OSError as error:
        raise StateError(f"{path} cannot be watched any more: {error.strerror}",
                         hint="bring the file back, or name another one with --map-path",
                         errno=error.errno or 0) from error  # fmt: skip
