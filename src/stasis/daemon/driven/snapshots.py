# SPDX-License-Identifier: Apache-2.0
"""The snapshots that kernel modules hold: created, taken and destroyed by them, their images served from the nodes.

The daemon notes each in RUN/driven/UUID/snapshot.json, so that the next one finds it. A snapshot that the module has no
more when a daemon starts is forgotten.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stasis.blksnap.drivers import Driver, DriverEvent, Held, Image, Tracked
from stasis.blksnap.kernel import Kernel
from stasis.block.backing import refuse_origins
from stasis.block.changemap import ChangeMap
from stasis.block.snapshot import SnapshotState
from stasis.daemon import sockets
from stasis.daemon.driven.devices import DrivenDevice, DrivenDevices
from stasis.daemon.driven.watcher import Watcher
from stasis.daemon.image import ImageServer
from stasis.daemon.paths import Directories
from stasis.daemon.snapshot import RECORD, Member, Snapshot, image_export
from stasis.daemon.snapshots import SnapshotOptions
from stasis.errors import BusyError, NotFoundError, StasisError, StateError, UsageError

__all__ = ["DrivenSnapshot", "DrivenSnapshots"]

MEMORY = "/dev/shm"
"""Storage "memory": a file system in memory, since a module takes a path."""
SERVER = "stasis.block.nodeserver"

log = logging.getLogger(__name__)


@dataclass
class DrivenSnapshot(Snapshot):
    """A snapshot in the registry; `notes` are the driver's."""

    driver: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> Held:
        return Held(self.id, self.storage, self.limit, self.notes)


