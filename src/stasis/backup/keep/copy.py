# SPDX-License-Identifier: Apache-2.0
"""Copy backups to another repository, which may have another key and another chunk size.

Names of chunks mean nothing in another repository, so what a chunk is called there shows only when it was read. What
a backup shares with one that was copied before is not read: where both name the same chunks, the copy takes over the
names that the earlier copy has.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stasis.backup.keep.threads import in_threads
from stasis.backup.progress import Progress
from stasis.backup.repo import ZERO, ChunkReader, ChunkWriter, Index, IndexBuilder, Manifest, Repository
from stasis.errors import UsageError

__all__ = ["CopiedBackup", "copy"]


@dataclass(frozen=True)
class CopiedBackup:
    """A backup and its copy. skipped: the copy was there already. Sizes are bytes."""

    source: str
    id: str
    skipped: bool = False
    bytes_read: int = 0
    bytes_stored: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def copy(source: Repository, backups: Sequence[Manifest], target: Repository, *, wait: float = 0,
         progress: Progress | None = None) -> Iterator[CopiedBackup]:
    """Copy backups, the oldest first; each is published when it is complete. Raises UsageError, LockedError."""
    if source.id == target.id:
        raise UsageError(f"{target.url} is the repository that is copied from", hint="copy to another repository")
    with source.lock_shared("copy", wait=wait), target.lock_shared("copy", wait=wait):
        pairs = _Pairs(source, target)
        for backup in sorted(backups, key=lambda each: (each.time, each.id)):
            known = pairs.copy_of(backup)
            if known is not None:
                yield CopiedBackup(backup.id, known.id, skipped=True)
                continue
            yield _Copy(source, target, backup, pairs, progress or Progress()).run()


class _Pairs:
    """Which backups of the source have a copy in the target: told by what stays the same in a copy."""

    def __init__(self, source: Repository, target: Repository) -> None:
        self._copies = {_identity(backup): backup for backup in target.backups()}
        self._sources = {_identity(backup): backup for backup in source.backups()}

    def copy_of(self, backup: Manifest) -> Manifest | None:
        return self._copies.get(_identity(backup))

    def copy_of_id(self, id_: str | None) -> Manifest | None:
        found = [backup for backup in self._sources.values() if backup.id == id_]
        return self.copy_of(found[0]) if found else None

    def add(self, copied: Manifest) -> None:
        self._copies[_identity(copied)] = copied

    def base(self, backup: Manifest) -> tuple[Manifest, Manifest] | None:
        """The last earlier backup of the same device that is in both repositories, as here and as there."""
        earlier = [(one, self._copies[key]) for key, one in self._sources.items()
                   if key in self._copies and (one.host, one.device) == (backup.host, backup.device)
                   and one.time < backup.time]
        return max(earlier, key=lambda pair: pair[0].time, default=None)


def _identity(backup: Manifest) -> tuple[object, ...]:
    return backup.set_id, backup.host, backup.device, backup.time, backup.size


class _Copy:
    """Goes through a backup in units that are whole chunks on both sides."""

    def __init__(self, source: Repository, target: Repository, backup: Manifest, pairs: _Pairs,
                 progress: Progress) -> None:
        self.source, self.target, self.backup = source, target, backup
        self.pairs, self.progress = pairs, progress
        self.unit = max(backup.chunk_size, target.chunk_size)
        self.index = source.index(backup)
        base = pairs.base(backup)
        self.base = source.index(base[0]) if base else None
        self.base_copy = target.index(base[1]) if base else None
        self.builder: IndexBuilder = target.index_builder(backup.size)
        self._workers = threading.local()

    def run(self) -> CopiedBackup:
        self.progress.phase(f"copying {self.backup.id[:8]}", self.backup.size)
        read = stored = 0
        units = range(0, self.backup.size, self.unit)
        threads = min(self.source.parallelism, self.target.parallelism)  # each has buffers of the larger chunk size
        for offset, (nread, nstored) in zip(units, in_threads(self._copy_unit, units, threads), strict=True):
            read += nread
            stored += nstored
            self.builder.settled(offset // self.target.chunk_size)
            self.progress.add(min(self.unit, self.backup.size - offset))
        copied = self.target.publish(self._draft())
        self.pairs.add(copied)
        return CopiedBackup(self.backup.id, copied.id, bytes_read=read, bytes_stored=stored)

    def _draft(self) -> Manifest:
        parent = self.pairs.copy_of_id(self.backup.parent)
        segments = tuple(name.hex() for name in self.builder.finish())
        return replace(self.backup, id="", segments=segments, chunk_size=self.target.chunk_size,
                       kind=self.backup.kind if parent else "full", parent=parent.id if parent else None)

    def _copy_unit(self, offset: int) -> tuple[int, int]:
        """Bytes read and stored."""
        numbers = _chunks(offset, self.unit, self.index)
        names = [self.index.name(number) for number in numbers]
        if all(name == ZERO for name in names):
            return 0, 0
        if self._take_over(offset, names):
            return 0, 0
        worker = self._worker()
        content = worker.buffer[: min(self.unit, self.backup.size - offset)]
        for place, name in enumerate(names):
            start = place * self.index.chunk_size
            worker.reader.fetch(name, content[start : start + self.index.chunk_size])
        stored = 0
        for start in range(0, len(content), self.target.chunk_size):
            chunk = worker.writer.store(content[start : start + self.target.chunk_size])
            self.builder.set((offset + start) // self.target.chunk_size, chunk.name)
            stored += chunk.stored_bytes
        return len(content), stored

    def _take_over(self, offset: int, names: list[bytes]) -> bool:
        """Take the names of the earlier copy where the earlier backup has the same content."""
        if self.base is None or self.base_copy is None or self.base.chunk_size != self.index.chunk_size:
            return False
        end = offset + self.unit
        if end > min(self.base.size, self.backup.size) and self.base.size != self.backup.size:
            return False  # a short chunk at one end
        if names != [self.base.name(number) for number in _chunks(offset, self.unit, self.base)]:
            return False
        for number in _chunks(offset, self.unit, self.base_copy):
            self.builder.set(number, self.base_copy.name(number))
        return True

    def _worker(self) -> _Worker:
        if not hasattr(self._workers, "worker"):
            self._workers.worker = _Worker(self.source, self.target, self.unit)
        worker: _Worker = self._workers.worker
        return worker


class _Worker:
    """What a thread has of its own."""

    def __init__(self, source: Repository, target: Repository, unit: int) -> None:
        self.reader: ChunkReader = source.chunk_reader()
        self.writer: ChunkWriter = target.chunk_writer()
        self.buffer = memoryview(bytearray(unit))


def _chunks(offset: int, length: int, index: Index) -> range:
    """Numbers of the chunks of a unit."""
    first = offset // index.chunk_size
    return range(first, min(-(-(offset + length) // index.chunk_size), index.count))
