# SPDX-License-Identifier: Apache-2.0
"""Backing up what is written meanwhile: in rounds, each of which stores what changed since the one before.

The index of the backup is kept open over all rounds; a later round puts its chunk in the place of an earlier one's.
What was written after the last round is in the source's own hands when it is brought to rest, and is laid over the
chunks that are stored by then. docs/design/live-copy.md has the proof.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from stasis.backup.job.device import CreateOptions, DeviceJob
from stasis.backup.job.history import History
from stasis.backup.job.parts import Part, split_changes
from stasis.backup.job.pipeline import Pipeline, RateLimit, Task
from stasis.backup.job.plan import ChunkRange, chunk_extents, touched_chunks
from stasis.backup.job.reading import ReadErrors
from stasis.backup.source import Extent, MovingGroup, MovingSource
from stasis.block.copy.plan import clip, complement, merge
from stasis.errors import DamagedError

if TYPE_CHECKING:
    from stasis.backup.progress import Progress
    from stasis.backup.repo import Manifest, Repository
    from stasis.backup.repo.index import IndexBuilder

__all__ = ["MovingJob", "Precopy"]

GAINING = 0.9  # a round that leaves more than this of what the one before left is no gain


class _Round(Pipeline):
    """A pass whose names are not final: a later round may replace any of them."""

    def _final(self, position: int) -> int:
        return 0


class MovingJob(DeviceJob):
    """One moving source's way into the repository: `plan`, `begin`, rounds, and `run` once it is at rest."""

    source: MovingSource

    def __init__(self, source: MovingSource, repository: Repository, options: CreateOptions, history: History,
                 progress: Progress) -> None:
        super().__init__(source, repository, options, history, progress)
        self._builder: IndexBuilder | None = None
        self._all_changed: list[Extent] = []
        self._is_first = True
        self.figures: dict[str, int] = {}

    # -- in motion ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """See whether the parent will do, as `run` of a source at rest does."""
        self._started = time.monotonic()
        try:
            self._check_parent()
        except DamagedError as error:
            self._give_up_parent(error)
        self._all_changed = list(self.decision.changed or ())

    def _distrust(self, where: Extent) -> None:
        super()._distrust(where)
        self.source.begin()  # tracking that is not trusted tells nothing: a new generation does

    def round(self) -> None:
        """Store what is to be read now; in the first round the sample is read beside that."""
        was_distrusted = self.distrusted
        try:
            if self._is_first:
                self._beside_sample(self._pass)
            else:
                self._pass()
        except DamagedError as error:
            self._give_up_parent(error)
            self._start_over()
        if self.distrusted and not was_distrusted:
            self._start_over()

    def _start_over(self) -> None:
        """What was stored by the parent does not count: a full backup."""
        self._all_changed, self._counters.unreadable = [], []
        self._builder, self._is_first = None, True
        self._pass()

    def _pass(self) -> None:
        if self._builder is None:
            self._builder = self._repository.index_builder(self.source.size, self._parent)
        if self._is_first:
            self._open_resume()
        pipeline = _Round(self._repository, self._task(self._builder), self._progress)
        try:
            pipeline.run(self.reads, self.parts)
        finally:
            self._counters.add(pipeline.counters)
        self._is_first = False

    def _task(self, builder: IndexBuilder) -> Task:
        """What was stored by an interrupted run counts in the first round only: later ones read what is newer."""
        limit = RateLimit(self.options.rate) if self.options.rate else None
        return Task(self.source, builder, self.source.size, self._repository.chunk_size,
                    ReadErrors(self.source.path, self.options.skip_unreadable),
                    self._resume if self._is_first else None, limit, self._parent)

    def advance(self) -> None:
        """End a round: what was written meanwhile is to be read in the next one."""
        written = self.source.advance()
        chunks = touched_chunks(written, self._repository.chunk_size)
        again = chunk_extents(chunks, self._repository.chunk_size, self.source.size or 0)
        self._readable_again(again)
        self._all_changed = merge([*self._all_changed, *written])
        self.reads, self.parts = self._to_read(chunks, again)

    def _to_read(self, chunks: list[ChunkRange], extents: Sequence[Extent]) -> tuple[list[ChunkRange], list[Part]]:
        """Of these chunks, all that changed since the parent: a delta holds all of that."""
        if self._parent is None:
            return chunks, []
        changed = [piece for offset, length in extents for piece in clip(self._all_changed, offset, offset + length)]
        return split_changes(changed, self._parent)

    def _readable_again(self, extents: Sequence[Extent]) -> None:
        """Places that are read anew: whether they can be read is found out anew."""
        kept = complement(extents, self.source.size or 0)
        self._counters.unreadable = [piece for offset, length in self._counters.unreadable
                                     for piece in clip(kept, offset, offset + length)]

    # -- at rest ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """The source is at rest: what it holds itself is to be stored, laid over what the rounds stored."""
        stashed = self.source.stashed
        self.time = self._history.next_time(self.source.name, self.source.taken)
        self.reads, self.parts = touched_chunks(stashed, self._repository.chunk_size), []
        if self.decision.changed is not None:
            self.decision = replace(self.decision, changed=merge([*self._all_changed, *stashed]))
        self._readable_again(stashed)
        self._counters.unreadable += self.source.unreadable
        self.source.use_base(self._repository.chunk_size, self._open_base)

    def _open_base(self) -> Callable[[int, memoryview], None]:
        assert self._builder is not None
        reader, name = self._repository.chunk_reader(), self._builder.name
        return lambda number, view: reader.fetch(name(number), view)

    def run(self) -> None:
        """Store what the source holds. Its names stand, and so do those of the rounds."""
        builder = self._builder
        assert builder is not None
        self._is_first = False
        pipeline = _Round(self._repository, self._task(builder), self._progress)
        pipeline.run(self.reads)
        self._counters.add(pipeline.counters)
        self._segments = builder.finish()

    def draft(self, set_id: str) -> Manifest:
        """The manifest, with how the source came to rest."""
        draft = super().draft(set_id)
        draft = replace(draft, statistics={**draft.statistics, **self.figures})
        return draft if draft.consistency == "hooks" else replace(draft, consistency=self.source.consistency)


