# SPDX-License-Identifier: Apache-2.0
"""Kernel modules as an engine of the control API. What a module cannot do is said, not done in another way."""

from __future__ import annotations

import base64
import contextlib
import errno
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stasis.blksnap.kernel import Kernel
from stasis.block.events import Event, EventQueue
from stasis.daemon import maps, model
from stasis.daemon.devices import FILTER
from stasis.daemon.driven import views
from stasis.daemon.driven.devices import DrivenDevices
from stasis.daemon.driven.snapshots import DrivenSnapshots
from stasis.daemon.paths import Directories
from stasis.daemon.record import DeviceRecord
from stasis.daemon.snapshots import SnapshotOptions
from stasis.errors import NotFoundError, StateError, UnsupportedError, UsageError

__all__ = ["DrivenEngine"]

COMMANDS = ("cbtdirty", "cbtinfo", "cbtmap", "snapshotadd", "snapshotinfo")


class DrivenEngine:
    """The devices that kernel modules track. Every public call takes the daemon's one lock."""

    def __init__(self, directories: Directories, lock: threading.RLock, kernel: Kernel | None = None) -> None:
        kernel = kernel or Kernel()
        self._directories = directories
        self._lock = lock
        self._devices = DrivenDevices(directories, kernel)
        self._snapshots = DrivenSnapshots(directories, self._devices, kernel)

    def recover(self) -> None:
        """Find again what an earlier daemon left."""
        with self._lock:
            self._devices.recover()
            self._snapshots.recover()

    def shut_down(self, *, keep: bool) -> None:
        """The daemon ends. Modules go on tracking; snapshots end, unless they are kept."""
        with self._lock:
            self._snapshots.shut_down(keep=keep)

    # -- devices ----------------------------------------------------------------------------------

    def paths(self) -> dict[str, str]:
        with self._lock:
            return {name: device.record.path for name, device in self._devices.devices.items()}

    def attach(self, wanted: DeviceRecord, filter_name: str) -> None:
        with self._lock:
            _check_filter(filter_name)
            self._devices.attach(wanted)

    def detach(self, name: str, *, force: bool, forget: bool) -> None:
        with self._lock:
            device = self._devices.find(name)
            self._snapshots.leave(device, force=force)
            self._devices.detach(device, forget=forget)

    def device(self, name: str, *, detailed: bool = False) -> model.Device:
        with self._lock:
            return views.device(self._directories, self._devices.find(name), self._snapshots.snapshot_of(name),
                                detailed=detailed)

    def refresh(self, name: str) -> None:
        with self._lock:
            self._devices.refresh(self._devices.find(name))

    def ctl(self, name: str, filter_name: str, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        """The filter's commands in terms of the other calls, with their names and errnos."""
        with self._lock:
            _check_filter(filter_name)
            if command not in COMMANDS:
                raise UnsupportedError(f"the filter {filter_name} has no command {command}",
                                       hint=f"it has {', '.join(COMMANDS)}", errno=errno.ENOTTY)
            try:
                return self._command(name, command, argument)
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"the argument of {command} is wrong: {error}", errno=errno.EINVAL) from error

    def _command(self, name: str, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        if command == "cbtdirty":
            self.mark(name, [(int(offset), int(length)) for offset, length in argument["ranges"]])
        elif command == "snapshotadd":
            self._snapshots.add(str(argument["id"]), name)
        elif command == "snapshotinfo":
            return self._image(name)
        else:
            self.update_map(name)
            if command == "cbtinfo":
                return maps.info(self._directories, name)
            data = maps.read(self._directories, name, int(argument["offset"]), int(argument["length"]),
                             held=bool(argument.get("held", False)))
            return {"map": base64.b64encode(data).decode()}
        return {}

    def _image(self, name: str) -> dict[str, Any]:
        snapshot = self._snapshots.snapshot_of(self._devices.find(name).name)
        if snapshot is None:
            raise NotFoundError(f"{name} is in no snapshot", hint="stasis snapshot create makes one")
        if not snapshot.is_taken:
            raise StateError(f"snapshot {snapshot.id} is not taken yet", hint=f"stasis snapshot take {snapshot.id}")
        shown = self.snapshot(snapshot.id).device(name)
        return {"id": snapshot.id, "error_code": shown.error_code, "image": shown.uri}

    def update_map(self, name: str) -> None:
        with self._lock:
            device = self._devices.find(name)
            snapshot = self._snapshots.snapshot_of(name)
            device.require().update_map(device.tracked, held=snapshot is not None and snapshot.is_taken)

    def mark(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        with self._lock:
            device = self._devices.find(name)
            maps.check_ranges(ranges, device.tracked.size, name)
            device.require().mark(device.tracked, ranges)
            self._devices.save(device)

    # -- snapshots --------------------------------------------------------------------------------

    def uuids(self) -> list[str]:
        return list(self._snapshots.snapshots)

    def create(self, options: SnapshotOptions, names: Sequence[str], *, take: bool) -> str:
        with self._lock:
            uuid = self._snapshots.create(options, names).id
            if take:
                try:
                    self._snapshots.take(uuid)
                except BaseException:
                    with contextlib.suppress(NotFoundError):  # the module may have given it up by itself
                        self._snapshots.destroy(uuid)
                    raise
            return uuid

    def add(self, uuid: str, name: str) -> None:
        with self._lock:
            self._snapshots.add(uuid, name)

    def take(self, uuid: str) -> None:
        with self._lock:
            self._snapshots.take(uuid)

    def destroy(self, uuid: str) -> None:
        with self._lock:
            self._snapshots.destroy(uuid)

    def snapshot(self, uuid: str) -> model.Snapshot:
        with self._lock:
            shown = self._snapshots.find(uuid)
            self._snapshots.look(shown)
            return views.snapshot(self._directories, shown)

    def events(self, uuid: str) -> EventQueue:
        with self._lock:
            return self._snapshots.find(uuid).events

    def take_event(self, uuid: str, codes: Collection[int]) -> Event | None:
        return self.events(uuid).take(codes)

    def image_node(self, uuid: str, name: str) -> str:
        shown = {device.name: device for device in self.snapshot(uuid).devices}
        if name not in shown:
            raise NotFoundError(f"{name} is not in the snapshot {uuid}")
        node = shown[name].node
        if node is None:
            raise StateError(f"snapshot {uuid} is not taken yet", hint=f"stasis snapshot take {uuid}")
        return node


def _check_filter(name: str) -> None:
    if name != FILTER:
        raise UsageError(f"kernel modules have the filter {FILTER}, not {name}", errno=errno.EINVAL)
