# SPDX-License-Identifier: Apache-2.0
"""dattobd behind the interface of the other drivers.

The module knows one device per minor number, which is either a snapshot or "incremental". Attaching makes a snapshot
and lets it go at once, so that changes are noted from then on; taking one turns the device into a snapshot again, and
leaves the COW file of the epoch that ended, whose index says what changed in it. Numbers and map are kept here, since
the module has neither. Discards are noted by no version of it: the kernel's count of them tells whether there were any,
and then the epoch says nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stasis.blksnap.drivers.base import Driver, Held, Image, Tracked
from stasis.blksnap.kernel import Kernel
from stasis.blksnap.uapi import dattobd
from stasis.block.changemap import ChangeMap
from stasis.block.mapimport import ForeignMap, store
from stasis.block.settings import Settings, tracking_block_shift
from stasis.datto.cowreader import CowReader
from stasis.datto.layout import Geometry
from stasis.errors import (
    BusyError,
    NotFoundError,
    StasisError,
    StateError,
    StorageError,
    UnsupportedError,
    UsageError,
)

__all__ = ["DattoDriver"]

MIB = 1 << 20
ROOM_MIB = 64
"""What a COW file has at least beside its index, for what is written between setting it up and tracking."""
DEFAULT_SHARE = 10
"""Percent of the device that a COW file takes where no limit is given: the module's own default."""
HIGHEST_MINOR = 255
LAST_NUMBER = 254
LATER = "the module keeps what changed since the last snapshot to itself; everything counts as changed since"


