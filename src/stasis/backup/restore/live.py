# SPDX-License-Identifier: Apache-2.0
"""Verifying a backup against the device that it was taken from, as far as that has not changed since.

The device is read and hashed, chunk by chunk; the repository is read only where a chunk differs, or changed in part
since the backup, so that most of the work is reading the device once.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from stasis.backup.progress import Progress
from stasis.backup.repo import Repository
from stasis.backup.repo.index import ZERO
from stasis.backup.repo.manifest import Manifest
from stasis.backup.restore.batches import Batch, Chunk, all_entries, batches, read_index
from stasis.backup.restore.checking import Damage, VerifyResult
from stasis.backup.restore.compare import differing_runs
from stasis.backup.source import Mark, PointInTimeSource
from stasis.block.copy import plan
from stasis.block.copy.plan import Extent
from stasis.block.copy.transfer import Crew
from stasis.errors import DamagedError, GenerationError, UsageError
from stasis.linux.iobuffer import IoBuffer

__all__ = ["verify_live"]

# Differences that are told one by one; the bytes of all are counted.
MOST_EXTENTS = 10_000


def verify_live(repository: Repository, manifest: Manifest, source: PointInTimeSource, *, read_data: bool = False,
                progress: Progress | None = None) -> VerifyResult:
    """Compare a backup with its origin, a file, or a snapshot. What `source` knows to have changed since the backup
    is left out; where it does not know, all is compared.

    read_data: fetch and check every chunk of the backup too, not only those that have to be looked into.
    Raises DamagedError when a chunk of the backup is damaged. Differences are in the result.
    """
    started = time.monotonic()
    if source.size is None:
        raise UsageError(f"{source.name} cannot be compared with a backup: its size is not known",
                         hint="name a file, a block device or a served device")
    shown = progress or Progress()
    size = min(manifest.size, source.size)
    changed = _changed_since(source, manifest)
    findings = _Findings(shown)
    with repository.lock_shared("verify"):
        index = repository.index(manifest)
        read_index(index)
        shown.phase("comparing", size)
        compared = _Compared(source, size, _Extents(changed), _Extents(source.zero_extents()), read_data)
        entries = (entry for entry in all_entries(index) if entry.number * manifest.chunk_size < size)
        crew = Crew(lambda: _LiveWorker(repository, compared, findings), repository.parallelism)
        crew.run(batches(entries, manifest.size, manifest.chunk_size), 0, lambda done: shown(min(done, size), size))
    findings.damage.raise_if_any(manifest)
    if source.size != manifest.size:
        findings.differs([(size, abs(source.size - manifest.size))])
    left_out = plan.total(plan.clip(changed, 0, size))
    return VerifyResult(
        backup=manifest.id, size=manifest.size, bytes_checked=findings.damage.bytes_checked,
        bytes_compared=size - left_out, bytes_left_out=left_out, bytes_differing=findings.bytes_differing,
        differing=tuple(plan.merge(findings.extents)), seconds=time.monotonic() - started,
    )


def _changed_since(source: PointInTimeSource, manifest: Manifest) -> list[Extent]:
    """What the source knows to have changed since the backup; nothing where it cannot tell."""
    if manifest.generation is None or manifest.change_number is None or source.mark is None:
        return []
    try:
        return plan.merge(source.changed_since(Mark(manifest.generation, manifest.change_number)))
    except GenerationError:
        return []


class _Extents:
    """Ascending extents that can be asked about a place."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._extents = extents
        self._starts = [offset for offset, _ in extents]

    def within(self, offset: int, length: int) -> list[Extent]:
        """Their parts in a range."""
        end = offset + length
        first = max(0, bisect_right(self._starts, offset) - 1)
        return plan.clip(self._extents[first : bisect_right(self._starts, end)], offset, end)

    def cover(self, offset: int, length: int) -> bool:
        """Whether a range lies in one of them."""
        return self.within(offset, length) == [(offset, length)]


@dataclass(frozen=True, slots=True)
class _Compared:
    """What is compared: the first `size` bytes of a source but for what changed."""

    source: PointInTimeSource
    size: int
    changed: _Extents
    zeroes: _Extents
    read_data: bool


class _Findings:
    """What all threads found."""

    def __init__(self, progress: Progress) -> None:
        self.damage = Damage(progress)
        self.extents: list[Extent] = []
        self.bytes_differing = 0
        self._lock = threading.Lock()

    def differs(self, extents: Sequence[Extent]) -> None:
        """These extents differ."""
        with self._lock:
            self.bytes_differing += plan.total(extents)
            self.extents += extents[: MOST_EXTENTS - len(self.extents)]


class _LiveWorker:
    """Reads the source and compares it with the backup."""

    def __init__(self, repository: Repository, compared: _Compared, findings: _Findings) -> None:
        self._reader = repository.chunk_reader()
        self._name = repository.chunk_name
        self._compared = compared
        self._findings = findings
        self._chunk_size = repository.chunk_size
        self._stored = IoBuffer(repository.chunk_size)
        self._live = IoBuffer(repository.chunk_size)
        self._source = compared.source.open_reader()

    def handle(self, batch: Batch) -> None:
        for chunk in batch.chunks:
            self._compare(chunk)
        for offset, length in batch.zeroes:
            for start in range(offset, offset + length, self._chunk_size):
                count = min(self._chunk_size, offset + length - start)
                if not self._compared.zeroes.cover(start, count):
                    self._compare(Chunk(start, count, ZERO))

    def _compare(self, chunk: Chunk) -> None:
        compared = self._compared
        length = max(0, min(chunk.length, compared.size - chunk.offset))
        changed = [(offset - chunk.offset, count) for offset, count in compared.changed.within(chunk.offset, length)]
        unchanged = plan.complement(changed, length)
        if unchanged:
            self._read(chunk.offset, unchanged)
        is_same = unchanged == [(0, chunk.length)] and self._name(self._live.view[: chunk.length]) == chunk.name
        if compared.read_data or (unchanged and not is_same):
            self._compare_stored(chunk, [] if is_same else unchanged)

    def _read(self, offset: int, parts: Sequence[Extent]) -> None:
        for start, count in parts:
            self._source.read_into([(offset + start, count)], self._live.view[start : start + count])

    def _compare_stored(self, chunk: Chunk, parts: Sequence[Extent]) -> None:
        """Compare parts, whose offsets count from the start of the chunk, with the stored chunk."""
        try:
            self._reader.fetch(chunk.name, self._stored.view[: chunk.length])
        except DamagedError as error:
            self._findings.damage.found(error)
            return
        self._findings.damage.checked(chunk.length if chunk.name != ZERO else 0)
        for start, count in parts:
            runs = differing_runs(self._stored.address + start, self._live.address + start, count)
            self._findings.differs([(chunk.offset + start + first, length) for first, length in runs])

    def abort(self) -> None:
        self._source.abort()

    def close(self) -> None:
        self._source.close()
        self._stored.close()
        self._live.close()
