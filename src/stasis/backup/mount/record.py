# SPDX-License-Identifier: Apache-2.0
"""What is known of a mounted backup, written down before each step, so that any process can take it apart."""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stasis.errors import StateError
from stasis.linux import process

__all__ = ["Process", "Record"]

RECORD = "record.json"


@dataclass(frozen=True)
class Process:
    """A process for good: its pid, and when it started."""

    pid: int
    start: int | None

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, process.start_time(pid))

    def runs(self) -> bool:
        """Whether it has not ended; one that has and that nobody waited for is still in /proc."""
        if self.start is None or process.start_time(self.pid) != self.start:
            return False
        try:
            pidfd = process.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            return not select.select([pidfd], [], [], 0)[0]
        finally:
            os.close(pidfd)


@dataclass(frozen=True)
class Record:
    """`target` is the directory, `home` our own one for it; `node` is the state of the block device, once there is
    one."""

    target: str
    home: str
    boot: str
    backup: str = ""
    guardian: Process | None = None
    server: Process | None = None
    node: dict[str, Any] | None = None

    @classmethod
    def of(cls, run_dir: Path, target: str) -> Record:
        """A new record of what is about to be mounted on a directory (an absolute path without links)."""
        return cls(target, str(_home(run_dir, target)), process.boot_id())

    @classmethod
    def load(cls, run_dir: Path, target: str) -> Record | None:
        """The record of what is mounted on a directory; None if there is none. StateError if it is no record."""
        return _read(_home(run_dir, target) / RECORD)

    def reload(self) -> Record | None:
        """What it says by now; None once it is removed."""
        return _read(self.path / RECORD)

    @property
    def path(self) -> Path:
        """Our own directory for this mount."""
        return Path(self.home)

    @property
    def socket(self) -> Path:
        return self.path / "nbd.sock"

    @property
    def node_directory(self) -> Path:
        return self.path / "node"

    @property
    def log(self) -> Path:
        return self.path / "mount.log"

    def create(self) -> Record:
        """Make our directory, with the record in it, as its guardian. OSError (ENOTEMPTY) if there is one already."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f"{self.path.name}-", dir=self.path.parent))
        try:
            record = replace(self, guardian=Process.of(os.getpid()))
            (new / RECORD).write_text(json.dumps(asdict(record)))
            new.rename(self.path)  # takes the place of an empty directory, but of no other
        except OSError:
            shutil.rmtree(new)
            raise
        return record

    def update(self, **fields: Any) -> Record:
        """The same with other values, written down: all of it, or what was there before."""
        changed = replace(self, **fields)
        new = self.path / f"{RECORD}.new"
        new.write_text(json.dumps(asdict(changed)))
        new.replace(self.path / RECORD)
        return changed

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _read(path: Path) -> Record | None:
    try:
        fields = json.loads(path.read_text())
        for name in ("guardian", "server"):
            fields[name] = Process(**fields[name]) if fields[name] else None
        return Record(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise StateError(f"{path} cannot be read: {error}", hint="unmount the backup and remove the file") from error


def _home(run_dir: Path, target: str) -> Path:
    return run_dir / "mounts" / hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
