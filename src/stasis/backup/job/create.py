# SPDX-License-Identifier: Apache-2.0
"""Making backups: one per source, all of one run under one set id, and published together at the end.

Until the manifests are published nothing of a run counts: the marks that the next run goes on from are those in the
manifests, so a run that fails or is cancelled leaves all changes to the next one.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from stasis.backup.job.device import CreateOptions, DeviceJob
from stasis.backup.job.history import History
from stasis.backup.progress import Progress
from stasis.errors import DamagedError, ExitCode, RepositoryError, StasisError, UsageError

if TYPE_CHECKING:
    from stasis.backup.job.precopy import Precopy
    from stasis.backup.repo import Lease, Manifest, Repository
    from stasis.backup.source import PointInTimeSource

__all__ = ["CreateOptions", "CreateResult", "Plan", "create", "plan"]

PURPOSE = "backup create"


@dataclass(frozen=True)
class CreateResult:
    """What was made. exit_code: OK, PARTIAL (some of it could not be read) or TRACKING (tracking was found wrong)."""

    set_id: str
    backups: tuple[Manifest, ...]
    warnings: tuple[str, ...] = ()
    exit_code: ExitCode = ExitCode.OK


@dataclass(frozen=True)
class Plan:
    """What a backup would do. Sizes in bytes; bytes_to_read is None for a stream; reason: why it is a full one."""

    device: str
    size: int | None
    kind: str
    parent: str | None
    reason: str
    bytes_changed: int | None
    bytes_to_read: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def plan(sources: Sequence[PointInTimeSource], repository: Repository, options: CreateOptions) -> list[Plan]:
    """What `create` would do; writes nothing. Raises as `create` does."""
    plans = []
    for job in _jobs(sources, repository, options, Progress(), []):
        size, decision = job.source.size, job.decision
        plans.append(Plan(job.source.name, size, decision.kind, decision.parent.id if decision.parent else None,
                          decision.reason, size if decision.changed_bytes is None else decision.changed_bytes,
                          None if size is None else job.bytes_to_read))
    return plans


def create(sources: Sequence[PointInTimeSource], repository: Repository, options: CreateOptions,
           progress: Progress | None = None, *, lease: Lease | None = None,
           have_read: Callable[[], None] | None = None, precopy: Precopy | None = None) -> CreateResult:
    """Back up the sources.

    lease: a shared lock of the repository that the caller holds already; otherwise one is taken.
    have_read: called once nothing more is read, while there still is much to make durable.
    precopy: what was copied already of those sources that were written to meanwhile; they are at rest by now.

    Raises GenerationError (the wanted kind cannot be made), LockedError, StorageError, RepositoryError, and StasisError
    for a source that cannot be read. Nothing is published then; what was stored is not stored or, where the source is
    tracked, read again by the next run.
    """
    if options.base is not None and len(sources) > 1:
        raise UsageError("--base names one backup, but there are several sources", hint="back them up one by one")
    options = replace(options, set_id=options.set_id or str(uuid.uuid4()))
    progress = progress or Progress()
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(repository.lock_shared(PURPOSE)) if lease is None else lease
        warnings: list[str] = []
        jobs = _jobs(sources, repository, options, progress, warnings, precopy)
        backups = _run(jobs, repository, options, progress, held, have_read)
    warnings += precopy.warnings if precopy is not None else []
    warnings += [warning for job in jobs for warning in job.warnings]
    return CreateResult(options.set_id, tuple(backups), tuple(warnings), _exit_code(jobs))


def _run(jobs: Sequence[DeviceJob], repository: Repository, options: CreateOptions, progress: Progress, lease: Lease,
         have_read: Callable[[], None] | None) -> list[Manifest]:
    known = all(job.source.size is not None for job in jobs)
    progress.phase("reading", sum(job.bytes_to_read for job in jobs) if known else None)
    try:
        with _kept(repository):
            for job in jobs:
                job.run()
            if have_read is not None:
                have_read()
            for job in jobs:
                job.remember()
        progress.phase("publishing")
        backups = _publish([job.draft(options.set_id) for job in jobs], repository, lease)
        for job in jobs:
            job.published()
    finally:
        for job in jobs:
            job.close()
    return backups


def _jobs(sources: Sequence[PointInTimeSource], repository: Repository, options: CreateOptions, progress: Progress,
          warnings: list[str], precopy: Precopy | None = None) -> list[DeviceJob]:
    begun: dict[int, DeviceJob] = {} if precopy is None else {id(job.source): job for job in precopy.jobs}
    if all(id(source) in begun for source in sources):
        return [begun[id(source)] for source in sources]
    history = History(repository, options.host, warnings.append)
    base = None if options.base is None else repository.resolve(options.base)
    jobs = [begun.get(id(source)) or DeviceJob(source, repository, options, history, progress) for source in sources]
    for job in jobs:
        if id(job.source) not in begun:
            job.plan(base)
    return jobs


@contextlib.contextmanager
def _kept(repository: Repository) -> Iterator[None]:
    """What was stored before a failure stays: the next run goes on from it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StasisError):  # the failure itself is what matters
            repository.sync()
        raise


def _publish(drafts: Sequence[Manifest], repository: Repository, lease: Lease) -> list[Manifest]:
    """Make the drafts backups, all or none."""
    backups: list[Manifest] = []
    try:
        repository.sync()
        if not lease.confirm():
            _renew(drafts, repository, lease)
        for draft in drafts:
            backups.append(repository.publish(draft))
    except BaseException:
        for backup in backups:
            repository.remove_backup(backup.id)
        raise
    return backups


def _renew(drafts: Sequence[Manifest], repository: Repository, lease: Lease) -> None:
    """A lock that lapsed means that chunks may be gone: take it again, and look for every one of them."""
    lease.renew()
    for draft in drafts:
        _check_complete(draft, repository)


def _check_complete(draft: Manifest, repository: Repository) -> None:
    """Raises RepositoryError if a chunk or segment of a backup is not there."""
    try:
        missing = sum(not repository.has_chunk(name) for name in repository.index(draft).needed())
    except DamagedError:
        missing = 1
    if missing:
        raise RepositoryError(f"the lock of this run in {repository.url} lapsed, and chunks of {draft.device} were "
                              "removed", hint="run the command again: it stores what is missing")


def _exit_code(jobs: Sequence[DeviceJob]) -> ExitCode:
    if any(job.bytes_unreadable for job in jobs):
        return ExitCode.PARTIAL
    return ExitCode.TRACKING if any(job.distrusted for job in jobs) else ExitCode.OK
