# SPDX-License-Identifier: Apache-2.0
"""Which pages of a tree were written since an earlier image set: private memory is watched from dump to dump.

What is not watched, for whatever reason, is dumped whole. docs/design/process-incremental.md says why no page is
missed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stasis.errors import NotFoundError, UnsupportedError
from stasis.linux import procfs, softdirty, userfaultfd
from stasis.linux.pagemap import PageScanner
from stasis.linux.pidfd import Pidfd
from stasis.linux.procfs import Mapping
from stasis.process.dump import dirtybits
from stasis.process.dump.canary import WATCHED, Canary, is_canary, left_behind, take_out
from stasis.process.dump.changes import Changes
from stasis.process.journal import Journal
from stasis.process.remote import Remote
from stasis.process.tree import Task

if TYPE_CHECKING:
    from stasis.process.dump.shared import Known

__all__ = ["Key", "Tracking", "ended", "is_watchable"]

Key = tuple[int, int]
"""(pid, start time): a process for good."""

UNWATCHABLE = frozenset(("io", "pf", "ht", "dp", "ss"))
"""Device memory, raw pages, huge pages, droppable memory, shadow stacks."""
RINGS = ("/[aio]", "anon_inode:[io_uring]")
NEVER = (errno.EBUSY, errno.EINVAL, errno.EPERM, errno.ESRCH, errno.ENOMEM)


def is_watchable(mapping: Mapping) -> bool:
    """Private memory that is no file's. A private file page that is dropped would still look like the old one."""
    special = mapping.path.startswith("[") and not mapping.path.startswith(("[heap]", "[stack]", "[anon:"))
    anonymous = not mapping.is_shared and not mapping.inode and not special
    return anonymous and not mapping.flags & UNWATCHABLE


def writes_unseen(layout: Sequence[Mapping]) -> bool:
    """Whether requests that were made earlier may write to pages without going through the page table: rings of
    asynchronous I/O. The kernel tells nobody of those under way."""
    return any(mapping.path.startswith(RINGS) for mapping in layout)