class Precopy:
    """The rounds of all moving sources of a run."""

    def __init__(self, sources: Sequence[MovingSource], repository: Repository, options: CreateOptions,
                 progress: Progress) -> None:
        """Decide for each source what kind of backup it gets. Raises GenerationError."""
        self.warnings: list[str] = []
        self.rounds = 0
        self._repository, self._progress = repository, progress
        history = History(repository, options.host, self.warnings.append)
        base = None if options.base is None else repository.resolve(options.base)
        for source in sources:
            source.begin()
        self.jobs = [MovingJob(source, repository, options, history, progress) for source in sources]
        for job in self.jobs:
            job.plan(base)

    def run(self, group: MovingGroup, rounds: int) -> None:
        """Rounds until what is left is little, and held by the sources. Raises BusyError and what reading and storing
        raise. What is stored can be read afterwards.
        """
        with self._kept():
            for job in self.jobs:
                job.begin()
            self._rounds(group, rounds)

    def go_on(self, group: MovingGroup, rounds: int) -> None:
        """More rounds: by the time of the freeze there was no room for what was left. Raises as `run` does."""
        with self._kept():
            for job in self.jobs:
                job.advance()
            self._rounds(group, rounds)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What is stored before a failure is durable, for the next run to find."""
        try:
            yield
        except BaseException:
            self._repository.sync()
            raise

    def _rounds(self, group: MovingGroup, rounds: int) -> None:
        left, before = rounds, float("inf")
        while True:
            seconds = self._round()
            if group.fits():
                self._repository.sync()  # now, as it takes a while in which more is written
                if group.gather():
                    return
            left, pending = left - 1, float(sum(job.source.pending_bytes for job in self.jobs))
            if not left or pending > before * GAINING:
                group.relieve(seconds)
                left, pending = rounds, float("inf")
            before = pending
            for job in self.jobs:
                job.advance()

    def _round(self) -> float:
        started = time.monotonic()
        self.rounds += 1
        self._progress.phase(f"round {self.rounds}", sum(job.bytes_to_read for job in self.jobs))
        for job in self.jobs:
            job.round()
        return time.monotonic() - started

    def settle(self, figures: Mapping[str, int] | None = None) -> None:
        """All sources are at rest. figures: what is worth telling of how they came there, for the manifests."""
        for job in self.jobs:
            job.figures = {"rounds": self.rounds, **(figures or {})}
            job.settle()

    def close(self) -> None:
        """Close what is open. What was stored stays, for the next run to find."""
        for job in self.jobs:
            job.close()
