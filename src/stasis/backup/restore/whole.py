# SPDX-License-Identifier: Apache-2.0
"""Restoring a backup to a file or block device."""

from __future__ import annotations

import os
from functools import partial

from stasis.backup.progress import Progress
from stasis.backup.repo import Repository
from stasis.backup.repo.manifest import Manifest
from stasis.backup.restore.batches import all_entries, read_index
from stasis.backup.restore.contents import is_empty, refuse_contents
from stasis.backup.restore.job import Job, RestoreIdentity, RestoreOptions, RestoreResult, readable_errors, target_path
from stasis.backup.restore.workers import DifferenceWriter, WholeWriter
from stasis.block.copy.target import Target
from stasis.errors import StateError

__all__ = ["restore"]


def restore(repository: Repository, manifest: Manifest, target: str | os.PathLike[str],
            options: RestoreOptions | None = None, progress: Progress | None = None) -> RestoreResult:
    """Write a backup to a regular file, which is made if need be, or to a block device.

    Every chunk is checked against its digest before it is written. While the target is unfinished,
    ``TARGET.stasis-copy`` tells where it is; on return all is durable and that file is gone. After an exception,
    KeyboardInterrupt included, the same call goes on from there.

    Raises DamagedError when an object of the repository is missing or altered, BusyError for a target that is mounted,
    in use or holds something, StorageError for one that is too small or fails, VerifyError when what is read back
    differs, and StateError when another unfinished copy is recorded.
    """
    chosen = options or RestoreOptions()
    path = target_path(target)
    with repository.lock_shared("restore"), readable_errors(str(path)):
        index = repository.index(manifest)
        read_index(index)
        with Target.open(path, manifest.size, create=True) as opened:
            identity = RestoreIdentity(repository.id, manifest.id)
            job = Job(repository, manifest, opened, identity, chosen, progress or Progress())
            position = _position(job, manifest.size, chosen)
            in_place = chosen.in_place and not is_empty(opened)
            job.begin(position, starts_empty=not in_place and not position)
            worker = DifferenceWriter if in_place else WholeWriter
            entries = all_entries(index, position // manifest.chunk_size)
            job.write(entries, partial(worker, repository, opened, job.tally), position, manifest.size)
            if chosen.verify:
                job.read_back(all_entries(index), manifest.size)
            job.complete()
            return job.result()


def _position(job: Job, size: int, options: RestoreOptions) -> int:
    """Where to go on: 0, unless this very restore was begun before. Refuses what must not be overwritten."""
    try:
        position = job.recorded_position()
    except StateError:
        if not options.overwrite:
            raise
        position = 0
    if position is None and not options.overwrite:
        refuse_contents(job.target, size, in_place=options.in_place)
    return position or 0
