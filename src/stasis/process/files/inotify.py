# SPDX-License-Identifier: Apache-2.0
"""inotify(7): what is watched, under which numbers. Events that nobody read are lost: they cannot be looked at
without taking them out."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from stasis.errors import StateError
from stasis.linux import inotify, procfs
from stasis.process.files.descriptor import Descriptor, owner, set_flags
from stasis.process.files.ghosts import DELETED
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.images.damage import damaged
from stasis.process.images.schema.events import FhEntry, InotifyFileEntry, InotifyWdEntry
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.roots import likely, places, reach

__all__ = ["Inotifies", "handle_entry"]

# fs/notify/fdinfo.c, inotify_fdinfo
WATCH = re.compile(r"inotify wd:([0-9a-f]+) ino:([0-9a-f]+) sdev:([0-9a-f]+) mask:([0-9a-f]+) ignored_mask:([0-9a-f]+) "
                   r"fhandle-bytes:([0-9a-f]+) fhandle-type:([0-9a-f]+) f_handle:([0-9a-f]+)")  # fmt: skip
HANDLE_WORDS = 16
WORD = 8
USER_MASK = 0x84000FFF  # IN_ALL_EVENTS, IN_EXCL_UNLINK, IN_ONESHOT
HIGHEST_WATCH = 1 << 20


class Inotifies(FileKind):
    type = FdTypes.INOTIFY
    field = "ify"

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:inotify"

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        if descriptor.info.count("inotify wd:") != len(WATCH.findall(descriptor.info)):
            looking.findings.add(descriptor.pid, descriptor.where, "the kernel does not tell what it watches")
        for watch in _watches(descriptor, 0):
            if watch.f_handle.path is None:
                reason = f"watch {watch.wd} is of a file that has no name any more, or on a file system without handles"
                looking.findings.add(descriptor.pid, descriptor.where, reason)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        entry = InotifyFileEntry(id=number, flags=descriptor.flags, fown=owner(fd),
                                 wd=list(_watches(descriptor, number)))  # fmt: skip
        return FileEntry(type=FdTypes.INOTIFY, id=number, ify=entry)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        return inotify.inotify()

    def connect(self, opened: Opened) -> None:
        """Watch when nothing is made or opened any more by the restore itself."""
        for number in opened.numbers(FdTypes.INOTIFY):
            fd, entry = opened.open(number), self.message_of(opened.entry(number))
            for watch in sorted(entry.wd, key=lambda each: each.wd):
                _watch(fd, watch, opened)
            _drain(fd)
            set_flags(fd, entry.flags)


def _watches(descriptor: Descriptor, number: int) -> Iterator[InotifyWdEntry]:
    for words in WATCH.findall(descriptor.info):
        wd, inode, device, mask, ignored, length, kind = (int(word, 16) for word in words[:7])
        handle = bytes.fromhex(words[7])[:length]
        yield InotifyWdEntry(id=number, i_ino=inode, mask=mask, ignored_mask=ignored, s_dev=device, wd=wd,
                             f_handle=handle_entry(descriptor.pid, device, kind, handle))  # fmt: skip


def handle_entry(pid: int, device: int, kind: int, handle: bytes) -> FhEntry:
    """The message for a file handle, with the path that leads to its file."""
    padded = handle.ljust(HANDLE_WORDS * WORD, b"\0")
    parts = [int.from_bytes(padded[at : at + WORD], "little") for at in range(0, len(padded), WORD)]
    path, mount = _path(pid, device, kind, handle)
    return FhEntry(bytes=len(handle), type=kind, handle=parts, path=path, mnt_id=mount)


def _path(pid: int, device: int, kind: int, handle: bytes) -> tuple[str | None, int | None]:
    """The path of a file handle, tried on each mount of its file system, None where it has none; and the mount, where
    the process lives in another mount namespace than the first one."""
    place = likely(pid)[0]
    wanted = f"{device >> 20}:{device & 0xFFFFF}".encode()
    for line in procfs.read(pid, "mountinfo").splitlines():
        fields = line.split()
        if fields[2] != wanted:
            continue
        with contextlib.suppress(OSError):
            mount = os.open(reach(fields[4].decode("unicode_escape"), place), os.O_RDONLY | os.O_CLOEXEC)
            try:
                fd = inotify.open_by_handle(mount, kind, handle, os.O_PATH | os.O_CLOEXEC)
            finally:
                os.close(mount)
            path = os.readlink(f"/proc/self/fd/{fd}")
            os.close(fd)
            is_lost = path.endswith(DELETED) or not path.startswith("/")
            return (None if is_lost else path), (int(fields[0]) if place != places()[0] else None)
    return None, None


def _watch(fd: int, watch: InotifyWdEntry, opened: Opened) -> None:
    """Add watches until the number comes; the kernel counts upwards."""
    path = watch.f_handle.path
    if path is None or not 0 < watch.wd <= HIGHEST_WATCH:
        raise damaged(opened.images.file_path("files"), 0, f"inotify {watch.id} has a watch without path or number")
    path = opened.path(path, watch.f_handle.mnt_id or -1)
    try:
        while (made := inotify.add_watch(fd, path, watch.mask & USER_MASK)) < watch.wd:
            inotify.remove_watch(fd, made)
    except OSError as error:
        raise StateError(f"{path} cannot be watched any more: {error.strerror}",
                         hint="bring the file back, or name another one with --map-path",
                         errno=error.errno or 0) from error  # fmt: skip
    if made != watch.wd:
        raise damaged(opened.images.file_path("files"), 0, f"inotify {watch.id} has watch {watch.wd} twice")


def _drain(fd: int) -> None:
    """Take out what it says about the watches that were removed again."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 1 << 16):
            pass