class DattoDriver(Driver):
    """The dattobd module. A device's notes: minor, cow (path), series, generation, number, marked, discarded."""

    name = "dattobd"
    storage_elsewhere = False
    has_events = False

    def __init__(self, kernel: Kernel, control: str) -> None:
        super().__init__(kernel, control)
        try:
            self.version = Path("/sys/module/dattobd/version").read_text().strip()
        except OSError:
            self.version = "of unknown version"

    def _call(self, call: str, subject: str, request: int, argument: ctypes.Structure) -> None:
        try:
            with self.kernel.open(self.control) as fd:
                self.kernel.ioctl(fd, call, request, argument)
        except OSError as error:
            raise self.failed(call, subject, error) from error

    def free_minor(self) -> int:
        """The lowest minor number that is free. BusyError if none is."""
        minor = dattobd.Minor()
        self._call("free", "a minor number", dattobd.IOCTL_GET_FREE, minor)
        return int(minor.minor)

    def _info(self, minor: int) -> dattobd.Info:
        info = dattobd.Info(minor=minor)
        self._call("datto-info", f"minor {minor}", dattobd.IOCTL_DATTOBD_INFO, info)
        return info

    def _find(self, path: str) -> dattobd.Info | None:
        """The module's own entry of a device, whoever set it up."""
        for minor in range(HIGHEST_MINOR):
            try:
                info = self._info(minor)
            except StasisError as error:
                if error.errno == errno.EINVAL:
                    return None  # there are no more
                continue
            if os.path.realpath(os.fsdecode(info.bdev)) == os.path.realpath(path):
                return info
        return None

    # -- devices ----------------------------------------------------------------------------------

    def attach(self, device: Tracked) -> None:
        """See Driver. The device's file system must be mounted for writing."""
        device.size = self.kernel.size(device.path)
        info = self._find(device.path)
        if info is None or not self._is_ours(device, info):
            self._begin(device, info)
        self.update_map(device, held=False)

    def _begin(self, device: Tracked, info: dattobd.Info | None) -> None:
        """Track a device from now on, or take one over that the module tracks already; what changed before is lost."""
        mount, discarded = self._mount_point(device), self.kernel.discarded(device.path)
        if info is not None and info.state & (dattobd.State.SNAPSHOT | dattobd.State.UNVERIFIED):
            raise BusyError(f"dattobd has {device.path} as its minor {info.minor} already, in state {info.state}",
                            hint=f"dbdctl destroy {info.minor}, or dbdctl transition-to-incremental {info.minor}")
        is_new = info is None
        info = info or self._set_up(device, mount)
        device.notes.update(minor=info.minor, cow=str(mount / os.fsdecode(info.cow).lstrip("/")), marked=[],
                            series=bytes(info.uuid).hex(), number=0, generation=str(uuid.uuid4()),
                            discarded=discarded)
        device.map_path.unlink(missing_ok=True)
        if is_new:
            self._track(device)

    @staticmethod
    def _is_ours(device: Tracked, info: dattobd.Info) -> bool:
        notes = device.notes
        return notes.get("minor") == info.minor and notes.get("series") == bytes(info.uuid).hex()

    def _mount_point(self, device: Tracked) -> Path:
        target = self.kernel.mount_point(device.path)
        if target is None:
            raise UsageError(f"{device.path} is not mounted for writing",
                             hint="dattobd protects a mounted file system and keeps its COW file on it")
        return Path(target)

    def _set_up(self, device: Tracked, mount: Path) -> dattobd.Info:
        minor, cow = self.free_minor(), _cow_name(mount, device)
        self._with_paths("setup", device, cow, dattobd.IOCTL_SETUP_SNAP, dattobd.SetupParams(
            fallocated_space=_index_mib(device.size) + ROOM_MIB, minor=minor))
        return self._info(minor)

    def _with_paths(self, call: str, device: Tracked, cow: Path, request: int, argument: Any) -> None:
        """A request that takes the COW file's path, and the device's where it has a place for it."""
        kept = [ctypes.create_string_buffer(os.fsencode(path)) for path in (device.path, cow)]
        argument.cow = ctypes.addressof(kept[1])
        if hasattr(argument, "bdev"):
            argument.bdev = ctypes.addressof(kept[0])
        self._call(call, device.path, request, argument)

    def _track(self, device: Tracked) -> None:
        minor = int(device.notes["minor"])
        try:
            self._call("incremental", device.path, dattobd.IOCTL_TRANSITION_INC, dattobd.Minor(minor))
        except StasisError:
            with contextlib.suppress(StasisError):
                if not self._info(minor).state & dattobd.State.SNAPSHOT:
                    return  # it does track, but has failed, which the map will say
            raise

    def detach(self, device: Tracked) -> None:
        """See Driver."""
        minor = int(device.notes["minor"])
        self._call("datto-destroy", device.path, dattobd.IOCTL_DESTROY, dattobd.Minor(minor))
        with contextlib.suppress(OSError):
            os.unlink(device.notes["cow"])  # the module leaves it while the file system is not mounted

    def _checked(self, device: Tracked) -> dattobd.Info:
        """The module's entry of a device. NotFoundError if it has another one, or none, under this number."""
        info = self._info(int(device.notes["minor"]))
        if not self._is_ours(device, info):
            raise NotFoundError(f"dattobd does not track {device.path} any more", hint="attach it again")
        return info

    def update_map(self, device: Tracked, *, held: bool) -> None:
        """See Driver."""
        info = self._checked(device)
        broken = f"dattobd has failed: {os.strerror(-info.error)}" if info.error else ""
        self._store(device, self._changes(device), held, broken)

    def _store(self, device: Tracked, changes: bytes | None, held: bool, broken: str = "") -> None:
        store(device.map_path, ForeignMap(
            device.size, _shift(device), str(device.notes["generation"]), int(device.notes["number"]), changes, held,
            broken or LATER, broken=bool(broken)))

    @staticmethod
    def _changes(device: Tracked) -> bytes | None:
        """The changes up to the last snapshot, as they were stored; None if that is another generation's file."""
        if not device.map_path.exists():
            return bytes(_blocks(device)) if device.notes["number"] == 0 else None
        try:
            with ChangeMap.open_readonly(device.map_path) as stored:
                same = stored.generation == device.notes["generation"] and len(stored.held) == _blocks(device)
                return bytes(stored.held) if same else None
        except StateError:
            return None

    def mark(self, device: Tracked, ranges: Sequence[tuple[int, int]]) -> None:
        """See Driver. The module has no such request: they are added to what it tells, now and at the next take."""
        changes = self._changes(device)
        if changes is not None and device.notes["number"]:
            changes = _marked(device, changes, ranges, int(device.notes["number"]))
        device.notes["marked"] = [*device.notes["marked"], *(list(one) for one in ranges)]
        with ChangeMap.open_readonly(device.map_path) as stored:
            held = stored.is_held
        self._store(device, changes, held)

    # -- snapshots --------------------------------------------------------------------------------

    def create(self, storage: str, limit: int | None, devices: Sequence[Tracked]) -> Held:
        """See Driver. The storage is a directory on the device's own file system."""
        held = Held(str(uuid.uuid4()), storage, limit)
        for device in devices:
            self.add(held, device)
        return held

    def add(self, held: Held, device: Tracked) -> None:
        """See Driver. One device is all that a snapshot of this module holds."""
        if held.notes.get("device"):
            raise UnsupportedError("dattobd takes a snapshot of one device at a time", hint="make one for each device")
        mount = self._mount_point(device)
        if not os.path.isdir(held.storage) or os.stat(held.storage).st_dev != os.stat(mount).st_dev:
            raise StorageError(f"{held.storage} is no directory on {mount}", errno=errno.EINVAL,
                               hint=f"dattobd keeps old contents on the protected file system: --storage {mount}")
        held.notes["device"] = device.name

    def take(self, held: Held, devices: Sequence[Tracked]) -> None:
        """See Driver."""
        if not devices:
            raise self.failed("snapshot", held.uuid, OSError(errno.EINVAL, ""))
        (device,) = devices
        before, old, discarded = self._checked(device), str(device.notes["cow"]), self.kernel.discarded(device.path)
        cow = _cow_name(Path(held.storage), device, other=old)
        self._with_paths("snapshot", device, cow, dattobd.IOCTL_TRANSITION_SNAP, dattobd.TransitionSnapParams(
            fallocated_space=_snapshot_mib(device.size, held.limit), minor=device.notes["minor"]))
        device.notes["cow"] = str(cow)
        self._end_epoch(device, self._changed(device, old, before))
        device.notes["discarded"] = discarded
        with contextlib.suppress(OSError):
            os.unlink(old)

    def _changed(self, device: Tracked, cow: str, before: dattobd.Info) -> list[tuple[int, int]] | None:
        """What the COW file of the epoch that ended says; None where it cannot be believed, or does not have it all."""
        discarded = self.kernel.discarded(device.path)
        if discarded is None or discarded != device.notes["discarded"]:
            return None
        try:
            with CowReader(cow, device.size) as reader:
                same = reader.header.uuid == bytes(before.uuid) and reader.header.seqid == before.seqid
                return list(reader.extents()) if same and not before.error else None
        except (StasisError, OSError):
            return None

    def _end_epoch(self, device: Tracked, changed: list[tuple[int, int]] | None) -> None:
        """Raise the number, and enter what changed; begin a new generation where that is not known, or at the end."""
        notes = device.notes
        # At number 0 everything counts as changed for whoever asks; nothing has changed since.
        changes = self._changes(device) if notes["number"] else bytes(_blocks(device))
        number = int(notes["number"]) + 1
        if changed is None or changes is None or number > LAST_NUMBER:
            notes.update(generation=str(uuid.uuid4()), number=0)
            changes = None
        else:
            notes["number"] = number
            changes = _marked(device, changes, [*changed, *notes["marked"]], number)
        notes["marked"] = []
        self._store(device, changes, True)

    def destroy(self, held: Held, devices: Sequence[Tracked]) -> None:
        """See Driver. BusyError while somebody has the image open; of a failed device nothing is left to let go of."""
        for device in devices:
            info = self._checked(device)
            if info.state & dattobd.State.SNAPSHOT and not info.error:
                self._track(device)

    def exists(self, held: Held) -> bool:
        """See Driver. The module knows devices only; their images tell whether the snapshot is still there."""
        return True

    def image(self, held: Held, device: Tracked) -> Image:
        """See Driver."""
        info = self._checked(device)
        is_snapshot = info.state & dattobd.State.SNAPSHOT
        return Image(str(self.kernel.dev / f"datto{info.minor}") if is_snapshot else None, -abs(info.error))


