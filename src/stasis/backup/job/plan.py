# SPDX-License-Identifier: Apache-2.0
"""Which kind of backup is made and against what, and which chunks it has to read.

Everything here is decided before the first byte is read. docs/design/backup-create.md has the argument why a backup
that is decided on here loses no change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stasis.backup.source import Extent, Mark, PointInTimeSource
from stasis.block.copy.plan import merge
from stasis.errors import GenerationError, NotFoundError, UsageError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.backup.repo import Manifest

__all__ = [
    "KINDS",
    "ChunkRange",
    "Decision",
    "chunk_extents",
    "covered_chunks",
    "decide",
    "mark_of",
    "touched_chunks",
    "untouched_chunks",
]

KINDS = ("auto", "full", "incremental", "differential")
ChunkRange = tuple[int, int]
"""(first, count) of chunk numbers; lists of them ascend and neither touch nor overlap."""
Known = Callable[["Manifest"], str]
"""Why a backup's snapshot is not one that this host's state directory knows; empty if it is."""


@dataclass(frozen=True)
class Decision:
    """What to do with one source: `changed` is None for a full backup, whose `reason` says why it is one."""

    kind: str
    parent: Manifest | None = None
    reason: str = ""
    changed: list[Extent] | None = field(default=None, repr=False)

    @property
    def changed_bytes(self) -> int | None:
        """Bytes that tracking calls changed."""
        return None if self.changed is None else sum(length for _, length in self.changed)


def mark_of(manifest: Manifest) -> Mark | None:
    """The mark that a backup was taken at; None if nothing was tracked, or tracking was found to be wrong."""
    if manifest.change_number is None or not manifest.generation:
        return None
    return Mark(manifest.generation, manifest.change_number)


def decide(source: PointInTimeSource, earlier: Sequence[Manifest], wanted: str, known: Known,
           base: Manifest | None = None) -> Decision:
    """Choose the kind for a source.

    earlier: this host's backups of the device, oldest first. base: the backup that a differential one is made against.
    Raises GenerationError when the wanted kind needs a parent and none will do, and says why.
    """
    if wanted == "full":
        return Decision("full", reason="a full backup was asked for")
    if wanted not in KINDS:
        raise UsageError(f"{wanted} is no kind of backup", hint=f"the kinds are {', '.join(KINDS)}")
    kind = "differential" if wanted == "differential" else "incremental"
    try:
        parent, changed = _choose(source, _candidates(source, earlier, kind, base), known)
    except (GenerationError, NotFoundError) as error:
        if wanted == "auto":
            return Decision("full", reason=error.message)
        raise GenerationError(f"no {kind} backup of {source.name} can be made: {error.message}",
                              hint="--kind auto makes a full one where it must") from error
    return Decision(kind, parent, changed=changed)


def _candidates(source: PointInTimeSource, earlier: Sequence[Manifest], kind: str,
                base: Manifest | None) -> list[Manifest]:
    """The backups that may become the parent, best first. NotFoundError without any."""
    found = [base] if base is not None else list(reversed(earlier))
    if kind == "differential" and base is None:
        found = [manifest for manifest in found if manifest.kind == "full"]
    if not found:
        what = "full backup" if kind == "differential" else "backup"
        raise NotFoundError(f"this host has no earlier {what} of {source.name}")
    return found


def _choose(source: PointInTimeSource, candidates: Sequence[Manifest],
            known: Known) -> tuple[Manifest, list[Extent]]:
    """The first candidate that will do, with what changed since. Its reason is the first one's if none will."""
    first: GenerationError | None = None
    for manifest in candidates:
        if first is not None and not _is_of_generation(manifest, source):
            continue  # older ones may be of ours again: another machine of the same name has generations of its own
        try:
            return manifest, _changed_since(source, manifest, known)
        except GenerationError as error:
            first = first or error
    assert first is not None
    raise first


def _is_of_generation(manifest: Manifest, source: PointInTimeSource) -> bool:
    mark = mark_of(manifest)
    return mark is not None and source.mark is not None and mark.generation == source.mark.generation


def _changed_since(source: PointInTimeSource, manifest: Manifest, known: Known) -> list[Extent]:
    """What changed between the backup's snapshot and this one. GenerationError says why that is not known."""
    short = manifest.id[:8]
    if source.mark is None:
        return source.changed_since(Mark("", 0))
    if source.size != manifest.size:
        raise GenerationError(f"the size changed from {format_size(manifest.size)} to {format_size(source.size or 0)} "
                              f"since backup {short}")
    if manifest.device_identity != source.identity:
        raise GenerationError(f"backup {short} is of another device: {manifest.device_identity}, and this is "
                              f"{source.identity}")
    mark = mark_of(manifest)
    if mark is None:
        raise GenerationError(f"backup {short} left no mark to go on from: nothing was tracked then, or tracking was "
                              "found to be wrong")
    if mark.generation == source.mark.generation:
        if mark.number > source.mark.number:
            raise GenerationError(f"backup {short} has change number {mark.number}, which is ahead of this snapshot's "
                                  f"{source.mark.number}")
        if unknown := known(manifest):
            raise GenerationError(unknown)
    return merge(source.changed_since(mark))


# -- chunks -----------------------------------------------------------------------------------------------------------


def touched_chunks(extents: Iterable[Extent], chunk_size: int) -> list[ChunkRange]:
    """The chunks that hold any byte of the extents."""
    rounded = ((offset // chunk_size, -(-(offset + length) // chunk_size)) for offset, length in extents if length > 0)
    return merge((first, end - first) for first, end in rounded)


def covered_chunks(extents: Iterable[Extent], chunk_size: int, size: int) -> list[ChunkRange]:
    """The chunks all of whose bytes lie in the extents (merged); the last one of a device may be short."""
    found = []
    for offset, length in extents:
        end = offset + length
        first = -(-offset // chunk_size)
        last = -(-size // chunk_size) if end >= size else end // chunk_size
        found.append((first, last - first))
    return merge(found)


def untouched_chunks(touched: Sequence[ChunkRange], count: int) -> list[ChunkRange]:
    """The chunks below `count` that are in none of the ranges."""
    gaps, position = [], 0
    for first, length in touched:
        gaps.append((position, min(first, count) - position))
        position = first + length
    gaps.append((position, count - position))
    return [gap for gap in gaps if gap[1] > 0]


def chunk_extents(ranges: Iterable[ChunkRange], chunk_size: int, size: int) -> list[Extent]:
    """The bytes of the chunks: the last chunk of a device may be short."""
    return [(first * chunk_size, min(count * chunk_size, size - first * chunk_size)) for first, count in ranges]
