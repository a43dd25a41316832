# SPDX-License-Identifier: Apache-2.0
"""What the words on a command line mean as sources of a backup, and the snapshot that makes them one instant.

    NAME          a served device; else an image file of that name in the working directory
    PATH          an image file or block device; the served device if it is the origin of one, the live one if it is
                  tracked
    UUID:NAME     a device of a snapshot that exists already
    datto:N       the snapshot of dattobd's tracer with minor N
    -             standard input

All served devices go into one snapshot, which is taken while the live ones are frozen. It is destroyed at the end on
every path; a run that was killed leaves it to the next run of the same device, which finds its UUID in the device's
lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from stasis.backup.job.state import RunLock
from stasis.backup.source import PointInTimeSource
from stasis.backup.sources import RawSource, StreamSource
from stasis.daemon import client as daemon
from stasis.daemon.live_sources import LiveSources, is_tracked
from stasis.daemon.paths import resolve
from stasis.daemon.record import default_name, origin_key, valid_name
from stasis.daemon.served_source import PlannedSource, ServedSource
from stasis.daemon.signals import deferred_interrupts
from stasis.daemon.tracer_source import TracerSource
from stasis.errors import BusyError, NotFoundError, StasisError, UsageError
from stasis.live.options import LiveOptions
from stasis.live.providers import open_file

if TYPE_CHECKING:
    from pathlib import Path

    from stasis.backup.job import CreateOptions
    from stasis.backup.job.precopy import Precopy
    from stasis.backup.progress import Progress
    from stasis.backup.repo import Repository
    from stasis.daemon.model import Device, Snapshot, Tracer

__all__ = ["SnapshotStorage", "SourceSet"]

DEFAULT_STORAGE = "/var/tmp"
TRACER = re.compile(r"datto:([0-9]{1,3})")
EXISTING = re.compile(r"([0-9a-fA-F][0-9a-fA-F-]{3,35}):(.+)")
FOUND = "stasis device list shows the served devices; or give the path of an image file or block device"


@dataclass(frozen=True)
class SnapshotStorage:
    """Where the snapshot of a run keeps old contents, as with `snapshot create`; limit None: what is free there."""

    path: str = DEFAULT_STORAGE
    limit: int | None = None


@dataclass
class _Wanted:
    """One source, before anything is opened. `device` is set for what the daemon serves, `live` for what is tracked."""

    name: str
    path: str
    device: Device | None = None
    snapshot: Snapshot | None = None
    live: bool = False
    tracer: Tracer | None = None


class SourceSet:
    """The sources of one run: names first, then `lock`, `prepare` and `take`; a context manager that undoes it all."""

    def __init__(self, words: Sequence[str], *, name: str | None = None, storage: SnapshotStorage | None = None,
                 live: LiveOptions | None = None, skip_unreadable: bool = False,
                 run_dir: str | Path | None = None, state_dir: str | Path | None = None) -> None:
        """Understand the words. Raises UsageError, NotFoundError, DaemonError."""
        self.directories = resolve(run_dir, state_dir)
        self._storage = storage or SnapshotStorage()
        self._live_options, self._skip_unreadable = live or LiveOptions(), skip_unreadable
        self._live: LiveSources | None = None
        self._client: daemon.Client | None = None
        self._devices: list[Device] | None = None
        self._stack = contextlib.ExitStack()
        self._locks: dict[str, RunLock] = {}
        self._made: str | None = None
        self._ending: threading.Thread | None = None
        try:
            self._wanted = [self._understand(word) for word in words]
            self._rename(name)
        except BaseException:
            self._disconnect()
            raise

    @property
    def names(self) -> list[str]:
        """The names of the sources in the repository."""
        return [wanted.name for wanted in self._wanted]

    @property
    def is_instant(self) -> bool:
        """Whether all sources are one instant, so that nothing need rest any longer once they are taken."""
        return all(wanted.device is not None or wanted.live or wanted.tracer for wanted in self._wanted)

    def __enter__(self) -> SourceSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self._stack.close()
        finally:
            self._disconnect()

    # -- what is meant ------------------------------------------------------------------------------------------------

    def _understand(self, word: str) -> _Wanted:
        if word == "-":
            return _Wanted("", "-")
        if "/" not in word and (match := EXISTING.fullmatch(word)) and not os.path.exists(word):
            return self._existing(match[1], match[2])
        if (match := TRACER.fullmatch(word)) and not os.path.exists(word):
            return self._traced(int(match[1]))
        device = self._served(word)
        if device is not None:
            return _Wanted(device.name, device.path, device)
        if not os.path.exists(word):
            raise NotFoundError(f"there is no served device and no file {word}", hint=FOUND)
        return _Wanted(default_name(word), word, live=is_tracked(word, self.directories.state))

    def _existing(self, uuid: str, name: str) -> _Wanted:
        client = self._connect(start=True)
        assert client is not None
        snapshot = client.snapshot(uuid)
        member = client.require_device(snapshot, name)
        return _Wanted(name, member.path, self._by_name(name), snapshot)

    def _traced(self, minor: int) -> _Wanted:
        client = self._connect(start=True)
        assert client is not None
        tracer = client.datto_info(minor)
        return _Wanted(tracer.device or default_name(tracer.bdev), tracer.bdev, tracer=tracer)

    def _served(self, word: str) -> Device | None:
        """The served device that a word means: by its name, or as the origin that lies at this path."""
        if "/" not in word and (device := self._by_name(word)) is not None:
            return device
        key = origin_key(word)
        if key is None:
            return None
        return next((device for device in self._all(start=False) if origin_key(device.path) == key), None)

    def _by_name(self, name: str) -> Device | None:
        known = (self.directories.devices / name / "device.json").exists()
        return next((device for device in self._all(start=known) if device.name == name), None)

    def _all(self, *, start: bool) -> list[Device]:
        if self._devices is None:
            client = self._connect(start=start)
            if client is None:
                return []
            self._devices = client.devices()
        return self._devices

    def _connect(self, *, start: bool) -> daemon.Client | None:
        """The daemon. One that is not there is started if it is needed, or if workers of it go on without it."""
        if self._client is None:
            start = start or any((self.directories.run / "workers").glob("*.ctl"))
            client = daemon.Client(self.directories)
            if client.try_open():
                self._client = client
            elif start:
                self._client = daemon.connect(self.directories.run, self.directories.state)
        return self._client

    def _rename(self, name: str | None) -> None:
        if name is not None:
            if len(self._wanted) != 1:
                raise UsageError("--name names one source, but there are several", hint="back them up one by one")
            self._wanted[0].name = valid_name(name)
        if any(not wanted.name for wanted in self._wanted):
            raise UsageError("standard input has no name", hint="give it one with --name")
        twice = next((one for one in self.names if self.names.count(one) > 1), None)
        if twice is not None:
            raise UsageError(f"two sources have the name {twice}", hint="back one of them up alone, with --name")

    # -- locks --------------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Keep other runs away from these devices, and clear up after one that was killed. Raises LockedError."""
        for name in sorted(self.names):
            self._locks[name] = self._stack.enter_context(RunLock(self.directories.state, name))
        for lock in self._locks.values():
            uuid = lock.read().get("snapshot")
            if isinstance(uuid, str) and uuid:
                self._destroy(uuid)
            lock.write({})

    def _destroy(self, uuid: str) -> None:
        """End a snapshot, on a connection of its own: ours may have been broken off in the middle of a call."""
        with (deferred_interrupts(), daemon.connect(self.directories.run, self.directories.state) as client,
              contextlib.suppress(NotFoundError)):
            client.destroy(uuid)

    # -- the instant --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the snapshot that `take` takes, so that what it needs starts while other things are done.

        `take` does it where nobody did. Raises BusyError and StorageError.
        """
        names = [wanted.device.name for wanted in self._wanted if wanted.device and wanted.snapshot is None]
        if names and self._made is None:
            self._make(names)

    def begin_live(self, repository: Repository, options: CreateOptions, progress: Progress) -> Precopy | None:
        """Copy live devices while they are written, until little is left; None without any. Raises BusyError."""
        live = self._open_live()
        if live is None:
            return None
        precopy = live.begin(repository, options, progress)
        live.refuse_writes(self._written_in_the_freeze())
        return precopy

    def _open_live(self) -> LiveSources | None:
        wanted = [(one.name, one.path) for one in self._wanted if one.live]
        if wanted and self._live is None:
            self._live = self._stack.enter_context(LiveSources(
                wanted, self.directories.state, self._live_options, skip_unreadable=self._skip_unreadable))
        return self._live

    def _written_in_the_freeze(self) -> list[tuple[str, str]]:
        """(what, path) of all that is written when a snapshot of the served devices is taken."""
        served = [one for one in self._wanted if one.device is not None and one.snapshot is None]
        if not served:
            return []
        written = [("the served device", one.path) for one in served]
        if self._storage.path != "memory":
            written.append(("the difference storage", self._storage.path))
        return [*written, ("the state directory", str(self.directories.state)),
                ("the run directory", str(self.directories.run))]

    def take(self) -> list[PointInTimeSource]:
        """Take the snapshot, at rest with the live devices, and open everything.

        Raises BusyError, StorageError and what else `take` raises.
        """
        self.prepare()
        if self._live is None:
            taken = self._take()
        else:
            taken = self._live.take(self._take)
        return [self._open(wanted, taken) for wanted in self._wanted]

    def _make(self, names: Sequence[str]) -> None:
        """A snapshot of served devices that is yet to be taken."""
        client = self._client
        assert client is not None
        with deferred_interrupts():
            made = self._create(client, names)
            self._stack.callback(self._forget, made.id)
            self._made = made.id
            for lock in self._locks.values():
                lock.write({"snapshot": made.id})

    def _take(self) -> Snapshot | None:
        if self._made is None:
            return None
        assert self._client is not None
        return self._client.take(self._made)

    def _create(self, client: daemon.Client, names: Sequence[str]) -> Snapshot:
        try:
            return client.create_snapshot(self._storage.path, names, limit=self._storage.limit, soon=True)
        except BusyError as error:
            hint = f"{error.hint}; or back up that snapshot, as UUID:NAME" if error.hint else ""
            raise BusyError(error.message, hint=hint, errno=error.errno) from error

    def release(self) -> None:
        """Nothing is read any more: destroy the snapshot beside what else is done. If that fails, the end does it."""
        if self._made is not None:
            self._ending = threading.Thread(target=self._try_to_destroy, args=(self._made,), daemon=True)
            self._ending.start()

    def _try_to_destroy(self, uuid: str) -> None:
        with contextlib.suppress(StasisError):
            self._destroy(uuid)
            self._made = None

    def _forget(self, uuid: str) -> None:
        if self._ending is not None:
            self._ending.join()
        if self._made is not None:
            self._destroy(uuid)
        for lock in self._locks.values():
            lock.write({})

    def _open(self, wanted: _Wanted, taken: Snapshot | None) -> PointInTimeSource:
        snapshot = wanted.snapshot or taken
        if wanted.device is not None and snapshot is not None and self._client is not None:
            kind = "served" if wanted.snapshot is None else "snapshot"
            return ServedSource(self._client, snapshot, wanted.device, wanted.name, kind)
        if wanted.tracer is not None and self._client is not None:
            return TracerSource(self._client, wanted.tracer, wanted.name)
        if wanted.path == "-":
            return StreamSource(wanted.name, 0)
        if wanted.live and (live := self._open_live()) is not None:
            return live.sources[wanted.name]
        return self._stack.enter_context(open_file(wanted.name, wanted.path))

    def planned(self) -> list[PointInTimeSource]:
        """The sources as they are now, for a plan: no snapshot is taken, and they cannot be read."""
        return [self._planned(wanted) for wanted in self._wanted]

    def _planned(self, wanted: _Wanted) -> PointInTimeSource:
        if wanted.device is not None and wanted.snapshot is None and self._client is not None:
            return PlannedSource(self._client, wanted.device, wanted.name)
        if wanted.path != "-" and not wanted.live and wanted.device is None and wanted.tracer is None:
            return self._stack.enter_context(RawSource(wanted.name, wanted.path))
        return self._open(wanted, None)

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
