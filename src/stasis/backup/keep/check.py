# SPDX-License-Identifier: Apache-2.0
"""Is everything there, and is it what was put there? Names every object that is missing, cut off or altered.

First the small objects are looked at, then the segments, then whether each chunk is listed, then, if asked, the content
of the chunks. What nobody needs is counted and is no error as long as it is whole: prune removes it.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from stasis.backup.keep import layout, small
from stasis.backup.keep.marks import MARKS_IN_MEMORY, Marks, Passes
from stasis.backup.keep.threads import in_threads
from stasis.backup.keep.used import manifests, mark_chunks, mark_segments
from stasis.backup.progress import Progress
from stasis.backup.repo import Manifest, Repository
from stasis.backup.repo.delta import is_delta, objects_of
from stasis.backup.repo.index import NAME_BYTES, ZERO
from stasis.backup.repo.objects import FRAME_BYTES, Header, Kind, object_name
from stasis.backup.repo.store import ObjectInfo
from stasis.errors import DamagedError, NotFoundError

__all__ = ["CheckResult", "Problem", "check"]

MOST_TRACED = 100_000
"""Damaged chunks and segments for which it is found out which backups need them; all are named in any case."""


@dataclass
class Problem:
    """One damaged object. `backups`: ids of those that need it, as far as that is known."""

    object: str
    reason: str
    backups: list[str] = field(default_factory=list)


@dataclass
class CheckResult:
    """What was looked at and what was found. Sizes are what objects take in the store."""

    backups: int = 0
    segments: int = 0
    chunks: int = 0
    chunks_read: int = 0
    bytes_read: int = 0
    seed: int | None = None
    garbage_objects: int = 0
    garbage_bytes: int = 0
    unknown: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def damaged_backups(self) -> list[str]:
        """Ids of the backups that need something that is damaged."""
        return sorted({id_ for problem in self.problems for id_ in problem.backups})

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "damaged_backups": self.damaged_backups}


def check(repository: Repository, *, read_share: float = 0.0, seed: int | None = None, wait: float = 0,
          progress: Progress | None = None, marks_in_memory: int = MARKS_IN_MEMORY) -> CheckResult:
    """Look at everything, and read a share (0 to 1) of the chunks, drawn by `seed`.

    Each problem goes to `progress.error` when it is found, and into the result. Raises LockedError while prune is at
    work, and nothing because of damage.
    """
    with repository.lock_shared("check", wait=wait):
        return _Check(repository, read_share, seed, progress or Progress(), marks_in_memory).run()


class _Verifier:
    """Reads chunks whose length is not known, only to look at them; a thread has one of its own."""

    def __init__(self, repository: Repository) -> None:
        self._store = repository.store
        self._reader = repository.chunk_reader()
        self._content = memoryview(bytearray(repository.chunk_size))
        self._head = memoryview(bytearray(FRAME_BYTES))

    def verify(self, name: bytes) -> None:
        """Raises DamagedError. All chunks but the last one of a device are whole, so that length is tried first.

        A delta is looked at by itself: its base is another one of the objects.
        """
        if is_delta(name):
            self._reader.verify_pack(name)
            return
        try:
            self._reader.fetch(name, self._content)
        except DamagedError:
            length = self._length(name)
            if not 0 < length < len(self._content):
                raise
            self._reader.fetch(name, self._content[:length])

    def _length(self, name: bytes) -> int:
        """What the header says, 0 when there is none."""
        try:
            self._store.get_into(object_name(Kind.CHUNK, name), [self._head])
        except NotFoundError:
            return 0
        header = Header.parse(self._head)
        return 0 if header is None else header.length


class _Check:
    def __init__(self, repository: Repository, share: float, seed: int | None, progress: Progress, limit: int) -> None:
        self.repository = repository
        self.share = share
        self.progress = progress
        self.limit = limit
        self.result = CheckResult()
        self.bad: dict[bytes, Problem] = {}
        self._lock = threading.Lock()
        self._readers = threading.local()
        if 0 < share < 1:
            self.result.seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed

    def run(self) -> CheckResult:
        self.progress.phase("small objects")
        for where, reason, backup in small.damaged(self.repository):
            self._report(where, reason, backup)
        self.ids = self.repository.backup_ids()
        self.result.backups = len(self.ids)
        for marks in Passes(self.limit):
            self._check_segments(marks)
        for marks in Passes(self.limit):
            self._check_chunks(marks)
        self._count_other_garbage()
        self._trace()
        return self.result

    # Segments and chunks

    def _check_segments(self, marks: Marks) -> None:
        """Presence only: that they can be read shows when the chunks are marked."""
        mark_segments(self.repository, marks, self.ids, self._ignore)
        marks.settle()
        for info in layout.objects(self.repository.store, Kind.SEGMENT, marks.low, marks.high):
            name = layout.content_name(info.name)
            if name is not None and not marks.see(name):
                self._garbage(info)
        self.result.segments += len(marks)

    def _check_chunks(self, marks: Marks) -> None:
        self.progress.phase("reading indexes")
        mark_chunks(self.repository, marks, self.ids, self._segment_damaged, lambda size: self.progress.add(size))
        marks.settle()
        self.result.chunks += len(marks)
        self.progress.phase("reading chunks" if self.share else "looking for chunks")
        for size in in_threads(self._check_chunk, self._listed_chunks(marks), self.repository.parallelism):
            self.progress.add(size, items=1)
        if marks.unseen():
            self._name_missing(marks)

    def _listed_chunks(self, marks: Marks) -> Iterator[ObjectInfo]:
        """Chunks in the store. Those that nobody needs are among them: the next backup might take one for its own."""
        for info in layout.objects(self.repository.store, Kind.CHUNK, marks.low, marks.high):
            name = layout.content_name(info.name)
            if name is None:
                continue
            if not marks.see(name):
                self._garbage(info)
            yield info

    def _check_chunk(self, info: ObjectInfo) -> int:
        name = layout.content_name(info.name)
        assert name is not None  # the listing left others out
        if not FRAME_BYTES < info.size <= FRAME_BYTES + self.repository.chunk_size:
            self._content_damaged(name, Kind.CHUNK, f"it is {info.size} bytes long")
        elif self._is_drawn(name):
            try:
                self._reader().verify(name)
            except DamagedError as error:
                self._content_damaged(name, Kind.CHUNK, error.message)
            with self._lock:
                self.result.chunks_read += 1
                self.result.bytes_read += info.size
        return info.size

    def _is_drawn(self, name: bytes) -> bool:
        if self.result.seed is None:
            return self.share >= 1
        return zlib.crc32(name, self.result.seed) < self.share * (1 << 32)

    def _reader(self) -> _Verifier:
        if not hasattr(self._readers, "reader"):
            self._readers.reader = _Verifier(self.repository)
        reader: _Verifier = self._readers.reader
        return reader

    def _name_missing(self, marks: Marks) -> None:
        """The marks know only hashes of what was not listed; the names are in the segments."""
        for _, names in self._segments():
            for name in names:
                if marks.covers(name) and name != ZERO and not marks.was_seen(name) and name not in self.bad:
                    self._content_damaged(name, Kind.CHUNK, "it is missing")

    # Problems

    def _report(self, where: str, reason: str, backup: str | None = None) -> Problem:
        problem = Problem(where, reason, [backup] if backup else [])
        with self._lock:
            self.result.problems.append(problem)
        of = f" (backup {backup})" if backup else ""
        self.progress.error(DamagedError(reason if where in reason else f"{where} is damaged: {reason}{of}"))
        return problem

    def _content_damaged(self, name: bytes, kind: Kind, reason: str) -> None:
        problem = self._report(object_name(kind, name), reason)
        if len(self.bad) < MOST_TRACED:
            self.bad[name] = problem

    def _segment_damaged(self, error: DamagedError, backup: Manifest | None) -> None:
        if backup is None:
            return  # a manifest: named with the small objects
        name = next((name for name in map(bytes.fromhex, backup.segments)
                     if object_name(Kind.SEGMENT, name) in error.message), None)
        if name is not None and name not in self.bad:
            self._content_damaged(name, Kind.SEGMENT, error.message)

    @staticmethod
    def _ignore(error: DamagedError, backup: Manifest | None) -> None:
        """Manifests that cannot be read are named with the small objects."""

    def _garbage(self, info: ObjectInfo) -> None:
        self.result.garbage_objects += 1
        self.result.garbage_bytes += info.size

    def _count_other_garbage(self) -> None:
        for info in layout.leftovers(self.repository):
            self._garbage(info)
        self.result.unknown = [info.name for info in layout.unknown(self.repository.store)]

    def _trace(self) -> None:
        """Which backups need what is damaged."""
        if not self.bad:
            return
        harmed: dict[str, list[bytes]] = {}  # segment: what is damaged in it
        for segment, names in self._segments():
            if found := [name for name in names if name in self.bad]:
                harmed[segment] = found
        for backup in manifests(self.repository, self.ids, self._ignore):
            for segment in backup.segments:
                own = [bytes.fromhex(segment)] if bytes.fromhex(segment) in self.bad else []
                for name in (*own, *harmed.get(segment, ())):
                    if backup.id not in self.bad[name].backups:
                        self.bad[name].backups.append(backup.id)

    def _segments(self) -> Iterator[tuple[str, list[bytes]]]:
        """Segments that can be read, with their names of chunks; one that neighbours share comes once."""
        last: set[str] = set()
        for backup in manifests(self.repository, self.ids, self._ignore):
            for segment in backup.segments:
                if segment not in last and bytes.fromhex(segment) not in {ZERO, *self.bad}:
                    yield segment, self._names_of(segment)
            last = set(backup.segments)

    def _names_of(self, segment: str) -> list[bytes]:
        try:
            content = objects_of(self.repository.segment(bytes.fromhex(segment)))
        except DamagedError:
            return []  # reported when the chunks were marked
        return [content[start : start + NAME_BYTES] for start in range(0, len(content), NAME_BYTES)]
