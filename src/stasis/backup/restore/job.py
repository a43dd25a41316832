# SPDX-License-Identifier: Apache-2.0
"""What a restore and an apply share: passes of a crew over the target, the record beside it, making it durable.

From `begin` to `complete` the target is unfinished, and ``TARGET.stasis-copy`` says so and how far it is. The record
is never ahead of the data: the position is taken before the data is made durable and written down after.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stasis.backup.progress import Progress
from stasis.backup.repo import Repository
from stasis.backup.repo.manifest import Manifest
from stasis.backup.restore.batches import Batch, Entry, batches
from stasis.backup.restore.workers import ReadBack, Tally
from stasis.block.copy.sidecar import Sidecar, forget_base, write_note
from stasis.block.copy.target import Target
from stasis.block.copy.transfer import Crew, Worker
from stasis.errors import StasisError, StorageError, VerifyError

__all__ = ["Job", "RestoreIdentity", "RestoreOptions", "RestoreResult", "readable_errors", "target_path"]

OpenWorker = Callable[[], Worker[Batch]]


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How to write a target.

    in_place: write only what the target does not hold already. overwrite: go over whatever it holds.
    verify: read the target back from its medium and compare it with the backup, all that was to be written.
    checkpoint_seconds: how often the target is made durable and the position written down.
    """

    in_place: bool = False
    overwrite: bool = False
    verify: bool = False
    checkpoint_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class RestoreIdentity:
    """What is written: a backup of a repository, whole or, with `base`, onto a restore of that backup."""

    repository: str
    backup: str
    base: str = ""

    def describe(self) -> str:
        """One phrase for messages."""
        return f"backup {self.backup[:12]}" + (f" onto backup {self.base[:12]}" if self.base else "")


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What was done, in bytes of the target; `position_at_start` is not 0 when an earlier run was continued."""

    backup: str
    target: str
    size: int
    bytes_written: int
    bytes_zeroed: int
    bytes_unchanged: int
    bytes_verified: int
    chunks_fetched: int
    chunks_sampled: int
    sample_seed: int | None
    position_at_start: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with ``message_type: summary``."""
        return {"message_type": "summary", **asdict(self)}


@contextmanager
def readable_errors(target: str) -> Iterator[None]:
    """Turn the OSErrors of the target into the sentence that a user sees."""
    try:
        yield
    except StasisError:
        raise
    except BrokenPipeError:
        raise
    except OSError as error:
        hint = "repeat the command: it goes on where it stopped"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = f"make room for {target}, then {hint}"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(f"restoring to {target} failed: {reason}", hint=hint, errno=error.errno) from error


class Job:
    """One run, from an opened target to a durable one."""

    def __init__(self, repository: Repository, manifest: Manifest, target: Target, identity: RestoreIdentity,
                 options: RestoreOptions, progress: Progress) -> None:
        self.repository = repository
        self.target = target
        self.tally = Tally()
        self.bytes_verified = 0
        self._manifest = manifest
        self._identity = identity
        self._options = options
        self._progress = progress
        self._sidecar = Sidecar(target.path, identity, manifest.size, target.inode)
        self._sync_failed = False
        self._next_checkpoint = 0.0
        self._started = time.monotonic()
        self._position_at_start = 0

    def recorded_position(self) -> int | None:
        """How far an earlier run of this very work came; None without one. Raises StateError for another's record."""
        return None if self.target.created else self._sidecar.load()

    def begin(self, position: int, *, starts_empty: bool) -> None:
        """From here on the target is unfinished, and says so."""
        self._position_at_start = position
        self._sidecar.save(position)
        forget_base(self.target.descriptor)
        if starts_empty:
            self.target.start_empty(self._manifest.size)
        else:
            self.target.set_size(self._manifest.size)

    def write(self, entries: Iterable[Entry], open_worker: OpenWorker, done: int, total: int) -> None:
        """Have workers do the entries; `done` of `total` bytes were done before. What was done stays done whatever
        is raised, KeyboardInterrupt included."""
        crew = Crew(open_worker, self.repository.parallelism)
        self._next_checkpoint = time.monotonic() + self._options.checkpoint_seconds

        def tick(settled: int) -> None:
            self._progress(done + settled, total)
            if time.monotonic() >= self._next_checkpoint:
                self._checkpoint(crew)

        self._progress.phase("restoring", total)
        self._progress.skip(done)
        try:
            work = batches(entries, self._manifest.size, self._manifest.chunk_size)
            crew.run(work, self._position_at_start, tick)
        except BaseException:
            if not self._sync_failed:
                self._checkpoint(crew)
            raise

    def compare(self, entries: Iterable[Entry], of: Manifest, phase: str, total: int, explanation: str,
                hint: str) -> None:
        """Compare what the target holds with entries of a backup. Raises VerifyError."""
        crew = Crew(lambda: ReadBack(self.repository, self.target, explanation, hint), self.repository.parallelism)
        self._progress.phase(phase, total)
        crew.run(batches(entries, of.size, of.chunk_size), 0, lambda done: self._progress(done, total))

    def read_back(self, entries: Iterable[Entry], total: int) -> None:
        """Compare what came to the medium. Raises VerifyError; the next run starts from the beginning then."""
        self.target.drop_cache()
        try:
            self.compare(entries, self._manifest, "reading back", total, "what was read back is not what was written",
                         "check the target's medium")
        except VerifyError:
            self._sidecar.save(0)
            raise
        self.bytes_verified = total

    def complete(self) -> None:
        """Make all durable, note in a file what it holds, and remove the record."""
        if not self.target.is_block_device:
            self.target.sync()
            modified = os.fstat(self.target.descriptor).st_mtime_ns
            note = {"repository": self._identity.repository, "backup": self._identity.backup, "modified_ns": modified}
            write_note(self.target.descriptor, note)
        self.target.finish()
        self._sidecar.remove()

    def result(self, *, chunks_sampled: int = 0, sample_seed: int | None = None) -> RestoreResult:
        """What this run did."""
        return RestoreResult(
            backup=self._manifest.id,
            target=str(self.target.path),
            size=self._manifest.size,
            bytes_verified=self.bytes_verified,
            chunks_sampled=chunks_sampled,
            sample_seed=sample_seed,
            position_at_start=self._position_at_start,
            seconds=time.monotonic() - self._started,
            **asdict(self.tally.counts),
        )

    def _checkpoint(self, crew: Crew[Batch]) -> None:
        position = crew.position
        self._sync_failed = True
        self.target.sync()
        # The kernel tells of a failed writeback only once: after one, no later sync proves anything.
        self._sync_failed = False
        self._sidecar.save(position)
        self._next_checkpoint = time.monotonic() + self._options.checkpoint_seconds


def target_path(target: str | os.PathLike[str]) -> Path:
    """Where the target really is, so that the record lies beside it and not beside a link to it."""
    return Path(os.path.realpath(target))
