# SPDX-License-Identifier: Apache-2.0
"""Delete what no backup needs: mark what is in use, then sweep the rest away.

Marking takes no lock and may take long. The sweep holds the exclusive lock, marks what was published meanwhile, and
deletes. docs/design/prune.md proves that nothing is deleted that a backup needs or a writer relies on, and that a
repository is whole wherever this is killed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from stasis.backup.keep import layout
from stasis.backup.keep.marks import MARKS_IN_MEMORY, Marks, Passes
from stasis.backup.keep.threads import in_threads
from stasis.backup.keep.used import OnDamage, mark_chunks, mark_segments
from stasis.backup.progress import Progress
from stasis.backup.repo import Lease, Repository
from stasis.backup.repo.locks import store_time
from stasis.backup.repo.manifest import Manifest
from stasis.backup.repo.objects import Kind
from stasis.backup.repo.store import ObjectInfo
from stasis.errors import DamagedError, LockedError

__all__ = ["PruneResult", "prune"]

BATCH_OBJECTS = 200
LEFTOVER_SECONDS = 3600
LOOK_SECONDS = 20.0
"""A deletion begins at most this long after the store was asked whether the lock is still ours. Whoever breaks a lock
waits for longer than this and the time for which a deletion is repeated when the store does not answer."""


@dataclass
class PruneResult:
    """What was deleted, or would be. Sizes are what objects take in the store."""

    dry_run: bool = False
    backups: int = 0
    chunks_kept: int = 0
    bytes_kept: int = 0
    chunks_removed: int = 0
    segments_removed: int = 0
    leftovers_removed: int = 0
    bytes_removed: int = 0
    spared: int = 0
    """Unused, but younger than the lock: somebody writes without one."""
    passes: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prune(repository: Repository, *, dry_run: bool = False, wait: float = 0, progress: Progress | None = None,
          marks_in_memory: int = MARKS_IN_MEMORY) -> PruneResult:
    """Delete what no backup needs; `wait` is for how many seconds to wait for writers.

    Raises LockedError when they take longer, or the lock was lost on the way, DamagedError when a manifest or a segment
    cannot be read: what it needs is then not known, and nothing is deleted.
    """
    return _Prune(repository, dry_run, wait, progress or Progress(), marks_in_memory).run()


@dataclass(frozen=True)
class _Part:
    """What a pass does with one kind of object."""

    kind: Kind
    mark: Callable[[Repository, Marks, list[str], OnDamage], None]
    marks: Marks


class _Guard:
    """Lets deletions pass as long as the lock is known to be ours. May be used from any thread."""

    def __init__(self, lease: Lease, lost: Callable[[], LockedError]) -> None:
        self._lease = lease
        self._lost = lost
        self._looked: float | None = None
        self._mutex = threading.Lock()

    def look(self) -> None:
        """Ask the store, unless that was a moment ago. Raises LockedError."""
        with self._mutex:
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            if self._looked is not None and now - self._looked < LOOK_SECONDS:
                return
            if not self._lease.confirm():
                raise self._lost()
            self._looked = now


class _Prune:
    def __init__(self, repository: Repository, dry_run: bool, wait: float, progress: Progress, limit: int) -> None:
        self.repository = repository
        self.wait = wait
        self.progress = progress
        self.limit = limit
        self.result = PruneResult(dry_run=dry_run)

    def run(self) -> PruneResult:
        started = time.monotonic()
        self._refuse_when_lost()
        segments, chunks = Passes(self.limit), Passes(self.limit)
        while parts := [_Part(kind, mark, marks) for kind, mark, marks in (
                (Kind.SEGMENT, mark_segments, next(segments, None)),
                (Kind.CHUNK, mark_chunks, next(chunks, None))) if marks is not None]:
            self.result.passes += 1
            self._one_pass(parts)
        self.result.seconds = round(time.monotonic() - started, 3)
        return self.result

    def _one_pass(self, parts: list[_Part]) -> None:
        self.progress.phase("reading indexes")
        ids = self.repository.backup_ids()
        self.result.backups = len(ids)
        self._mark(parts, ids)
        if self.result.dry_run:
            self._count(parts)
            return
        with self.repository.lock_exclusive("prune", wait=self.wait) as lease:
            time.sleep(self.repository.store.listing_lag)  # what was published before the lock was ours is listed now
            known = set(ids)
            self._mark(parts, [id_ for id_ in self.repository.backup_ids() if id_ not in known])
            self.progress.phase("deleting")
            for part in parts:
                part.marks.settle()
                self._sweep(part.kind, part.marks, lease)
            if self.result.passes == 1:
                self._remove_leftovers(lease)

    def _mark(self, parts: list[_Part], ids: list[str]) -> None:
        for part in parts:
            part.mark(self.repository, part.marks, ids, self._refuse)

    def _count(self, parts: list[_Part]) -> None:
        self.progress.phase("looking at objects")
        for part in parts:
            part.marks.settle()
            for unused in self._unused(part.kind, part.marks):
                self._count_removed(part.kind, unused)
        if self.result.passes == 1:
            self.result.leftovers_removed = sum(1 for _ in layout.leftovers(self.repository))

    def _sweep(self, kind: Kind, marks: Marks, lease: Lease) -> None:
        batch: list[ObjectInfo] = []
        locked_at = store_time(self.repository.store, self.repository.codec())
        for info in self._unused(kind, marks):
            if info.modified > locked_at:
                self.result.spared += 1
                continue
            batch.append(info)
            if len(batch) == BATCH_OBJECTS:
                self._delete(kind, batch, lease)
                batch = []
        self._delete(kind, batch, lease)

    def _unused(self, kind: Kind, marks: Marks) -> Iterator[ObjectInfo]:
        """Objects of one kind that no backup refers to. Names that are none of ours are left alone."""
        for info in layout.objects(self.repository.store, kind, marks.low, marks.high):
            name = layout.content_name(info.name)
            if name is None:
                continue
            self.progress.add(0, items=1)
            if name not in marks:
                yield info
            elif kind is Kind.CHUNK:
                self.result.chunks_kept += 1
                self.result.bytes_kept += info.size

    def _delete(self, kind: Kind, batch: list[ObjectInfo], lease: Lease) -> None:
        guard = _Guard(lease, self._lock_lost)

        def delete(info: ObjectInfo) -> ObjectInfo:
            guard.look()
            self.repository.store.delete(info.name)
            return info

        for info in in_threads(delete, batch, self.repository.parallelism):
            self._count_removed(kind, info)
            self.progress.add(info.size)

    def _count_removed(self, kind: Kind, info: ObjectInfo) -> None:
        self.result.bytes_removed += info.size
        if kind is Kind.CHUNK:
            self.result.chunks_removed += 1
        else:
            self.result.segments_removed += 1

    def _remove_leftovers(self, lease: Lease) -> None:
        """Probes of the clock, files without a name: what killed commands left."""
        oldest = store_time(self.repository.store, self.repository.codec()) - LEFTOVER_SECONDS
        batch = [info for info in layout.leftovers(self.repository) if info.modified <= oldest]
        if not lease.confirm():
            raise self._lock_lost()
        for info in batch:
            self.repository.store.delete(info.name)
            self.result.bytes_removed += info.size
        self.result.leftovers_removed = len(batch) + self.repository.store.clean()

    def _refuse_when_lost(self) -> None:
        """Chunks of a backup whose manifest got lost are no garbage as long as nobody said so."""
        for id_ in self.repository.lost_backups():
            self._refuse(DamagedError(f"backups/{id_} is missing"), None)

    def _refuse(self, error: DamagedError, manifest: Manifest | None) -> None:
        of = f", which backup {manifest.id} of {manifest.device} needs" if manifest else ""
        raise DamagedError(f"nothing was pruned, because what is in use is not known: {error.message}{of}",
                           hint="stasis backup check names all that is damaged; forget those backups by their id, "
                                "then prune")

    def _lock_lost(self) -> LockedError:
        return LockedError(f"prune lost its lock of {self.repository.url} and stopped; nothing in use was deleted",
                           hint="the machine was suspended, or somebody ran unlock; run prune again")
