# SPDX-License-Identifier: Apache-2.0
"""The backup of one source: decide, check a sample, read and store, and draw up the manifest."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import stasis
from stasis.backup.job.history import History
from stasis.backup.job.parts import Part, split_changes
from stasis.backup.job.pipeline import ZERO, Counters, Pipeline, RateLimit, Task
from stasis.backup.job.plan import (
    ChunkRange,
    Decision,
    chunk_extents,
    covered_chunks,
    decide,
    mark_of,
    touched_chunks,
    untouched_chunks,
)
from stasis.backup.job.reading import ReadErrors
from stasis.backup.job.resume import ResumeFile
from stasis.backup.job.selfcheck import Sample, SampleOptions, check_sample
from stasis.backup.job.state import DeviceState, make_folder, state_path
from stasis.backup.source import Extent, PointInTimeSource
from stasis.block.copy.plan import clip, merge, total
from stasis.errors import DamagedError, GenerationError, StasisError

if TYPE_CHECKING:
    from stasis.backup.progress import Progress
    from stasis.backup.repo import Index, Manifest, Repository

__all__ = ["CreateOptions", "DeviceJob"]

RANGES_IN_NOTE = 16


@dataclass(frozen=True)
class CreateOptions:
    """How to make backups.

    host: whose backups they are; kind: "auto", "full", "incremental", "differential"; base: id of the backup that a
    differential one is made against, None for the last full one.
    set_id: common to the backups of one run; drawn if empty.
    consistency: "hooks" if programs were brought to rest for the snapshot, else "crash".
    state_dir: where this host remembers snapshots and interrupted runs; None remembers nothing, so that every mark in
    the repository is believed and nothing is continued.
    skip_unreadable: store zeroes for what cannot be read, instead of failing.
    rate: bytes per second that are read at most.
    """

    host: str
    kind: str = "auto"
    base: str | None = None
    tags: tuple[str, ...] = ()
    set_id: str = ""
    consistency: str = "crash"
    state_dir: Path | None = None
    sample: SampleOptions = field(default_factory=SampleOptions)
    skip_unreadable: bool = False
    rate: int | None = None


class DeviceJob:
    """One source's way into the repository. `plan`, then `run`, then `draft`."""

    def __init__(self, source: PointInTimeSource, repository: Repository, options: CreateOptions, history: History,
                 progress: Progress) -> None:
        self.source, self.options = source, options
        self.warnings: list[str] = []
        self.distrusted = ""
        self.time = history.next_time(source.name, source.taken)
        self._repository, self._progress, self._history = repository, progress, history
        self._state = DeviceState(options.state_dir, source.name) if options.state_dir is not None else None
        self._resume: ResumeFile | None = None
        self._counters = Counters()
        self._sample = Sample(0, 0)
        self._segments: tuple[bytes, ...] = ()
        self._started = time.monotonic()

    # -- deciding -----------------------------------------------------------------------------------------------------

    def plan(self, base: Manifest | None) -> None:
        """Choose kind and parent, and which chunks to read. GenerationError if the wanted kind cannot be made."""
        self.decision = decide(self.source, self._history.parents(self.source.name), self.options.kind, self._unknown,
                               base)
        self._parent: Index | None = None
        if self.decision.parent is not None:
            self._parent = self._repository.index(self.decision.parent)
        try:
            self.reads, self.parts = self._chunks_to_read()
        except DamagedError as error:
            self._give_up_parent(error)

    def _unknown(self, manifest: Manifest) -> str:
        mark = mark_of(manifest)
        return "" if self._state is None or mark is None else self._state.why_unknown(mark, manifest.time)

    def _chunks_to_read(self) -> tuple[list[ChunkRange], list[Part]]:
        """Chunks to read whole, and those to read in part."""
        chunk_size = self._repository.chunk_size
        if self.decision.changed is not None and self._parent is not None:
            return split_changes(self.decision.changed, self._parent)
        size = self.source.size
        if size is None:
            return [], []
        zeroes = covered_chunks(self.source.zero_extents(), chunk_size, size)
        return untouched_chunks(zeroes, -(-size // chunk_size)), []

    @property
    def bytes_to_read(self) -> int:
        """What `run` will read, the sample left aside; 0 for a stream, whose length is not known."""
        if self.source.size is None:
            return 0
        extents = chunk_extents(self.reads, self._repository.chunk_size, self.source.size)
        return total(extents) + sum(part.length for part in self.parts)

    # -- doing --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Check the sample, then read and store. Raises StasisError; what is stored by then is not read again."""
        self._started = time.monotonic()
        try:
            self._check_parent()
            self._store_and_check()
        except DamagedError as error:
            before = self.bytes_to_read
            self._give_up_parent(error)
            self._progress.expect(self.bytes_to_read - before)
            self._open_resume()
            self._store()
        if disturbed := self.source.disturbed():
            self.warnings.append(disturbed)

    def _store_and_check(self) -> None:
        """If the sample differs, all is stored anew."""
        def store() -> None:
            self._open_resume()
            self._store()

        self._beside_sample(store)
        if self.distrusted:
            store()

    def _beside_sample(self, store: Callable[[], None]) -> None:
        """Have the sample read beside what is stored, and judge it then."""
        given_up = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            sample = pool.submit(self._draw_sample, given_up)
            try:
                store()
            except BaseException:
                given_up.set()
                raise
        sample.result()
        self._judge_sample()

    def _parent_id(self) -> str:
        return self.decision.parent.id[:8] if self.decision.parent is not None else ""

    def _give_up_parent(self, error: DamagedError) -> None:
        """Make a full backup, if the kind was left open, because what the parent needs is damaged."""
        if self._parent is None or self.options.kind != "auto":
            raise error
        self._become_full(f"the backup {self._parent_id()} cannot be built upon: {error.message}")

    def _become_full(self, reason: str) -> None:
        self.decision, self._parent = Decision("full", reason=reason), None
        self.reads, self.parts = self._chunks_to_read()
        if self._resume is not None:
            self._resume.close()

    def _check_parent(self) -> None:
        """What is taken over unread must be there. Where asking costs a round trip, `check` is left to find out."""
        from stasis.backup.repo.objects import Kind, object_name

        store = self._repository.store
        if self._parent is None or not store.cheap_lookup:
            return
        for name in set(self._parent.segment_names()) - {ZERO}:
            if not store.exists(where := object_name(Kind.SEGMENT, name)):
                raise self._repository.codec().missing(where)

    def _draw_sample(self, given_up: threading.Event) -> None:
        if self._parent is None or self.decision.changed is None:
            return
        seed = self.options.sample.seed if self.options.sample.seed is not None else secrets.randbelow(1 << 32)
        try:
            self._sample = check_sample(self.source, self._repository, self._parent, self.decision.changed,
                                        self.options.sample, seed, given_up)
        except OSError as error:
            if self.options.skip_unreadable:
                self.warnings.append(f"what tracking calls unchanged was not checked: {self.source.path} could not be "
                                     f"read ({error.strerror or error})")
                return
            raise StasisError(f"{self.source.path} cannot be read: {error.strerror or error}", errno=error.errno or 0,
                              hint="--on-read-error skip stores zeroes for what cannot be read") from error

    def _judge_sample(self) -> None:
        if different := self._confirmed(self._sample.different):
            self._distrust(different[0])

    def _confirmed(self, different: tuple[Extent, ...]) -> list[Extent]:
        """Differences that tracking still does not know of: an image may have been written to since it was asked."""
        parent = self.decision.parent
        mark = None if parent is None else mark_of(parent)
        if not different or mark is None:
            return []
        changed = self.source.changed_since(mark)
        return [(offset, length) for offset, length in different if not clip(changed, offset, offset + length)]

    def _distrust(self, where: Extent) -> None:
        self.distrusted = (f"{self.source.name} differs from backup {self._parent_id()} between {where[0]} and "
                           f"{sum(where)}, where tracking says that nothing changed (sample drawn with seed "
                           f"{self._sample.seed})")
        if self._state is not None:
            self._state.forget(self.distrusted)
        try:
            self.source.distrust(self.distrusted)
        except StasisError as error:  # no backup of this host goes on from an older mark, with or without it
            self.warnings.append(f"the change map of {self.source.name} could not be told: {error.message}")
        self.warnings.append(f"change tracking is wrong, so a full backup is made: {self.distrusted}")
        before = self.bytes_to_read
        self._become_full(f"change tracking was found to be wrong: {self.distrusted}")
        self._progress.expect(self.bytes_to_read - before)

    def _open_resume(self) -> None:
        """Take up the record of an interrupted run, as far as it still holds, and go on with it."""
        directory, mark, size = self.options.state_dir, self.source.mark, self.source.size
        if directory is None or mark is None or size is None:
            return
        chunk_size = self._repository.chunk_size
        identity = {"repository": self._repository.id, "size": size, "chunk_size": chunk_size,
                    "device": self.source.identity}
        path = state_path(directory, self.source.name, ".done")
        make_folder(path)
        self._resume = ResumeFile(path, identity, -(-size // chunk_size))
        stale: list[ChunkRange] | None = None
        earlier = None if self.distrusted else self._resume.earlier_mark()
        if earlier is not None:
            with contextlib.suppress(GenerationError):
                stale = touched_chunks(self.source.changed_since(earlier), chunk_size)
        self._resume.begin(mark, stale)

    def _store(self) -> None:
        size = self.source.size
        builder = self._repository.index_builder(size, self._parent)
        limit = RateLimit(self.options.rate) if self.options.rate else None
        task = Task(self.source, builder, size, self._repository.chunk_size,
                    ReadErrors(self.source.path, self.options.skip_unreadable), self._resume, limit,
                    self._parent)
        pipeline = Pipeline(self._repository, task, self._progress)
        self._counters = pipeline.counters
        pipeline.run(self.reads, self.parts)
        self._segments = builder.finish() if size is not None else builder.finish(self.source.size)

    def remember(self) -> None:
        """Record the snapshot, before a manifest names it."""
        if self._state is not None and self.source.mark is not None and not self.distrusted:
            self._state.remember(self.source.mark, self.time)

    def published(self) -> None:
        """The backup is complete: nothing is left to continue."""
        if self._resume is not None:
            self._resume.remove()

    def close(self) -> None:
        """Close what is open; a record of what was done stays for the next run."""
        if self._resume is not None:
            self._resume.close()

    # -- the manifest -------------------------------------------------------------------------------------------------

    def draft(self, set_id: str) -> Manifest:
        """The manifest without its id. A mark that must not be gone on from is left out."""
        from stasis.backup.repo import Manifest

        source, decision = self.source, self.decision
        mark = None if self.distrusted else source.mark
        return Manifest(
            set_id=set_id, host=self.options.host, device=source.name, path=source.path, source_kind=source.kind,
            device_identity=source.identity, size=source.size or 0, chunk_size=self._repository.chunk_size,
            time=self.time, kind=decision.kind, segments=tuple(name.hex() for name in self._segments),
            parent=None if decision.parent is None else decision.parent.id,
            generation=None if mark is None else mark.generation,
            change_number=None if mark is None else mark.number, tags=self.options.tags,
            statistics=self._statistics(), consistency=self.options.consistency, note=self._note(),
            tool=f"stasis {stasis.__version__}",
        )

    def _statistics(self) -> dict[str, int]:
        counters, size = self._counters, self.source.size or 0
        changed = self.decision.changed_bytes
        return {
            "bytes_changed": size if changed is None else changed,
            "bytes_read": counters.bytes_read,
            "bytes_compared": self._sample.bytes_compared,
            "bytes_stored": counters.bytes_stored,
            "bytes_unreadable": self.bytes_unreadable,
            "chunks_total": -(-size // self._repository.chunk_size),
            "chunks_new": counters.chunks_new,
            "deltas": counters.deltas,
            "chunks_resumed": counters.chunks_resumed,
            "seconds": round(time.monotonic() - self._started),
        }

    @property
    def bytes_unreadable(self) -> int:
        """Bytes that could not be read, for which zeroes are stored."""
        return total(merge(self._counters.unreadable))

    def _note(self) -> str:
        parts = [f"full because {self.decision.reason}"] if self.decision.reason else []
        if self._counters.unreadable:
            ranges = merge(self._counters.unreadable)
            shown = ", ".join(f"{offset}+{length}" for offset, length in ranges[:RANGES_IN_NOTE])
            more = f" and {len(ranges) - RANGES_IN_NOTE} more" if len(ranges) > RANGES_IN_NOTE else ""
            parts.append(f"zeroes stand for what could not be read (offset+length): {shown}{more}")
        parts += [warning for warning in self.warnings if self.distrusted not in warning or not self.distrusted]
        return "; ".join(parts)
