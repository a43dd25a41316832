# SPDX-License-Identifier: Apache-2.0
"""A device of a taken snapshot as the source of a backup."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stasis.backup.source import Extent, Mark, SourceReader
from stasis.backup.sources import ExplainedReader, nbd_zero_extents
from stasis.backup.sources.numbers import bounded_extents
from stasis.backup.sources.raw import identity_of
from stasis.daemon import client as daemon
from stasis.errors import GenerationError, NotFoundError, StasisError, StateError, StorageError, UsageError

if TYPE_CHECKING:
    from stasis.daemon.client import Client
    from stasis.daemon.model import Device, MapInfo, Snapshot

__all__ = ["PlannedSource", "ServedSource"]


class ServedSource:
    """One device of a snapshot that is taken. Calls but `open_reader` come from one thread."""

    def __init__(self, client: Client, snapshot: Snapshot, device: Device, name: str, kind: str) -> None:
        """kind: "served" for a snapshot of this run, "snapshot" for one that others made and may write to."""
        member = client.require_device(snapshot, device.name)
        _refuse_corrupted(member.error_code, device.name)
        self.name, self.kind, self.path = name, kind, member.path
        self.size: int | None = member.size
        self.identity = identity_of(member.path)
        self.mark: Mark | None = None
        if member.generation and member.change_number is not None:
            self.mark = Mark(member.generation, member.change_number)
        self.block_size = device.tracking_block or 0
        self.taken: float | None = snapshot.taken
        self._client, self._snapshot, self._device, self._uri = client, snapshot.id, device.name, str(member.uri)

    def changed_since(self, mark: Mark) -> list[Extent]:
        """What changed between the mark and the snapshot, what was written to its image included.

        Raises GenerationError where that is not known.
        """
        own = self.mark
        if own is None:
            raise GenerationError(f"changes of {self.name} are not tracked", hint="attach it again")
        if mark.generation != own.generation:
            raise _started_over(self.name, mark, own, self._client.map_info(self._device))
        if mark.number > own.number:
            raise GenerationError(f"change number {mark.number} of {self.name} is ahead of the snapshot's {own.number}")
        # A backup of this very snapshot exists: what was written to its image since has the snapshot's own number.
        since = mark.number - 1 if mark.number == own.number else mark.number
        with _unknown(self.name):
            # Fails where the map is broken, or belongs to this snapshot no more since the device changed its size.
            self._client.changed_extents(self._device, own.number, held=True, generation=own.generation)
            block_size = self._client.map_info(self._device).block_size
            changed = self._client.read_map(self._device, held=True)
        return bounded_extents(changed, max(since, 0), block_size, self.size or 0)

    def zero_extents(self) -> list[Extent]:
        """What the image's server says reads as zeroes."""
        return nbd_zero_extents(self._uri)

    def open_reader(self) -> SourceReader:
        """A connection to the image."""
        return ExplainedReader(self._uri, self.check)

    def disturbed(self) -> str:
        """A snapshot shows nothing of later writes."""
        return ""

    def distrust(self, reason: str) -> None:
        """Count everything as changed, for whoever asks the map from now on; durably."""
        self._client.mark(self._device, [(0, self.size or 0)])

    def check(self) -> None:
        """Raise StorageError if the image is lost. From any thread: the connection is its own."""
        directories = self._client.directories
        with daemon.connect(directories.run, directories.state, start_daemon=False) as client:
            member = client.require_device(client.snapshot(self._snapshot), self._device)
        _refuse_corrupted(member.error_code, self._device)


class PlannedSource:
    """A served device as it is now: tells what a backup would read, without taking a snapshot."""

    kind = "served"
    taken: float | None = None

    def __init__(self, client: Client, device: Device, name: str) -> None:
        self.name, self.path = name, device.path
        self.size: int | None = device.size
        self.identity = identity_of(device.path)
        self.mark: Mark | None = None
        if device.generation and device.change_number is not None:
            self.mark = Mark(device.generation, device.change_number + 1)  # that of the next snapshot
        self.block_size = device.tracking_block or 0
        self._client, self._device = client, device

    def changed_since(self, mark: Mark) -> list[Extent]:
        """What changed between the mark and now. GenerationError where that is not known."""
        name, own = self._device.name, self.mark
        if own is None:
            raise GenerationError(f"changes of {self.name} are not tracked", hint="attach it again")
        info = self._client.map_info(name)
        if mark.generation != info.generation:
            raise _started_over(self.name, mark, own, info)
        with _unknown(self.name):
            self._client.changed_extents(name, info.change_number, generation=info.generation)
            changed = self._client.read_map(name)
        return bounded_extents(changed, mark.number, info.block_size, self.size or 0)

    def zero_extents(self) -> list[Extent]:
        """What the device's server says reads as zeroes; a device of a kernel module has none."""
        return nbd_zero_extents(self._device.uri) if self._device.uri.startswith("nbd") else []

    def open_reader(self) -> SourceReader:
        """Not for reading. Raises StasisError."""
        raise StasisError(f"{self.name} was only planned to be read")

    def disturbed(self) -> str:
        """Nothing is read."""
        return ""

    def distrust(self, reason: str) -> None:
        """Nothing was compared."""


@contextlib.contextmanager
def _unknown(name: str) -> Iterator[None]:
    """A map that cannot be read tells nothing, which is no reason to make no backup at all."""
    try:
        yield
    except (UsageError, StateError, NotFoundError) as error:
        raise GenerationError(f"nothing is known of the changes of {name}: {error.message}",
                              hint="make a full backup") from error


def _started_over(name: str, mark: Mark, own: Mark, info: MapInfo) -> GenerationError:
    """Why the mark is of another generation, as far as the map tells."""
    why = f" ({info.assumed})" if info.assumed.startswith("new generation") else ""
    return GenerationError(f"the change map of {name} started over since the last backup{why}: its generation is now "
                           f"{own.generation[:8]}, and was {mark.generation[:8]}")


def _refuse_corrupted(error_code: int, name: str) -> None:
    if error_code:
        raise StorageError(f"the snapshot image of {name} is lost: its difference storage was full or failed",
                           hint="give more with --limit, or another place with --storage", errno=-error_code)