def _cow_name(directory: Path, device: Tracked, other: str = "") -> Path:
    """Name of a COW file; the next one must not have the name of the one that is in use."""
    first, second = (directory / f".stasis-{device.name}.{letter}.cow" for letter in "ab")
    return second if str(first) == other else first


def _index_mib(size: int) -> int:
    return -(-Geometry(size).data_offset // MIB)


def _snapshot_mib(size: int, limit: int | None) -> int:
    """Size of a COW file: what the limit allows beside the index, or the module's default share, and never too small.

    Left to itself the module would take as much as for tracking, or what is left of a truncated file.
    """
    room = -(-limit // MIB) if limit is not None else max(ROOM_MIB, size * DEFAULT_SHARE // 100 // MIB)
    return _index_mib(size) + max(room, 1)


def _shift(device: Tracked) -> int:
    return tracking_block_shift(device.size, Settings())


def _blocks(device: Tracked) -> int:
    return max(1, -(-device.size >> _shift(device)))


def _marked(device: Tracked, changes: bytes, ranges: Sequence[Sequence[int]], number: int) -> bytes:
    """The map with the blocks of some ranges (offset, length) raised to `number`."""
    marked, shift = bytearray(changes), _shift(device)
    for offset, length in ranges:
        first, end = offset >> shift, -(-(offset + length) >> shift)
        marked[first:end] = bytes((number,)) * (min(end, len(marked)) - first)
    return bytes(marked)
