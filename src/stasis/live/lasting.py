# SPDX-License-Identifier: Apache-2.0
"""Tracking over a reboot: the map is saved when the file systems are gone, and taken up if nothing wrote in between.

At boot there are two steps. The early one starts the programs before file systems are mounted, when the root may be
read-only, and notes in /run what it saw; the later one decides whether the saved map may be gone on with.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from stasis.block.changemap import ChangeMap
from stasis.errors import NotFoundError, StasisError, StateError
from stasis.linux import fsmarks, mounts
from stasis.live import devicefile, identity, sealing, tracker, tracking
from stasis.live.devicefile import DeviceFile, Record
from stasis.live.tracker import Tracker

__all__ = ["resume", "resume_early", "save"]

Told = list[tuple[str, str]]
"""Name of each device, and what became of it."""

APPEAR_SECONDS = 20.0
"""How long the early step waits for disks that are not there."""
SAVED = "saved"
"""What `save` says of a device whose map can be gone on with."""
TAKEN_UP = "taken up"


@dataclass(frozen=True)
class Sight:
    """What was seen of a device when its programs began to run."""

    mark: str
    """Of its file system; empty if there is none that tells."""
    written: int
    """Sectors written since the device appeared, -1 if not counted."""
    mounted: bool
    """Whether a file system on it was mounted for writing."""


# -- shutdown -----------------------------------------------------------------------------------------


def save(state: Path) -> Told:
    """Save the map of every tracked device whose file system is unmounted; says what became of each.

    That of a mounted one is prepared, if the state directory lies on it, for `sealing.finish`.
    """
    return [(name, _save(state, name)) for name in devicefile.names(state)]


def _save(state: Path, name: str) -> str:
    try:
        with Tracker.open(name, state) as found:
            return _save_map(found, DeviceFile(state, name))
    except StasisError as error:
        return f"not saved: {error.message}"


def _save_map(found: Tracker, files: DeviceFile) -> str:
    found.check()
    if _is_mounted(found.identity.rdev):
        return sealing.prepare(found, files)
    found.turn()
    mark = _mark(found.identity.path)
    if not mark:
        return "not saved: it has no file system that was unmounted in order and would tell of later writes"
    files.write_saved(mark)
    found.changes.finish(tracker.map_identity(found.record))
    if found.count_changed() or _mark(found.identity.path) != mark:
        found.turn()  # takes the clean flag back
        return "not saved: it is written to"
    return SAVED


def _is_mounted(rdev: int) -> bool:
    return any(not mount.read_only for mount in mounts.mounts_of(rdev))


def _mark(path: str) -> str:
    with contextlib.suppress(OSError):
        return fsmarks.read(path)
    return ""


# -- boot ---------------------------------------------------------------------------------------------


def resume_early(state: Path, *, wait: bool = True) -> Told:
    """Start tracking what was tracked before the boot; writes to /run only.

    Waits until the devices are there, or else leaves out those that are not.
    """
    told: Told = []
    if wait:
        _wait_for_devices(state)
    for name in devicefile.names(state):
        try:
            told.append((name, _start_early(DeviceFile(state, name))))
        except NotFoundError as error:
            told.append((name, f"not tracked{'' if wait else ' yet'}: {error.message}"))
        except StasisError as error:
            told.append((name, f"not tracked: {error.message}"))
    return told


def _wait_for_devices(state: Path) -> None:
    """This early, disks are still being found."""
    deadline = time.monotonic() + APPEAR_SECONDS
    for name in devicefile.names(state):
        with contextlib.suppress(StasisError):
            record = DeviceFile(state, name).read()
            while not os.path.exists(record.given) and time.monotonic() < deadline:
                time.sleep(0.05)  # udev makes names in many directories; at boot nobody minds a look at one


def _start_early(files: DeviceFile) -> str:
    record = files.read()
    if record.this_boot or files.early.exists():
        return "tracked already"
    taken = tracking.attach(files, record, write=False)
    _write_early(files, taken, _look(taken))
    return "tracked"


def _look(record: Record) -> Sight:
    who = record.identity
    return Sight(_mark(who.path), identity.read_counters(who), _is_mounted(who.rdev))


def _write_early(files: DeviceFile, record: Record, sight: Sight) -> None:
    files.early.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = files.early.with_suffix(".new")
    temporary.write_text(json.dumps({"record": record.as_dict(), "sight": asdict(sight)}))
    os.replace(temporary, files.early)


def resume(state: Path) -> Told:
    """Go on with the saved maps, or begin new generations, and say which and why."""
    told = []
    for name in devicefile.names(state):
        files = DeviceFile(state, name)
        try:
            lock = files.lock()
            try:
                told.append((name, _resume(files)))
            finally:
                os.close(lock)
        except StasisError as error:
            told.append((name, f"not tracked: {error.message}"))
    return told


def _resume(files: DeviceFile) -> str:
    record = files.read()
    if record.this_boot:
        return "tracked already"
    early = files.read_early()
    if early is None:
        taken = tracking.attach(files, record, write=False)
        sight = _look(taken)
    else:
        taken, sight = early[0], Sight(**early[1])
    changes, reason = _take_up(files, taken, sight)
    # The order matters: a record of this boot beside a map that was not begun yet would make that trusted.
    if changes is None:
        tracker.new_map(files, taken, reason).close()
    else:
        changes.begin("", tracker.map_identity(taken))
        changes.close()
    files.write(taken)
    files.forget_saved()
    files.early.unlink(missing_ok=True)
    return f"new generation: {reason}" if reason else TAKEN_UP


def _take_up(files: DeviceFile, record: Record, sight: Sight) -> tuple[ChangeMap | None, str]:
    try:
        changes = ChangeMap.open(files.map)
    except FileNotFoundError:
        return None, "its map is gone"
    except StateError as error:
        return None, error.message
    saved = files.read_saved() if changes.is_clean else sealing.mark_of(files, changes)
    reason = _distrust(changes, record, saved, sight)
    if not reason:
        sealing.take_up(files, changes, record.identity.rdev)
        return changes, ""
    changes.close()
    return None, reason


def _distrust(changes: ChangeMap, record: Record, saved: str, sight: Sight) -> str:
    """Why a map from before the boot must not be gone on with; empty if it may."""
    if changes.is_broken:
        return str(changes.assumed)
    if not saved:
        return "its map was not saved at the last shutdown"
    if changes.capacity != record.identity.size or changes.block_shift != record.block_shift:
        return f"its size changed from {changes.capacity} to {record.identity.size} bytes"
    if sight.mounted:
        return "it was mounted before tracking began"
    if sight.written != 0:
        return "it was written to before tracking began"
    if sight.mark != saved:
        return "its file system was mounted, checked or replaced since the map was saved"
    return ""
