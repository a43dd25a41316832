# SPDX-License-Identifier: Apache-2.0
"""A stream becomes a backup of this repository. Nothing shows until its digest was right and all is durable."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from io import BufferedReader
from typing import Any

import zstandard

import stasis
from stasis.backup.progress import Progress
from stasis.backup.repo import Manifest, Repository
from stasis.backup.streams import describe
from stasis.backup.streams.assemble import Assembler
from stasis.backup.streams.describe import Description
from stasis.backup.streams.rbddiff import PIECE_BYTES, Head, Piece, StreamReader
from stasis.errors import DamagedError, NotFoundError

__all__ = ["Counted", "ReceiveResult", "open_stream", "receive"]

ZSTD_MAGIC = zstandard.FRAME_HEADER
LARGEST_WINDOW = 1 << 27  # what zstd takes by default; a frame that asks for more wants to fill our memory


@dataclass(frozen=True)
class ReceiveResult:
    """The backup that was made of a stream; `known`: it was there already. Bytes are those of the stream's data."""

    id: str
    sent_as: str
    host: str
    device: str
    size: int
    kind: str
    parent: str | None
    known: bool
    bytes_data: int
    bytes_zero: int
    bytes_stored: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def open_stream(source: BufferedReader) -> StreamReader:
    """The stream behind a file, packed or not. Raises DamagedError."""
    if source.peek(4)[:4] != ZSTD_MAGIC:
        return StreamReader(source)
    unpacker = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    packed = unpacker.stream_reader(source, read_size=PIECE_BYTES, read_across_frames=True, closefd=False)
    return StreamReader(BufferedReader(packed, PIECE_BYTES))


def receive(repository: Repository, stream: StreamReader, progress: Progress | None = None) -> ReceiveResult:
    """Store what a stream holds and publish it as a backup; one that is here already is only checked.

    Raises DamagedError for anything wrong in the stream, NotFoundError when the backup that it builds on is not here.
    """
    started = time.monotonic()
    about = _described(stream.head)
    with repository.lock_shared("receive"):
        backups = repository.backups()
        backup = known = describe.find(backups, describe.Identity.of(about.backup))
        counted, stored = Counted(stream, progress or Progress()), 0
        if backup is None:
            base = _base(repository, backups, about, stream.head)
            assembler = Assembler(repository, stream.head.size, base)
            segments = assembler.run(counted.pieces())
            stored = assembler.bytes_stored
            backup = repository.publish(_draft(repository, about, stream.head, base, segments, counted, stored))
        else:
            counted.check()
    return ReceiveResult(
        backup.id, stream.head.to_snap, backup.host, backup.device, backup.size, backup.kind, backup.parent,
        known is not None, counted.bytes_data, counted.bytes_zero, stored, round(time.monotonic() - started, 3))


def _described(head: Head) -> Description:
    if not head.description:
        raise DamagedError("the backup stream does not say which device it is of",
                           hint="streams of rbd itself cannot be received; `stasis backup send` makes those that can")
    about = describe.decode(head.description)
    if (about.base is None) != (head.from_snap is None):
        raise DamagedError("the backup stream contradicts itself on the backup that it builds on")
    return about


def _base(repository: Repository, backups: list[Manifest], about: Description, head: Head) -> Manifest | None:
    if about.base is None:
        return None
    found = describe.find(backups, about.base)
    if found is None:
        raise NotFoundError(
            f"the stream builds on backup {str(head.from_snap)[:12]} of {about.base.device} on {about.base.host} at "
            f"{about.base.time}, which is not in {repository.url}",
            hint="receive that one first, or send this one whole, without --from")
    return found


def _kind(about: Description, base: Manifest | None) -> str:
    if base is None:
        return "full"
    return "differential" if about.backup.kind == "differential" else "incremental"


def _draft(repository: Repository, about: Description, head: Head, base: Manifest | None, segments: tuple[bytes, ...],
           counted: Counted, stored: int) -> Manifest:
    return replace(
        about.backup, size=head.size, chunk_size=repository.chunk_size, segments=tuple(n.hex() for n in segments),
        kind=_kind(about, base), parent=base.id if base else None, note=f"received, sent as {head.to_snap}",
        statistics={"bytes_changed": counted.bytes_data + counted.bytes_zero, "bytes_stored": stored},
        tool=f"stasis {stasis.__version__}")


class Counted:
    """The pieces of a stream, counted for progress and result."""

    def __init__(self, stream: StreamReader, progress: Progress) -> None:
        self._stream = stream
        self._progress = progress
        self.bytes_data = 0
        self.bytes_zero = 0

    def check(self) -> None:
        """Read to the end and keep nothing."""
        for _ in self.pieces():
            pass

    def pieces(self) -> Iterator[Piece]:
        """The pieces of the stream."""
        done, size = 0, self._stream.head.size
        self._progress.phase("receiving", size)
        for offset, length, data in self._stream.pieces():
            yield offset, length, data
            if data is None:
                self.bytes_zero += length
            else:
                self.bytes_data += length
            self._progress.add(offset + length - done)
            done = offset + length
        self._progress.add(size - done)