class DrivenSnapshots:
    """All of them. Not thread-safe: the daemon's lock is held around every call."""

    def __init__(self, directories: Directories, devices: DrivenDevices, kernel: Kernel) -> None:
        self._directories = directories
        self._devices = devices
        self._kernel = kernel
        self.snapshots: dict[str, DrivenSnapshot] = {}
        self._watchers: dict[str, Watcher] = {}

    def find(self, uuid: str, number: int = errno.ESRCH) -> DrivenSnapshot:
        """The snapshot with this UUID, or the only one that begins so. NotFoundError with the call's own errno."""
        matches = [snapshot for name, snapshot in self.snapshots.items() if uuid and name.startswith(uuid.lower())]
        if len(matches) != 1:
            count = "no" if not matches else "more than one"
            raise NotFoundError(f"there is {count} snapshot {uuid}", hint="stasis snapshot list shows them",
                                errno=number)
        return matches[0]

    def snapshot_of(self, name: str) -> DrivenSnapshot | None:
        """The snapshot that a device is in."""
        return next((snapshot for snapshot in self.snapshots.values()
                     if name in snapshot.members and snapshot.members[name].error_code != -errno.ENODEV), None)

    def _members(self, snapshot: DrivenSnapshot) -> list[DrivenDevice]:
        return [self._devices.devices[name] for name in snapshot.members if name in self._devices.devices]

    def _tracked(self, snapshot: DrivenSnapshot) -> list[Tracked]:
        return [device.tracked for device in self._members(snapshot)]

    def _driver(self, snapshot: DrivenSnapshot) -> Driver:
        for device in self._members(snapshot):
            return device.require()
        raise StateError(f"the devices of snapshot {snapshot.id} are all detached", hint="destroy it",
                         errno=errno.ENODEV)

    # -- before the take --------------------------------------------------------------------------

    def create(self, options: SnapshotOptions, names: Sequence[str]) -> DrivenSnapshot:
        """Make a snapshot of devices of one module. Raises what the module says; nothing is left behind then.

        Nothing is started ahead of the take: its images are the module's.
        """
        devices = [self._devices.find(name) for name in names]
        _refuse_options(options)
        if len({device.record.driver for device in devices}) != 1:
            raise UsageError("a snapshot holds devices of one kernel module", hint="make one for each module")
        if len(set(names)) < len(names):
            raise BusyError("a device is named twice", errno=errno.EALREADY)
        for device in devices:
            self._refuse_member(device)
        driver = devices[0].require()
        storage = MEMORY if options.storage == "memory" else options.storage
        for device in devices:
            _refuse_storage(driver, storage, device)
        held = driver.create(storage, options.limit, [device.tracked for device in devices])
        snapshot = DrivenSnapshot(
            held.uuid, self._directories.driven / held.uuid, storage, options.limit, tcp=options.tcp,
            tls_certificates=options.tls_certificates, tls_psk=options.tls_psk, driver=driver.name, notes=held.notes,
            members={device.name: Member(device.name, device.record.path) for device in devices})
        snapshot.directory.mkdir(mode=0o700, parents=True)
        snapshot.save()
        self.snapshots[snapshot.id] = snapshot
        self._watch(snapshot, driver)
        return snapshot

    def _refuse_member(self, device: DrivenDevice) -> None:
        other = self.snapshot_of(device.name)
        if other is not None:
            raise BusyError(f"{device.name} is in the snapshot {other.id}",
                            hint=f"a device is in one snapshot at most; stasis snapshot destroy {other.id}")

    def add(self, uuid: str, name: str) -> None:
        """Add a device. The module would take one after the take too, and do nothing with it."""
        snapshot, device = self.find(uuid), self._devices.find(name)
        if name in snapshot.members:
            raise BusyError(f"{name} is in this snapshot already", errno=errno.EALREADY)
        self._refuse_member(device)
        if snapshot.state is not SnapshotState.CREATED:
            raise StateError(f"snapshot {snapshot.id} is already taken", errno=errno.EALREADY,
                             hint="create another snapshot for this device")
        if device.record.driver != snapshot.driver:
            raise UsageError(f"{name} is tracked by {device.record.driver}, not by {snapshot.driver}",
                             hint="a snapshot holds devices of one kernel module")
        _refuse_storage(device.require(), snapshot.storage, device)
        device.require().add(snapshot.held, device.tracked)
        snapshot.members[name] = Member(name, device.record.path)
        snapshot.save()

    # -- the take ---------------------------------------------------------------------------------

    def take(self, uuid: str) -> None:
        """Take it. The module takes all devices or none; an image that cannot be served costs that image only."""
        snapshot = self.find(uuid)
        driver = self._driver(snapshot)
        snapshot.move(SnapshotState.TAKING)
        started = time.monotonic_ns()
        try:
            driver.take(snapshot.held, self._tracked(snapshot))
        except BaseException:
            snapshot.move(SnapshotState.CREATED)
            self._forget_if_gone(snapshot, driver)
            raise
        snapshot.hold_ns, snapshot.taken = time.monotonic_ns() - started, time.time()
        for device in self._members(snapshot):
            self._record(snapshot.members[device.name], device)
            self._devices.save(device)
        snapshot.move(SnapshotState.TAKEN)
        self._serve(snapshot, driver)

    def _forget_if_gone(self, snapshot: DrivenSnapshot, driver: Driver) -> None:
        """A module may give a snapshot up that it fails to take."""
        with contextlib.suppress(StasisError):
            if not driver.exists(snapshot.held):
                self._watchers.pop(snapshot.id).stop()
                self._forget(snapshot)

    def _record(self, member: Member, device: DrivenDevice) -> None:
        with ChangeMap.open_readonly(device.tracked.map_path) as changes:
            member.generation, member.change_number = changes.held_generation, changes.held_number
        member.wrapped = member.change_number == 0
        member.size = device.tracked.size

    def _serve(self, snapshot: DrivenSnapshot, driver: Driver) -> None:
        for index, device in enumerate(self._members(snapshot)):
            try:
                self._serve_image(snapshot, device, driver, index)
            except StasisError as error:
                log.error("%s", error)
                self._lost(snapshot, device.name, error.errno or errno.EIO, str(error))

    def _serve_image(self, snapshot: DrivenSnapshot, device: DrivenDevice, driver: Driver, index: int) -> None:
        member, image = snapshot.members[device.name], driver.image(snapshot.held, device.tracked)
        if image.node is None:
            raise StateError(f"{driver.name} shows no image of {device.name}", errno=errno.ENOENT)
        member.node = {"node": image.node}
        export = image_export(member.name, snapshot.id)
        tcp = None
        if snapshot.tcp:
            address = sockets.parse_address(snapshot.tcp, snapshot.tls_certificates, snapshot.tls_psk)
            tcp = sockets.nth_port(address, index)
        server = ImageServer(export, self._directories.nbd_socket(export), self._directories.log_of(export), tcp,
                             lambda child: None, module=SERVER)
        snapshot.images[member.name] = server
        server.start({"path": image.node}, [])
        member.tcp = server.tcp_address
        snapshot.save()

    # -- what happens to it -----------------------------------------------------------------------

    def _watch(self, snapshot: DrivenSnapshot, driver: Driver) -> None:
        def told(event: DriverEvent) -> None:
            name = self._name_of(snapshot, event.device)
            if event.name == "corrupted" and name:
                self._lost(snapshot, name, -event.error_code, "", event.time)
            else:
                snapshot.events.post(event.name, snapshot.id, device=name, error_code=event.error_code,
                                     requested=event.requested, monotonic_ns=event.time)

        def gone() -> None:
            for name in list(snapshot.members):
                self._lost(snapshot, name, errno.ESRCH, "somebody else has destroyed the snapshot")

        self._watchers[snapshot.id] = Watcher(driver, snapshot.held, told, gone)

    def _name_of(self, snapshot: DrivenSnapshot, number: tuple[int, int] | None) -> str:
        for name, member in list(snapshot.members.items()):
            with contextlib.suppress(OSError):  # a device that was removed
                if number is not None and self._kernel.number(member.path) == number:
                    return name
        return ""

    def _lost(self, snapshot: DrivenSnapshot, name: str, error: int, reason: str, moment: int | None = None) -> None:
        """The image of a device cannot be trusted any more; told once. Also called by the watcher, without the lock."""
        member = snapshot.members[name]
        if member.error_code:
            return
        member.error_code = -abs(error)
        snapshot.events.post("corrupted", snapshot.id, device=name, error_code=member.error_code, reason=reason,
                             monotonic_ns=moment)

    def look(self, snapshot: DrivenSnapshot) -> None:
        """Ask the module for the state of the images: an event may have gone to another reader."""
        for device in self._members(snapshot) if snapshot.is_taken else ():
            if device.driver is None:
                continue
            try:
                image = device.driver.image(snapshot.held, device.tracked)
            except StasisError as error:
                image = Image(None, -(error.errno or errno.EIO))
            if image.error_code:
                self._lost(snapshot, device.name, image.error_code, "")
        if snapshot.error_code and snapshot.state is SnapshotState.TAKEN:
            snapshot.move(SnapshotState.CORRUPTED)

    def leave(self, device: DrivenDevice, *, force: bool) -> None:
        """A device is about to be detached. BusyError while it is in a snapshot, unless `force`."""
        snapshot = self.snapshot_of(device.name)
        if snapshot is None:
            return
        if not force:
            raise BusyError(f"{device.name} is in the snapshot {snapshot.id}",
                            hint=f"stasis snapshot destroy {snapshot.id}, or --force, which gives up its image")
        if len(snapshot.members) == 1:
            self.destroy(snapshot.id)
            return
        if device.name in snapshot.images:
            snapshot.images[device.name].stop()
        self._lost(snapshot, device.name, errno.ENODEV, "detached by force")
        snapshot.members[device.name].error_code = -errno.ENODEV

    # -- the end ----------------------------------------------------------------------------------

    def destroy(self, uuid: str) -> None:
        """End a snapshot: first nobody waits for it or reads it on our side, then the module lets go of it."""
        snapshot = self.find(uuid, errno.ENODEV)
        watcher = self._watchers.pop(snapshot.id, None)
        if watcher is not None:
            watcher.stop()
        for image in snapshot.images.values():
            image.stop()
        devices = self._members(snapshot)
        driver = next((device.driver for device in devices if device.driver is not None), None)
        try:
            if driver is not None:
                driver.destroy(snapshot.held, self._tracked(snapshot))
        except StasisError as error:
            if not isinstance(error, NotFoundError):
                self._watch(snapshot, self._driver(snapshot))
                raise
        self._forget(snapshot)
        for device in devices:
            self._release_map(device)

    def _release_map(self, device: DrivenDevice) -> None:
        if device.driver is not None:
            with contextlib.suppress(StasisError):
                device.driver.update_map(device.tracked, held=False)
            self._devices.save(device)

    def _forget(self, snapshot: DrivenSnapshot) -> None:
        for name in snapshot.members:
            self._directories.log_of(image_export(name, snapshot.id)).unlink(missing_ok=True)
        shutil.rmtree(snapshot.directory, ignore_errors=True)
        self.snapshots.pop(snapshot.id, None)
        snapshot.events.close()

    def shut_down(self, *, keep: bool) -> None:
        """The daemon ends: destroy the snapshots, or `keep` them for the next one, which serves their images again."""
        for snapshot in list(self.snapshots.values()):
            try:
                if not keep:
                    self.destroy(snapshot.id)
                    continue
            except StasisError as error:
                log.error("the snapshot %s stays: %s", snapshot.id, error)
            self._rest(snapshot)

    def _rest(self, snapshot: DrivenSnapshot) -> None:
        watcher = self._watchers.pop(snapshot.id, None)
        if watcher is not None:
            watcher.stop()
        for image in snapshot.images.values():
            image.stop()
        snapshot.save()

    def recover(self) -> None:
        """Take up the snapshots that the modules still have."""
        if not self._directories.driven.is_dir():
            return
        for directory in sorted(self._directories.driven.iterdir()):
            try:
                self._recover(directory)
            except (StasisError, OSError) as error:
                log.error("a snapshot is forgotten: %s", error)
                shutil.rmtree(directory, ignore_errors=True)

    def _recover(self, directory: Path) -> None:
        if not (directory / RECORD).exists():
            shutil.rmtree(directory, ignore_errors=True)
            return
        snapshot = DrivenSnapshot.load(directory)
        assert isinstance(snapshot, DrivenSnapshot)
        driver = self._driver(snapshot)
        if not driver.exists(snapshot.held) or snapshot.state is SnapshotState.TAKING:
            with contextlib.suppress(StasisError):
                driver.destroy(snapshot.held, self._tracked(snapshot))
            raise StateError(f"{driver.name} has no snapshot {snapshot.id} any more")
        self.snapshots[snapshot.id] = snapshot
        self._watch(snapshot, driver)
        if snapshot.is_taken:
            for device in self._members(snapshot):
                driver.update_map(device.tracked, held=True)
            self._serve(snapshot, driver)


def _refuse_storage(driver: Driver, storage: str, device: DrivenDevice) -> None:
    """StorageError if the storage lies on the device; a module overlooks the disk of a partition, and the reverse."""
    if not driver.storage_elsewhere:
        return
    try:
        fd = os.open(storage, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # the module will say what it misses
    try:
        refuse_origins(fd, [os.stat(device.record.path)], storage)
    finally:
        os.close(fd)


def _refuse_options(options: SnapshotOptions) -> None:
    """UsageError for what only our own engine can do."""
    if options.storage_fd is not None or options.chunk is not None or options.bitmaps:
        raise UsageError("a snapshot by a kernel module takes no descriptor, --chunk or --bitmap",
                         hint="give --storage PATH and --limit only")
