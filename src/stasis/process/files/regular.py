# SPDX-License-Identifier: Apache-2.0
"""Regular files and directories, and devices that have no state: opened by their path again.

The size at the dump is checked at the restore: a program that goes on with another file than it had would damage it.
A file that was only appended to is cut back by nobody; it may have grown.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from stasis import units
from stasis.errors import StateError, UnsupportedError
from stasis.linux import procfs
from stasis.process.files.descriptor import Descriptor, owner
from stasis.process.files.ghosts import DELETED, allocated
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.images.schema.common import FownEntry
from stasis.process.images.schema.files import FdTypes, FileEntry, RegFileEntry
from stasis.process.roots import likely, mount_behind, places, reach, where

if TYPE_CHECKING:
    from stasis.process.files.options import FileOptions

__all__ = ["NO_OWNER", "STATELESS_DEVICES", "RegularFiles", "mount_at", "mount_of", "open_by_entry", "path_entry"]

NO_OWNER = FownEntry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
STATELESS_DEVICES = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)}
"""null, zero, full, random, urandom (Documentation/admin-guide/devices.txt)."""
CREATING = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | os.O_NOFOLLOW  # only open(2) itself heeds these
LARGEFILE = 0o100000
O_TMPFILE = os.O_TMPFILE  # which has the bit of O_DIRECTORY in it


class RegularFiles(FileKind):
    """Files that are known by their path."""

    type = FdTypes.REG
    field = "reg"

    def claims(self, descriptor: Descriptor) -> bool:
        if descriptor.kind in (stat.S_IFREG, stat.S_IFDIR):
            return not descriptor.link.startswith("/memfd:")
        device = os.major(descriptor.status.st_rdev), os.minor(descriptor.status.st_rdev)
        return descriptor.kind == stat.S_IFCHR and device in STATELESS_DEVICES

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        if _outside_name(descriptor) in self.options.outside:
            return
        reason, option = why_lost(descriptor.pid, descriptor.link, descriptor.status, self.options)
        if reason:
            looking.findings.add(descriptor.pid, descriptor.where, reason, option)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        name = current_name(descriptor.pid, descriptor.link, descriptor.status)
        source, outside = f"/proc/{descriptor.pid}/fd/{descriptor.fd}", _outside_name(descriptor)
        if outside in self.options.outside:
            name = outside
        elif descriptor.is_deleted:
            saving.ghosts.keep(number, source, descriptor.status)
        elif is_lost(descriptor.pid, descriptor.link, descriptor.status):
            saving.ghosts.link(number, source, name, descriptor.status, saving.new_id)
        entry = path_entry(number, name, descriptor.status, descriptor.flags, mount_of(descriptor, name))
        entry.pos, entry.fown, entry.ext = descriptor.position, owner(fd), name == outside or None
        return FileEntry(type=FdTypes.REG, id=number, reg=entry)

    def resource(self, entry: FileEntry, opened: Opened) -> str:
        return str(self.message_of(entry).name).lstrip("/")

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found = self.message_of(entry)
        if found.ext:
            raise StateError(f"the file {found.name} was left to the restorer to bring",
                             hint=f"give a descriptor for it: --inherit-fd with {found.name}")  # fmt: skip
        fd = opened.open_path(entry.id)
        if found.pos and not stat.S_ISCHR(os.fstat(fd).st_mode):
            os.lseek(fd, found.pos, os.SEEK_SET)
        return fd


def _is_at(link: str, status: os.stat_result) -> bool:
    """Whether a path still leads to the file, in a mount namespace of the tree."""
    return any(_is_in(place, link, status) for place in places())


def _is_in(place: int, link: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(reach(link, place)), status)
    except OSError:
        return False


def _outside_name(descriptor: Descriptor) -> str:
    """What criu calls a file that is left to the restorer."""
    return f"file[{int(descriptor.field('mnt_id') or 0):x}:{descriptor.status.st_ino:x}]"


def is_lost(pid: int, link: str, status: os.stat_result) -> bool:
    """Whether a file that has a name has not the one it was opened by, nor another one in the same directory."""
    return status.st_nlink > 0 and link.endswith(DELETED) and not _is_at(current_name(pid, link, status), status)


def why_lost(pid: int, link: str, status: os.stat_result, options: FileOptions) -> tuple[str, str]:
    """Why a file that is known by its path cannot be found or taken along, and the option for that; "" where it can."""
    if status.st_nlink == 0:
        if stat.S_ISREG(status.st_mode) and allocated(status) > options.ghost_limit:
            size = units.format_size(allocated(status))
            option = f"--ghost-limit {allocated(status) // 1024}K"
            return f"the file was deleted and occupies {size}, more than is taken along", option
        return "", ""
    if _is_at(current_name(pid, link, status), status):
        return "", ""
    if not link.endswith(DELETED):
        return "another file has its name now", ""
    if not _is_ours(pid, os.path.dirname(link)):
        return "the file lost the name it was opened by, and its mount namespace is not that of the dumper", ""
    if options.link_remap:
        return "", ""
    reason = "the file lost the name it was opened by, and its other names are not in the same directory"
    return reason, "--link-remap"


def _is_ours(pid: int, directory: str) -> bool:
    """Whether a directory of a process, or the next one above it that is there, is the same for us: where links are
    made."""
    try:
        theirs = os.stat(reach(directory, likely(pid)[0]))
    except (FileNotFoundError, NotADirectoryError):
        return directory == os.path.dirname(directory) or _is_ours(pid, os.path.dirname(directory))
    try:
        return os.path.samestat(os.stat(directory), theirs)
    except OSError:
        return False


def current_name(pid: int, link: str, status: os.stat_result) -> str:
    """The path by which a file can be reached; for a deleted one the path it had."""
    name = link.removesuffix(DELETED) if link.endswith(DELETED) and not _is_at(link, status) else link
    if status.st_nlink == 0 or name == link:
        return name
    return next(filter(None, (_other_name(place, os.path.dirname(name), status) for place in places())), name)


def _other_name(place: int, directory: str, status: os.stat_result) -> str:
    try:
        with os.scandir(reach(directory, place)) as entries:
            for entry in entries:
                path = os.path.join(directory, entry.name)
                if entry.inode() == status.st_ino and _is_in(place, path, status):
                    return path
    except OSError:
        pass  # the directory is gone, too
    return ""


def mount_of(descriptor: Descriptor, name: str) -> int:
    """What a message says of the mount namespace in which a file has a path."""
    return where(descriptor.pid, name, descriptor.status, int(descriptor.field("mnt_id") or 0))


def mount_at(pid: int, link: str, name: str, status: os.stat_result) -> int:
    """The same for what /proc/PID/LINK leads to."""
    return where(pid, name, status, mount_behind(pid, link))


def path_entry(number: int, name: str, status: os.stat_result, flags: int, mount: int = -1) -> RegFileEntry:
    """The message for a file with nothing but a path."""
    is_regular = stat.S_ISREG(status.st_mode)
    return RegFileEntry(id=number, flags=flags, pos=0, fown=NO_OWNER, name=name, mnt_id=mount,
                        size=status.st_size if is_regular else None, mode=status.st_mode)  # fmt: skip


def open_by_entry(entry: RegFileEntry, path: str, flags: int | None = None) -> int:
    """Open the file of an entry again. StateError where it is not what it was."""
    wanted = (entry.flags if flags is None else flags) & ~(CREATING | O_TMPFILE | LARGEFILE)
    if stat.S_ISDIR(entry.mode or 0):
        wanted |= os.O_DIRECTORY
    try:
        fd = os.open(path, wanted | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise StateError(f"{path}, which a process had open, cannot be opened: {error.strerror}",
                         hint="bring the file back, or name another one with --map-path",
                         errno=error.errno or 0) from error  # fmt: skip
    try:
        _refuse_other(entry, path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_other(entry: RegFileEntry, path: str, status: os.stat_result) -> None:
    if entry.mode is not None and stat.S_IFMT(entry.mode) != stat.S_IFMT(status.st_mode):
        raise StateError(f"{path} is of another kind than the file that a process had open",
                         hint="bring the file back, or name another one with --map-path")  # fmt: skip
    if entry.size is None or entry.size == status.st_size:
        return
    grew = status.st_size > entry.size
    if not (grew and entry.flags & os.O_APPEND):
        raise StateError(f"{path} has {status.st_size} bytes now and had {entry.size} when a process had it open",
                         hint="bring the file back as it was, or name another one with --map-path")  # fmt: skip


def file_of(pid: int, link: str) -> tuple[str, os.stat_result]:
    """Path and status of what /proc/PID/LINK leads to. ProcessLookupError."""
    where = f"/proc/{pid}/{link}"
    try:
        return os.readlink(where), os.stat(where)
    except FileNotFoundError as error:
        procfs.stat(pid)  # tells whether the process is gone, or only the file
        raise UnsupportedError(f"process {pid} has lost its {link}", errno=error.errno or 0) from error
