# SPDX-License-Identifier: Apache-2.0
"""`backup run`: sets of the configuration, each backed up, then thinned out, then pruned, and never twice at once.

A set that fails keeps none of the others from being backed up.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stasis.backup.config import BackupSet, RepositoryEntry
from stasis.backup.job import CreateResult, Plan, SampleOptions
from stasis.backup.job.state import RunLock
from stasis.backup.keep.forget import Selection, forget_by_policy
from stasis.backup.keep.prune import prune
from stasis.backup.progress import Progress
from stasis.backup.repo import Repository, Secrets
from stasis.daemon import paths
from stasis.daemon.backups import BackupJob, back_up, plan_backup
from stasis.daemon.sources import SnapshotStorage
from stasis.errors import ExitCode, LockedError, StasisError
from stasis.live.options import LiveOptions

__all__ = ["SetResult", "run_sets", "worst"]

PRUNE_WAIT = 60.0


@dataclass
class SetResult:
    """What became of a set. plans: with `dry_run`, what would be backed up. forgotten: ids of backups."""

    name: str
    created: CreateResult | None = None
    plans: list[Plan] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    bytes_pruned: int = 0
    warnings: list[str] = field(default_factory=list)
    error: StasisError | None = None

    @property
    def exit_code(self) -> int:
        """That of its error, else that of its backups."""
        if self.error is not None:
            return int(self.error.exit_code)
        return int(self.created.exit_code) if self.created else int(ExitCode.OK)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        backups = self.created.backups if self.created else ()
        return {"name": self.name, "set": self.created.set_id if self.created else None,
                "backups": [{"id": one.id, "device": one.device, "kind": one.kind, "size": one.size,
                             "parent": one.parent, "note": one.note, "statistics": dict(one.statistics)}
                            for one in backups],
                "plans": [plan.as_dict() for plan in self.plans], "forgotten": self.forgotten,
                "bytes_pruned": self.bytes_pruned, "warnings": self.warnings,
                "error": self.error.as_dict() if self.error else None, "exit_code": self.exit_code}


def worst(results: Iterable[SetResult]) -> int:
    """The exit code of a run: of the first set that failed, else TRACKING before PARTIAL before OK."""
    codes = [result.exit_code for result in results]
    mild = (int(ExitCode.OK), int(ExitCode.PARTIAL), int(ExitCode.TRACKING))
    return next((code for code in codes if code not in mild), max(codes, default=int(ExitCode.OK)))


def run_sets(sets: Sequence[BackupSet], progress: Progress, *, dry_run: bool = False,
             run_dir: str | Path | None = None, state_dir: str | Path | None = None) -> list[SetResult]:
    """Run sets one after the other. Errors of a set are told through the progress and kept in its result."""
    directories = paths.resolve(run_dir, state_dir)
    results = []
    for wanted in sets:
        result = SetResult(wanted.name)
        results.append(result)
        try:
            with _locked(directories.state, wanted.name, dry_run):
                _run(wanted, result, progress, dry_run, run_dir, state_dir)
        except StasisError as error:
            result.error = error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            result.error = StasisError(f"{where}{error.strerror or error}", errno=error.errno or 0)
        if result.error is not None:
            progress.error(result.error)
    return results


@contextlib.contextmanager
def _locked(state: Path, name: str, dry_run: bool) -> Iterator[None]:
    """One run of a set at a time. Raises LockedError."""
    if dry_run:
        yield
        return
    with RunLock(state, f"set {name}") as lock:
        lock.write({})
        yield


def _run(wanted: BackupSet, result: SetResult, progress: Progress, dry_run: bool, run_dir: str | Path | None,
         state_dir: str | Path | None) -> None:
    job = _job(wanted, run_dir, state_dir)
    entry = wanted.repository
    with Repository.open(entry.url, _secrets(entry), read_only=dry_run) as repository:
        if dry_run:
            result.plans = plan_backup(job, repository)
        else:
            result.created = back_up(job, repository, progress)
            result.warnings += result.created.warnings
        if result.exit_code != ExitCode.PARTIAL:  # an older backup may be the only one of what could not be read
            _thin_out(wanted, result, repository, progress, dry_run)


def _thin_out(wanted: BackupSet, result: SetResult, repository: Repository, progress: Progress, dry_run: bool) -> None:
    """Forget what the rules do not keep of this set's own backups, then prune."""
    if wanted.keep is not None:
        progress.phase("forgetting")
        # Other hosts may have sets of the same name in this repository.
        own = Selection(host=wanted.host or socket.gethostname(), tags=frozenset({wanted.tag}))
        groups = forget_by_policy(repository, wanted.keep, own, ("device",), dry_run=dry_run)
        result.forgotten = [id_ for group in groups for id_ in group.forgotten]
    if wanted.prune and not dry_run:
        try:
            result.bytes_pruned = prune(repository, wait=max(PRUNE_WAIT, wanted.wait), progress=progress).bytes_removed
        except LockedError as error:
            result.warnings.append(f"not pruned, a later run will: {error.message}")


def _job(wanted: BackupSet, run_dir: str | Path | None, state_dir: str | Path | None) -> BackupJob:
    sample = SampleOptions() if wanted.self_check is None else SampleOptions(share=wanted.self_check)
    storage = SnapshotStorage(limit=wanted.limit)
    if wanted.storage is not None:
        storage = SnapshotStorage(wanted.storage, wanted.limit)
    return BackupJob(
        sources=wanted.sources, name=wanted.device, host=wanted.host, kind=wanted.kind,
        tags=(*wanted.tags, wanted.tag), storage=storage, before=wanted.pre_snapshot, after=wanted.post_snapshot,
        sample=sample, skip_unreadable=wanted.skip_unreadable, rate=wanted.rate, wait=wanted.wait, live=_live(wanted),
        run_dir=run_dir, state_dir=state_dir)


def _live(wanted: BackupSet) -> LiveOptions:
    """How live devices are treated: what the file does not say is as usual."""
    usual = LiveOptions()
    return LiveOptions(max_freeze=wanted.max_freeze or usual.max_freeze, on_busy=wanted.on_busy,
                       busy_freeze=wanted.busy_freeze or usual.busy_freeze, memory=wanted.freeze_memory or usual.memory,
                       staging=Path(wanted.staging) if wanted.staging else None, staging_limit=wanted.staging_size)


def _secrets(entry: RepositoryEntry) -> Secrets:
    """What opens the repository; without a word in the file, what the environment says, and nobody is asked."""
    if entry.passphrase_file is not None:
        return Secrets.from_environment(environment={"STASIS_PASSPHRASE_FILE": entry.passphrase_file})
    if entry.passphrase_command is not None:
        return Secrets.from_environment(environment={"STASIS_PASSPHRASE_COMMAND": entry.passphrase_command})
    return Secrets.from_environment(entry.key_file, environment=os.environ)
