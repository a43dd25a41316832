# SPDX-License-Identifier: Apache-2.0
"""Dumping descriptor tables: each table once, each open file description once, whoever shares them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stasis.linux.kcmp import same_file
from stasis.process.files.descriptor import Descriptor, descriptors, duplicate
from stasis.process.files.kind import FileKind
from stasis.process.files.kinds import all_kinds
from stasis.process.files.regular import file_of, path_entry
from stasis.process.findings import Findings
from stasis.process.images.schema.files import FdinfoEntry, FdTypes, FileEntry
from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["FD_CLOEXEC", "FileTable", "check_descriptors"]

FD_CLOEXEC = 1


def check_descriptors(pid: int, findings: Findings) -> None:
    """Note which descriptors of a process cannot be kept."""
    kinds = all_kinds()
    for descriptor in descriptors(pid):
        kind = _kind_of(descriptor, kinds)
        if kind is None:
            findings.add(pid, descriptor.where, "this kind of file is not supported yet")
        else:
            kind.check(descriptor, findings)


def _kind_of(descriptor: Descriptor, kinds: Sequence[FileKind]) -> FileKind | None:
    return next((kind for kind in kinds if kind.claims(descriptor)), None)


class FileTable:
    """All files of a dump. Ids are counted over all kinds, from 1 on."""

    def __init__(self, out: ImageSetWriter) -> None:
        self.out = out
        self._kinds = all_kinds()
        self._last_id = 0
        self._by_path: dict[tuple[int, int, int, str], int] = {}
        self._descriptions: dict[tuple[int, int, str], list[tuple[Descriptor, int, FdTypes]]] = {}
        self._tables: set[int] = set()

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def path_file(self, pid: int, link: str, flags: int) -> int:
        """Id of the file behind /proc/PID/LINK, which is known by its path: the program, directories, mapped files."""
        name, status = file_of(pid, link)
        key = status.st_dev, status.st_ino, flags, name
        if key not in self._by_path:
            number = self._by_path[key] = self._new_id()
            self.out.write("files", FileEntry(type=FdTypes.REG, id=number, reg=path_entry(number, name, status, flags)))
        return self._by_path[key]

    def dump_descriptors(self, pid: int, files_id: int) -> None:
        """Write the descriptor table `files_id` of a process, unless another process shares it and was here before."""
        if files_id in self._tables:
            return
        self._tables.add(files_id)
        self.out.image("fdinfo", files_id).begin()
        for descriptor in descriptors(pid):
            number, kind = self._description(descriptor)
            flags = FD_CLOEXEC if descriptor.close_on_exec else 0
            self.out.write("fdinfo", FdinfoEntry(id=number, flags=flags, type=kind, fd=descriptor.fd), number=files_id)

    def _description(self, descriptor: Descriptor) -> tuple[int, FdTypes]:
        """Id and kind of the open file description behind a descriptor, dumped if it is new."""
        key = descriptor.status.st_dev, descriptor.status.st_ino, descriptor.link
        known = self._descriptions.setdefault(key, [])
        for other, number, type_ in known:
            if same_file(descriptor.pid, descriptor.fd, other.pid, other.fd):
                return number, type_
        kind = _kind_of(descriptor, self._kinds)
        assert kind is not None, "check_descriptors found it"
        number = self._new_id()
        fd = duplicate(descriptor)
        try:
            self.out.write("files", kind.dump(descriptor, fd, number, self))
        finally:
            os.close(fd)
        known.append((descriptor, number, kind.type))
        return number, kind.type

    def finish(self) -> None:
        """All processes were here."""
        for kind in self._kinds:
            kind.finish(self)
