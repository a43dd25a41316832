# SPDX-License-Identifier: Apache-2.0
"""Backups made by hand, for tests of what is done with backups."""

from __future__ import annotations

import itertools
from typing import Any

from stasis.backup.repo import Manifest, Repository

__all__ = ["CHUNK", "backup_of", "content_of"]

CHUNK = 64 << 10
_SECONDS = itertools.count()


def backup_of(repository: Repository, data: bytes, **fields: Any) -> Manifest:
    """Publish a full backup that holds these bytes; each is a second older than the next."""
    size = repository.chunk_size
    builder, writer = repository.index_builder(len(data)), repository.chunk_writer()
    for number in range(builder.count):
        builder.set(number, writer.store(memoryview(data)[number * size : (number + 1) * size]).name)
    second = next(_SECONDS)
    clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
    values: dict[str, Any] = {
        "set_id": f"set-{second}", "host": "host", "device": "disk", "path": "/srv/disk.img", "source_kind": "file",
        "device_identity": "disk-1", "time": f"2026-01-01T{clock}.000000Z", "kind": "full", **fields,
    }
    segments = tuple(name.hex() for name in builder.finish())
    return repository.publish(Manifest(size=len(data), chunk_size=size, segments=segments, **values))


def content_of(repository: Repository, backup: Manifest) -> bytes:
    """All bytes of a backup."""
    index, reader = repository.index(backup), repository.chunk_reader()
    content = bytearray(backup.size)
    for number in range(index.count):
        start = number * index.chunk_size
        reader.fetch(index.name(number), memoryview(content)[start : start + index.chunk_length(number)])
    return bytes(content)
