# SPDX-License-Identifier: Apache-2.0
"""What a daemon does when it starts: adopt what outlived an earlier one, serve what was remembered, undo half a take.

Workers and image servers go on when a daemon dies. The snapshots' registry lies in the run directory; which of them is
still true is told by the workers themselves.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stasis.block.diffstorage import DiffStorage
from stasis.block.snapshot import SnapshotState
from stasis.daemon import sockets, statefile
from stasis.daemon.child import Child, spawned
from stasis.daemon.devices import DeviceKeeper
from stasis.daemon.image import ImageServer
from stasis.daemon.paths import Directories
from stasis.daemon.served import STOP_TIMEOUT
from stasis.daemon.snapshot import RECORD, Member, Snapshot, image_export
from stasis.daemon.snapshots import SnapshotKeeper
from stasis.errors import StasisError
from stasis.linux import process

__all__ = ["recover"]

log = logging.getLogger(__name__)


@dataclass
class _Found:
    """What the adopted workers said: snapshot and its state by device, and a storage descriptor by snapshot."""

    held: dict[str, tuple[str, str]] = field(default_factory=dict)
    storage: dict[str, int] = field(default_factory=dict)

    def enter(self, name: str, hello: dict[str, Any], storage_fd: int | None) -> None:
        uuid = hello.get("snapshot")
        if uuid:
            self.held[name] = (str(uuid), str(hello.get("snapshot_state")))
        if storage_fd is not None and (not uuid or self.storage.setdefault(str(uuid), storage_fd) != storage_fd):
            os.close(storage_fd)


def recover(devices: DeviceKeeper, snapshots: SnapshotKeeper) -> None:
    """Bring registry and processes together. What fails is logged, and shown by the devices and snapshots."""
    found = _Found()
    orphans = []
    remembered = devices.remembered()
    _end_strangers(devices.directories, {device.name for device in remembered})
    for device in remembered:
        adopted = devices.adopt(device)
        if adopted is not None:
            found.enter(device.name, *adopted)
        else:
            orphans.append(device)
    directories = sorted(snapshots.directories.snapshots.iterdir())
    _end_images(directories, {device.name for device in orphans})
    for device in orphans:
        devices.serve_again(device)
    for directory in directories:
        _recover_snapshot(snapshots, directory, found)
    _drop_unknown(devices, snapshots, found)
    for fd in found.storage.values():
        os.close(fd)
    _remove_stale_sockets(devices, snapshots)


def _remove_stale_sockets(devices: DeviceKeeper, snapshots: SnapshotKeeper) -> None:
    """Of images whose take or end a daemon did not finish."""
    exports = set(devices.devices) | devices.tracers.exports()
    for snapshot in snapshots.snapshots.values():
        exports.update(image_export(name, snapshot.id) for name in snapshot.members)
    for path in (devices.directories.run / "nbd").glob("*.sock"):
        if path.stem not in exports:
            path.unlink()


def _end_strangers(directories: Directories, names: set[str]) -> None:
    """Processes that a daemon started and died before it noted them, or before it finished the attach they are for.

    Nobody was told of them, and they hold the origin.
    """
    known = _noted(directories, names)
    for pid in spawned(directories.run / "workers"):
        with contextlib.suppress(ProcessLookupError):
            if pid not in known:
                child = Child(pid)
                log.warning("process %d, of which an earlier daemon left no note, is ended", pid)
                child.stop(STOP_TIMEOUT)
                child.close()


def _noted(directories: Directories, names: set[str]) -> set[int]:
    """Pids of the workers of these devices and of all image servers as they were noted, and of what they forked."""
    pids = set()
    for name in names:
        with contextlib.suppress(StasisError, FileNotFoundError):
            pids.add(int(statefile.read(directories.runtime_of(name), "remove it").get("pid", 0)))
    for directory in directories.snapshots.iterdir():
        with contextlib.suppress(StasisError, FileNotFoundError):
            pids.update(member.image_pid or 0 for member in Snapshot.load(directory).members.values())
    return pids.union(*(process.children(pid) for pid in pids))


def _end_images(directories: list[Path], names: set[str]) -> None:
    """An image server has its origin open, and with it the lock on it, which the next worker must get."""
    for directory in directories:
        with contextlib.suppress(StasisError, FileNotFoundError):
            for member in Snapshot.load(directory).members.values():
                child = Child.adopt(member.image_pid or 0, member.image_start_time)
                if child is not None and member.name in names:
                    child.kill()
                if child is not None:
                    child.close()


def _recover_snapshot(keeper: SnapshotKeeper, directory: Path, found: _Found) -> None:
    if not (directory / RECORD).exists():
        log.warning("the snapshot %s, whose creation or end was not finished, is removed", directory.name)
        shutil.rmtree(directory, ignore_errors=True)
        return
    try:
        snapshot = Snapshot.load(directory)
        if snapshot.is_taken:
            keeper.snapshots[snapshot.id] = snapshot
            _adopt(keeper, snapshot, found)
        elif snapshot.state is SnapshotState.CREATED and snapshot.storage != "descriptor":
            keeper.open_storage(snapshot, None)
            keeper.snapshots[snapshot.id] = snapshot
        else:
            log.error("the snapshot %s was %s when the daemon died; it is removed", snapshot.id, snapshot.state.value)
            keeper.remove(snapshot)
    except (StasisError, OSError) as error:
        log.error("a snapshot is removed: %s", error)
        keeper.snapshots.pop(directory.name, None)
        shutil.rmtree(directory, ignore_errors=True)


def _adopt(keeper: SnapshotKeeper, snapshot: Snapshot, found: _Found) -> None:
    fd = found.storage.pop(snapshot.id, None)
    if fd is not None:
        snapshot.diff = DiffStorage(fd, snapshot.header_path)
    for member in snapshot.members.values():
        if member.name not in keeper.devices.devices:
            member.error_code = member.error_code or -errno.ENODEV
            continue
        image = _image(keeper, snapshot, member)
        if fd is None or found.held.get(member.name) != (snapshot.id, "taken"):  # said before the image is served again
            keeper.device_lost(member.name, errno.ESTALE, "its worker died while no daemon held the device")
        _serve_image(keeper, snapshot, member, image)


def _image(keeper: SnapshotKeeper, snapshot: Snapshot, member: Member) -> ImageServer:
    tcp = None
    if snapshot.tcp and member.tcp:
        options = sockets.parse_address(snapshot.tcp, snapshot.tls_certificates, snapshot.tls_psk)
        tcp = sockets.TcpOptions(options.host, member.tcp[1], options.certificates, options.psk)
    return keeper.images.make(snapshot, member, tcp)


def _serve_image(keeper: SnapshotKeeper, snapshot: Snapshot, member: Member, image: ImageServer) -> None:
    child = Child.adopt(member.image_pid or 0, member.image_start_time)
    if snapshot.diff is None:
        if child is not None:
            child.kill()
        log.error("the image %s has lost its storage", image_export(member.name, snapshot.id))
    elif child is not None:
        image.adopt(child, *keeper.images.configuration(snapshot, member))
    else:
        image.start(*keeper.images.configuration(snapshot, member))


def _drop_unknown(devices: DeviceKeeper, snapshots: SnapshotKeeper, found: _Found) -> None:
    """Workers that protect a snapshot which nobody knows any more, or which was never taken, let go of it."""
    for name, (uuid, state) in found.held.items():
        channel = devices.devices[name].channel
        if channel is None or (state == "taken" and uuid in snapshots.snapshots):
            continue
        with contextlib.suppress(StasisError):
            channel.call("abort") if state != "taken" else channel.call("drop", snapshot=uuid)
