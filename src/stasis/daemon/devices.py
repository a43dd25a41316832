# SPDX-License-Identifier: Apache-2.0
"""The devices of the daemon: attach, detach, restart of their workers, adoption of those that outlived a daemon."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from stasis.block import settings as settings_file
from stasis.block.filters import Filter, FilterKind, FilterRegistry, FilterSlot
from stasis.daemon import nodes, record
from stasis.daemon.child import Child
from stasis.daemon.paths import Directories
from stasis.daemon.record import DeviceRecord, OriginKey
from stasis.daemon.served import Resume, ServedDevice
from stasis.daemon.tracers import TracerKeeper
from stasis.errors import BusyError, NotFoundError, StasisError, StateError

__all__ = ["FILTER", "DeviceKeeper", "Memberships"]

FILTER = "snapshot"
"""Name of the filter that tracks changes and copies on write."""
RESTARTS = 5
RESTART_WINDOW = 30.0
"""A worker that dies more often than RESTARTS times in so many seconds is restarted ever more slowly."""

log = logging.getLogger(__name__)


class Memberships(Protocol):
    """What the devices need to know of snapshots."""

    def snapshot_of(self, name: str) -> str | None: ...

    def resume(self, device: ServedDevice) -> Resume | None: ...

    def device_event(self, device: ServedDevice, event: Mapping[str, Any]) -> None: ...

    def device_lost(self, name: str, error: int, reason: str) -> None: ...

    def command(self, device: ServedDevice, command: str, argument: Mapping[str, Any]) -> dict[str, Any]: ...


class DeviceKeeper:
    """All attached devices. Every public call takes the daemon's one lock, which snapshots share."""

    def __init__(self, directories: Directories, lock: threading.RLock, overrides: Mapping[str, Any]) -> None:
        """`overrides` are settings that go before the stored ones."""
        self.directories = directories
        self._overrides = overrides
        self.lock = lock
        self.devices: dict[str, ServedDevice] = {}
        self.memberships: Memberships
        self.tracers: TracerKeeper
        self.filters: FilterRegistry[ServedDevice] = FilterRegistry()
        self.filters.register(_SnapshotFilterKind(self))
        self._slots: dict[OriginKey, FilterSlot[ServedDevice]] = {}
        self._deaths: dict[str, list[float]] = {}
        self._closing = False

    # -- looking ----------------------------------------------------------------------------------

    def find(self, name: str) -> ServedDevice:
        """The device of this name. NotFoundError."""
        try:
            return self.devices[name]
        except KeyError:
            known = ", ".join(sorted(self.devices)) or "none"
            raise NotFoundError(f"there is no device {name}", hint=f"attached devices: {known}") from None

    def slot(self, device: ServedDevice) -> FilterSlot[ServedDevice]:
        slot = self._slots.setdefault(device.key, FilterSlot(device, device.name))
        slot.gone = device.is_gone
        return slot

    # -- attach and detach ------------------------------------------------------------------------

    def attach(self, wanted: DeviceRecord, filter_name: str = FILTER) -> ServedDevice:
        """Put a filter on a device and serve it. Raises what the registry, the origin or the worker raises."""
        with self.lock:
            record.valid_name(wanted.name)
            self.directories.check_export(wanted.name)
            key = record.origin_key(wanted.path)
            if key is None:
                raise NotFoundError(f"{wanted.path} does not exist", hint="name a block device or an image file")
            slot = self._slots.get(key)
            if slot is None or slot.filter is None:
                slot = FilterSlot(ServedDevice(wanted, key, self.directories, self), wanted.path)
            slot.gone = slot.device.is_gone
            self.filters.attach(slot, filter_name)
            self._slots[key] = slot
            return slot.device

    def begin(self, device: ServedDevice) -> None:
        """Open and serve a device whose slot is free; nothing is left behind if that fails."""
        wanted, directory = device.record, self.directories.device(device.name)
        if device.name in self.devices:
            raise BusyError(f"there is a device {device.name} already, {self.devices[device.name].record.path}",
                            hint="choose another name with --name")
        is_new = not directory.exists()
        self._forget_other_map(wanted)
        try:
            device.open()
            settings_file.tracking_block_shift(device.size, self.settings(), wanted.tracking_block)
            directory.mkdir(mode=0o700, exist_ok=True)
            self._start_worker(device)
            record.save(directory, wanted)
        except BaseException:
            device.stop_worker()
            device.close()
            self.directories.log_of(device.name).unlink(missing_ok=True)
            if is_new:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        self.devices[device.name] = device

    def _start_worker(self, device: ServedDevice, *, continuity: bool = False, resume: Resume | None = None) -> None:
        device.plugins = self.tracers.before_start(device)
        device.start_worker(self.settings(), continuity=continuity, resume=resume)
        self.tracers.started(device)

    def _forget_other_map(self, wanted: DeviceRecord) -> None:
        """A map kept under this name for another path says nothing about this device."""
        directory = self.directories.device(wanted.name)
        try:
            same = record.load(directory).path == wanted.path
        except FileNotFoundError:
            same = False
        if not same:
            for name in ("map", "intent"):
                (directory / name).unlink(missing_ok=True)

    def detach(self, name: str, *, force: bool = False, forget: bool = False) -> None:
        """Take the filter off. BusyError while it is in a snapshot, unless `force`, which corrupts its image there.

        `forget` removes its change map too, and works on a device that is not attached or whose record is damaged.
        """
        with self.lock:
            if name not in self.devices and forget:
                self._forget(name)
                return
            device = self.find(name)
            self._refuse_member(device, force)
            self._remove_node(device)
            if self.memberships.snapshot_of(name) is not None:
                self.memberships.device_lost(name, errno.ENODEV, "detached by force")
            slot = self.slot(device)
            if slot.gone or device.failure is not None:
                self.end(device)
            else:
                self.filters.detach(slot, FILTER)
            self._slots.pop(device.key, None)
            if forget:
                self._forget(name)

    def _forget(self, name: str) -> None:
        directory = self.directories.device(record.valid_name(name))
        if not directory.is_dir():
            raise NotFoundError(f"nothing is remembered of a device {name}")
        shutil.rmtree(directory)

    def _refuse_member(self, device: ServedDevice, force: bool) -> None:
        uuid = self.memberships.snapshot_of(device.name)
        if uuid is not None and not force:
            raise BusyError(f"{device.name} is in the snapshot {uuid}",
                            hint=f"stasis snapshot destroy {uuid}, or --force, which makes its image unreadable")

    def _remove_node(self, device: ServedDevice) -> None:
        """Raises BusyError while the node is in use: before the image of a snapshot was given up for nothing."""
        self.tracers.nodes.release_device(device.name)
        if device.node is not None:
            nodes.remove(device.node)
            device.set_node(None)

    def end(self, device: ServedDevice) -> None:
        """Stop serving a device and keep its map."""
        self._remove_node(device)
        device.stop_worker()
        self.tracers.stopped(device.name)
        device.close()
        device.record.attached = False
        record.save(self.directories.device(device.name), device.record)
        del self.devices[device.name]

    def maximum_tracers(self) -> int:
        """How many tracers of dattobd there may be."""
        return self.settings().tracer_maximum_count

    def settings(self) -> settings_file.Settings:
        """The settings as they are now. StateError if their file is damaged."""
        return settings_file.load(self.directories.settings).with_values(self._overrides)

    def ctl(self, name: str, filter_name: str, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        """A command to the filter of a device, with the errnos of the filter registry."""
        with self.lock:
            return self.filters.ctl(self.slot(self.find(name)), filter_name, command, argument)

    # -- kernel nodes -----------------------------------------------------------------------------

    def make_node(self, device: ServedDevice) -> None:
        """Give the device a node under /dev. Done without the lock: the node reads from the worker at once."""
        state = nodes.make(device.uri, device.size, device.name, self.directories)
        with self.lock:
            device.set_node(state)

    # -- workers that die -------------------------------------------------------------------------

    def worker_event(self, device: ServedDevice, event: Mapping[str, Any]) -> None:
        """An event came from a worker (in its watching thread)."""
        with self.lock:
            if event.get("event") == "generation" and device.channel is not None:
                device.size = int(device.channel.call("hello")["size"])
            if str(event.get("event")).startswith("datto_"):
                self.tracers.event(device.name, event)
            else:
                self.memberships.device_event(device, event)

    def worker_died(self, device: ServedDevice, child: Child) -> None:
        """A worker ended without being told to (in its watching thread): start another one at once."""
        if not child.wait(5.0):
            child.kill()  # it closed its sockets but hangs: it must not write once its successor does
        log.error("the worker of %s (pid %d) died; starting it again", device.name, child.pid)
        while not self._restart(device, child):
            time.sleep(1.0)

    def _restart(self, device: ServedDevice, child: Child) -> bool:
        time.sleep(self._pause(device.name))
        with self.lock:
            replaced = device.child is not child and device.child is not None
            if replaced or self._closing or self.devices.get(device.name) is not device:
                return True  # somebody restarted or detached it meanwhile, or the daemon ends
            device.release_worker()
            if device.is_gone:
                return True  # there is nothing to serve
            try:
                self._start_worker(device, continuity=True, resume=self.memberships.resume(device))
                if device.node is not None:
                    nodes.reconnect(device.node)
            except StasisError as error:
                log.error("%s", error)
                device.failure = error
                return False
            return True

    def _pause(self, name: str) -> float:
        now = time.monotonic()
        deaths = [moment for moment in self._deaths.get(name, []) if now - moment < RESTART_WINDOW] + [now]
        self._deaths[name] = deaths
        return 0.0 if len(deaths) <= RESTARTS else min(5.0, 0.1 * 2 ** min(len(deaths) - RESTARTS, 10))

    # -- a daemon that starts and stops -----------------------------------------------------------

    def remembered(self) -> list[ServedDevice]:
        """Devices that an earlier daemon had, not served yet; those whose record is damaged carry the failure."""
        found = []
        for directory in sorted(self.directories.devices.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                device = self._remembered(directory.name)
                if device.record.attached and device.record.driver == record.SERVED:
                    found.append(device)
        return found

    def _remembered(self, name: str) -> ServedDevice:
        failure: StateError | None = None
        try:
            wanted = record.load(self.directories.device(name))
        except StateError as error:
            wanted, failure = DeviceRecord(name, ""), error
        key = record.origin_key(wanted.path) or ("file", 0, hash(name))
        device = ServedDevice(wanted, key, self.directories, self)
        device.failure = failure
        return device

    def adopt(self, device: ServedDevice) -> tuple[dict[str, Any], int | None] | None:
        """Adopt the device's worker: (answer to hello, storage descriptor). None if there is none."""
        self.devices[device.name] = device
        if device.failure is None:
            self._occupy(device)
        try:
            adopted = device.adopt()
        except (StasisError, OSError):
            return None  # it did not outlive the daemon
        self.tracers.adopt(device)
        return adopted

    def _occupy(self, device: ServedDevice) -> None:
        slot = self._slots.setdefault(device.key, FilterSlot(device, device.record.path))
        slot.kind, slot.filter = FILTER, _SnapshotFilter(self, device)

    def serve_again(self, device: ServedDevice) -> None:
        """Serve a device that has no worker; what keeps it from that is logged and kept in `failure`."""
        if device.failure is not None:
            log.error("%s", device.failure)
            return
        try:
            device.open()
            self._start_worker(device)
            self._restore_node(device)
        except StasisError as error:
            log.error("%s is not served: %s", device.name, error)
            device.failure = error
            device.close()

    def _restore_node(self, device: ServedDevice) -> None:
        """A node that outlived its worker gets a new connection; one that was taken apart is made again."""
        if device.node is not None:
            nodes.reconnect(device.node)
        elif device.record.kernel:
            self.make_node(device)

    def let_go(self, device: ServedDevice, *, keep_worker: bool) -> None:
        """The daemon ends: stop the worker in order, or leave it to the next daemon. The record stays."""
        self._closing = True
        if keep_worker:
            device.release_worker()
        else:
            device.stop_worker()
        device.close(remove=not keep_worker)

    def refresh(self, name: str) -> ServedDevice:
        """Look at the device anew: serve it if it could not be served, ask for its size if it is."""
        with self.lock:
            device = self.find(name)
            if device.failure is not None:
                device.close()
                device.failure = None
                self.serve_again(device)
            device.size = int(device.require().call("hello")["size"])
            return device


class _SnapshotFilter(Filter):
    """The filter on one served device."""

    commands = ("cbtdirty", "cbtinfo", "cbtmap", "snapshotadd", "snapshotinfo")

    def __init__(self, keeper: DeviceKeeper, device: ServedDevice) -> None:
        self._keeper, self._device = keeper, device

    def detach(self) -> None:
        self._keeper.end(self._device)

    def ctl(self, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        return self._keeper.memberships.command(self._device, command, argument)


class _SnapshotFilterKind(FilterKind[ServedDevice]):
    """Change tracking and copy-on-write, done by a worker process."""

    name = FILTER

    def __init__(self, keeper: DeviceKeeper) -> None:
        self._keeper = keeper

    def attach(self, device: ServedDevice) -> Filter:
        self._keeper.begin(device)
        return _SnapshotFilter(self._keeper, device)
