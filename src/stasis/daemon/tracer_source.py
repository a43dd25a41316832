# SPDX-License-Identifier: Apache-2.0
"""The snapshot of a dattobd tracer as the source of a backup.

Its mark is (UUID of the series, number of the snapshot). What changed since an earlier snapshot of the series is the
union of what the finished COW files between the two list: so a backup that failed or was left out costs no full one.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from stasis.backup.source import Extent, Mark, SourceReader
from stasis.backup.sources import ExplainedReader
from stasis.backup.sources.numbers import bounded_extents
from stasis.backup.sources.raw import identity_of
from stasis.daemon import client as daemon
from stasis.datto.cowreader import CowReader
from stasis.datto.layout import BLOCK_SIZE
from stasis.errors import GenerationError, StasisError, StateError, StorageError
from stasis.nbd.uri import NbdUri

if TYPE_CHECKING:
    from stasis.daemon.client import Client
    from stasis.daemon.model import Tracer

__all__ = ["TracerSource"]

MOST_BLOCKS = 64 << 20
"""Bytes of memory for the union; on devices of more than 256 GiB several blocks share one."""


class TracerSource:
    """The image of an active snapshot. While it is read the tracer cannot go on to another state (EBUSY)."""

    kind = "datto"

    def __init__(self, client: Client, tracer: Tracer, name: str) -> None:
        """Raises StateError if the tracer has no image, StorageError if it has failed."""
        _refuse_failed(tracer)
        if tracer.live:
            raise StateError(f"{tracer.bdev} is traced as it is in use, and has no image to read",
                             hint=f"stasis backup create {tracer.bdev} needs none")
        if tracer.state_name != "active snapshot" or tracer.device is None:
            raise StateError(f"tracer {tracer.minor} is {tracer.state_name} and has no image to read",
                             hint="dbdctl transition-to-snapshot makes one")
        self.name, self.path = name, tracer.bdev
        self.size: int | None = client.device(tracer.device).size
        self.identity = identity_of(tracer.bdev)
        self.mark: Mark | None = Mark(str(uuid.UUID(hex=tracer.uuid)), tracer.seqid)
        self.block_size = BLOCK_SIZE
        self.taken: float | None = tracer.taken or None
        self._client, self._tracer = client, tracer
        export = f"datto{tracer.minor}"
        self._uri = str(NbdUri(export=export, socket=str(client.directories.nbd_socket(export))))

    def changed_since(self, mark: Mark) -> list[Extent]:
        """What changed between the mark and the snapshot. GenerationError where a COW file in between is gone."""
        own, size = self.mark, self.size
        assert own is not None
        assert size is not None
        if mark.generation != own.generation:
            raise GenerationError(f"the series of {self.name} is now {own.generation[:8]}, and was "
                                  f"{mark.generation[:8]}", hint="make a full backup")
        if mark.number > own.number or mark.number < self._tracer.trusted_from:
            raise GenerationError(f"what changed on {self.name} since its snapshot {mark.number} is not known",
                                  hint="make a full backup")
        unit = BLOCK_SIZE
        while size // unit > MOST_BLOCKS:
            unit *= 2
        flags = bytearray(-(-size // unit))
        for number in range(mark.number, own.number):
            for offset, length in [*self._listed(number, size), *self._own(number), *self._own(number + 1)]:
                first, end = offset // unit, -(-(offset + length) // unit)
                flags[first:end] = b"\1" * (end - first)
        return bounded_extents(bytes(flags), 0, unit, size)

    def _own(self, number: int) -> list[Extent]:
        """What belongs to a COW file on the device itself, which lists no changes of its own and reads as zeroes in its
        image: it differs from the images before and after."""
        numbers = self._tracer.own.get(str(number), [])
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _listed(self, number: int, size: int) -> list[Extent]:
        path = self._tracer.finished.get(str(number))
        missing = f"what changed on {self.name} after its snapshot {number} is not known"
        if path is None:
            raise GenerationError(missing, hint="make a full backup")
        try:
            with CowReader(path, size) as reader:
                header = reader.header
                if (header.uuid.hex(), header.seqid) != (self._tracer.uuid, number) or not (
                        header.is_clean and header.is_index_only):
                    raise GenerationError(f"{missing}: {path} is another COW file by now", hint="make a full backup")
                return list(reader.extents())
        except (StasisError, OSError) as error:
            if isinstance(error, GenerationError):
                raise
            raise GenerationError(f"{missing}: {error}", hint="make a full backup") from error

    def zero_extents(self) -> list[Extent]:
        """Not known."""
        return []

    def open_reader(self) -> SourceReader:
        """A connection to the image."""
        return ExplainedReader(self._uri, self.check)

    def disturbed(self) -> str:
        """A snapshot shows nothing of later writes."""
        return ""

    def distrust(self, reason: str) -> None:
        """No backup of this snapshot or one before can be gone on from."""
        self._client.datto_distrust(self._tracer.minor)

    def check(self) -> None:
        """Raise StorageError if the tracer has failed. From any thread: the connection is its own."""
        directories = self._client.directories
        with daemon.connect(directories.run, directories.state, start_daemon=False) as client:
            _refuse_failed(client.datto_info(self._tracer.minor))


def _refuse_failed(tracer: Tracer) -> None:
    if tracer.error:
        raise StorageError(f"the snapshot of tracer {tracer.minor} is lost: {tracer.reason or tracer.error}",
                           hint="destroy it and set it up again", errno=-tracer.error)
