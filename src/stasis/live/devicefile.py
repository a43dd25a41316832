# SPDX-License-Identifier: Apache-2.0
"""What a state directory knows of a tracked device: `live/NAME/device.json`, beside its map and its lock.

The byte-by-byte part is the change map (docs/formats/change-map.md); this file is docs/formats/live-device.md.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stasis.block.changemap import ChangeMap
from stasis.block.statefiles import writing
from stasis.errors import BusyError, NotFoundError, StateError
from stasis.linux import process
from stasis.live.identity import Identity

__all__ = ["DeviceFile", "Record", "find", "names", "root"]


@dataclass(frozen=True)
class Record:
    """A tracked device; `given` is the path that the user named it by, which may be a link that survives a reboot."""

    given: str
    identity: Identity
    block_shift: int
    slot: int
    table: int
    """Number of the table in the kernel, which changes when the programs are loaded anew."""
    boot: str
    bio_based: bool
    misses: int
    """Missed runs of the programs that note writes in flight, when tracking began."""

    @property
    def leads_elsewhere(self) -> str:
        """The device that the given path leads to now if it is another one; empty if not, and if it leads nowhere."""
        now = os.path.realpath(self.given)
        return now if now != self.identity.path and os.path.exists(now) else ""

    @property
    def this_boot(self) -> bool:
        """Whether the kernel's part is of this boot."""
        return self.boot == process.boot_id()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def on(self, slot: int, table: int, misses: int) -> Record:
        """The same device in another slot of this boot."""
        return replace(self, slot=slot, table=table, misses=misses, boot=process.boot_id())


def root(state: Path) -> Path:
    """Where the tracked devices of a state directory are."""
    return state / "live"


def early_directory(state: Path) -> Path:
    """Where the early step of a boot leaves its notes, before the state directory can be written."""
    return Path("/run/stasis-live") / f"{zlib.crc32(os.fsencode(state)):08x}"


def names(state: Path) -> list[str]:
    """Names of the tracked devices."""
    directory = root(state)
    return sorted(path.parent.name for path in directory.glob("*/device.json")) if directory.is_dir() else []


def find(state: Path, device: str) -> str:
    """The name of a tracked device from its name or a path. NotFoundError if it is not tracked."""
    known = names(state)
    if device in known:
        return device
    given, real = os.path.abspath(device), os.path.realpath(device)
    for name in known:
        record = DeviceFile(state, name).read()
        now = record.leads_elsewhere
        if given == record.given or (real == record.identity.path and not now):
            return name
        if real == record.identity.path:
            raise NotFoundError(f"{device} was tracked as {record.given}, which leads to {now} now",
                                hint=f"name {record.given} to go on there, or stasis track stop {name} and start again")
    raise NotFoundError(f"{device} is not tracked", hint=f"stasis track start {device}")


class DeviceFile:
    """The files of one tracked device."""

    def __init__(self, state: Path, name: str) -> None:
        self.name, self.directory = name, root(state) / name
        self.map, self.seal = self.directory / "map", self.directory / "seal"

    def read(self) -> Record:
        """What is recorded. NotFoundError, or StateError if it is damaged."""
        path = self.directory / "device.json"
        try:
            fields = json.loads(path.read_text())
            return Record(**{**fields, "identity": Identity(**fields["identity"])})
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.name} is not tracked", hint=f"stasis track start /dev/{self.name}") from error
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise StateError(f"the state file {path} cannot be read: {error}",
                             hint=f"stasis track stop {self.name}, and start again") from error

    def write(self, record: Record) -> None:
        """Replace what is recorded, atomically."""
        path = self.directory / "device.json"
        with writing(path):
            temporary = self.directory / "device.new"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "w") as file:
                file.write(json.dumps(record.as_dict()))
                file.flush()
                os.fsync(fd)
            os.replace(temporary, path)

    def new_map(self, size: int, shift: int) -> ChangeMap:
        """A new generation in place of whatever map there was, durable. StorageError."""
        with writing(self.map):
            return ChangeMap.create(self.map, size, shift)

    @property
    def early(self) -> Path:
        """What the early step of a boot noted, gone at the next boot."""
        return early_directory(self.directory.parent.parent) / f"{self.name}.json"

    def read_early(self) -> tuple[Record, dict[str, Any]] | None:
        """The record and the sight that the early step noted, if it ran on this boot."""
        try:
            fields = json.loads(self.early.read_text())
            record = Record(**{**fields["record"], "identity": Identity(**fields["record"]["identity"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return (record, fields["sight"]) if record.this_boot else None

    def write_saved(self, mark: str) -> None:
        """Note the mark of the file system beside the map that is saved, durably."""
        with open(self.directory / "saved", "w") as file:
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())

    def read_saved(self) -> str:
        """The mark that was noted; empty if the map was not saved."""
        try:
            return (self.directory / "saved").read_text()
        except OSError:
            return ""

    def forget_saved(self) -> None:
        """The saved map is in use again."""
        (self.directory / "saved").unlink(missing_ok=True)
        self.seal.unlink(missing_ok=True)

    def lock(self) -> int:
        """Nobody else switches or reads this device's bitmaps as long as the descriptor is open. BusyError."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise BusyError(f"the tracking of {self.name} is in use by another command",
                            hint="wait for the backup that runs") from error
        return fd

    def remove(self) -> None:
        """Forget the device."""
        for name in ("device.json", "device.new", "map", "map.new", "saved", "seal", "lock"):
            (self.directory / name).unlink(missing_ok=True)
        self.early.unlink(missing_ok=True)
        self.directory.rmdir()
