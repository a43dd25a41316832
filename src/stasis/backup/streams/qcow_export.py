# SPDX-License-Identifier: Apache-2.0
"""Backups become qcow2 files: one whole image, or a chain in which each file holds what changed since the one below.

Only what is there or has changed is written. A file has its name when it is complete and on the disk, never before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stasis.backup.progress import Progress
from stasis.backup.repo import Manifest, Repository
from stasis.backup.streams import qemu
from stasis.backup.streams.extents import Extents
from stasis.backup.streams.newfile import new_file
from stasis.errors import BusyError, NotFoundError
from stasis.nbd.client import Client

__all__ = ["ExportedFile", "ancestry", "export_chain", "export_whole"]

BATCH_BYTES = 8 << 20
BATCH_PIECES = 64
LONGEST_ZERO = 1 << 30  # NBD counts in 32 bits


@dataclass(frozen=True)
class ExportedFile:
    """A file that holds a backup; `known`: an earlier export had made it. Sizes are bytes, `bytes_data` is what was
    written."""

    id: str
    path: str
    backing: str | None
    known: bool
    size: int
    bytes_data: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def export_whole(repository: Repository, backup: Manifest, path: Path, progress: Progress | None = None
                 ) -> ExportedFile:
    """Write one backup to a new file. Raises BusyError when it exists, DamagedError, StasisError of qemu."""
    with repository.lock_shared("export"):
        return _export(repository, backup, None, path, None, progress or Progress())


def export_chain(repository: Repository, backups: Sequence[Manifest], folder: Path, progress: Progress | None = None
                 ) -> list[ExportedFile]:
    """Write backups, oldest first, as files of a folder that build on each other; those that are there are kept."""
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is no directory", hint="a chain is a file per backup; name a directory for them")
    done: list[ExportedFile] = []
    with repository.lock_shared("export"):
        below: tuple[Manifest, Path] | None = None
        for backup in backups:
            path = folder / f"{backup.id}.qcow2"
            base, backing = below or (None, None)
            if path.exists():
                done.append(_known(backup, path, backing))
            else:
                done.append(_export(repository, backup, base, path, backing, progress or Progress()))
            below = backup, path
    return done


def ancestry(repository: Repository, backup: Manifest) -> list[Manifest]:
    """A backup and those that it was made against, oldest first, as far as they are still there."""
    known = {one.id: one for one in repository.backups()}
    chain = [backup]
    while (parent := known.get(chain[-1].parent or "")) is not None and len(chain) <= len(known):
        chain.append(parent)
    return chain[::-1]


def _known(backup: Manifest, path: Path, backing: Path | None) -> ExportedFile:
    """A file of an earlier export: it must build on what this chain builds on."""
    named = qemu.info(path, "qcow2").get("backing-filename")
    if named != (backing.name if backing else None):
        raise BusyError(f"{path} exists and builds on {named or 'no other file'}, not on "
                        f"{backing.name if backing else 'none'}", hint="export to another directory")
    return ExportedFile(backup.id, str(path), str(backing) if backing else None, True, backup.size, 0, 0.0)


def _export(repository: Repository, backup: Manifest, base: Manifest | None, path: Path, backing: Path | None,
            progress: Progress) -> ExportedFile:
    started = time.monotonic()
    extents = Extents(repository, backup, base)
    with new_file(path) as (_, part):
        qemu.create(part, backup.size, backing)
        with qemu.serve(part, "qcow2", writable=True) as client:
            _write(client, extents, progress)
            _clear_tail(client, backup.size)
    return ExportedFile(backup.id, str(path), str(backing) if backing else None, False, backup.size,
                        extents.bytes_data, round(time.monotonic() - started, 3))


def _clear_tail(client: Client, size: int) -> None:
    """qcow2 counts in 512 bytes: what it adds behind the end must not show what the file below has there."""
    if client.size > size:
        client.pwrite(size, bytes(client.size - size))
        client.flush()


def _write(client: Client, extents: Extents, progress: Progress) -> None:
    batch: list[tuple[int, bytes]] = []
    size = 0
    for offset, length, data in extents.read(progress, "exporting"):
        if data is None:
            for start in range(offset, offset + length, LONGEST_ZERO):
                client.write_zeroes(start, min(LONGEST_ZERO, offset + length - start))
            continue
        batch.append((offset, bytes(data)))
        size += length
        if size >= BATCH_BYTES or len(batch) == BATCH_PIECES:
            client.write_many(batch)
            batch, size = [], 0
    client.write_many(batch)
    client.flush()
