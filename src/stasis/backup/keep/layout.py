# SPDX-License-Identifier: Apache-2.0
"""Which object is what, by its name (docs/formats/repository.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stasis.backup.keep.marks import FIRST_BYTES
from stasis.backup.repo import Repository
from stasis.backup.repo.objects import Kind
from stasis.backup.repo.store import ObjectInfo, Store

__all__ = ["FOLDERS", "content_name", "is_ours", "leftovers", "objects", "unknown"]

FOLDERS = {Kind.CHUNK: "chunks", Kind.SEGMENT: "segments"}
_CONTENT = re.compile(r"(?:chunks|segments)/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_KNOWN = re.compile(
    r"config|keys/[0-9a-f]{16}|backups/[0-9a-f]{64}|tags/[0-9a-f]{64}/[0-9a-f]{8}-[0-9a-f]{16}"
    r"|locks/(?:shared|exclusive|broken)-[0-9a-f]{16}-[0-9]+|clock/[0-9a-f]{16}|tmp/.*")


def content_name(path: str) -> bytes | None:
    """The name of a chunk or segment, None for any other object."""
    match = _CONTENT.fullmatch(path)
    return bytes.fromhex(match[2]) if match else None


def objects(store: Store, kind: Kind, low: int = 0, high: int = FIRST_BYTES) -> Iterator[ObjectInfo]:
    """Chunks or segments whose first byte lies in `low` to `high` - 1, and what else is in their folders."""
    if (low, high) == (0, FIRST_BYTES):
        yield from store.list(FOLDERS[kind])
        return
    for first in range(low, high):
        yield from store.list(f"{FOLDERS[kind]}/{first:02x}")


def leftovers(repository: Repository) -> Iterator[ObjectInfo]:
    """What commands that were killed left under a name of its own: probes of the store's clock."""
    yield from repository.store.list("clock")


def is_ours(info: ObjectInfo) -> bool:
    """Whether an object has a name that this version gives."""
    return content_name(info.name) is not None or _KNOWN.fullmatch(info.name) is not None


def unknown(store: Store) -> Iterator[ObjectInfo]:
    """Objects that are none of ours."""
    return (info for info in store.list("") if not is_ours(info))
