# SPDX-License-Identifier: Apache-2.0
"""The copy job: open both sides, sample, copy, make durable, verify; in this order, and resumable in
between."""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stasis.block.copy import plan
from stasis.block.copy.plan import Extent, Piece, Window
from stasis.block.copy.sidecar import CopyIdentity, Sidecar, check_base, forget_base, record_base
from stasis.block.copy.source import NbdSource, OpenSource
from stasis.block.copy.target import Target
from stasis.block.copy.transfer import Handler, Transfer
from stasis.block.copy.verify import Comparison
from stasis.errors import GenerationError, StasisError, StateError, StorageError, UsageError, VerifyError
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.tls import TlsConfig

__all__ = ["CopyOptions", "CopyResult", "Progress", "copy_image"]

Progress = Callable[[int, int], None]
"""Told how far a copy is: (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy.

    verify: read the target back from its medium and compare it with the image, all that was copied.
    sample_share: share of the blocks not in ``changed`` that is compared before anything is written, 0 to 1.
    sample_minimum: blocks that are compared at least, when the share is not 0.
    sample_seed: draws the same sample again; None draws a new one, which the result names.
    block_size: unit of the sample in bytes; the tracking block is the natural one.
    never: a path that must not be the target, the snapshot's origin.
    expected_generation: the generation that the base of an incremental copy belongs to, where it is known.
    tls: certificates or keys, where the URI asks for TLS.
    connections: NBD connections, each with a thread.
    window_size: bytes in flight per connection.
    checkpoint_seconds: how often the target is made durable and the position written down.
    """

    verify: bool = False
    sample_share: float = 0.001
    sample_minimum: int = 16
    sample_seed: int | None = None
    block_size: int = 64 * 1024
    never: Path | None = None
    expected_generation: str | None = None
    tls: TlsConfig | None = None
    connections: int = 2
    window_size: int = 4 << 20
    max_extents: int = 64
    checkpoint_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What a copy did. Bytes, seconds; ``position_at_start`` is not 0 when an earlier run was continued."""

    target: str
    image_size: int
    bytes_copied: int
    bytes_zeroed: int
    bytes_verified: int
    blocks_sampled: int
    sample_seed: int
    position_at_start: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with ``message_type: summary``."""
        return {"message_type": "summary", **asdict(self)}


def copy_image(
    source: str | OpenSource,
    target: str | os.PathLike[str],
    identity: CopyIdentity,
    *,
    changed: Sequence[Extent] | None = None,
    options: CopyOptions | None = None,
    progress: Progress | None = None,
) -> CopyResult:
    """Copy a snapshot image to a regular file or a block device.

    source: NBD URI of the image export, or a function that opens a connection to it.
    identity: what is copied; a run that was interrupted goes on only with the same identity.
    changed: None copies the whole image and makes the target as long as it.  Else the extents, in bytes, that
        changed since ``identity.since`` (from ``map changed``): only they are written, and the target must be
        a complete copy from then on.
    progress: called with (bytes done, bytes in all) from the calling thread, about ten times per second.

    A target that is a regular file is made if need be, by a whole copy.  While the copy is unfinished,
    ``TARGET.stasis-copy`` tells where it is.  On return all is durable and that file is gone.  After an
    exception, KeyboardInterrupt included, the same call goes on from there.

    Raises GenerationError (exit code 7), VerifyError (8) when the sample or the read-back differs, StateError
    when another unfinished copy is recorded, what Target.open raises, and StorageError for I/O that fails.
    """
    chosen = options or CopyOptions()
    _refuse_generation(identity, chosen, changed)
    opener: OpenSource = source if callable(source) else partial(NbdSource, source, chosen.tls)
    with _readable_errors(Path(target)), closing(opener()) as first:
        size, zeroes = first.size, first.zero_extents()
        never, create = chosen.never, changed is None
        with Target.open(Path(target), size, create=create, never=never) as opened:
            job = _Job(opener, opened, identity, size, chosen, progress)
            return job.run(changed, zeroes)


def _refuse_generation(identity: CopyIdentity, options: CopyOptions, changed: Sequence[Extent] | None) -> None:
    if (changed is None) != (identity.since is None):
        raise UsageError("an incremental copy needs both the changed extents and the number they changed since")
    expected = options.expected_generation
    if changed is not None and expected is not None and expected != identity.generation:
        raise GenerationError(
            f"the changes of {identity.device} are of generation {identity.generation}, not of {expected}",
            hint="copy the whole image, without --since",
        )


@contextmanager
def _readable_errors(target: Path) -> Iterator[None]:
    """Turn the OSErrors of both sides into the sentence that a user sees."""
    try:
        yield
    except StasisError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = "repeat the command: it goes on where it stopped"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = f"free space for {target}, then {hint}"
        detail = f" ({error.filename})" if error.filename else ""
        raise StorageError(f"copying to {target} failed: {reason}{detail}", hint=hint, errno=error.errno) from error


