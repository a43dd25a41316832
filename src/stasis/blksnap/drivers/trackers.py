# SPDX-License-Identifier: Apache-2.0
"""blksnap v1 and v2: everything on the control node, devices by number.

These have no request to attach or to add: a device is tracked from the first snapshot on that it is in, and a snapshot
has the devices it was created with.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence

from stasis.blksnap.drivers.base import DriverEvent, Held, Image, Tracked
from stasis.blksnap.drivers.blksnap import BlksnapDriver, ModuleMap, Numbers, as_sectors
from stasis.blksnap.drivers.feeding import Feeder
from stasis.blksnap.kernel import Kernel
from stasis.blksnap.uapi import v2
from stasis.blksnap.uapi.common import Uuid
from stasis.blksnap.uapi.v5 import EventCode
from stasis.errors import NotFoundError, StasisError, UnsupportedError, UsageError

__all__ = ["TrackerDriver"]

MAP_PORTION = 1 << 20
MOST_DEVICES = 4096


class TrackerDriver(BlksnapDriver):
    """A blksnap module with BLK_SNAP requests."""

    numbers = Numbers(
        v2.IOCTL_BLK_SNAP_SNAPSHOT_DESTROY, v2.IOCTL_BLK_SNAP_SNAPSHOT_TAKE, v2.IOCTL_BLK_SNAP_SNAPSHOT_COLLECT,
        v2.IOCTL_BLK_SNAP_SNAPSHOT_WAIT_EVENT,
        {EventCode.LOW_FREE_SPACE: "low_space", EventCode.CORRUPTED: "corrupted"},
    )

    def __init__(self, kernel: Kernel, control: str, version: str) -> None:
        super().__init__(kernel, control)
        self.version = f"{version}, interface v2"
        self._feeder = Feeder(kernel, self._append)

    # -- devices ----------------------------------------------------------------------------------

    def _number(self, device: Tracked) -> tuple[int, int]:
        try:
            number = self.kernel.number(device.path)
        except OSError as error:
            raise self.failed("attach", device.path, error) from error
        if number is None:
            raise UsageError(f"{device.path} is no block device", hint="the module tracks block devices only")
        return number

    def attach(self, device: Tracked) -> None:
        """See Driver. A snapshot that is never taken makes the module track the device."""
        number = self._number(device)
        if self._find(number) is None:
            self._destroy(self._create([number], device.path))
        if self._find(number) is None:
            raise UnsupportedError("this blksnap module tracks a device from its first snapshot on only",
                                   hint="a module of a later generation can be told to")
        self.update_map(device, held=False)

    def detach(self, device: Tracked) -> None:
        """See Driver."""
        major, minor = self._number(device)
        self.control_call("detach", device.path, v2.IOCTL_BLK_SNAP_TRACKER_REMOVE, v2.BlkSnapDev(major, minor))

    def _find(self, number: tuple[int, int]) -> v2.CbtInfo | None:
        room = 16
        while True:
            array = (v2.CbtInfo * room)()
            request = v2.TrackerCollect(count=room, cbt_info_array=ctypes.addressof(array))
            try:
                self.control_call("collect", "its devices", v2.IOCTL_BLK_SNAP_TRACKER_COLLECT, request)
            except StasisError as error:
                if error.errno == errno.ENODATA:
                    return None  # some say so where there is none at all
                if error.errno != errno.ENOBUFS or room >= MOST_DEVICES:
                    raise
                room *= 2
                continue
            return next((info for info in array if (info.dev_id.mj, info.dev_id.mn) == number and info.blk_size), None)

    def module_map(self, device: Tracked) -> ModuleMap:
        """See BlksnapDriver."""
        info = self._find(self._number(device))
        if info is None:
            raise NotFoundError(f"blksnap does not track {device.path} any more", hint="attach it again")
        return ModuleMap(info.device_capacity, info.blk_size, info.blk_count, str(info.generation_id), info.snap_number)

    def read_module_map(self, device: Tracked, info: ModuleMap) -> bytes:
        """See BlksnapDriver. Without a snapshot the module shows nothing (EPERM): everything may have changed."""
        changes = ctypes.create_string_buffer(info.block_count)
        offset = 0
        while offset < info.block_count:
            try:
                got = self._read_portion(device, changes, offset)
            except StasisError as error:
                if error.errno == errno.EPERM:
                    return bytes((max(info.number, 1),)) * info.block_count
                raise
            if got <= 0:
                raise StasisError(f"blksnap gives {offset} of {info.block_count} bytes of the map of {device.path}",
                                  errno=errno.EIO)
            offset += got
        return changes.raw

    def _read_portion(self, device: Tracked, changes: ctypes.Array[ctypes.c_char], offset: int) -> int:
        """Read the map from block `offset` on; how much came, which may be less than was asked for."""
        major, minor = self._number(device)
        request = v2.TrackerReadCbtBitmap(
            dev_id=v2.BlkSnapDev(major, minor), offset=offset, length=min(MAP_PORTION, len(changes) - offset),
            buff=ctypes.addressof(changes) + offset)
        return self.control_call("cbtmap", device.path, v2.IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, request)

    def mark(self, device: Tracked, ranges: Sequence[tuple[int, int]]) -> None:
        """See Driver."""
        major, minor = self._number(device)
        for offset, length in ranges:
            if length <= 0:
                continue
            sectors = as_sectors([(offset, length)])
            self.control_call("cbtdirty", device.path, v2.IOCTL_BLK_SNAP_TRACKER_MARK_DIRTY_BLOCKS,
                              v2.TrackerMarkDirtyBlocks(dev_id=v2.BlkSnapDev(major, minor), count=1,
                                                        dirty_blocks_array=ctypes.addressof(sectors)))

    # -- snapshots --------------------------------------------------------------------------------

    def _create(self, numbers: Sequence[tuple[int, int]], subject: str) -> str:
        array = (v2.BlkSnapDev * len(numbers))(*(v2.BlkSnapDev(*number) for number in numbers))
        request = v2.SnapshotCreate(count=len(numbers), dev_id_array=ctypes.addressof(array))
        self.control_call("create", subject, v2.IOCTL_BLK_SNAP_SNAPSHOT_CREATE, request)
        return str(request.id)

    def _destroy(self, uuid: str) -> None:
        self.control_call("destroy", uuid, self.numbers.destroy, Uuid.of(uuid))

    def create(self, storage: str, limit: int | None, devices: Sequence[Tracked]) -> Held:
        """See Driver. UsageError without a device: none can be added later."""
        if not devices:
            raise UsageError("this blksnap module cannot add devices to a snapshot", hint="name them when creating it")
        held = Held(self._create([self._number(device) for device in devices], storage), storage, limit)
        with self.undone(held):
            self._feeder.begin(held, BlksnapDriver.next_event(self, held, 1))
        return held

    def add(self, held: Held, device: Tracked) -> None:
        """See Driver. Always UnsupportedError."""
        raise UnsupportedError("this blksnap module cannot add devices to a snapshot",
                               hint="destroy it, and name all devices when creating another", errno=errno.ENOTTY)

    def released(self, held: Held) -> None:
        """See BlksnapDriver."""
        self._feeder.end(held, held.notes.get("images", ()))

    def image(self, held: Held, device: Tracked) -> Image:
        """See Driver. This module tells of a lost image by its event alone."""
        array = (v2.ImageInfo * MOST_DEVICES)()
        request = v2.SnapshotCollectImages(id=Uuid.of(held.uuid), count=len(array),
                                           image_info_array=ctypes.addressof(array))
        try:
            self.control_call("collect", held.uuid, v2.IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, request)
        except StasisError as error:
            if error.errno == errno.ENODEV:
                return Image(None)  # it is not taken yet
            raise
        number = self._number(device)
        for info in array:
            if (info.orig_dev_id.mj, info.orig_dev_id.mn) == number and info.image_dev_id.mj:
                return Image(self._node(info.image_dev_id.mj, info.image_dev_id.mn))
        return Image(None)

    def _node(self, major: int, minor: int) -> str:
        try:
            return self.kernel.node(major, minor)
        except OSError as error:
            raise self.failed("collect", f"image {major}:{minor}", error) from error

    def next_event(self, held: Held, timeout_ms: int) -> DriverEvent | None:
        """See Driver."""
        event = super().next_event(held, timeout_ms)
        return self._feeder.feed(held, event) if event is not None and event.name == "low_space" else event

    def _append(self, held: Held, number: tuple[int, int], ranges: Sequence[tuple[int, int]]) -> None:
        """Hand over ranges (offset, length) in bytes of a device as difference storage."""
        array = as_sectors(ranges)
        self.control_call("append", held.uuid, v2.IOCTL_BLK_SNAP_SNAPSHOT_APPEND_STORAGE, v2.SnapshotAppendStorage(
            id=Uuid.of(held.uuid), dev_id=v2.BlkSnapDev(*number), count=len(ranges), ranges=ctypes.addressof(array)))
