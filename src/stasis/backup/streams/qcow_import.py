# SPDX-License-Identifier: Apache-2.0
"""qcow2 files, and what else qemu reads, become backups: one of an image, or one of each file of a chain.

An image may name other files as its backing files or for its data. Whoever made it chose these names, so they are
followed only when the user asks for the chain.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import stasis
from stasis.backup.progress import Progress
from stasis.backup.repo import Manifest, Repository
from stasis.backup.sources.raw import identity_of
from stasis.backup.streams import qemu
from stasis.backup.streams.assemble import Assembler
from stasis.backup.streams.rbddiff import LARGEST_DEVICE, PIECE_BYTES, Piece
from stasis.block.copy.plan import Extent, split_by_allocation
from stasis.errors import StasisError, UsageError
from stasis.nbd.client import Client

__all__ = ["ImportOptions", "ImportedBackup", "backing_chain", "import_images"]

STATE_ZERO = 2  # proto.md, base:allocation
DEPTH_TOP = 1  # docs/interop/nbd.txt of qemu: allocated in the image itself, not in a backing file
BATCH = 8
WINDOW = 4 << 30  # bytes whose extents are known at a time, so that memory does not grow with the image


@dataclass(frozen=True)
class ImportOptions:
    """What the backups are called. image_format: as qemu names it. host: empty for this one."""

    name: str
    image_format: str = "qcow2"
    host: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImportedBackup:
    """A backup that was made of a file. Sizes are bytes."""

    id: str
    path: str
    size: int
    kind: str
    parent: str | None
    bytes_data: int
    bytes_stored: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def backing_chain(path: Path, image_format: str, *, follow: bool) -> list[Path]:
    """An image and those that it builds on, lowest first. Raises UsageError when there are some and `follow` is false,
    or when one of them is of another format."""
    chain = [path]
    while True:
        found = qemu.info(chain[-1], image_format)
        _refuse_data_file(chain[-1], found)
        below = found.get("backing-filename")
        if below is None:
            return chain[::-1]
        if not follow:
            raise UsageError(f"{path} builds on {below}", hint="give --chain to import both, if you trust the image")
        if found.get("backing-filename-format", image_format) != image_format or ":" in below.partition("/")[0]:
            raise UsageError(f"{chain[-1]} builds on {below}, which is no {image_format} file",
                             hint="convert it with qemu-img first")
        lower = chain[-1].parent / below
        if lower.resolve() in [known.resolve() for known in chain]:
            raise UsageError(f"{lower} builds on itself", hint="see what qemu-img info says of its backing file")
        chain.append(lower)


def _refuse_data_file(path: Path, found: dict[str, Any]) -> None:
    specific = found.get("format-specific", {}).get("data", {})
    if "data-file" in specific:
        raise UsageError(f"{path} keeps its data in another file, {specific['data-file']}",
                         hint="convert it with qemu-img first, if you trust the image")


def import_images(repository: Repository, chain: Sequence[Path], options: ImportOptions,
                  progress: Progress | None = None) -> list[ImportedBackup]:
    """Make a backup of each file, lowest first: a full one, then what each of the others changed.

    Raises StasisError with what qemu says. Backups of files before the one that failed stay.
    """
    done: list[ImportedBackup] = []
    parent: Manifest | None = None
    with repository.lock_shared("import"):
        for path, moment in zip(chain, _times(chain), strict=True):
            started = time.monotonic()
            with qemu.serve(path, options.image_format) as client:
                _check(path, client)
                assembler = Assembler(repository, client.size, parent)
                image = _Image(client, parent is not None, progress or Progress())
                segments = assembler.run(image.pieces())
            draft = _draft(repository, path, client.size, moment, parent, options)
            statistics = {"bytes_read": image.bytes_data, "bytes_stored": assembler.bytes_stored}
            backup = repository.publish(_finished(draft, segments, statistics))
            done.append(ImportedBackup(backup.id, str(path), backup.size, backup.kind, backup.parent, image.bytes_data,
                                       assembler.bytes_stored, round(time.monotonic() - started, 3)))
            parent = backup
    return done


def _check(path: Path, client: Client) -> None:
    if client.size > LARGEST_DEVICE:
        raise UsageError(f"{path} is {client.size} bytes large, more than any device")
    if not {qemu.ALLOCATION, qemu.DEPTH} <= client.contexts.keys():
        raise StasisError(f"{path}: qemu-nbd does not tell what is allocated", hint="qemu 5.2 and later do")


def _times(chain: Sequence[Path]) -> list[str]:
    """When each was written last, each later than the one before, as files that were copied need not be."""
    moments: list[datetime] = []
    for path in chain:
        moment = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        if moments and moment <= moments[-1]:
            moment = moments[-1] + timedelta(microseconds=1)
        moments.append(moment)
    return [moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ") for moment in moments]


def _draft(repository: Repository, path: Path, size: int, moment: str, parent: Manifest | None, options: ImportOptions,
           ) -> Manifest:
    return Manifest(
        set_id=str(uuid.uuid4()), host=options.host or socket.gethostname(), device=options.name,
        path=str(path.absolute()), source_kind="file", device_identity=identity_of(str(path)), size=size,
        chunk_size=repository.chunk_size,
        time=moment, kind="full" if parent is None else "incremental", parent=parent.id if parent else None,
        tags=options.tags, note=f"imported from {path.name}", tool=f"stasis {stasis.__version__}", segments=())


def _finished(draft: Manifest, segments: tuple[bytes, ...], statistics: dict[str, int]) -> Manifest:
    return Manifest(**{**vars(draft), "segments": tuple(name.hex() for name in segments), "statistics": statistics})


class _Image:
    """What an image holds, or what is in its topmost file alone."""

    def __init__(self, client: Client, top_only: bool, progress: Progress) -> None:
        self._client = client
        self._top_only = top_only
        self._progress = progress
        self._buffer = memoryview(bytearray(BATCH * PIECE_BYTES))
        self.bytes_data = 0

    def pieces(self) -> Iterator[Piece]:
        """Extents that ascend; zeroes of a lowest image are left out."""
        self._progress.phase("importing", self._client.size)
        done = 0
        batch: list[Extent] = []
        for offset, length, is_zero in self._extents():
            if is_zero:
                yield from self._read(batch)
                batch = []
                if self._top_only:
                    yield offset, length, None
            else:
                batch.append((offset, length))
                if len(batch) == BATCH:
                    yield from self._read(batch)
                    batch = []
            self._progress.add(offset + length - done)
            done = offset + length
        yield from self._read(batch)
        self._progress.add(self._client.size - done)

    def _extents(self) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, zero); data is cut to what one read brings."""
        for start in range(0, self._client.size, WINDOW):
            length = min(WINDOW, self._client.size - start)
            for offset, count, is_zero in split_by_allocation(self._wanted(start, length), self._zeroes(start, length)):
                if is_zero:
                    yield offset, count, True
                    continue
                for piece in range(offset, offset + count, PIECE_BYTES):
                    yield piece, min(PIECE_BYTES, offset + count - piece), False

    def _wanted(self, start: int, length: int) -> list[Extent]:
        if not self._top_only:
            return [(start, length)]
        found = self._client.extents(qemu.DEPTH, start, length)
        return [(offset, count) for offset, count, depth in found if depth == DEPTH_TOP]

    def _zeroes(self, start: int, length: int) -> list[Extent]:
        found = self._client.extents(qemu.ALLOCATION, start, length)
        return [(offset, count) for offset, count, state in found if state & STATE_ZERO]

    def _read(self, batch: Sequence[Extent]) -> Iterator[Piece]:
        places, position = [], 0
        for offset, length in batch:
            places.append((offset, self._buffer[position : position + length]))
            position += length
        self._client.read_many(places)
        for offset, place in places:
            self.bytes_data += len(place)
            yield offset, len(place), place
