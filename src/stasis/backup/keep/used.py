# SPDX-License-Identifier: Apache-2.0
"""What backups refer to: their segments, and through these their chunks, one manifest at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from stasis.backup.keep.marks import Marks
from stasis.backup.keep.threads import in_threads
from stasis.backup.repo import Repository
from stasis.backup.repo.delta import objects_of
from stasis.backup.repo.index import ZERO
from stasis.backup.repo.manifest import Manifest
from stasis.errors import DamagedError, NotFoundError

__all__ = ["OnDamage", "manifests", "mark_chunks", "mark_segments"]

SEGMENTS_REMEMBERED = 300_000
"""Segments that are known to have been read. One that is not remembered is read once more, which only costs time."""

MANIFESTS_AT_ONCE = 4  # one of a device of 64 TiB takes 2 MiB

OnDamage = Callable[[DamagedError, Manifest | None], None]
"""Called with what cannot be read, and with the backup that needs it."""


def manifests(repository: Repository, ids: Iterable[str], on_damage: OnDamage) -> Iterator[Manifest]:
    """The manifests that are (still) there. Only a few of them are in memory at a time."""

    def load(id_: str) -> Manifest | DamagedError | None:
        try:
            return repository.manifest(id_)
        except NotFoundError:
            return None  # forgotten since it was listed
        except DamagedError as error:
            return error

    for found in in_threads(load, ids, min(MANIFESTS_AT_ONCE, repository.parallelism)):
        if isinstance(found, DamagedError):
            on_damage(found, None)
        elif found is not None:
            yield found


def mark_segments(repository: Repository, marks: Marks, ids: Iterable[str], on_damage: OnDamage) -> None:
    """Mark the segments of these backups."""
    for manifest in manifests(repository, ids, on_damage):
        for name in manifest.segments:
            marks.add(bytes.fromhex(name))


def mark_chunks(repository: Repository, marks: Marks, ids: Iterable[str], on_damage: OnDamage,
                on_segment: Callable[[int], None] = lambda nbytes: None) -> None:
    """Mark the chunks of these backups; `on_segment` hears the size of each segment that was read."""

    def load(place: tuple[Manifest, bytes]) -> bytes:
        try:
            return objects_of(repository.segment(place[1]))
        except DamagedError as error:
            if repository.store.exists(f"backups/{place[0].id}"):  # else it was forgotten and pruned meanwhile
                on_damage(error, place[0])
            return b""

    for names in in_threads(load, _segments(repository, ids, on_damage), repository.parallelism):
        marks.add(names)
        on_segment(len(names))


def _segments(repository: Repository, ids: Iterable[str], on_damage: OnDamage) -> Iterator[tuple[Manifest, bytes]]:
    """Segments of these backups, each with the first backup that needs it."""
    known: set[bytes] = {ZERO}
    for manifest in manifests(repository, ids, on_damage):
        for name in map(bytes.fromhex, manifest.segments):
            if name not in known:
                if len(known) < SEGMENTS_REMEMBERED:
                    known.add(name)
                yield manifest, name
