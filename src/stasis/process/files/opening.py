# SPDX-License-Identifier: Apache-2.0
"""Restoring descriptor tables, in the process that is to have them and before it becomes another program."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Container, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from stasis.errors import UnsupportedError
from stasis.process.files.descriptor import F_OWNER_TID, set_owner
from stasis.process.files.ghosts import Ghosts
from stasis.process.files.kinds import all_kinds
from stasis.process.files.locks import take_locks
from stasis.process.files.options import FileOptions
from stasis.process.files.regular import open_by_entry
from stasis.process.files.table import FD_CLOEXEC
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdinfoEntry, FdTypes, FileEntry, RegFileEntry

if TYPE_CHECKING:
    from stasis.process.files.kind import FileKind
    from stasis.process.files.paths import Paths
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.common import FownEntry
    from stasis.process.images.schema.events import PidfdEntry
    from stasis.process.namespaces.apart import Apart

__all__ = ["FileSet"]

HIGHEST_FD = 1 << 20
ROOM = 64
"""Between the highest number that a table uses and the first that is ours."""


class FileSet:
    """The files of an image set."""

    def __init__(
        self, images: ImageSet, paths: Paths, options: FileOptions | None = None
    ) -> None:
        self.images = images
        self.paths = paths
        self._apart: Apart | None = None
        self.state: dict[type[FileKind], dict[int, Any]] = {}
        self.tables: dict[int, list[FdinfoEntry]] = {}
        self._options = options or FileOptions()
        self._ghosts = Ghosts(images, self.move, self.path_of)
        self._made: dict[int, int] = {}
        self._late: set[int] = set()
        self.made_late: Container[int] = frozenset()
        self.base = ROOM
        self._entries: dict[int, FileEntry] = {entry.id: entry for entry in images.messages("files")}
        types = {entry.type for entry in self._entries.values()}
        self._kinds = {kind.type: kind for kind in all_kinds(self._options, types)}

    @property
    def closes_connections(self) -> bool:
        """Whether TCP connections come back as sockets without one."""
        return self._options.tcp == "close" or bool(self.images.inventory.tcp_close)

    def entry(self, number: int) -> FileEntry:
        """The file of an id. DamagedError where there is none."""
        if number not in self._entries:
            raise damaged(self.images.file_path("files"), 0, f"it has no file {number}")
        return self._entries[number]

    def regular(self, number: int) -> RegFileEntry:
        """A file that is known by its path. DamagedError where the id is another kind's."""
        found = self.entry(number).reg
        if found is None:
            raise damaged(self.images.file_path("files"), 0, f"file {number} has no path")
        return found

    def file_name(self, number: int) -> str:
        """The path of such a file."""
        return self.regular(number).name

    def check(self, files_id: int) -> None:
        """Refuse a table that is damaged, or that has kinds of files which cannot be restored."""
        path = self.images.file_path("fdinfo", files_id)
        numbers = set()
        for entry in self.images.messages("fdinfo", files_id):
            if self.entry(entry.id).type != entry.type:
                raise damaged(path, 0, f"descriptor {entry.fd} is of another kind than its file")
            self._kind(self.entry(entry.id)).message_of(self.entry(entry.id))
            if entry.fd in numbers or entry.fd > HIGHEST_FD:
                raise damaged(path, 0, f"there cannot be a descriptor {entry.fd}")
            numbers.add(entry.fd)

    def open_all(self, tables: Sequence[int], mapped: Iterable[int] = ()) -> None:
        """Make every open file description that the tables have, behind all numbers that they use. `mapped`: ids of
        files that memory is made from, of which those without a path are made as well.

        In the first process of the tree, before it makes the others: what they share they then inherit.
        """
        self.tables = {files_id: self.images.messages("fdinfo", files_id) for files_id in tables}
        entries = [entry for table in self.tables.values() for entry in table]
        self.base = max([entry.fd for entry in entries], default=-1) + 1 + ROOM
        for entry in entries:
            self.open(entry.id)
        for number in mapped:
            if self.entry(number).type == FdTypes.MEMFD:
                self.open(number)
        for kind in self._kinds.values():
            kind.connect(self)
        for kind in self._kinds.values():
            kind.done(self)

    def open(self, number: int) -> int:
        """Our descriptor for the description of this id, which is made if it is not there yet."""
        if number not in self._made:
            entry = self.entry(number)
            kind = self._kind(entry)
            inherited = self._options.inherited.get(kind.resource(entry, self), -1)
            with self.inside("net", getattr(kind.message_of(entry), "ns_id", None)):
                self._made[number] = self.move(os.dup(inherited) if inherited >= 0 else kind.restore(entry, self))
        return self._made[number]

    def live_in(self, apart: Apart) -> None:
        """Say where processes live, and files are."""
        self._apart = self.paths.apart = apart

    def inside(self, name: str, number: int | None) -> AbstractContextManager[None]:
        """Be in a namespace of the tree for a moment, by its kind and number."""
        return self._apart.inside(name, number) if self._apart else nullcontext()

    def namespace(self, name: str, number: int) -> int | None:
        """A descriptor for one of a kind in which processes live apart; None where there is none."""
        return self._apart.descriptor(name, number) if self._apart else None

    def standing(self, mount: int) -> AbstractContextManager[None]:
        """Be in the mount namespace that has this mount."""
        return self.inside("mnt", self.paths.place(mount))

    def map_path(self, path: str) -> str:
        """A path in the mount namespace that we are in."""
        return self.paths.mapped(path)

    def path(self, name: str, mount: int) -> str:
        """Where a path of the mount namespace that has this mount is for us; -1 for that of the first process."""
        return self.paths.path(name, mount)

    def path_of(self, number: int) -> str:
        """Where a file that is known by its path is for us."""
        found = self.regular(number)
        return self.paths.path(found.name, found.mnt_id)

    def numbers(self, kind: FdTypes) -> list[int]:
        """The ids of all files of a kind that were made."""
        return [number for number in self._made if self.entry(number).type == kind]

    def _kind(self, entry: FileEntry) -> FileKind:
        if entry.type not in self._kinds:
            raise UnsupportedError(f"file {entry.id} of the images is of the kind {FdTypes(entry.type).name}, "
                                   "which is not supported yet")  # fmt: skip
        return self._kinds[entry.type]

    def open_path(self, number: int, flags: int | None = None) -> int:
        """A new description of a file that is known by its path, or is in memory; by default as the entry says."""
        if self.entry(number).type == FdTypes.MEMFD and number in self._made:
            return os.open(f"/proc/self/fd/{self._made[number]}", (flags or 0) | os.O_CLOEXEC)
        entry = self.regular(number)
        path = self.paths.path(entry.name, entry.mnt_id)
        return open_by_entry(entry, self._ghosts.path(entry, path) or path, flags)

    def move(self, fd: int) -> int:
        """The same description behind all numbers that tables use; `fd` is closed."""
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self.base)
        os.close(fd)
        return moved

    def place(self, files_id: int, kept: Sequence[int]) -> None:
        """Give this process the table, and close all but it and the `kept` descriptors, which were moved."""
        wanted = self.images.messages("fdinfo", files_id)
        self._open_late(wanted)
        locks = self.images.messages("filelocks")
        self.images.close()  # its number may be one that the table has
        _close_all_but({*kept, *self._made.values()})
        for entry in wanted:
            os.dup2(self._made[entry.id], entry.fd, inheritable=not entry.flags & FD_CLOEXEC)
        for fd in self._made.values():
            os.close(fd)
        for number in {entry.id: entry.fd for entry in reversed(wanted)}.values():
            _tell_number(number)
        take_locks(locks, self.images.file_path("filelocks"))

    def spare(self, files_id: int) -> list[tuple[int, bool, int]]:
        """The table of a process that begins with a copy of ours: number, whether it is closed by execve(2), and a
        descriptor for its description behind all numbers. Before `place`."""
        wanted = self.images.messages("fdinfo", files_id)
        self._open_late(wanted)
        return [(entry.fd, bool(entry.flags & FD_CLOEXEC), self.another(self._made[entry.id])) for entry in wanted]

    def another(self, fd: int) -> int:
        """A second descriptor for the same description, behind all numbers that tables use."""
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self.base)

    def _open_late(self, wanted: Sequence[FdinfoEntry]) -> None:
        for number in {entry.id for entry in wanted} - self._late:
            self._late.add(number)
            late = self._kind(self.entry(number)).late(self.entry(number), self)
            if late is not None:
                os.close(self._made[number])
                self._made[number] = self.move(late)

    def late_pidfds(self, files_id: int) -> list[tuple[FdinfoEntry, PidfdEntry]]:
        """Descriptors of processes that are made late, and what they are for."""
        found = [(entry, self.entry(entry.id).pidfd) for entry in self.images.messages("fdinfo", files_id)]
        return [(entry, pidfd) for entry, pidfd in found if pidfd is not None and pidfd.nspid in self.made_late]

    def owned_by_others(self, files_id: int) -> list[tuple[int, FownEntry]]:
        """Descriptors whose signals go to a single thread, or to a process that is made late."""
        found = []
        for entry in self.images.messages("fdinfo", files_id):
            file = self.entry(entry.id)
            wanted = self._kind(file).owner(file, self)
            if wanted is not None and wanted.pid and (wanted.pid_type == F_OWNER_TID or wanted.pid in self.made_late):
                found.append((entry.fd, wanted))
        return found

    def set_owners(self, files_id: int) -> None:
        """Say who gets signals of the descriptions. All processes must be there."""
        for number in {entry.id for entry in self.images.messages("fdinfo", files_id)}:
            entry = self.entry(number)
            wanted = self._kind(entry).owner(entry, self)
            if wanted is not None:
                set_owner(self._made[number], wanted)


def _tell_number(fd: int) -> None:
    """Signals for a descriptor tell its number (si_fd), which the kernel notes when it is set up for them (setfl())."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_ASYNC:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_ASYNC)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                pass  # the descriptor of the listing
