# SPDX-License-Identifier: Apache-2.0
"""Dumping descriptor tables: each table once, each open file description once, whoever shares them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

from stasis.linux.kcmp import same_file
from stasis.process import spaces
from stasis.process.files.connections import Connections
from stasis.process.files.descriptor import Descriptor, descriptors, duplicate
from stasis.process.files.ghosts import GhostWriter
from stasis.process.files.kinds import all_kinds
from stasis.process.files.locks import LockWriter, check_locks
from stasis.process.files.options import FileOptions
from stasis.process.files.regular import current_name, file_of, is_lost, mount_at, path_entry
from stasis.process.images.schema.files import FdinfoEntry, FdTypes, FileEntry

if TYPE_CHECKING:
    from stasis.process.files.kind import FileKind
    from stasis.process.files.linkremap import LinkRemaps
    from stasis.process.findings import Findings
    from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["FD_CLOEXEC", "FileTable", "check_descriptors"]

FD_CLOEXEC = 1
NOTHING: Mapping[int, list[Descriptor]] = MappingProxyType({})
UNKNOWN = {
    "anon_inode:[io_uring]": "the kernel does not tell what is under way in an io_uring",
    "anon_inode:[userfaultfd]": "its process would wait for pages that nobody fills",
    "anon_inode:bpf-": "BPF programs, maps and links are not supported yet",
    "anon_inode:[perf_event]": "counters of perf cannot be set",
    "anon_inode:seccomp notify": "it decides about the system calls of others",
}
"""Why kinds that nobody keeps are not kept, by what /proc calls them."""


def check_descriptors(
    pids: Sequence[int], findings: Findings, options: FileOptions | None = None
) -> dict[int, list[Descriptor]]:
    """Note which descriptors of the processes of a tree cannot be kept; all of them, by process."""
    return _Check(findings, options or FileOptions()).run(pids)


class _Check:
    """One look at all descriptors of a tree."""

    def __init__(self, findings: Findings, options: FileOptions) -> None:
        self.findings = findings
        self.descriptors: list[Descriptor] = []
        self._options = options
        self._kinds = all_kinds(options)

    def run(self, pids: Sequence[int]) -> dict[int, list[Descriptor]]:
        found = {pid: descriptors(pid) for pid in pids}
        for table in found.values():
            for descriptor in table:
                self.look_at(descriptor)
        for kind in self._kinds:
            kind.check_all(self)
        return found

    def look_at(self, descriptor: Descriptor) -> None:
        """Have the kind that it is of check it."""
        self.descriptors.append(descriptor)
        check_locks(descriptor, keep=self._options.file_locks, findings=self.findings)
        kind = _kind_of(descriptor, self._kinds)
        if kind is None:
            self.findings.add(descriptor.pid, descriptor.where, _why_unknown(descriptor))
        else:
            self._check(kind, descriptor)

    def _check(self, kind: FileKind, descriptor: Descriptor) -> None:
        if descriptor.kind != stat.S_IFSOCK:
            kind.check(descriptor, self)
            return
        from stasis.process.files.sockopts import check_filter  # a restore needs this module, too

        with _namespace_of(descriptor) as number:
            kind.check(descriptor, self)
            check_filter(descriptor, self.findings)
            spaces.check_socket(descriptor.pid, descriptor.where, number, self.findings)
            kind.check_apart(descriptor, number, self)


@contextmanager
def _namespace_of(descriptor: Descriptor) -> Iterator[int]:
    """In the network namespace of a socket; its number."""
    fd = duplicate(descriptor)
    try:
        with spaces.inside_of(fd) as number:
            yield number
    finally:
        os.close(fd)


def _why_unknown(descriptor: Descriptor) -> str:
    for name, reason in UNKNOWN.items():
        if descriptor.link.startswith(name):
            return reason
    return "this kind of file is not supported yet"


def _kind_of(descriptor: Descriptor, kinds: Sequence[FileKind]) -> FileKind | None:
    return next((kind for kind in kinds if kind.claims(descriptor)), None)


class FileTable:
    """All files of a dump. Ids are counted over all kinds, from 1 on."""

    def __init__(
        self, out: ImageSetWriter, options: FileOptions | None = None, connections: Connections | None = None,
        known: Mapping[int, list[Descriptor]] = NOTHING, links: LinkRemaps | None = None,
    ) -> None:
        """`known`: what `check_descriptors` found since the tree stands still."""
        self.out = out
        self.connections = connections or Connections()
        self.ghosts = GhostWriter(out, links)
        self.warnings: list[str] = []
        self._locks = LockWriter(out)
        self.descriptors: dict[int, list[Descriptor]] = {}
        self._kinds = all_kinds(options or FileOptions())
        self._known = known
        self._last_id = 0
        self._by_path: dict[tuple[int, int, int, str, int], int] = {}
        self._descriptions: dict[tuple[int, int, str], list[tuple[Descriptor, int, FdTypes]]] = {}
        self._tables: set[int] = set()

    def new_id(self) -> int:
        """The next id."""
        self._last_id += 1
        return self._last_id

    def path_file(self, pid: int, link: str, flags: int) -> int:
        """Id of the file behind /proc/PID/LINK, which is known by its path: the program, directories, mapped files."""
        name, status = file_of(pid, link)
        mount = mount_at(pid, link, name, status)
        key = status.st_dev, status.st_ino, flags, name, mount
        if key not in self._by_path:
            number = self._by_path[key] = self.new_id()
            if name.startswith("/memfd:"):
                from stasis.process.files.memfd import Memfds

                memfds = next(kind for kind in self._kinds if isinstance(kind, Memfds))
                self.out.image("files").append(memfds.mapped(f"/proc/{pid}/{link}", name, status, flags, number))
                return number
            if status.st_nlink == 0:
                self.ghosts.keep(number, f"/proc/{pid}/{link}", status)
            elif is_lost(pid, name, status):
                self.ghosts.link(number, f"/proc/{pid}/{link}", current_name(pid, name, status), status, self.new_id)
            entry = path_entry(number, current_name(pid, name, status), status, flags, mount)
            self.out.image("files").append(FileEntry(type=FdTypes.REG, id=number, reg=entry))
        return self._by_path[key]

    def dump_descriptors(self, pid: int, files_id: int) -> None:
        """Write the descriptor table `files_id` of a process, unless another process shares it and was here before."""
        self.descriptors[pid] = self._known[pid] if pid in self._known else descriptors(pid)
        if files_id in self._tables:
            return
        self._tables.add(files_id)
        with self.out.image("fdinfo", files_id) as image:
            image.begin()
            for descriptor in self.descriptors[pid]:
                number, kind = self._description(descriptor)
                self._locks.keep(descriptor, number)
                flags = FD_CLOEXEC if descriptor.close_on_exec else 0
                image.append(FdinfoEntry(id=number, flags=flags, type=kind, fd=descriptor.fd))

    def number_of(self, descriptor: Descriptor) -> int:
        """Id of the open file description behind a descriptor, dumped if it is new."""
        return self._description(descriptor)[0]

    def _description(self, descriptor: Descriptor) -> tuple[int, FdTypes]:
        """Id and kind of the open file description behind a descriptor, dumped if it is new."""
        key = descriptor.status.st_dev, descriptor.status.st_ino, descriptor.link
        known = self._descriptions.setdefault(key, [])
        for other, number, type_ in known:
            if same_file(descriptor.pid, descriptor.fd, other.pid, other.fd):
                return number, type_
        kind = _kind_of(descriptor, self._kinds)
        assert kind is not None, "check_descriptors found it"
        number = self.new_id()
        fd = duplicate(descriptor)
        try:
            entry = self._dump(kind, descriptor, fd, number)
        finally:
            os.close(fd)
        if entry is not None:
            self.out.image("files").append(entry)
        known.append((descriptor, number, kind.type))
        return number, kind.type

    def _dump(self, kind: FileKind, descriptor: Descriptor, fd: int, number: int) -> FileEntry | None:
        if descriptor.kind != stat.S_IFSOCK:
            return kind.dump(descriptor, fd, number, self)
        with spaces.inside_of(fd) as namespace:
            entry = kind.dump(descriptor, fd, number, self)
        if entry is not None and spaces.is_apart("net", namespace):
            getattr(entry, kind.field).ns_id = namespace
        return entry

    def finish(self) -> None:
        """All processes were here."""
        for kind in self._kinds:
            kind.finish(self)
        for kind in self._kinds:
            kind.saved()