class Tracking:
    """What is watched in a tree, and since when. Owns the descriptors.

    `since`: id of the image set whose memory the marks refer to, empty where that is not known. `canaries`: where
    soft-dirty bits are the marks. `warnings`: why something that was watched is dumped whole.
    """

    def __init__(self, since: str = "") -> None:
        self.since = since
        self.shared: Known | None = None
        """What the set `since` has of shared memory; for the command that works with it."""
        self.watches: dict[Key, int] = {}
        self.canaries: dict[Key, Canary] = {}
        self.warnings: list[str] = []
        self._proven: dict[Key, bool] = {}

    def close(self) -> None:
        """Watch no longer, unless somebody else holds the descriptors."""
        for key in list(self.watches):
            self._drop(key)

    def keep_only(self, keys: set[Key]) -> None:
        """Forget processes that are not in the tree any more."""
        for key in set(self.watches) - keys:
            self._drop(key)

    def arm(self, task: Task, layout: Sequence[Mapping], journal: Journal) -> Changes:
        """Mark all pages of a stopped task that can be watched, and tell which were written since the last time."""
        found = Changes()
        for changes in self.mark(task, layout, journal).values():
            found.extend(changes)
        return found

    def mark(self, task: Task, layout: Sequence[Mapping], journal: Journal) -> dict[int, Changes]:
        """The same for each mapping that can be watched, by its start and in order of address. Raises UnsupportedError
        where the kernel cannot tell, and NotFoundError when the task is gone."""
        try:
            return self._mark(task, layout, journal)
        except ProcessLookupError as error:
            raise ended(task.pid) from error
        except OSError as error:
            raise UnsupportedError(
                f"what process {task.pid} writes to its memory cannot be watched: {error.strerror or error}",
                hint="it needs userfaultfd, and Linux 6.7 or soft-dirty bits (CONFIG_MEM_SOFT_DIRTY); dump without "
                "--parent, --pre-copy, --track and pre-dump",
            ) from error

    def _mark(self, task: Task, layout: Sequence[Mapping], journal: Journal) -> dict[int, Changes]:
        if writes_unseen(layout):
            self._drop(_key(task))
            _clean(task.pid, layout, journal)
            return {}
        fd = self._watch(task, layout, journal)
        with PageScanner(task.pid) as scanner:
            if not userfaultfd.has_async():
                return self._clear_bits(task, layout, journal, scanner)
            return self._protect(fd, layout, scanner)

    def _protect(self, fd: int, layout: Sequence[Mapping], scanner: PageScanner) -> dict[int, Changes]:
        marked: dict[int, Changes] = {}
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

    def _clear_bits(
        self, task: Task, layout: Sequence[Mapping], journal: Journal, scanner: PageScanner
    ) -> dict[int, Changes]:
        key = _key(task)
        fd = self.watches[key]
        watched = [mapping for mapping in layout if is_watchable(mapping) and _register(fd, mapping)]
        if not watched:
            return {}  # all of it is watched by others: our clearing would be in their way
        proven = self._is_proven(task, scanner)
        self._proven.pop(key, None)
        canary = self._canary(task, layout, journal)
        try:
            found = dirtybits.clear(scanner, task.pid, fd, watched)
            self.canaries[key] = canary.raised(scanner, task.pid)
        except OSError:
            _clean(task.pid, procfs.mappings(task.pid, flags=False), journal)
            raise
        marked = {}
        for mapping in watched:
            known = proven and WATCHED in mapping.flags and dirtybits.MERGEABLE not in mapping.flags
            runs = softdirty.runs(found[mapping.start], mapping.start)
            marked[mapping.start] = Changes((start, length, written or not known) for start, length, written in runs)
        return marked

    def _canary(self, task: Task, layout: Sequence[Mapping], journal: Journal) -> Canary:
        """The one that is there, or a new one."""
        known = self.canaries.get(_key(task))
        if known is not None and known.is_in_place(task.pid):
            return known
        with Remote(task.pid, layout, journal) as remote:
            take_out(remote, layout)
            return Canary.put(remote)

    def _is_proven(self, task: Task, scanner: PageScanner) -> bool:
        """Whether the bits of a task tell what was written since the set `since`."""
        key = _key(task)
        if not self.since or key not in self.canaries:
            return False
        if key not in self._proven:
            self._proven[key] = self.canaries[key].stands(scanner, task.pid)
            if not self._proven[key]:
                self.warnings.append(f"somebody else cleared the marks of what process {task.pid} wrote, or equal "
                                     "pages were merged: all of its memory is written")  # fmt: skip
        return self._proven[key]

    def changes(self, task: Task, mapping: Mapping, scanner: PageScanner) -> Changes | None:
        """The pages of a mapping of a stopped task and which of them are not as in the set `since`; None if it has to
        be dumped whole."""
        fd = self.watches.get(_key(task), -1)
        if fd < 0 or not self.since or WATCHED not in mapping.flags or not is_watchable(mapping):
            return None
        if not _register(fd, mapping):
            return None  # somebody else watches it
        if not userfaultfd.has_async():
            return dirtybits.look(scanner, mapping) if self._is_proven(task, scanner) else None
        return Changes(scanner.changes(mapping.start, mapping.end, arm=False))

    def end(self, remote: Remote, task: Task, layout: Sequence[Mapping]) -> None:
        """Leave nothing in a stopped process that is not watched on, nor what a keeper left that was killed."""
        self.canaries.pop(_key(task), None)
        take_out(remote, layout if _key(task) in self.watches else left_behind(layout))

    def withdraw(self, task: Task, journal: Journal) -> None:
        """The same where nothing else is done with it."""
        if self.canaries.pop(_key(task), None) is not None:
            _clean(task.pid, procfs.mappings(task.pid, flags=False), journal)

    def _watch(self, task: Task, layout: Sequence[Mapping], journal: Journal) -> int:
        """A descriptor for the task's memory: that of before, unless it runs another program since."""
        key = _key(task)
        if key in self.watches and not any(WATCHED in mapping.flags for mapping in layout):
            self._drop(key)
        if key not in self.watches:
            with Remote(task.pid, layout, journal) as remote:
                self.watches[key] = _inject(remote)
        return self.watches[key]

    def _drop(self, key: Key) -> None:
        self.canaries.pop(key, None)
        if key in self.watches:
            os.close(self.watches.pop(key))


def ended(pid: int) -> NotFoundError:
    """What to say of a process that is gone."""
    return NotFoundError(f"process {pid} ended meanwhile", hint="it cannot be dumped any more")


def _key(task: Task) -> Key:
    return task.pid, task.stat.start_time


def _clean(pid: int, layout: Sequence[Mapping], journal: Journal) -> None:
    """Take canaries out of a stopped process that we do not look at otherwise."""
    if any(map(is_canary, layout)):
        with Remote(pid, layout, journal) as remote:
            take_out(remote, layout)


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
        if userfaultfd.has_async():
            userfaultfd.enable(fd)
        else:
            userfaultfd.enable_plain(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _register(fd: int, mapping: Mapping) -> bool:
    """Watch a mapping; whether that is so now, and by us."""
    try:
        userfaultfd.register(fd, mapping.start, mapping.length)
    except OSError as error:
        # One of ours that could not be registered again would lose its bits with the others, and look unwritten later.
        if error.errno == errno.EBUSY or (error.errno in NEVER and WATCHED not in mapping.flags):
            return False
        raise
    return True
