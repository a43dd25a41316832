# SPDX-License-Identifier: Apache-2.0
"""The snapshots of the daemon: create, add, take, destroy, and what happens to them meanwhile."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import time
import uuid as uuids
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stasis.block.chunktable import ChunkTable
from stasis.block.diffstorage import DiffStorage
from stasis.block.events import Event
from stasis.block.settings import chunk_shift
from stasis.block.snapshot import SnapshotState
from stasis.daemon import ctl, sockets
from stasis.daemon.channel import Channel
from stasis.daemon.devices import DeviceKeeper
from stasis.daemon.images import ImageKeeper
from stasis.daemon.paths import Directories
from stasis.daemon.served import Resume, ServedDevice
from stasis.daemon.snapshot import Member, Snapshot, image_export
from stasis.daemon.take import Participant, TakeResult, take
from stasis.errors import BusyError, NotFoundError, StasisError, StateError

__all__ = ["SnapshotKeeper", "SnapshotOptions"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SnapshotOptions:
    """What a snapshot is created with. Sizes in bytes; `storage` is a path, "memory" or "descriptor".

    soon: it is going to be taken in a moment, so what can be started for that is.
    """

    storage: str
    storage_fd: int | None = None
    limit: int | None = None
    chunk: int | None = None
    bitmaps: list[int] = field(default_factory=list)
    tcp: str | None = None
    tls_certificates: str | None = None
    tls_psk: str | None = None
    soon: bool = False


class SnapshotKeeper:
    """All snapshots. Every public call takes the daemon's one lock, which devices share."""

    def __init__(self, directories: Directories, devices: DeviceKeeper, lock: threading.RLock) -> None:
        self.directories = directories
        self.devices = devices
        self.lock = lock
        self.images = ImageKeeper(directories, devices, lock)
        self.snapshots: dict[str, Snapshot] = {}

    def find(self, uuid: str, number: int = errno.ESRCH) -> Snapshot:
        """The snapshot with this UUID, or the only one that begins so. NotFoundError with the call's own errno."""
        wanted = uuid.lower()
        matches = [snapshot for name, snapshot in self.snapshots.items() if wanted and name.startswith(wanted)]
        if len(matches) != 1:
            count = "no" if not matches else "more than one"
            raise NotFoundError(f"there is {count} snapshot {uuid}", hint="stasis snapshot list shows them",
                                errno=number)
        return matches[0]

    # -- before the take --------------------------------------------------------------------------

    def create(self, options: SnapshotOptions, names: Iterable[str], *, take: bool = False) -> Snapshot:
        """Make a snapshot of the devices; all of it or nothing. Raises what storage, devices and take raise."""
        with self.lock:
            members = self._members(names)
            if options.tcp:
                sockets.parse_address(options.tcp, options.tls_certificates, options.tls_psk)
            uuid = str(uuids.uuid4())
            directory = self.directories.snapshot(uuid)
            directory.mkdir(mode=0o700)
            snapshot = Snapshot(uuid, directory, options.storage, options.limit, options.chunk, list(options.bitmaps),
                                options.tcp, options.tls_certificates, options.tls_psk, members=members)
            try:
                self._chunk_shifts(snapshot)
                self.open_storage(snapshot, options.storage_fd)
                snapshot.save()
                self.snapshots[uuid] = snapshot
                if take:
                    self.take(uuid)
                elif options.soon:
                    self.images.prestart(snapshot)
            except BaseException:
                self.remove(snapshot)
                raise
            return snapshot

    def _members(self, names: Iterable[str]) -> dict[str, Member]:
        members: dict[str, Member] = {}
        for name in names:
            device = self.devices.find(name)
            if name in members:
                raise BusyError(f"{name} is named twice", errno=errno.EALREADY)
            self._refuse_other(name, None)
            device.require()
            members[name] = Member(name, device.record.path)
        return members

    def _refuse_other(self, name: str, snapshot: Snapshot | None) -> None:
        owner = self.snapshot_of(name)
        if owner is None:
            return
        if snapshot is not None and owner == snapshot.id:
            raise BusyError(f"{name} is in this snapshot already", errno=errno.EALREADY)
        raise BusyError(f"{name} is in the snapshot {owner}",
                        hint=f"a device is in one snapshot at most; stasis snapshot destroy {owner}")

    def open_storage(self, snapshot: Snapshot, fd: int | None) -> None:
        """Make the difference storage ready. StorageError and its kin."""
        devices = [self.devices.find(name) for name in snapshot.members]
        stats = [os.fstat(device.origin_fd) for device in devices]
        target = snapshot.storage if fd is None else fd
        snapshot.diff = DiffStorage.create(target, snapshot.header_path, self.devices.settings(),
                                           limit=snapshot.limit, origins=stats)
        for device in devices:
            device.refuse_storage(snapshot.diff.fd, snapshot.storage)

    def _chunk_shifts(self, snapshot: Snapshot) -> None:
        settings = self.devices.settings()
        for member in snapshot.members.values():
            device = self.devices.find(member.name)
            member.size = device.size
            member.chunk_shift = chunk_shift(device.size, settings, device.minimum_io_size, snapshot.chunk)

    def add(self, uuid: str, name: str) -> Snapshot:
        """Add a device to a snapshot that is not taken yet. ESRCH, EALREADY, EBUSY as SNAPSHOTADD has them."""
        with self.lock:
            snapshot = self.find(uuid)
            device = self.devices.find(name)
            self._refuse_other(name, snapshot)
            device.require()
            if snapshot.state is not SnapshotState.CREATED:
                raise StateError(f"snapshot {snapshot.id} is already taken", errno=errno.EALREADY,
                                 hint="create another snapshot for this device")
            if snapshot.diff is not None:
                device.refuse_storage(snapshot.diff.fd, snapshot.storage)
            snapshot.members[name] = Member(name, device.record.path)
            snapshot.save()
            return snapshot

    # -- the take ---------------------------------------------------------------------------------

    def take(self, uuid: str) -> Snapshot:
        """Take it, on all its devices at one instant or on none. ESRCH, EALREADY, ENODEV as SNAPSHOT_TAKE has them."""
        with self.lock:
            snapshot = self.find(uuid)
            snapshot.move(SnapshotState.TAKING)
            try:
                if not snapshot.members:
                    raise StateError(f"snapshot {snapshot.id} has no devices", errno=errno.ENODEV,
                                     hint=f"stasis snapshot add {snapshot.id} DEVICE")
                self._chunk_shifts(snapshot)
                self.images.listen(snapshot)
                result = self._take_all(snapshot)
            except BaseException:
                self._untake(snapshot)
                raise
            self._record(snapshot, result)
            for member in snapshot.members.values():
                self._start_image(snapshot, member)
            snapshot.move(SnapshotState.TAKEN)
            return snapshot

    def _take_all(self, snapshot: Snapshot) -> TakeResult:
        assert snapshot.diff is not None
        with contextlib.ExitStack() as stack:
            participants = []
            for member in snapshot.members.values():
                self.devices.find(member.name).require()
                channel = stack.enter_context(
                    Channel.connect(self.directories.worker_control(member.name), member.name, timeout=30.0))
                participants.append(Participant(member.name, channel, self._prepare(snapshot, member),
                                                snapshot.diff.fd))
            return take(participants, self.devices.settings().hold_timeout_ms)

    def _prepare(self, snapshot: Snapshot, member: Member) -> dict[str, Any]:
        return {"snapshot": snapshot.id, "table": str(snapshot.table_path(member.name)),
                "chunk_shift": member.chunk_shift, "storage": str(snapshot.header_path), "new": True}

    def _untake(self, snapshot: Snapshot) -> None:
        """Some worker may have been let go with the snapshot taken before another one failed: it must drop it."""
        for member in snapshot.members.values():
            self._drop(member.name, snapshot.id)
            snapshot.table_path(member.name).unlink(missing_ok=True)
        for image in snapshot.images.values():
            image.stop()
        snapshot.images.clear()
        snapshot.move(SnapshotState.CREATED)

    def _drop(self, name: str, uuid: str) -> None:
        device = self.devices.devices.get(name)
        if device is not None and device.channel is not None:
            with contextlib.suppress(StasisError):
                device.channel.call("drop", snapshot=uuid)

    def _record(self, snapshot: Snapshot, result: TakeResult) -> None:
        snapshot.hold_ns, snapshot.taken = result.hold_ns, time.time()
        for switched in result.devices:
            member = snapshot.members[switched.name]
            member.generation, member.change_number = switched.generation, switched.change_number
            member.wrapped, member.held_ns = switched.wrapped, switched.held_ns
            if switched.wrapped:
                self._post(snapshot, "generation", member.name, {"reason": "the change number has wrapped"})

    def _start_image(self, snapshot: Snapshot, member: Member) -> None:
        """An image server that cannot be started costs this image only: the snapshot is taken."""
        try:
            self.images.start(snapshot, member)
        except StasisError as error:
            log.error("%s", error)
            self.device_lost(member.name, errno.EIO, str(error))

    # -- the end ----------------------------------------------------------------------------------

    def destroy(self, uuid: str) -> None:
        """End a snapshot, in use or not. NotFoundError with ENODEV, as SNAPSHOT_DESTROY has it."""
        with self.lock:
            self.remove(self.find(uuid, errno.ENODEV))

    def remove(self, snapshot: Snapshot) -> None:
        """Take apart whatever there is of it."""
        if snapshot.state is not SnapshotState.DESTROYING:
            snapshot.state = SnapshotState.DESTROYING
        for member in snapshot.members.values():
            self.images.remove_node(member)
        for image in snapshot.images.values():
            image.stop()
        for member in snapshot.members.values():
            self._drop(member.name, snapshot.id)
            export = image_export(member.name, snapshot.id)
            self.directories.log_of(export).unlink(missing_ok=True)
        if snapshot.diff is not None:
            snapshot.diff.dispose(snapshot.storage if os.path.isabs(snapshot.storage) else None)
            snapshot.diff.close()
            snapshot.diff = None
        shutil.rmtree(snapshot.directory, ignore_errors=True)
        self.snapshots.pop(snapshot.id, None)
        snapshot.events.close()

    def let_go(self, snapshot: Snapshot) -> None:
        """The daemon ends and leaves the snapshot to its processes and the next daemon."""
        for image in snapshot.images.values():
            image.stop(keep_process=True)
        if snapshot.diff is not None:
            snapshot.diff.close()

    # -- what happens to it -----------------------------------------------------------------------

    def snapshot_of(self, name: str) -> str | None:
        """UUID of the snapshot that the device is in."""
        for snapshot in self.snapshots.values():
            member = snapshot.members.get(name)
            if member is not None and member.error_code != -errno.ENODEV:
                return snapshot.id
        return None

    def resume(self, device: ServedDevice) -> Resume | None:
        """What a restarted worker must go on protecting."""
        uuid = self.snapshot_of(device.name)
        snapshot = self.snapshots[uuid] if uuid else None
        if snapshot is None or not snapshot.is_taken or snapshot.diff is None:
            return None
        member = snapshot.members[device.name]
        if member.error_code:
            return None
        return Resume(snapshot.id, str(snapshot.table_path(member.name)), member.chunk_shift,
                      str(snapshot.header_path), snapshot.diff.fd)

    def device_event(self, device: ServedDevice, event: Mapping[str, Any]) -> None:
        """A worker reported something: enter it into the snapshot it belongs to."""
        uuid = event.get("snapshot") or self.snapshot_of(device.name)
        snapshot = self.snapshots.get(str(uuid))
        if snapshot is None or device.name not in snapshot.members:
            return
        if event["event"] == "corrupted":
            self._corrupt(snapshot, device.name, int(event.get("error_code", -errno.EIO)), event)
        else:
            self._post(snapshot, str(event["event"]), device.name, event)

    def device_lost(self, name: str, error: int, reason: str) -> None:
        """The image of a device can no longer be kept right: mark it, so that nobody reads wrong data."""
        uuid = self.snapshot_of(name)
        if uuid is None:
            return
        snapshot = self.snapshots[uuid]
        if snapshot.state is SnapshotState.CREATED:
            del snapshot.members[name]
            snapshot.save()
            return
        self._end_protection(snapshot, name, error)
        self._corrupt(snapshot, name, -error, {"reason": reason})

    def _end_protection(self, snapshot: Snapshot, name: str, error: int) -> None:
        """Make the image answer EIO: by the worker that holds it, or on the table itself where none does."""
        channel = self.devices.find(name).channel
        if error == errno.ENODEV:
            self.images.remove_node(snapshot.members[name])
            snapshot.images[name].stop()  # it has the origin open, which goes back to its owner
        try:
            if channel is not None and channel.call("corrupt", errno=error)["held"]:
                return
            table = ChunkTable.open(snapshot.table_path(name), writable=True)
        except (OSError, StasisError) as failure:
            log.error("the image of %s is taken away: %s", name, failure)
            snapshot.images[name].stop()
            return
        table.set_error(error)
        table.close()

    def _corrupt(self, snapshot: Snapshot, name: str, code: int, event: Mapping[str, Any]) -> None:
        member = snapshot.members[name]
        if member.error_code:
            return  # the first error stays, and is told once
        member.error_code = -abs(code)
        self._post(snapshot, "corrupted", name, {**event, "error_code": member.error_code})
        if snapshot.is_taken:
            snapshot.move(SnapshotState.CORRUPTED)

    def _post(self, snapshot: Snapshot, name: str, device: str, event: Mapping[str, Any]) -> None:
        try:
            snapshot.events.post(name, snapshot.id, device=device, error_code=int(event.get("error_code") or 0),
                                 requested=int(event.get("requested") or 0), monotonic_ns=event.get("time"),
                                 reason=str(event.get("reason") or ""))
        except KeyError:
            log.error("the worker of %s reported an unknown event %s", device, name)
            return
        snapshot.save()

    def wait_events(self, uuid: str, after: int, timeout: float | None) -> tuple[list[Event], bool]:
        """Events with a sequence number above `after`, waiting for the first; and whether the snapshot is gone."""
        with self.lock:
            queue = self.find(uuid).events
        return queue.wait(after, timeout), queue.closed

    def take_event(self, uuid: str, codes: Collection[int]) -> Event | None:
        """The oldest event with one of these codes that nobody took yet, None without. The next daemon knows of it."""
        with self.lock:
            snapshot = self.find(uuid)
            event = snapshot.events.take(codes)
            if event is not None:
                snapshot.save()
            return event

    def image_node(self, uuid: str, name: str) -> str:
        """Path of a node for the image of a device, made if there is none. Called without the lock.

        Raises NotFoundError, StateError before the take, and what `nodes.make` raises.
        """
        return self.images.node(lambda: self._member(uuid, name))

    def _member(self, uuid: str, name: str) -> tuple[Snapshot, Member]:
        snapshot = self.find(uuid)
        if name not in snapshot.members:
            raise NotFoundError(f"{name} is not in the snapshot {snapshot.id}")
        if not snapshot.is_taken:
            raise StateError(f"snapshot {uuid} is not taken yet", hint=f"stasis snapshot take {uuid}")
        return snapshot, snapshot.members[name]

    def command(self, device: ServedDevice, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        """A filter command of a device."""
        return ctl.run(self, device, command, argument)

    def image_of(self, name: str) -> tuple[Snapshot, Member]:
        """The taken snapshot of a device and its part in it. NotFoundError, or StateError if it is not taken."""
        uuid = self.snapshot_of(name)
        if uuid is None:
            raise NotFoundError(f"{name} is in no snapshot", hint="stasis snapshot create makes one")
        snapshot = self.snapshots[uuid]
        if not snapshot.is_taken:
            raise StateError(f"snapshot {uuid} is not taken yet", hint=f"stasis snapshot take {uuid}")
        return snapshot, snapshot.members[name]
