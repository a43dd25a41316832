# SPDX-License-Identifier: Apache-2.0
"""Verifying a backup by digest: every chunk that it names is fetched and compared with its name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from stasis.backup.progress import Progress
from stasis.backup.repo import Repository
from stasis.backup.repo.index import ZERO
from stasis.backup.repo.manifest import Manifest
from stasis.backup.restore.batches import Batch, Entry, all_entries, batches, read_index
from stasis.block.copy.plan import Extent
from stasis.block.copy.transfer import Crew
from stasis.errors import DamagedError
from stasis.linux.iobuffer import IoBuffer

__all__ = ["VerifyResult", "verify"]

# Names that are remembered so that a chunk is not read twice: about 30 MiB at most.
REMEMBERED_NAMES = 1 << 18


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was verified. bytes_checked: stored data read and compared with its digest. bytes_compared: of the live
    device, with the backup; bytes_left_out: of it, because they changed since. bytes_differing counts whole extents;
    `differing` holds the first of them."""

    backup: str
    size: int
    bytes_checked: int
    bytes_compared: int
    bytes_left_out: int
    bytes_differing: int
    differing: tuple[Extent, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with ``message_type: summary``."""
        differing = [{"offset": offset, "length": length} for offset, length in self.differing]
        return {"message_type": "summary", **asdict(self), "differing": differing}


def verify(repository: Repository, manifest: Manifest, progress: Progress | None = None) -> VerifyResult:
    """Read all chunks of a backup and compare each with its digest.

    Raises DamagedError at the end when chunks are damaged or missing; it names the first, and `progress` is told of
    each. Raises it at once when the index is.
    """
    started = time.monotonic()
    shown = progress or Progress()
    damage = Damage(shown)
    with repository.lock_shared("verify"):
        index = repository.index(manifest)
        read_index(index)
        shown.phase("verifying", manifest.size)
        crew = Crew(lambda: _Checker(repository, damage), repository.parallelism)
        entries = without_repetition(all_entries(index))
        crew.run(batches(entries, manifest.size, manifest.chunk_size), 0, lambda done: shown(done, manifest.size))
    damage.raise_if_any(manifest)
    return VerifyResult(manifest.id, manifest.size, damage.bytes_checked, 0, 0, 0, (), time.monotonic() - started)


def without_repetition(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries; one whose chunk was there before says ZERO, as it needs no reading again."""
    seen: set[bytes] = set()
    for entry in entries:
        if entry.name in seen:
            yield Entry(entry.number, ZERO)
            continue
        if entry.name != ZERO and len(seen) < REMEMBERED_NAMES:
            seen.add(entry.name)
        yield entry


class Damage:
    """The damaged chunks that all threads found, and how much they read."""

    def __init__(self, progress: Progress) -> None:
        self.bytes_checked = 0
        self.count = 0
        self._first: DamagedError | None = None
        self._progress = progress
        self._lock = threading.Lock()

    def found(self, error: DamagedError) -> None:
        """A chunk is damaged."""
        with self._lock:
            self.count += 1
            if self._first is None:
                self._first = error
            self._progress.error(error)

    def checked(self, length: int) -> None:
        """So many bytes were read and are right."""
        with self._lock:
            self.bytes_checked += length

    def raise_if_any(self, manifest: Manifest) -> None:
        """Raise DamagedError if there was any."""
        if self._first is None:
            return
        others = f" (the first of {self.count} damaged chunks)" if self.count > 1 else ""
        raise DamagedError(f"backup {manifest.id[:12]} is damaged: {self._first.message}{others}",
                           hint=self._first.hint)


class _Checker:
    """Fetches chunks and drops them."""

    def __init__(self, repository: Repository, damage: Damage) -> None:
        self._reader = repository.chunk_reader()
        self._damage = damage
        self._buffer = IoBuffer(repository.chunk_size)

    def handle(self, batch: Batch) -> None:
        checked = 0
        for chunk in batch.chunks:
            try:
                self._reader.fetch(chunk.name, self._buffer.view[: chunk.length])
                checked += chunk.length
            except DamagedError as error:
                self._damage.found(error)
        self._damage.checked(checked)

    def abort(self) -> None:
        """A chunk under way is finished: that takes a moment."""

    def close(self) -> None:
        self._buffer.close()
