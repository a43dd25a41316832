# SPDX-License-Identifier: Apache-2.0
"""Who does the work behind the control API: the served devices' keepers, or a kernel module that is driven.

A device belongs to one engine, and so does a snapshot. The API asks `Engines` whose a name or UUID is, and that engine
for everything else; so commands, backups and maps know nothing of where a device is tracked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from stasis.block.events import Event, EventQueue
from stasis.daemon import ctl, model, views
from stasis.daemon.devices import DeviceKeeper
from stasis.daemon.record import SERVED, DeviceRecord, origin_key, valid_name
from stasis.daemon.snapshots import SnapshotKeeper, SnapshotOptions
from stasis.errors import BusyError, NotFoundError, UsageError

__all__ = ["Engine", "Engines", "ServedEngine"]


class Engine(Protocol):
    """What the control API asks for. Names are those of devices; a UUID may be the beginning of one."""

    def paths(self) -> dict[str, str]:
        """Path of the origin by name of the device."""

    def uuids(self) -> list[str]:
        """UUIDs of the snapshots."""

    def attach(self, wanted: DeviceRecord, filter_name: str) -> None:
        """Track a device. If this raises, nothing has changed."""

    def detach(self, name: str, *, force: bool, forget: bool) -> None:
        """Track it no more."""

    def device(self, name: str, *, detailed: bool = False) -> model.Device:
        """What is shown of a device. NotFoundError."""

    def refresh(self, name: str) -> None:
        """Look at a device anew."""

    def ctl(self, name: str, filter_name: str, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        """A command to the filter of a device."""

    def update_map(self, name: str) -> None:
        """Bring the file of a change map up to date."""

    def mark(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Count ranges in bytes as changed."""

    def create(self, options: SnapshotOptions, names: Sequence[str], *, take: bool) -> str:
        """Make a snapshot; its UUID."""

    def add(self, uuid: str, name: str) -> None:
        """Add a device to a snapshot."""

    def take(self, uuid: str) -> None:
        """Take a snapshot."""

    def destroy(self, uuid: str) -> None:
        """End a snapshot."""

    def snapshot(self, uuid: str) -> model.Snapshot:
        """What is shown of a snapshot. NotFoundError."""

    def events(self, uuid: str) -> EventQueue:
        """The events of a snapshot. NotFoundError."""

    def take_event(self, uuid: str, codes: Collection[int]) -> Event | None:
        """The oldest event with one of these codes that nobody took yet, at once; None without. NotFoundError."""

    def image_node(self, uuid: str, name: str) -> str:
        """Path of a block device for the image of a device."""


class ServedEngine:
    """The devices that stasis serves by itself."""

    def __init__(self, devices: DeviceKeeper, snapshots: SnapshotKeeper) -> None:
        self._devices, self._snapshots = devices, snapshots

    def paths(self) -> dict[str, str]:
        with self._devices.lock:
            return {name: device.record.path for name, device in self._devices.devices.items()}

    def uuids(self) -> list[str]:
        return list(self._snapshots.snapshots)

    def attach(self, wanted: DeviceRecord, filter_name: str) -> None:
        is_new = not self._devices.directories.device(valid_name(wanted.name)).exists()
        device = self._devices.attach(wanted, filter_name)
        if not wanted.kernel:
            return
        try:
            self._devices.make_node(device)
        except BaseException:
            self._devices.detach(device.name, forget=is_new)
            raise

    def detach(self, name: str, *, force: bool, forget: bool) -> None:
        self._devices.detach(name, force=force, forget=forget)

    def device(self, name: str, *, detailed: bool = False) -> model.Device:
        with self._devices.lock:
            return views.device(self._snapshots, self._devices.find(name), detailed=detailed)

    def refresh(self, name: str) -> None:
        self._devices.refresh(name)

    def ctl(self, name: str, filter_name: str, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        return self._devices.ctl(name, filter_name, command, argument)

    def update_map(self, name: str) -> None:
        """The file is the map."""

    def mark(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        with self._devices.lock:
            ctl.mark(self._devices.find(name), ranges)

    def create(self, options: SnapshotOptions, names: Sequence[str], *, take: bool) -> str:
        return self._snapshots.create(options, names, take=take).id

    def add(self, uuid: str, name: str) -> None:
        self._snapshots.add(uuid, name)

    def take(self, uuid: str) -> None:
        self._snapshots.take(uuid)

    def destroy(self, uuid: str) -> None:
        self._snapshots.destroy(uuid)

    def snapshot(self, uuid: str) -> model.Snapshot:
        with self._snapshots.lock:
            return views.snapshot(self._snapshots, self._snapshots.find(uuid))

    def events(self, uuid: str) -> EventQueue:
        with self._snapshots.lock:
            return self._snapshots.find(uuid).events

    def take_event(self, uuid: str, codes: Collection[int]) -> Event | None:
        return self._snapshots.take_event(uuid, codes)

    def image_node(self, uuid: str, name: str) -> str:
        return self._snapshots.image_node(uuid, name)


class Engines:
    """All engines; the first one answers for what nobody knows."""

    def __init__(self, served: Engine, driven: Engine) -> None:
        self._served, self._driven = served, driven
        self.all = (served, driven)

    def of_device(self, name: str) -> Engine:
        """The engine of a device."""
        return self._driven if name in self._driven.paths() else self._served

    def of_snapshot(self, uuid: str) -> Engine:
        """The engine of a snapshot. NotFoundError (ESRCH) if the beginning of a UUID fits some of both."""
        found = [engine for engine in self.all if any(known.startswith(uuid.lower()) for known in engine.uuids())]
        if len(found) > 1:
            raise NotFoundError(f"there is more than one snapshot {uuid}", hint="stasis snapshot list shows them")
        return found[0] if found else self._served

    def of_devices(self, names: Sequence[str]) -> Engine:
        """The engine of several devices. UsageError if they have not the same."""
        found = {id(engine): engine for engine in map(self.of_device, names)}
        if len(found) > 1:
            raise UsageError("a snapshot holds served devices, or devices of a kernel module, but not both",
                             hint="make one for each kind")
        return next(iter(found.values()), self._served)

    def attach(self, wanted: DeviceRecord, filter_name: str) -> Engine:
        """Track a device with the engine that its record names. BusyError if another one has it, or its name."""
        engine = self._served if wanted.driver == SERVED else self._driven
        key = origin_key(wanted.path)
        for other in self.all:
            for name, path in other.paths().items() if other is not engine else ():
                if name == wanted.name:
                    raise BusyError(f"there is a device {name} already, {path}",
                                    hint="choose another name with --name")
                if key is not None and origin_key(path) == key:
                    raise BusyError(f"{wanted.path} is attached already, as {name}",
                                    hint=f"stasis device detach {name}")
        engine.attach(wanted, filter_name)
        return engine

    def add(self, uuid: str, name: str) -> Engine:
        """Add a device to a snapshot of the same engine. UsageError."""
        engine = self.of_snapshot(uuid)
        if self.of_device(name) is not engine:
            raise UsageError(f"{name} is tracked in another way than the devices of the snapshot {uuid}",
                             hint="name the devices of a kernel module when creating the snapshot")
        engine.add(uuid, name)
        return engine
