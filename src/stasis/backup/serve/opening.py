# SPDX-License-Identifier: Apache-2.0
"""Making exports of backups: found, locked against prune, and given a cache that they share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stasis.backup.repo import Index, Lease, Manifest, Repository
from stasis.backup.serve.cache import DEFAULT_LIMIT, ChunkCache
from stasis.backup.serve.export import BackupExport
from stasis.backup.serve.overlay import OverlayExport, Scratch
from stasis.errors import DamagedError, StasisError, UsageError
from stasis.nbd.export import Export

__all__ = ["ServedBackup", "ServedBackups", "Wanted", "open_backups", "open_cache", "open_index", "open_lease"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What to serve: backups and those to compare with as the user names them, "latest" being of `host` and `device`.

    `overlay` is the directory for scratch space, None for read-only exports; `cache` the bytes of chunks to keep.
    """

    backups: Sequence[str]
    against: Sequence[str] = ()
    host: str | None = None
    device: str | None = None
    overlay: str | None = None
    cache: int = DEFAULT_LIMIT


@dataclass(frozen=True)
class ServedBackup:
    """An export and its backup; `against` is the id of the one that its dirty bitmap compares with."""

    backup: Manifest
    export: Export
    against: str | None


class ServedBackups:
    """The exports of a server by backup id, and by device name where that means one of them only."""

    def __init__(self, served: Sequence[ServedBackup], cache: ChunkCache, lease: Lease) -> None:
        self.served, self._cache, self._lease = tuple(served), cache, lease

    def list(self) -> Sequence[str]:
        return [one.backup.id for one in self.served]

    def find(self, name: str) -> Export | None:
        """The empty name stands for the only export, as clients expect of a default export."""
        fitting = [one.export for one in self.served if name in (one.backup.id, one.backup.device, "")]
        return fitting[0] if len(fitting) == 1 else None

    def abort(self) -> None:
        """Let reads that wait for the store fail soon; may be called by a signal handler."""
        self._cache.abort()

    def keep_lease(self) -> None:
        """To be called every few minutes: a lock that lapsed, as when the machine slept, is taken again."""
        if self._lease.valid():
            return
        log.warning("the lock of the repository lapsed: if prune ran meanwhile, reads of what it removed will fail")
        try:
            self._lease.renew()
        except (StasisError, OSError) as error:
            log.warning("the lock of the repository cannot be taken again: %s", error)


@contextlib.contextmanager
def open_lease(repository: Repository, purpose: str) -> Iterator[Lease]:
    """While the block runs, prune takes nothing away. LockedError while it is at work."""
    with repository.lock_shared(purpose) as lease:
        yield lease


def open_index(repository: Repository, backup: Manifest) -> Index:
    """The index of a backup. DamagedError for one whose chunks are not those of the repository.

    In a repository without encryption anybody could have written it, and buffers are made for the repository's chunks.
    """
    if backup.chunk_size != repository.chunk_size:
        raise DamagedError(f"backup {backup.id[:12]} has chunks of {backup.chunk_size} bytes, its repository of "
                           f"{repository.chunk_size}", hint="it was not made by stasis; do not trust it")
    return repository.index(backup)


@contextlib.contextmanager
def open_cache(repository: Repository, limit: int = DEFAULT_LIMIT) -> Iterator[ChunkCache]:
    """A cache of the repository's chunks."""
    cache = ChunkCache(repository.chunk_reader, repository.chunk_size, limit=limit, threads=repository.parallelism)
    try:
        yield cache
    finally:
        cache.close()


@contextlib.contextmanager
def open_backups(repository: Repository, wanted: Wanted) -> Iterator[ServedBackups]:
    """Exports of backups, as long as the block runs.

    Raises NotFoundError and UsageError about what is wanted, LockedError while prune is at work, and what making the
    scratch space raises.
    """
    with open_lease(repository, "serve") as lease, contextlib.ExitStack() as stack:
        # Found under the lock: a backup that is forgotten from here on is served to the end all the same.
        backups = _resolve(repository, wanted.backups, wanted)
        pairs = _pair(backups, _resolve(repository, wanted.against, wanted))
        cache = stack.enter_context(open_cache(repository, wanted.cache))
        served = [_serve(repository, backup, other, cache, wanted, stack) for backup, other in pairs]
        yield ServedBackups(served, cache, lease)


def _resolve(repository: Repository, names: Sequence[str], wanted: Wanted) -> list[Manifest]:
    found = [repository.resolve(name, host=wanted.host, device=wanted.device) for name in names]
    if len({one.id for one in found}) != len(found):
        raise UsageError("a backup is named twice", hint="name every backup once")
    return found


def _pair(backups: list[Manifest], others: list[Manifest]) -> list[tuple[Manifest, Manifest | None]]:
    """Each backup with the one to compare it with: the other of its device, or simply the other if there is one of
    both."""
    if len(backups) == len(others) == 1:
        return [(backups[0], others[0])]
    of_device: dict[tuple[str, str], Manifest] = {}
    for other in others:
        if of_device.setdefault((other.host, other.device), other) is not other:
            raise UsageError(f"two backups of {other.device} are to be compared with",
                             hint="name one per device with --against")
    pairs = [(backup, of_device.get((backup.host, backup.device))) for backup in backups]
    unused = {other.id for other in others} - {other.id for _, other in pairs if other}
    if unused:
        raise UsageError(f"no served backup is of the device of {min(unused)[:12]}",
                         hint="serve one backup only to compare it with a backup of another device")
    return pairs


def _serve(
    repository: Repository, backup: Manifest, other: Manifest | None, cache: ChunkCache, wanted: Wanted,
    stack: contextlib.ExitStack,
) -> ServedBackup:
    export = BackupExport(
        backup.id, open_index(repository, backup), cache,
        description=f"{backup.device} of {backup.host} at {backup.time}",
        against=(other.id, open_index(repository, other)) if other else None,
    )
    against = other.id if other else None
    if wanted.overlay is None:
        return ServedBackup(backup, export, against)
    scratch = Scratch(wanted.overlay, backup.size)
    stack.callback(scratch.close)
    return ServedBackup(backup, OverlayExport(export, scratch), against)
