# SPDX-License-Identifier: Apache-2.0
"""`backup create` and `backup run`: sources, hooks, snapshot and backup in the order that loses nothing."""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.backup.hooks import Hooks
from stasis.backup.job import CreateOptions, CreateResult, Plan, SampleOptions, create, plan
from stasis.backup.progress import Progress
from stasis.daemon.signals import interrupted_by_sigterm
from stasis.daemon.sources import SnapshotStorage, SourceSet
from stasis.errors import ExitCode
from stasis.live.options import LiveOptions

if TYPE_CHECKING:
    from stasis.backup.repo import Repository

__all__ = ["BackupJob", "back_up", "back_up_once_open", "plan_backup"]

PURPOSE = "backup create"


@dataclass(frozen=True)
class BackupJob:
    """One run: what to back up, and how. Paths None: the usual directories. Sizes in bytes.

    sources: words as on the command line of `backup create`; name: another name for the only source.
    host: None is this host's name. kind, base, tags, sample, skip_unreadable, rate: see `CreateOptions`.
    before, after: shell commands around the snapshot point.
    wait: seconds to wait for a prune that runs. live: how live devices may be treated.
    """

    sources: Sequence[str]
    name: str | None = None
    host: str | None = None
    kind: str = "auto"
    base: str | None = None
    tags: tuple[str, ...] = ()
    storage: SnapshotStorage = field(default_factory=SnapshotStorage)
    before: str | None = None
    after: str | None = None
    sample: SampleOptions = field(default_factory=SampleOptions)
    skip_unreadable: bool = False
    rate: int | None = None
    wait: float = 0
    live: LiveOptions = field(default_factory=LiveOptions)
    run_dir: str | Path | None = None
    state_dir: str | Path | None = None

    def open_sources(self) -> SourceSet:
        """The sources; nothing is taken or locked yet."""
        return SourceSet(self.sources, name=self.name, storage=self.storage, live=self.live,
                         skip_unreadable=self.skip_unreadable, run_dir=self.run_dir, state_dir=self.state_dir)

    def options(self, sources: SourceSet) -> CreateOptions:
        """What the backup itself is told."""
        return CreateOptions(host=self.host or socket.gethostname(), kind=self.kind, base=self.base, tags=self.tags,
                             consistency="hooks" if self.before else "crash", state_dir=sources.directories.state,
                             sample=self.sample, skip_unreadable=self.skip_unreadable, rate=self.rate)


def plan_backup(job: BackupJob, repository: Repository) -> list[Plan]:
    """What `back_up` would do. Takes no snapshot, runs no command, writes nothing."""
    with job.open_sources() as sources:
        return plan(sources.planned(), repository, job.options(sources))


def back_up(job: BackupJob, repository: Repository, progress: Progress | None = None) -> CreateResult:
    """Take a snapshot of the sources and store it. Live devices are copied while they are written before that.

    Whatever ends it, signals included, the snapshot is destroyed and the second hook has run. A hook that failed after
    the snapshot makes the exit code FAILURE, if it was OK. Raises what `SourceSet`, `Hooks` and `create` raise.
    """
    return back_up_once_open(job, lambda: repository, progress)


def back_up_once_open(job: BackupJob, opened: Callable[[], Repository], progress: Progress | None = None,
                      ) -> CreateResult:
    """The same for a repository that is being opened: `opened` waits for it, and is called once nothing is left to do
    without one. Opening is one long computation, beside which the sources are made ready. Whoever opened it closes it.
    """
    with interrupted_by_sigterm(), job.open_sources() as sources:
        sources.lock()
        sources.prepare()
        repository = opened()
        options = replace(job.options(sources), set_id=str(uuid.uuid4()))
        hooks = Hooks(job.before, job.after, sources.names, options.set_id)
        with repository.lock_shared(PURPOSE, wait=job.wait) as lease, contextlib.ExitStack() as stack:
            stack.callback(hooks.after, failed=True)
            progress = progress or Progress()
            precopy = sources.begin_live(repository, options, progress)
            hooks.before()
            taken = sources.take()
            if sources.is_instant:
                hooks.after()

            def have_read() -> None:
                hooks.after()
                sources.release()

            result = create(taken, repository, options, progress, lease=lease, have_read=have_read,
                            precopy=precopy)
    if not hooks.warnings:
        return result
    return replace(result, warnings=(*result.warnings, *hooks.warnings), exit_code=result.exit_code or ExitCode.FAILURE)
