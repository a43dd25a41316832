# SPDX-License-Identifier: Apache-2.0
"""What all generations of blksnap have in common: snapshots by UUID on a control node, events, one map per device."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stasis.blksnap.drivers.base import Driver, DriverEvent, Held, Tracked
from stasis.blksnap.uapi.common import (
    SECTOR,
    EventCorrupted,
    EventSpace,
    Sectors,
    SnapshotCollect,
    SnapshotEvent,
    Uuid,
)
from stasis.block.mapimport import ForeignMap, store
from stasis.errors import GenerationError, NotFoundError, StasisError

__all__ = ["LATER", "WRAPPED", "BlksnapDriver", "ModuleMap", "Numbers", "as_sectors"]

WRAPPED = 255
"""`changes_number` at the snapshot that wrapped; the map that is shown with it is still that of the old generation."""
LATER = "the module shows changes up to its last snapshot only; everything counts as changed since"
SPARE_IDS = 16


def as_sectors(ranges: Sequence[tuple[int, int]]) -> ctypes.Array[Sectors]:
    """Ranges (offset, length) in bytes as the modules take them, widened to whole sectors."""
    array = (Sectors * len(ranges))()
    for place, (offset, length) in zip(array, ranges, strict=True):
        place.offset = offset // SECTOR
        place.count = -(-(offset + length) // SECTOR) - place.offset
    return array


@dataclass(frozen=True)
class Numbers:
    """Requests on the control node that every generation has."""

    destroy: int
    take: int
    collect: int
    wait: int
    events: dict[int, str]


@dataclass(frozen=True)
class ModuleMap:
    """A map's figures as the module tells them; sizes in bytes."""

    capacity: int
    block_size: int
    block_count: int
    generation: str
    number: int


class BlksnapDriver(Driver):
    """A blksnap module, whichever generation."""

    name = "blksnap"
    numbers: Numbers

    # -- maps -------------------------------------------------------------------------------------

    @abstractmethod
    def module_map(self, device: Tracked) -> ModuleMap:
        """The figures of a device's map."""

    @abstractmethod
    def read_module_map(self, device: Tracked, info: ModuleMap) -> bytes:
        """The map as of the last snapshot, one byte per block. GenerationError if the module has lost it."""

    def update_map(self, device: Tracked, *, held: bool) -> None:
        """See Driver. After a wrap the module shows the old generation's map beside the new name: not to be used."""
        info = self.module_map(device)
        changes, broken = None, ""
        fresh = device.notes.get("unknown") == info.generation and device.notes.get("unknown_at") == info.number
        if info.number != WRAPPED and not fresh:
            try:
                changes = self.read_module_map(device, info)
            except GenerationError as error:
                broken = error.message
        device.size = info.capacity
        number = 0 if info.number == WRAPPED else info.number
        store(device.map_path, ForeignMap(info.capacity, info.block_size.bit_length() - 1, info.generation, number,
                                          changes, held, broken or LATER, broken=bool(broken)))

    def take(self, held: Held, devices: Sequence[Tracked]) -> None:
        """See Driver. A map that was replaced at the take (resize, damage) says nothing of the epoch before."""
        before = {device.name: self.module_map(device).generation for device in devices}
        self.control_call("take", held.uuid, self.numbers.take, Uuid.of(held.uuid))
        for device in devices:
            info = self.module_map(device)
            if info.generation != before[device.name]:
                device.notes.update(unknown=info.generation, unknown_at=info.number)
            self.update_map(device, held=True)

    # -- the control node -------------------------------------------------------------------------

    def control_call(self, call: str, subject: str, request: int, argument: ctypes.Structure) -> int:
        """One request on the control node, its errors told in our words."""
        try:
            with self.kernel.open(self.control) as fd:
                return self.kernel.ioctl(fd, call, request, argument)
        except OSError as error:
            raise self.failed(call, subject, error) from error

    def destroy(self, held: Held, devices: Sequence[Tracked]) -> None:
        """See Driver. The images are noted first: they tell when the module has let go, and are not told later."""
        for device in devices:
            with contextlib.suppress(StasisError):
                node = self.image(held, device).node
                held.notes["images"] = sorted({*held.notes.get("images", ()), *([node] if node else ())})
        try:
            self.control_call("destroy", held.uuid, self.numbers.destroy, Uuid.of(held.uuid))
        except NotFoundError:
            self.released(held)
            raise
        self.released(held)

    def released(self, held: Held) -> None:
        """The module has no such snapshot any more, and writes to its storage no longer."""

    def exists(self, held: Held) -> bool:
        """See Driver."""
        return held.uuid in self.collect()

    def collect(self) -> list[str]:
        """UUIDs of all snapshots of the module. There may be more by the time they are asked for than were counted."""
        room = 0
        while True:
            ids = (Uuid * room)()
            request = SnapshotCollect(count=room, ids=ctypes.addressof(ids) if room else 0)
            try:
                self.control_call("collect", "its snapshots", self.numbers.collect, request)
            except StasisError as error:
                if error.errno != errno.ENODATA:
                    raise
                room = 2 * room + SPARE_IDS
                continue
            if request.count <= room:
                return [str(one) for one in ids[: request.count] if any(bytes(one))]
            room = request.count + SPARE_IDS

    def next_event(self, held: Held, timeout_ms: int) -> DriverEvent | None:
        """See Driver. The module waits for that many jiffies, up to ten times as long as it was asked to."""
        event = SnapshotEvent(id=Uuid.of(held.uuid), timeout_ms=timeout_ms)
        try:
            with self.kernel.open(self.control) as fd:
                self.kernel.ioctl(fd, "wait", self.numbers.wait, event)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise self.failed("wait", held.uuid, error) from error
        return self._understood(event)

    def _understood(self, event: SnapshotEvent) -> DriverEvent | None:
        """What the event says; None for one of a generation to come."""
        name, moment = self.numbers.events.get(event.code), event.time_label or time.monotonic_ns()
        if name == "corrupted":
            lost = EventCorrupted.from_buffer_copy(event.data)
            return DriverEvent(name, moment, (lost.dev_id_mj, lost.dev_id_mn), -abs(lost.err_code or errno.EIO))
        if name is None:
            return None
        return DriverEvent(name, moment, requested=EventSpace.from_buffer_copy(event.data).requested_nr_sect * SECTOR)

    @contextlib.contextmanager
    def undone(self, held: Held) -> Iterator[None]:
        """Destroy a snapshot whose making fails in the block."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(StasisError):
                self.destroy(held, ())
            raise
