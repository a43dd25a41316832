# SPDX-License-Identifier: Apache-2.0
"""A proof that nobody but us has cleared the soft-dirty bits of a process since we did.

Anybody may clear them: criu, a debugger, the program itself. So the process gets a mapping of ours that it cannot write
to. After each clearing we write to its first page; as long as that page's bit is set nobody has cleared the bits. The
second page is never touched: a bit there would say that all pages of this mapping are shown as written.
"""

from __future__ import annotations

import errno
import os
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from stasis.linux import libc, procfs, softdirty
from stasis.linux.taskmem import TaskMemory

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stasis.linux.pagemap import PageScanner
    from stasis.linux.procfs import Mapping
    from stasis.process.remote import Remote

__all__ = ["WATCHED", "Canary", "is_canary", "left_behind", "merged_pages", "take_out"]

PAGE = 4096
LENGTH = 2 * PAGE
NAME = "stasis-watch"
PATH = f"/memfd:{NAME} (deleted)"
PROT_NONE, MAP_PRIVATE, MFD_CLOEXEC, MADV_DONTFORK = 0, 2, 1, 10
WATCHED = "uw"  # VM_UFFD_WP, in VmFlags of /proc/PID/smaps
KSM = "/sys/kernel/mm/ksm"


def is_canary(mapping: Mapping) -> bool:
    """Whether a mapping is ours: it belongs to no image. A name can be chosen by anybody; but what nobody can read or
    write, and has this length, holds nothing of the process's."""
    return (mapping.path, mapping.permissions, mapping.offset, mapping.length) == (PATH, "---p", 0, LENGTH)


def left_behind(layout: Sequence[Mapping]) -> list[Mapping]:
    """Ours that no keeper knows of any more. While one lives, its descriptor watches other mappings of the process."""
    if any(WATCHED in mapping.flags for mapping in layout):
        return []
    return list(filter(is_canary, layout))


def take_out(remote: Remote, layout: Iterable[Mapping]) -> None:
    """Take our mappings out of a stopped process."""
    for mapping in filter(is_canary, layout):
        remote.call("munmap", mapping.start, mapping.length)


class Canary(NamedTuple):
    """Where it is, which file it maps, and how many pages had been merged (KSM) when the bits were cleared."""

    address: int
    inode: int
    merged: int

    @classmethod
    def put(cls, remote: Remote) -> Canary:
        """Give it to a stopped process."""
        fd = remote.open("memfd_create", remote.put(NAME.encode() + b"\0"), MFD_CLOEXEC)
        try:
            remote.call("ftruncate", fd, LENGTH)
            address = remote.call("mmap", 0, LENGTH, PROT_NONE, MAP_PRIVATE, fd, 0)
            remote.call("madvise", address, LENGTH, MADV_DONTFORK)
        finally:
            remote.close_fd(fd)
        return cls(address, _mapping(remote.pid, address).inode, 0)

    def raised(self, scanner: PageScanner, pid: int) -> Canary:
        """Set its bit, right after all were cleared. OSError (EOPNOTSUPP) if the kernel keeps no such bits."""
        if softdirty.is_set(scanner, self.address) or softdirty.is_set(scanner, self.address + PAGE):
            raise libc.error(errno.EOPNOTSUPP, "clear_refs", pid)
        with closing(TaskMemory(pid)) as memory:
            memory.write(self.address, b"\1")
        if not softdirty.is_set(scanner, self.address) or softdirty.is_set(scanner, self.address + PAGE):
            raise libc.error(errno.EOPNOTSUPP, "soft-dirty bits", pid)
        return self._replace(merged=merged_pages())

    def is_in_place(self, pid: int) -> bool:
        """Whether the process has it as it was."""
        try:
            found = _mapping(pid, self.address)
        except LookupError:
            return False
        return is_canary(found) and (found.inode, found.length, found.permissions) == (self.inode, LENGTH, "---p")

    def stands(self, scanner: PageScanner, pid: int) -> bool:
        """Whether nobody has cleared bits since, and none was lost by merging equal pages.

        The kernel drops the bit of a page that it merges (mm/ksm.c, replace_page). Such a page is known by its
        mapping (`mg`), unless it was split again: that counts as `cow_ksm`.
        """
        return (
            self.is_in_place(pid)
            and softdirty.is_set(scanner, self.address)
            and not softdirty.is_set(scanner, self.address + PAGE)
            and self.merged == merged_pages()
        )


def _mapping(pid: int, address: int) -> Mapping:
    for mapping in procfs.mappings(pid, flags=False):
        if mapping.start == address:
            return mapping
    raise LookupError(address)


def merged_pages() -> int:
    """How many merged pages were split again since the machine was started; 0 for a kernel that merges none. OSError
    (EOPNOTSUPP) for one that does and does not tell (before Linux 5.18)."""
    with open("/proc/vmstat") as file:
        for line in file:
            name, _, count = line.partition(" ")
            if name == "cow_ksm":
                return int(count)
    if os.path.exists(KSM):
        raise libc.error(errno.EOPNOTSUPP, "cow_ksm in /proc/vmstat")
    return 0
