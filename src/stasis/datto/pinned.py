# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a COW file on the protected device: where it lies. `STATE/devices/NAME/pinned-UUID-SEQID`.

It is durable before the first byte is written by this map, and goes when the file is given back to its file system.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stasis.datto.extents import BlockMap

__all__ = ["Pinned"]

PREFIX = "pinned-"


@dataclass(frozen=True, slots=True)
class Pinned:
    """One file: `relative` is its path below its mount point, `node` the device that its file system is mounted from,
    `size` its length in bytes. `doomed`: it is to be removed as soon as its file system can be reached."""

    path: str
    relative: str
    inode: int
    node: str
    uuid: str
    seqid: int
    size: int
    stretches: tuple[tuple[int, int, int], ...]
    doomed: bool = False

    @property
    def blocks(self) -> BlockMap:
        return BlockMap(self.stretches)

    def place(self, directory: Path) -> Path:
        """The record of this file."""
        return directory / f"{PREFIX}{self.uuid}-{self.seqid}"

    def save(self, directory: Path) -> None:
        """Remember it, durably. OSError."""
        path = self.place(directory)
        temporary = path.with_suffix(".new")
        with temporary.open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(directory)

    def forget(self, directory: Path) -> None:
        """Forget it, durably. OSError."""
        self.place(directory).unlink(missing_ok=True)
        _sync(directory)

    def cut(self, length: int) -> Pinned:
        """The same file, cut off."""
        return replace(self, size=length, stretches=self.blocks.cut(length).stretches)

    @classmethod
    def all(cls, directory: Path) -> Iterator[Pinned]:
        """The files that are remembered of a device; a record that cannot be read is passed over."""
        for path in sorted(directory.glob(f"{PREFIX}*")):
            if path.suffix:
                continue
            try:
                fields = json.loads(path.read_text())
                yield cls(**{**fields, "stretches": tuple((a, b, c) for a, b, c in fields["stretches"])})
            except (OSError, ValueError, TypeError, KeyError):
                continue

    @classmethod
    def find(cls, directory: Path, path: str) -> Pinned | None:
        """The latest file that is remembered under a path, whole or as seen from its mount point."""
        known = [one for one in cls.all(directory) if path in (one.path, one.relative) and not one.doomed]
        return max(known, key=lambda one: one.seqid, default=None)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
