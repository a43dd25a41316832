# SPDX-License-Identifier: Apache-2.0
"""blksnap from v3 on: a filter on the block device, which is also asked for its map and its image."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Sequence

from stasis.blksnap.drivers.base import DriverEvent, Held, Image, Tracked
from stasis.blksnap.drivers.blksnap import BlksnapDriver, ModuleMap, Numbers, as_sectors
from stasis.blksnap.drivers.feeding import Feeder
from stasis.blksnap.drivers.generations import FILTER_NAME, Generation, Storage
from stasis.blksnap.kernel import Kernel
from stasis.blksnap.uapi import common, current, v5, v7
from stasis.blksnap.uapi.common import SECTOR, Uuid
from stasis.blksnap.uapi.current import Command
from stasis.errors import StasisError, StorageError, UnsupportedError

__all__ = ["FilterDriver"]

MAP_PORTION = 32 << 10
"""Bytes of a map asked for at once, as the module's own tool does."""


class FilterDriver(BlksnapDriver):
    """A blksnap module with BLKFILTER requests."""

    def __init__(self, kernel: Kernel, control: str, generation: Generation, version: str) -> None:
        super().__init__(kernel, control)
        self.generation = generation
        self.version = f"{version}, interface {generation.label}"
        self.numbers = Numbers(generation.destroy, generation.take, generation.collect, generation.wait,
                               generation.events)
        self._feeder = Feeder(kernel, self._append)

    # -- devices ----------------------------------------------------------------------------------

    def _device_call(self, call: str, path: str, request: int, argument: ctypes.Structure) -> int:
        try:
            with self.kernel.open(path) as fd:
                return self.kernel.ioctl(fd, call, request, argument)
        except OSError as error:
            raise self.failed(call, path, error) from error

    def _control(self, call: str, path: str, command: Command, option: ctypes.Structure) -> None:
        """One command to the filter. The option's length does not come back, so nothing relies on it."""
        self._device_call(call, path, self.generation.ctl, common.FilterCtl(
            name=FILTER_NAME, cmd=command, optlen=ctypes.sizeof(option), opt=ctypes.addressof(option)))

    def attach(self, device: Tracked) -> None:
        """See Driver. A filter that is there already is taken over with its map."""
        argument = (current.FilterAttach(name=FILTER_NAME) if self.generation.attach_options
                    else common.FilterName(name=FILTER_NAME))
        try:
            self._device_call("attach", device.path, self.generation.attach, argument)
        except StasisError as error:
            if error.errno != errno.EALREADY:
                raise
        self.update_map(device, held=False)

    def detach(self, device: Tracked) -> None:
        """See Driver."""
        self._device_call("detach", device.path, self.generation.detach, common.FilterName(name=FILTER_NAME))

    def module_map(self, device: Tracked) -> ModuleMap:
        """See BlksnapDriver."""
        info = common.CbtInfo()
        self._control("cbtinfo", device.path, Command.CBTINFO, info)
        return ModuleMap(info.device_capacity, info.block_size, info.block_count, str(info.generation_id),
                         info.changes_number)

    def read_module_map(self, device: Tracked, info: ModuleMap) -> bytes:
        """See BlksnapDriver. No portion reaches beyond the end: the module does not refuse that in time."""
        changes = ctypes.create_string_buffer(info.block_count)
        for offset in range(0, info.block_count, MAP_PORTION):
            length = min(MAP_PORTION, info.block_count - offset)
            self._control("cbtmap", device.path, Command.CBTMAP, common.CbtMap(
                offset=offset, length=length, buffer=ctypes.addressof(changes) + offset))
        return changes.raw

    def mark(self, device: Tracked, ranges: Sequence[tuple[int, int]]) -> None:
        """See Driver. One range per call: modules from before March 2024 apply the first one over and over."""
        for offset, length in ranges:
            if length <= 0:
                continue  # the module would take a count of 0 at sector 0 for the whole device
            sectors = as_sectors([(offset, length)])
            self._control("cbtdirty", device.path, Command.CBTDIRTY, common.CbtDirty(
                count=1, dirty_sectors=ctypes.addressof(sectors)))

    # -- snapshots --------------------------------------------------------------------------------

    def create(self, storage: str, limit: int | None, devices: Sequence[Tracked]) -> Held:
        """See Driver."""
        held = Held("", storage, limit)
        if self.generation.storage is Storage.PATH:
            self._create_by_path(held)
        elif self.generation.storage is Storage.DESCRIPTOR:
            self._create_by_descriptor(held)
        else:
            made = Uuid()
            self.control_call("create", storage, self.generation.create, made)
            held.uuid = str(made)
        with self.undone(held):
            if self.generation.storage is Storage.RANGES:
                self._feeder.begin(held, BlksnapDriver.next_event(self, held, 1))
            for device in devices:
                self.add(held, device)
        return held

    def _create_by_path(self, held: Held) -> None:
        path = ctypes.create_string_buffer(os.fsencode(held.storage))
        request = current.SnapshotCreate(diff_storage_limit_sect=_limit(held) // SECTOR,
                                         diff_storage_filename=ctypes.addressof(path))
        self.control_call("create", held.storage, self.generation.create, request)
        held.uuid = str(request.id)

    def _create_by_descriptor(self, held: Held) -> None:
        fd = _open_storage(held.storage)
        try:
            request = v7.SnapshotCreateV6(diff_storage_limit_sect=_limit(held) // SECTOR, diff_storage_fd=fd)
            self.control_call("create", held.storage, self.generation.create, request)
        finally:
            os.close(fd)  # the module holds the file by itself
        held.uuid = str(request.id)

    def add(self, held: Held, device: Tracked) -> None:
        """See Driver. Asked a second time the module must say that the device is there.

        It says that all is well, and does nothing, where the device holds the difference storage.
        """
        argument = common.SnapshotAdd(id=Uuid.of(held.uuid))
        self._control("add", device.path, Command.SNAPSHOTADD, argument)
        try:
            self._control("add", device.path, Command.SNAPSHOTADD, argument)
        except StasisError as error:
            if error.errno == errno.EALREADY:
                return
            raise
        raise StorageError(f"blksnap refuses add of {device.path}: it holds the difference storage {held.storage}",
                           hint="name a storage on another disk", errno=errno.EBUSY)

    def released(self, held: Held) -> None:
        """See BlksnapDriver."""
        self._feeder.end(held, held.notes.get("images", ()))

    def image(self, held: Held, device: Tracked) -> Image:
        """See Driver. The module leaves the name alone where there is no image."""
        info = common.SnapshotInfo()
        self._control("info", device.path, Command.SNAPSHOTINFO, info)
        name = info.image.decode(errors="replace")
        return Image(str(self.kernel.dev / name) if name else None, -abs(info.error_code))

    def next_event(self, held: Held, timeout_ms: int) -> DriverEvent | None:
        """See Driver. Where storage is handed over bit by bit, a call for more is answered here."""
        event = super().next_event(held, timeout_ms)
        if event is not None and event.name == "low_space":
            return self._feeder.feed(held, event)
        return event

    def _append(self, held: Held, number: tuple[int, int], ranges: Sequence[tuple[int, int]]) -> None:
        """Hand over ranges (offset, length) in bytes of a device as difference storage."""
        path = ctypes.create_string_buffer(os.fsencode(self.kernel.node(*number)))
        array = as_sectors(ranges)
        self.control_call("append", held.uuid, v5.IOCTL_BLKSNAP_SNAPSHOT_APPEND_STORAGE, v5.SnapshotAppendStorage(
            id=Uuid.of(held.uuid), bdev_path=ctypes.addressof(path), bdev_path_size=len(path), count=len(ranges),
            ranges=ctypes.addressof(array)))


def _limit(held: Held) -> int:
    """The limit in bytes; what is free in the storage where none was named."""
    if held.limit is not None:
        return held.limit
    try:
        info = os.stat(held.storage)
        if stat.S_ISBLK(info.st_mode):
            return 1 << 62  # a block device is used whole, whatever the limit
        space = os.statvfs(held.storage)
    except OSError as error:
        raise StorageError(f"{held.storage} cannot be used: {error.strerror}", errno=error.errno or 0) from error
    return (info.st_size if stat.S_ISREG(info.st_mode) else 0) + space.f_bavail * space.f_frsize


def _open_storage(path: str) -> int:
    """The difference storage opened as v6 wants it: an unnamed file in a directory, a file, or a block device."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return os.open(path, os.O_RDWR | os.O_TMPFILE | os.O_EXCL | os.O_CLOEXEC, 0o600)
        exclusive = os.O_EXCL if stat.S_ISBLK(mode) else 0
        return os.open(path, os.O_RDWR | exclusive | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise UnsupportedError(f"the file system of {path} has no unnamed files", hint="name a file") from error
        raise StorageError(f"{path} cannot be used: {error.strerror}", errno=error.errno or 0,
                           hint="name a directory, file or block device") from error