class _Job:
    """One run of a copy, from an opened target to a durable one."""

    def __init__(
        self,
        opener: OpenSource,
        target: Target,
        identity: CopyIdentity,
        size: int,
        options: CopyOptions,
        progress: Progress | None,
    ) -> None:
        self._opener = opener
        self._target = target
        self._identity = identity
        self._size = size
        self._options = options
        self._progress = progress
        self._sidecar = Sidecar(target.path, identity, size, target.inode)
        self._seed = secrets.randbits(32) if options.sample_seed is None else options.sample_seed
        self._bytes_found_zero = 0
        self._lock = threading.Lock()
        self._sync_failed = False
        self._next_checkpoint = 0.0
        self._total = 0
        self._done_before = 0

    def run(self, changed: Sequence[Extent] | None, zeroes: Sequence[Extent]) -> CopyResult:
        """Do all of it; ``zeroes`` are the extents of the image that read as zeroes."""
        started = time.monotonic()
        whole = [(0, self._size)] if self._size else []
        wanted = whole if changed is None else plan.clip(plan.merge(changed), 0, self._size)
        position = 0 if self._target.created else self._sidecar.load() or 0
        sample = [] if changed is None else self._draw_sample(wanted)
        pieces = plan.split_by_allocation(wanted, zeroes)
        rest = plan.split_by_allocation(plan.clip(wanted, position, self._size), zeroes)
        self._tell_total(plan.total(sample), plan.total(wanted))
        if changed is not None:
            self._refuse_wrong_base()
            self._compare(plan.split_by_allocation(sample, zeroes), *self._sample_words())
        self._prepare(position, starts_empty=changed is None and not position)
        self._copy(rest, position)
        if self._options.verify:
            self._verify(pieces)
        self._complete()
        copied, zeroed = _bytes_by_kind(rest)
        return CopyResult(
            target=str(self._target.path),
            image_size=self._size,
            bytes_copied=copied - self._bytes_found_zero,
            bytes_zeroed=zeroed + self._bytes_found_zero,
            bytes_verified=plan.total(wanted) if self._options.verify else 0,
            blocks_sampled=len(sample),
            sample_seed=self._seed,
            position_at_start=position,
            seconds=time.monotonic() - started,
        )

    def _draw_sample(self, wanted: Sequence[Extent]) -> list[Extent]:
        chosen = self._options
        unchanged = plan.complement(wanted, self._size)
        return plan.sample_blocks(unchanged, chosen.block_size, chosen.sample_share, chosen.sample_minimum, self._seed)

    def _tell_total(self, sample_bytes: int, wanted_bytes: int) -> None:
        passes = 2 if self._options.verify else 1
        self._total = sample_bytes + passes * wanted_bytes

    def _refuse_wrong_base(self) -> None:
        check_base(self._target.descriptor, self._target.path, self._identity)
        if not self._target.is_block_device:
            found = os.fstat(self._target.descriptor).st_size
            if found != self._size:
                raise StateError(
                    f"{self._target.path} has {found} bytes, the image has {self._size}: it is no copy of it",
                    hint="copy the whole image, without --since",
                )

    def _sample_words(self) -> tuple[str, str]:
        since, seed = self._identity.since, self._seed
        explanation = f"this block is not among those that changed since {since} (sample drawn with seed {seed})"
        return explanation, "nothing was written; copy the whole image, without --since"

    def _prepare(self, position: int, starts_empty: bool) -> None:
        """From here on the target is unfinished, and says so."""
        self._sidecar.save(position)
        if self._identity.since is None:
            forget_base(self._target.descriptor)
        if starts_empty:
            self._target.start_empty(self._size)
        else:
            self._target.set_size(self._size)

    def _copy(self, pieces: Sequence[Piece], position: int) -> None:
        transfer = self._transfer(self._store)
        self._next_checkpoint = time.monotonic() + self._options.checkpoint_seconds

        def tick(done: int) -> None:
            self._report(done)
            if time.monotonic() >= self._next_checkpoint:
                self._checkpoint(transfer)

        try:
            if pieces:
                transfer.run(self._windows(pieces), position, tick)
        except BaseException:
            # KeyboardInterrupt too: what was done is worth keeping.
            if not self._sync_failed:
                self._checkpoint(transfer)
            raise
        self._advance(plan.total((offset, length) for offset, length, _ in pieces))

    def _store(self, window: Window, buffer: IoBuffer) -> None:
        position = zeroed = 0
        for offset, length in window.reads:
            zeroed += self._target.write(offset, buffer, position, length)
            position += length
        self._target.zero(window.zeroes)
        with self._lock:
            self._bytes_found_zero += zeroed

    def _checkpoint(self, transfer: Transfer) -> None:
        """Write down the position that was reached before the data was made durable."""
        position = transfer.position
        self._sync_failed = True
        self._target.sync()
        # The kernel tells of a failed writeback only once: after one, no later sync proves anything.
        self._sync_failed = False
        self._sidecar.save(position)
        self._next_checkpoint = time.monotonic() + self._options.checkpoint_seconds

    def _verify(self, pieces: Sequence[Piece]) -> None:
        self._target.drop_cache()
        try:
            self._compare(pieces, "what was read back is not what was written", "check the target's medium")
        except VerifyError:
            self._sidecar.save(0)
            raise

    def _compare(self, pieces: Sequence[Piece], explanation: str, hint: str) -> None:
        transfer = self._transfer(Comparison(self._target, explanation, hint))
        if pieces:
            transfer.run(self._windows(pieces), 0, self._report)
        self._advance(plan.total((offset, length) for offset, length, _ in pieces))

    def _complete(self) -> None:
        if not self._target.is_block_device:
            record_base(self._target.descriptor, self._identity)
        self._target.finish()
        self._sidecar.remove()

    def _transfer(self, handler: Handler) -> Transfer:
        return Transfer(self._opener, handler, self._options.window_size, self._options.connections)

    def _windows(self, pieces: Sequence[Piece]) -> Iterator[Window]:
        return plan.windows(pieces, self._options.window_size, self._options.max_extents)

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(self._done_before + done, self._total)

    def _advance(self, length: int) -> None:
        self._done_before += length


def _bytes_by_kind(pieces: Sequence[Piece]) -> tuple[int, int]:
    """(bytes to read, bytes known as zeroes)."""
    data = plan.total((offset, length) for offset, length, is_zero in pieces if not is_zero)
    zeroes = plan.total((offset, length) for offset, length, is_zero in pieces if is_zero)
    return data, zeroes
