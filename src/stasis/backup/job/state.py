# SPDX-License-Identifier: Apache-2.0
"""What a host remembers of its backups beside the repository: a lock and the known snapshots, per device.

    STATE/backup/NAME.lock     held while a backup of the device runs; names the snapshot that the run made
    STATE/backup/NAME.json     the snapshots of the current generation that backups were made from
    STATE/backup/NAME.done     chunks of an interrupted backup (see resume.py)

The change map and these files live in one directory, so they go back in time together when a machine is set back to an
earlier state or cloned. A backup in the repository whose snapshot is not recorded here belongs to another course of
events, and its change number means nothing for this map.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from stasis.backup.source import Mark
from stasis.block.statefiles import writing
from stasis.errors import LockedError, PermissionDeniedError, StateError

__all__ = ["DeviceState", "RunLock", "make_folder", "state_path"]


def state_path(directory: Path, device: str, suffix: str) -> Path:
    """The path of a state file of a device."""
    return directory / "backup" / (quote(device, safe="") + suffix)


def make_folder(path: Path) -> None:
    """Make the folder of a state file. Raises PermissionDeniedError or StateError."""
    where = path.parent
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
    except PermissionError as error:
        raise PermissionDeniedError(f"{where} cannot be made: {error.strerror}",
                                    hint="choose another --state-dir") from error
    except OSError as error:
        raise StateError(f"{where} cannot be made: {error.strerror}", hint="choose another --state-dir",
                         errno=error.errno) from error


class RunLock:
    """Held while a device is backed up on this host; the kernel lets go of it when its holder dies."""

    def __init__(self, directory: Path, device: str) -> None:
        """Take it. LockedError if another run holds it."""
        self.path = state_path(directory, device, ".lock")
        make_folder(self.path)
        with writing(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self.read().get("pid", "unknown")
            os.close(self._fd)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise LockedError(f"a backup of {device} is running already on this host (pid {holder})",
                              hint="wait for it to end") from error

    def read(self) -> dict[str, Any]:
        """What the last holder wrote; empty if that was nothing of use."""
        try:
            value = json.loads(os.pread(self._fd, 1 << 16, 0) or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def write(self, values: Mapping[str, Any]) -> None:
        """Replace what the lock says of its holder."""
        data = json.dumps({"pid": os.getpid(), **values}).encode()
        with writing(self.path):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, data, 0)

    def close(self) -> None:
        """Let go. The file stays: removing it would let two holders lock two files of one name."""
        os.close(self._fd)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


class DeviceState:
    """The snapshots of a device that backups were made from: change number to time, within one generation."""

    def __init__(self, directory: Path, device: str) -> None:
        self.path = state_path(directory, device, ".json")
        self.device = device
        self.generation, self.times, self.distrusted = "", dict[str, str](), ""
        self._load()

    def _load(self) -> None:
        try:
            value = json.loads(self.path.read_bytes())
            self.generation, self.times = str(value["generation"]), dict(value["times"])
            self.distrusted = str(value.get("distrusted", ""))
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            # Nothing is known then, which costs a full backup and loses nothing.
            self.generation, self.times, self.distrusted = "", {}, "its record was damaged"

    def why_unknown(self, mark: Mark, time: str) -> str:
        """Why a backup of this mark and time must not be gone on from; empty if it may."""
        if self.generation == mark.generation and self.times.get(str(mark.number)) == time:
            return ""
        if self.distrusted:
            return f"change tracking of {self.device} was not trusted any more: {self.distrusted}"
        return (f"this host has no record of the snapshot of {self.device} at {time} "
                "(was the machine set back or copied, or its state directory replaced?)")

    def remember(self, mark: Mark, time: str) -> None:
        """Record a snapshot, durably, before a backup names it."""
        if mark.generation != self.generation:
            self.generation, self.times = mark.generation, {}
        # What was recorded under higher numbers belongs to a course of events that is over.
        self.times = {number: at for number, at in self.times.items() if int(number) < mark.number}
        self.times[str(mark.number)] = time
        with writing(self.path):
            self._save()

    def forget(self, reason: str) -> None:
        """Trust none of the recorded snapshots any more, durably."""
        self.times, self.distrusted = {}, reason
        with writing(self.path):
            self._save()

    def _save(self) -> None:
        value = {"generation": self.generation, "times": self.times, "distrusted": self.distrusted}
        make_folder(self.path)
        temporary = self.path.with_name(self.path.name + ".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            file.write(json.dumps(value))
            file.flush()
            os.fsync(fd)
        os.replace(temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
