# SPDX-License-Identifier: Apache-2.0
"""Which pages of a tree were written since an earlier image set: private memory is watched from dump to dump.

What is not watched, for whatever reason, is dumped whole. docs/design/process-incremental.md says why no page is
missed.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator, Sequence

from stasis.linux import userfaultfd
from stasis.linux.pagemap import Change, PageScanner
from stasis.linux.pidfd import Pidfd
from stasis.linux.procfs import Mapping
from stasis.process.journal import Journal
from stasis.process.remote import Remote
from stasis.process.tree import Task

__all__ = ["Changes", "Key", "Tracking", "is_watchable"]

Key = tuple[int, int]
"""(pid, start time): a process for good."""

WATCHED = "uw"  # VM_UFFD_WP, in VmFlags of /proc/PID/smaps
UNWATCHABLE = frozenset(("io", "pf", "ht", "dp", "ss"))
"""Device memory, raw pages, huge pages, droppable memory, shadow stacks."""
NEVER = (errno.EBUSY, errno.EINVAL, errno.EPERM, errno.ESRCH, errno.ENOMEM)


def is_watchable(mapping: Mapping) -> bool:
    """Private memory that is no file's. A private file page that is dropped would still look like the old one."""
    special = mapping.path.startswith("[") and not mapping.path.startswith(("[heap]", "[stack]", "[anon:"))
    anonymous = not mapping.is_shared and not mapping.inode and not special
    return anonymous and not mapping.flags & UNWATCHABLE


class Changes:
    """Runs of pages in order of address, each with whether it was written. 16 bytes each: there may be many."""

    def __init__(self) -> None:
        self._values = array("Q")

    def add(self, start: int, length: int, *, written: bool) -> None:
        """Append a run."""
        self._values.extend((start, length | written))

    def extend(self, others: Changes) -> None:
        """Append all runs of others, which lie behind."""
        self._values.extend(others._values)

    def __iter__(self) -> Iterator[Change]:
        values = iter(self._values)
        for start, length in zip(values, values, strict=True):
            yield start, length & ~1, bool(length & 1)

    @property
    def written(self) -> int:
        """Bytes in runs that were written."""
        return sum(length for _, length, written in self if written)


class Tracking:
    """What is watched in a tree, and since when. Owns the descriptors.

    `since`: id of the image set whose memory the marks refer to, empty where that is not known.
    """

    def __init__(self, since: str = "", watches: dict[Key, int] | None = None) -> None:
        self.since = since
        self.watches = {} if watches is None else watches

    def close(self) -> None:
        """Watch no longer, unless somebody else holds the descriptors."""
        for fd in self.watches.values():
            os.close(fd)
        self.watches.clear()

    def keep_only(self, keys: set[Key]) -> None:
        """Forget processes that are not in the tree any more."""
        for key in set(self.watches) - keys:
            os.close(self.watches.pop(key))

    def arm(self, task: Task, layout: Sequence[Mapping], journal: Journal) -> Changes:
        """Mark all pages of a stopped task that can be watched, and tell which were written since the last time."""
        found = Changes()
        for changes in self.mark(task, layout, journal).values():
            found.extend(changes)
        return found

    def mark(self, task: Task, layout: Sequence[Mapping], journal: Journal) -> dict[int, Changes]:
        """The same for each mapping that can be watched, by its start and in order of address."""
        fd = self._watch(task, layout, journal)
        marked: dict[int, Changes] = {}
        with PageScanner(task.pid) as scanner:
            for mapping in layout:
                if not is_watchable(mapping) or not _register(fd, mapping):
                    continue
                known = WATCHED in mapping.flags
                if not known:
                    userfaultfd.forget(fd, mapping.start, mapping.length)  # marks of an earlier life
                found = marked[mapping.start] = Changes()
                for start, length, written in scanner.changes(mapping.start, mapping.end, arm=True):
                    found.add(start, length, written=written or not known or not self.since)
        return marked

    def changes(self, task: Task, mapping: Mapping, scanner: PageScanner) -> Changes | None:
        """The pages of a mapping of a stopped task and which of them are not as in the set `since`; None if it has to
        be dumped whole."""
        fd = self.watches.get(_key(task), -1)
        if fd < 0 or not self.since or WATCHED not in mapping.flags or not is_watchable(mapping):
            return None
        if not _register(fd, mapping):
            return None  # somebody else watches it
        found = Changes()
        for start, length, written in scanner.changes(mapping.start, mapping.end, arm=False):
            found.add(start, length, written=written)
        return found

    def _watch(self, task: Task, layout: Sequence[Mapping], journal: Journal) -> int:
        """A descriptor for the task's memory: that of before, unless it runs another program since."""
        key = _key(task)
        if key in self.watches and not any(WATCHED in mapping.flags for mapping in layout):
            os.close(self.watches.pop(key))
        if key not in self.watches:
            with Remote(task.pid, layout, journal) as remote:
                self.watches[key] = _inject(remote)
        return self.watches[key]


def _key(task: Task) -> Key:
    return task.pid, task.stat.start_time


def _inject(remote: Remote) -> int:
    """Have the task make a descriptor for its memory, and take it over."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        theirs = remote.open("userfaultfd", flags)
    except PermissionError:
        theirs = remote.open("userfaultfd", flags | userfaultfd.UFFD_USER_MODE_ONLY)
    try:
        with Pidfd(remote.pid) as pidfd:
            fd = pidfd.get(theirs)
    finally:
        remote.close_fd(theirs)
    try:
        userfaultfd.enable(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _register(fd: int, mapping: Mapping) -> bool:
    """Watch a mapping; whether that is so now, and by us."""
    try:
        userfaultfd.register(fd, mapping.start, mapping.length)
    except OSError as error:
        if error.errno in NEVER:
            return False
        raise
    return True
