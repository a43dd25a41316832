# SPDX-License-Identifier: Apache-2.0
"""Restoring descriptor tables, in the process that is to have them and before it becomes another program."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from typing import Any

from stasis.process.files.descriptor import set_owner
from stasis.process.files.kind import FileKind
from stasis.process.files.kinds import all_kinds
from stasis.process.files.table import FD_CLOEXEC
from stasis.process.images.damage import damaged
from stasis.process.images.imageset import ImageSet
from stasis.process.images.schema.files import FdTypes, FileEntry, RegFileEntry

__all__ = ["FileSet"]

HIGHEST_FD = 1 << 20
ROOM = 64
"""Between the highest number that a table uses and the first that is ours."""


class FileSet:
    """The files of an image set."""

    def __init__(self, images: ImageSet, map_path: Callable[[str], str]) -> None:
        self.images = images
        self.map_path = map_path
        self.state: dict[type[FileKind], dict[int, Any]] = {}
        self._kinds = {kind.type: kind for kind in all_kinds()}
        self._made: dict[int, int] = {}
        self.base = ROOM
        self._entries: dict[int, FileEntry] = {entry.id: entry for entry in images.messages("files")}

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
            if entry.type not in self._kinds:
                raise damaged(path, 0, f"descriptor {entry.fd} is of the kind {FdTypes(entry.type).name}, "
                                       "which is not supported yet")  # fmt: skip
            self._kinds[entry.type].message_of(self.entry(entry.id))
            if entry.fd in numbers or entry.fd > HIGHEST_FD:
                raise damaged(path, 0, f"there cannot be a descriptor {entry.fd}")
            numbers.add(entry.fd)

    def open_all(self, tables: Sequence[int]) -> None:
        """Make every open file description that the tables have, behind all numbers that they use.

        In the first process of the tree, before it makes the others: what they share they then inherit.
        """
        entries = [entry for files_id in tables for entry in self.images.messages("fdinfo", files_id)]
        self.base = max([entry.fd for entry in entries], default=-1) + 1 + ROOM
        for entry in entries:
            if entry.id not in self._made:
                self._made[entry.id] = self.move(self._kinds[entry.type].restore(self.entry(entry.id), self))
        for kind in self._kinds.values():
            kind.done(self)

    def move(self, fd: int) -> int:
        """The same description behind all numbers that tables use; `fd` is closed."""
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self.base)
        os.close(fd)
        return moved

    def place(self, files_id: int, kept: Sequence[int]) -> None:
        """Give this process the table, and close all but it and the `kept` descriptors, which were moved."""
        wanted = self.images.messages("fdinfo", files_id)
        _close_all_but({*kept, *self._made.values(), self.images.fd})
        for entry in wanted:
            os.dup2(self._made[entry.id], entry.fd, inheritable=not entry.flags & FD_CLOEXEC)
        for fd in self._made.values():
            os.close(fd)
        self.images.close()

    def set_owners(self, files_id: int) -> None:
        """Say who gets signals of the descriptions. All processes must be there."""
        for entry in self.images.messages("fdinfo", files_id):
            kind = self._kinds[entry.type]
            set_owner(self._made[entry.id], kind.message_of(self.entry(entry.id)).fown)


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                pass  # the descriptor of the listing
