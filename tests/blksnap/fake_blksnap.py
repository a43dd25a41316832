# SPDX-License-Identifier: Apache-2.0
"""blksnap's state machine, all generations, with what the real one does wrong.

Wrong on purpose, as it was found in the module's own code: waiting counts jiffies; a destroyed snapshot lives on until
its last waiter returns; COLLECT fills what it can and says ENODATA; an add of the device that holds the storage returns
0; the image's name is left alone where there is none; an offset beyond the map is not refused; a dirty range of count 0
marks everything; before March 2024 the first range was applied for each; an add after the take is accepted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import threading
import time
import uuid
from collections import deque
from pathlib import Path

from stasis.blksnap.drivers.generations import CURRENT, V5, V6, V7, Generation
from stasis.blksnap.uapi import common, current, v2, v5, v7
from stasis.blksnap.uapi.common import SECTOR
from tests.blksnap.fake_kernel import Disk, FakeKernel, fail, unknown

CHUNK = 256 << 10
NAMES = {"6.15": "blksnap-{}-{}", "v7": "blksnap-image_{}:{}", "v6": "blksnap-image_{}:{}", "v5": "blksnap-image_{}:{}"}


class Map:
    """A change map as the module keeps it, in two copies."""

    def __init__(self, size: int, shift: int = 16) -> None:
        self.capacity, self.shift = size, shift
        self.count = -(-size >> shift)
        self.read, self.write = bytearray(self.count), bytearray(self.count)
        self.previous, self.active = 0, 1
        self.generation = uuid.uuid4()
        self.corrupted = False

    def mark(self, offset: int, length: int, *, both: bool = False) -> None:
        first, last = offset >> self.shift, (offset + length - 1) >> self.shift
        if last >= self.count:
            self.corrupted = True
            raise fail(errno.EINVAL)
        for block in range(first, last + 1):
            self.write[block] = max(self.write[block], self.active)
            if both:
                self.read[block] = max(self.read[block], self.previous)

    def switch(self) -> None:
        self.previous, self.active = self.active, self.active + 1
        if self.active == 256:
            self.active, self.write, self.generation = 1, bytearray(self.count), uuid.uuid4()
        else:
            self.read[:] = self.write


class Tracker:
    def __init__(self, disk: Disk) -> None:
        self.disk, self.map = disk, Map(disk.size)
        self.snapshot: Snapshot | None = None
        self.image: Path | None = None
        self.error = 0
        self.chunks: set[int] = set()


class Snapshot:
    def __init__(self, limit: int, storage: tuple[int, int] | None) -> None:
        self.id, self.limit, self.storage = uuid.uuid4(), limit, storage
        self.filled, self.capacity = 0, limit
        self.ranges: list[tuple[int, int]] = []
        self.trackers: list[Tracker] = []
        self.taken = self.told = False
        self.events: deque[tuple[int, bytes]] = deque()
        self.waiters = 0
        self.destroyed = False


class FakeBlksnap:
    """The module from v3 on."""

    def __init__(self, kernel: FakeKernel, generation: Generation = CURRENT, *, hz: int = 1000,
                 applies_first_only: bool = False) -> None:
        self.kernel, self.generation, self.hz = kernel, generation, hz
        self.applies_first_only = applies_first_only
        self.trackers: dict[str, Tracker] = {}
        self.other_filter: set[str] = set()
        self.take_fails = 0
        self.snapshots: dict[uuid.UUID, Snapshot] = {}
        self.corrupted_code = {name: code for code, name in generation.events.items()}["corrupted"]
        self.changed = threading.Condition(threading.RLock())

    # -- requests on the block device -------------------------------------------------------------

    def device(self, disk: Disk, request: int, argument: ctypes.Structure) -> int:
        calls = {self.generation.attach: self._attach, self.generation.detach: self._detach,
                 self.generation.ctl: self._ctl}
        if request not in calls:
            raise unknown()
        # What the caller thinks it is does not matter: the number says how the module reads it.
        kind = common.FilterCtl if request == self.generation.ctl else common.FilterName
        with self.changed:
            calls[request](disk, kind.from_buffer(argument))
        return 0

    def _attach(self, disk: Disk, argument: ctypes.Structure) -> None:
        if argument.name != b"blksnap":
            raise fail(errno.ENOENT)
        if disk.path.as_posix() in self.other_filter:
            raise fail(errno.EBUSY)
        if str(disk.path) in self.trackers:
            raise fail(errno.EALREADY)
        self.trackers[str(disk.path)] = Tracker(disk)

    def _attached(self, disk: Disk, name: bytes) -> Tracker:
        if str(disk.path) in self.other_filter:
            raise fail(errno.EINVAL)
        if str(disk.path) not in self.trackers:
            raise fail(errno.ENOENT)
        if name != b"blksnap":
            raise fail(errno.ENOENT if self.generation is V6 else errno.EINVAL)
        return self.trackers[str(disk.path)]

    def _detach(self, disk: Disk, argument: ctypes.Structure) -> None:
        self._attached(disk, argument.name)
        del self.trackers[str(disk.path)]

    def _ctl(self, disk: Disk, argument: common.FilterCtl) -> None:
        tracker = self._attached(disk, argument.name)
        commands = [(common.CbtInfo, self._info), (common.CbtMap, self._map), (common.CbtDirty, self._dirty),
                    (common.SnapshotAdd, self._add), (common.SnapshotInfo, self._image)]
        if argument.cmd >= len(commands):
            raise fail(errno.ENOTTY)
        kind, command = commands[argument.cmd]
        if argument.optlen < ctypes.sizeof(kind):
            raise fail(errno.EINVAL)
        command(tracker, kind.from_address(argument.opt))
        argument.optlen = 0  # what comes back there means nothing

    def _info(self, tracker: Tracker, info: common.CbtInfo) -> None:
        kept = tracker.map
        info.device_capacity, info.block_size, info.block_count = kept.capacity, 1 << kept.shift, kept.count
        info.generation_id, info.changes_number = common.Uuid.of(str(kept.generation)), kept.previous

    def _map(self, tracker: Tracker, request: common.CbtMap) -> None:
        kept = tracker.map
        if kept.corrupted:
            raise fail(errno.EFAULT)
        assert request.offset <= kept.count, "the module would read beyond its map"
        if request.length > kept.count - request.offset:
            raise fail(errno.ENODATA)
        part = bytes(kept.read[request.offset : request.offset + request.length])
        ctypes.memmove(request.buffer, part, len(part))

    def _dirty(self, tracker: Tracker, request: common.CbtDirty) -> None:
        if tracker.map.corrupted:
            raise fail(errno.EINVAL)
        ranges = (common.Sectors * request.count).from_address(request.dirty_sectors)
        for one in ranges:
            applied = ranges[0] if self.applies_first_only else one
            if applied.count == 0:
                tracker.map.mark(0, tracker.map.capacity, both=True)
                raise fail(errno.EINVAL)
            tracker.map.mark(applied.offset * SECTOR, applied.count * SECTOR, both=True)

    def _add(self, tracker: Tracker, request: common.SnapshotAdd) -> None:
        snapshot = self._find(request.id, errno.ESRCH)
        if tracker.disk.integrity:
            raise fail(errno.EPERM)
        if tracker.snapshot is not None:
            raise fail(errno.EALREADY if tracker.snapshot is snapshot else errno.EBUSY)
        if snapshot.storage == tracker.disk.number:
            return  # refused in the kernel's log only
        tracker.snapshot = snapshot
        snapshot.trackers.append(tracker)

    def _image(self, tracker: Tracker, info: common.SnapshotInfo) -> None:
        info.error_code = -tracker.error
        if tracker.image is not None:
            info.image = tracker.image.name.encode()

    # -- requests on the control node -------------------------------------------------------------

    def control(self, request: int, argument: ctypes.Structure) -> int:
        if request == self.generation.wait:
            return self._wait(argument)
        calls = {self.generation.version: self._version, self.generation.create: self._create,
                 self.generation.destroy: self._destroy, self.generation.take: self._take,
                 self.generation.collect: self._collect}
        if self.generation is V5:
            calls[v5.IOCTL_BLKSNAP_SNAPSHOT_APPEND_STORAGE] = self._append
        if request not in calls:
            raise fail(errno.ENOTTY)
        with self.changed:
            calls[request](argument)
        return 0

    def _version(self, version: common.Version) -> None:
        version.major, version.minor = 2, 0

    def _find(self, wanted: common.Uuid, missing: int) -> Snapshot:
        try:
            return self.snapshots[uuid.UUID(bytes=bytes(wanted))]
        except KeyError:
            raise fail(missing) from None

    def _create(self, request: ctypes.Structure) -> None:
        if self.generation is V5:
            snapshot = Snapshot(0, None)
            snapshot.events.append((v5.EventCode.LOW_FREE_SPACE, (2048).to_bytes(8, "little")))
            identity = request
        else:
            request = (v7.SnapshotCreateV6 if self.generation is V6 else current.SnapshotCreate).from_buffer(request)
            limit = request.diff_storage_limit_sect * SECTOR
            snapshot = Snapshot(limit, self._storage(request))
            identity = None
        self.snapshots[snapshot.id] = snapshot
        made = common.Uuid.of(str(snapshot.id))
        if identity is not None:
            ctypes.memmove(ctypes.addressof(identity), ctypes.addressof(made), 16)
        else:
            request.id = made

    def _storage(self, request: ctypes.Structure) -> tuple[int, int] | None:
        """Number of the disk that the storage is or lies on, as far as this kernel knows it."""
        if self.generation is V6:
            if request.diff_storage_fd == 0xFFFFFFFF:
                raise fail(errno.EINVAL)
            status = os.fstat(request.diff_storage_fd)
            path = os.readlink(f"/proc/self/fd/{request.diff_storage_fd}")
        else:
            if request.diff_storage_filename > 1 << 47:
                raise fail(errno.EFAULT)
            path = os.fsdecode(ctypes.string_at(request.diff_storage_filename))
            status = os.stat(path)
        if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise fail(errno.EINVAL)
        if stat.S_ISREG(status.st_mode) and status.st_size > request.diff_storage_limit_sect * SECTOR:
            raise fail(errno.ENOSPC)
        for disk in self.kernel.disks.values():
            if path == str(disk.path) or (disk.mounted_on and Path(path).is_relative_to(disk.mounted_on)):
                return disk.number
        return None

    def _append(self, request: v5.SnapshotAppendStorage) -> None:
        snapshot = self._find(request.id, errno.ESRCH)
        ranges = (common.Sectors * request.count).from_address(request.ranges)
        assert all(one.count for one in ranges)
        assert len(ctypes.string_at(request.bdev_path)) + 1 == request.bdev_path_size
        snapshot.capacity += sum(one.count for one in ranges) * SECTOR
        snapshot.ranges += [(one.offset, one.count) for one in ranges]
        snapshot.told = False

    def _destroy(self, wanted: common.Uuid) -> None:
        snapshot = self._find(wanted, errno.ENODEV)
        del self.snapshots[snapshot.id]
        snapshot.destroyed = True
        if not snapshot.waiters:
            self.release(snapshot)

    def release(self, snapshot: Snapshot) -> None:
        for tracker in snapshot.trackers:
            if tracker.image is not None:
                tracker.image.unlink()
            tracker.image, tracker.snapshot, tracker.error = None, None, 0
            tracker.chunks.clear()

    def _take(self, wanted: common.Uuid) -> None:
        snapshot = self._find(wanted, errno.ESRCH)
        if snapshot.taken:
            raise fail(errno.EALREADY)
        if not snapshot.trackers:
            raise fail(errno.ENODEV)
        if self.take_fails:
            self._destroy(wanted)  # it is given up altogether
            raise fail(self.take_fails)
        for tracker in snapshot.trackers:
            if tracker.map.corrupted or tracker.map.capacity != tracker.disk.size:
                tracker.map = Map(tracker.disk.size)
            tracker.map.switch()
            tracker.image = self.kernel.dev / self._image_name(tracker.disk)
            shutil.copyfile(tracker.disk.path, tracker.image)
        snapshot.taken = True

    def _image_name(self, disk: Disk) -> str:
        return NAMES[self.generation.label].format(*disk.number)

    def _collect(self, request: common.SnapshotCollect) -> None:
        if not request.ids:
            request.count = len(self.snapshots)
            return
        found = list(self.snapshots)[: request.count]
        for index, one in enumerate(found):
            ctypes.memmove(request.ids + 16 * index, one.bytes, 16)
        request.count = len(found)
        if len(found) < len(self.snapshots):
            raise fail(errno.ENODATA)

    def _wait(self, event: common.SnapshotEvent) -> int:
        with self.changed:
            snapshot = self._find(event.id, errno.ESRCH)
            snapshot.waiters += 1
            self.changed.wait_for(lambda: snapshot.events, event.timeout_ms / self.hz)  # jiffies, not milliseconds
            snapshot.waiters -= 1
            if snapshot.destroyed and not snapshot.waiters:
                self.release(snapshot)
            if not snapshot.events:
                raise fail(errno.ENOENT)
            event.code, data = snapshot.events.popleft()
            event.time_label = time.monotonic_ns()
            ctypes.memmove(ctypes.addressof(event) + common.SnapshotEvent.data.offset, data, len(data))
        return 0

    # -- what happens -----------------------------------------------------------------------------

    def before_write(self, disk: Disk, offset: int, length: int) -> None:
        with self.changed:
            tracker = self.trackers.get(str(disk.path))
            if tracker is None:
                return
            tracker.map.mark(offset, length)
            if tracker.image is not None and tracker.snapshot is not None and not tracker.error:
                for chunk in range(offset // CHUNK, (offset + length - 1) // CHUNK + 1):
                    self._keep(tracker, tracker.snapshot, chunk)

    def _keep(self, tracker: Tracker, snapshot: Snapshot, chunk: int) -> None:
        if chunk in tracker.chunks or tracker.error:
            return
        if snapshot.filled + CHUNK > snapshot.capacity:
            self.corrupt(tracker, errno.ENOSPC)
            return
        tracker.chunks.add(chunk)
        snapshot.filled += CHUNK
        if snapshot.capacity - snapshot.filled <= CHUNK and not snapshot.told:
            self._tell_of_space(snapshot)

    def _tell_of_space(self, snapshot: Snapshot) -> None:
        for code, name in self.generation.events.items():
            if name in ("no_space", "low_space"):
                snapshot.told = True
                wanted = snapshot.capacity if name == "no_space" else 1 << 20
                self.post(snapshot, code, (wanted // SECTOR).to_bytes(8, "little"))

    def corrupt(self, tracker: Tracker, error: int) -> None:
        """The image of a device is lost."""
        with self.changed:
            assert tracker.snapshot is not None
            tracker.error = error
            lost = common.EventCorrupted(*tracker.disk.number, error)
            self.post(tracker.snapshot, self.corrupted_code, bytes(lost))

    def post(self, snapshot: Snapshot, code: int, data: bytes) -> None:
        with self.changed:
            snapshot.events.append((code, data))
            self.changed.notify_all()

    def write_image(self, disk: Disk, offset: int, data: bytes) -> None:
        """Somebody writes to the image, through its node."""
        with self.changed:
            tracker = self.trackers[str(disk.path)]
            assert tracker.image is not None
            tracker.map.mark(offset, len(data), both=True)
            with tracker.image.open("r+b") as file:
                file.seek(offset)
                file.write(data)


class FakeTracker(FakeBlksnap):
    """The module of v1 and v2: the same machine behind other requests."""

    def __init__(self, kernel: FakeKernel, *, hz: int = 1000) -> None:
        super().__init__(kernel, V5, hz=hz)

    def _image_name(self, disk: Disk) -> str:
        name = f"blksnap-image{len(self.trackers)}"
        self.kernel.nodes[252, disk.number[1]] = str(self.kernel.dev / name)
        return name

    def device(self, disk: Disk, request: int, argument: ctypes.Structure) -> int:
        raise unknown()

    def _tracker(self, dev: v2.BlkSnapDev) -> Tracker:
        for tracker in self.trackers.values():
            if tracker.disk.number == (dev.mj, dev.mn):
                return tracker
        raise fail(errno.ENODEV)

    def control(self, request: int, argument: ctypes.Structure) -> int:
        if request == v2.IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT:
            return self._wait(argument)
        calls = {
            v2.IOCTL_BLK_SNAP_VERSION: self._version, v2.IOCTL_BLK_SNAP_TRACKER_REMOVE: self._remove,
            v2.IOCTL_BLK_SNAP_TRACKER_COLLECT: self._collect_trackers,
            v2.IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP: self._read_map,
            v2.IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS: self._mark,
            v2.IOCTL_BLK_SNAP_SNAPSHOT_CREATE: self._create_with,
            v2.IOCTL_BLK_SNAP_SNAPSHOT_DESTROY: self._destroy, v2.IOCTL_BLK_SNAP_SNAPSHOT_TAKE: self._take,
            v2.IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE: self._append_ranges,
            v2.IOCTL_BLK_SNAP_SNAPSHOT_COLLECT: self._collect,
            v2.IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES: self._collect_images,
        }
        if request not in calls:
            raise fail(errno.ENOTTY)
        with self.changed:
            return calls[request](argument) or 0

    def _remove(self, dev: v2.BlkSnapDev) -> None:
        tracker = self._tracker(dev)
        if tracker.snapshot is not None:
            raise fail(errno.EBUSY)
        del self.trackers[str(tracker.disk.path)]

    def _collect_trackers(self, request: v2.TrackerCollect) -> None:
        room = (v2.CbtInfo * request.count).from_address(request.cbt_info_array)
        for info, tracker in zip(room, self.trackers.values(), strict=False):
            kept = tracker.map
            info.dev_id, info.blk_size, info.device_capacity = tracker.disk.number, 1 << kept.shift, kept.capacity
            info.blk_count, info.snap_number = kept.count, kept.previous
            info.generation_id = common.Uuid.of(str(kept.generation))
        if not self.trackers:
            raise fail(errno.ENODATA)
        if request.count < len(self.trackers):
            raise fail(errno.ENOBUFS)
        request.count = len(self.trackers)

    def _read_map(self, request: v2.TrackerReadCbtBitmap) -> int:
        tracker = self._tracker(request.dev_id)
        if tracker.image is None:
            raise fail(errno.EPERM)
        kept = tracker.map
        length = min(request.length, kept.count - request.offset, 7)  # it may give less than was asked for
        ctypes.memmove(request.buff, bytes(kept.read[request.offset : request.offset + length]), length)
        return length

    def _mark(self, request: v2.TrackerMarkDirtyBlocks) -> None:
        for one in (common.Sectors * request.count).from_address(request.dirty_blocks_array):
            self._tracker(request.dev_id).map.mark(one.offset * SECTOR, one.count * SECTOR, both=True)

    def _create_with(self, request: v2.SnapshotCreate) -> None:
        snapshot = Snapshot(0, None)
        for dev in (v2.BlkSnapDev * request.count).from_address(request.dev_id_array):
            path = self.kernel.nodes[dev.mj, dev.mn]
            tracker = self.trackers.setdefault(path, Tracker(self.kernel.disks[path]))
            if tracker.snapshot is not None:
                raise fail(errno.EBUSY)
            tracker.snapshot = snapshot
            snapshot.trackers.append(tracker)
        snapshot.events.append((v5.EventCode.LOW_FREE_SPACE, (2048).to_bytes(8, "little")))
        self.snapshots[snapshot.id] = snapshot
        request.id = common.Uuid.of(str(snapshot.id))

    def _append_ranges(self, request: v2.SnapshotAppendStorage) -> None:
        snapshot = self._find(request.id, errno.ESRCH)
        ranges = (common.Sectors * request.count).from_address(request.ranges)
        snapshot.capacity += sum(one.count for one in ranges) * SECTOR
        snapshot.told = False

    def _collect_images(self, request: v2.SnapshotCollectImages) -> None:
        snapshot = self._find(request.id, errno.ESRCH)
        if not snapshot.taken:
            raise fail(errno.ENODEV)
        room = (v2.ImageInfo * request.count).from_address(request.image_info_array)
        for info, tracker in zip(room, snapshot.trackers, strict=False):
            info.orig_dev_id = tracker.disk.number
            info.image_dev_id = (252, tracker.disk.number[1])
        request.count = len(snapshot.trackers)


__all__ = ["CHUNK", "CURRENT", "V5", "V6", "V7", "FakeBlksnap", "FakeTracker"]
