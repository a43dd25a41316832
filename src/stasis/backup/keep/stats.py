# SPDX-License-Identifier: Apache-2.0
"""How much a repository holds, and how much room it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from stasis.backup.keep.used import manifests
from stasis.backup.repo import Repository
from stasis.errors import DamagedError

__all__ = ["Stats", "stats"]


@dataclass
class Stats:
    """Sizes in bytes. bytes_protected: of all devices, each backup counted; bytes_stored: what the store holds."""

    backups: int = 0
    devices: int = 0
    hosts: int = 0
    bytes_protected: int = 0
    chunks: int = 0
    bytes_chunks: int = 0
    segments: int = 0
    bytes_stored: int = 0
    objects: int = 0
    oldest: str | None = None
    newest: str | None = None
    chunk_size: int = 0
    compression: str = ""
    encrypted: bool = False

    @property
    def ratio(self) -> float | None:
        """How many bytes of devices one stored byte stands for."""
        return round(self.bytes_protected / self.bytes_stored, 2) if self.bytes_stored and self.backups else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def stats(repository: Repository) -> Stats:
    """Count backups and objects. Reads manifests and listings, no data. Raises DamagedError."""
    result = Stats(chunk_size=repository.chunk_size, compression=repository.compression,
                   encrypted=repository.encrypted)
    _count_backups(repository, result)
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for info in repository.store.list(""):
        folder = info.name.split("/")[0]
        count[folder] += 1
        size[folder] += info.size
    result.chunks, result.bytes_chunks, result.segments = count["chunks"], size["chunks"], count["segments"]
    result.objects, result.bytes_stored = count.total(), size.total()
    return result


def _count_backups(repository: Repository, result: Stats) -> None:
    def refuse(error: DamagedError, _: object) -> None:
        raise error

    times, devices = [], set()
    for backup in manifests(repository, repository.backup_ids(), refuse):
        result.backups += 1
        result.bytes_protected += backup.size
        devices.add((backup.host, backup.device))
        times.append(backup.time)
    result.devices, result.hosts = len(devices), len({host for host, _ in devices})
    result.oldest, result.newest = min(times, default=None), max(times, default=None)
