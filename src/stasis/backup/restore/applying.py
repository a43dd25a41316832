# SPDX-License-Identifier: Apache-2.0
"""Bringing a restored image up to a later backup by copying only what changed between the two.

What update-img does for dattobd, with the checks that it lacks: the target must be noted or said to hold the base, a
random sample of it must be equal to the base before anything is written, and whatever is overwritten is looked at.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

from stasis.backup.progress import Progress
from stasis.backup.repo import Repository
from stasis.backup.repo.index import Index
from stasis.backup.repo.manifest import Manifest
from stasis.backup.restore.batches import Chunk, Entry, changed_entries, read_index, total_length
from stasis.backup.restore.job import Job, RestoreIdentity, RestoreOptions, RestoreResult, readable_errors, target_path
from stasis.backup.restore.workers import DifferenceWriter
from stasis.block.copy import plan
from stasis.block.copy.sidecar import Sidecar, read_note
from stasis.block.copy.target import Target
from stasis.errors import NotFoundError, StateError, UsageError, VerifyError

__all__ = ["ApplyOptions", "apply"]

RESTORE_INSTEAD = "stasis backup restore --in-place --overwrite compares the whole target and writes what differs"


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """How to apply.

    sample_share: share of the chunks, 0 to 1, that is compared with the base before anything is written;
    sample_minimum: chunks that are compared at least, when the share is not 0. sample_seed: draws the same sample
    again. verify, checkpoint_seconds: as in RestoreOptions.
    """

    sample_share: float = 0.001
    sample_minimum: int = 16
    sample_seed: int | None = None
    verify: bool = False
    checkpoint_seconds: float = 5.0


def apply(repository: Repository, manifest: Manifest, target: str | os.PathLike[str], *, base: Manifest | None = None,
          options: ApplyOptions | None = None, progress: Progress | None = None) -> RestoreResult:
    """Make a target that holds backup `base` hold backup `manifest`.

    base: None takes what an earlier restore has noted in the target's attributes.
    Goes on where an earlier run stopped. Raises StateError when the target is not noted to hold a backup, holds
    another one or was written to, VerifyError when it differs from the base, and what `restore` raises.
    """
    chosen = options or ApplyOptions()
    path = target_path(target)
    with (repository.lock_shared("restore"), readable_errors(str(path)),
          Target.open(path, manifest.size, create=False) as opened):
        begun = _begun_from(repository, manifest, opened)
        held = base or _noted_base(repository, opened, begun)
        run = _Apply(repository, held, manifest, opened, chosen, progress or Progress())
        return run.run(noted=base is None and not begun)


def _begun_from(repository: Repository, manifest: Manifest, target: Target) -> str:
    """The base of an unfinished run that is recorded beside the target; empty without one."""
    recorded = Sidecar.recorded_identity(target.path)
    if (recorded.get("repository"), recorded.get("backup")) != (repository.id, manifest.id):
        return ""
    return str(recorded.get("base") or "")


def _noted_base(repository: Repository, target: Target, begun: str) -> Manifest:
    note = read_note(target.descriptor)
    held = begun or note.get("backup")
    if not isinstance(held, str):
        raise StateError(f"{target.path} is not noted to hold a backup",
                         hint=f"name the backup that it holds with --from; or {RESTORE_INSTEAD}")
    if not begun and note.get("repository") != repository.id:
        raise StateError(f"{target.path} holds a backup of another repository", hint=RESTORE_INSTEAD)
    try:
        return repository.backup(held)
    except NotFoundError as error:
        raise NotFoundError(f"{target.path} holds backup {held[:12]}, which is no longer in {repository.url}",
                            hint=RESTORE_INSTEAD) from error


class _Apply:
    """One run, when it is known what the target should hold."""

    def __init__(self, repository: Repository, base: Manifest, manifest: Manifest, target: Target,
                 options: ApplyOptions, progress: Progress) -> None:
        self._repository = repository
        self._base = base
        self._manifest = manifest
        self._target = target
        self._options = options
        self._seed = secrets.randbits(32) if options.sample_seed is None else options.sample_seed
        identity = RestoreIdentity(repository.id, manifest.id, base.id)
        restore_options = RestoreOptions(verify=options.verify, checkpoint_seconds=options.checkpoint_seconds)
        self._job = Job(repository, manifest, target, identity, restore_options, progress)

    def run(self, *, noted: bool) -> RestoreResult:
        """Check, write, complete. `noted`: the base is known from the target's note alone."""
        if self._base.chunk_size != self._manifest.chunk_size:
            raise UsageError(f"backups {self._base.id[:12]} and {self._manifest.id[:12]} differ in their chunk size",
                             hint=RESTORE_INSTEAD)
        old, new = self._repository.index(self._base), self._repository.index(self._manifest)
        read_index(old)
        read_index(new)
        position = self._job.recorded_position()
        sampled = self._refuse_other_contents(old, noted=noted) if position is None else 0
        self._write(old, new, position or 0, strict=position is None)
        self._job.complete()
        return self._job.result(chunks_sampled=sampled, sample_seed=self._seed if sampled else None)

    def _write(self, old: Index, new: Index, position: int, *, strict: bool) -> None:
        size, chunk_size = self._manifest.size, self._manifest.chunk_size
        total = total_length(changed_entries(old, new), size, chunk_size)
        left = total_length(changed_entries(old, new, position // chunk_size), size, chunk_size)

        def open_worker() -> DifferenceWriter:
            stranger = self._stranger if strict else None
            return DifferenceWriter(self._repository, self._target, self._job.tally, stranger)

        self._job.begin(position, starts_empty=False)
        self._job.write(changed_entries(old, new, position // chunk_size), open_worker, total - left, total)
        if self._options.verify:
            self._job.read_back(changed_entries(old, new), total)

    def _refuse_other_contents(self, old: Index, *, noted: bool) -> int:
        """Refuse a target that is not, or no longer, what it should be; returns the size of the sample."""
        target, note = self._target, read_note(self._target.descriptor)
        if not target.is_block_device and (found := os.fstat(target.descriptor).st_size) != self._base.size:
            raise StateError(f"{target.path} has {found} bytes, backup {self._base.id[:12]} has {self._base.size}",
                             hint=RESTORE_INSTEAD)
        if note.get("repository") == self._repository.id and note.get("backup") != self._base.id:
            raise StateError(f"{target.path} holds backup {str(note.get('backup'))[:12]}, not {self._base.id[:12]}",
                             hint="leave out --from")
        if noted and note.get("modified_ns") != os.fstat(target.descriptor).st_mtime_ns:
            raise StateError(f"{target.path} was written to since backup {self._base.id[:12]} was restored to it",
                             hint=f"name the backup with --from if that changed nothing; or {RESTORE_INSTEAD}")
        return self._compare_sample(old)

    def _compare_sample(self, old: Index) -> int:
        chunk_size, options = self._base.chunk_size, self._options
        drawn = plan.sample_blocks([(0, self._base.size)], chunk_size, options.sample_share, options.sample_minimum,
                                   self._seed)
        numbers = {offset // chunk_size for offset, _ in drawn}
        if numbers:
            numbers |= {0, old.count - 1}  # the start of a device tells best: writing to a file system changes it
        sample = [Entry(number, old.name(number)) for number in sorted(numbers)]
        explanation = f"it is no faithful restore of backup {self._base.id[:12]} (sample drawn with seed {self._seed})"
        total = total_length(sample, self._base.size, chunk_size)
        self._job.compare(sample, self._base, "sampling", total, explanation,
                          f"nothing was written; {RESTORE_INSTEAD}")
        return len(sample)

    def _stranger(self, chunk: Chunk) -> VerifyError:
        return VerifyError(
            f"{self._target.path} differs from backup {self._base.id[:12]} in the {chunk.length} bytes at offset "
            f"{chunk.offset}, so it is no faithful restore of it", hint=f"the target is unfinished; {RESTORE_INSTEAD}")
