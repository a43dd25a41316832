# SPDX-License-Identifier: Apache-2.0
"""Which devices are tracked: start, stop, list."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stasis.block import settings as block_settings
from stasis.errors import BusyError, StasisError, UsageError
from stasis.live import devicefile, identity, pins, tracker
from stasis.live.devicefile import DeviceFile, Record
from stasis.live.identity import SECTOR, Identity
from stasis.live.pins import Hooks
from stasis.live.tracker import Tracker

__all__ = ["TrackedDevice", "attach", "inspect", "start", "start_all", "stop", "stop_all", "tracked"]

REST_SECONDS = 10
"""How long to wait for a moment without a write in progress."""


@dataclass(frozen=True)
class TrackedDevice:
    """A tracked device at one moment; sizes in bytes."""

    name: str
    path: str
    size: int
    block_size: int
    generation: str
    change_number: int
    changed_blocks: int
    """Blocks written since the last switch."""
    lost: str
    note: str
    """How this generation began."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def start(device: str, state: Path, *, block_size: int | None = None) -> Tracker:
    """Track a device from now on, with a new generation. The tracker is open.

    BusyError if it is tracked already, NotFoundError, UsageError, UnsupportedError, PermissionDeniedError.
    """
    who = identity.identify(device)
    settings = block_settings.load(state / "settings.json")
    shift = block_settings.tracking_block_shift(who.size, settings, block_size)
    bio_based = identity.takes_bios(who)
    with pins.locked():
        _make_private(state)
    files = DeviceFile(state, who.name)
    lock = files.lock()
    if who.name in devicefile.names(state):
        os.close(lock)
        raise BusyError(f"{device} is tracked already", hint=f"stasis track show {who.name}")
    try:
        record = attach(files, Record(os.path.abspath(device), who, shift, 0, 0, "", bio_based, 0))
        files.write(record)
        tracker.new_map(files, record, "").close()
    except BaseException:
        _forget(files)
        os.close(lock)
        raise
    return Tracker(files, lock)


def start_all(devices: Sequence[str], state: Path, *, block_size: int | None = None) -> list[str]:
    """Track all of these devices from now on, or none of them: if one cannot be, those before it are let go again.

    Their names. The errors of `start`, and UsageError for a device that is named twice.
    """
    _refuse_twice(devices)
    with contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
        names = []
        for device in devices:
            tracker = held.enter_context(start(device, state, block_size=block_size))
            names.append(tracker.identity.name)
            undo.callback(_forget, DeviceFile(state, names[-1]))  # still locked: nobody has a mark of it yet
        undo.pop_all()
    return names


def _refuse_twice(devices: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for device in devices:
        name = identity.identify(device).name
        if name in seen:
            raise UsageError(f"{device} is the same device as {seen[name]}", hint="name each device once")
        seen[name] = device


def _make_private(state: Path) -> None:
    os.makedirs(devicefile.root(state).parent, mode=0o700, exist_ok=True)
    devicefile.root(state).mkdir(mode=0o700, exist_ok=True)


def attach(files: DeviceFile, record: Record, *, write: bool = True) -> Record:
    """Give a device a slot with empty bitmaps, whatever it had; loads the programs if need be.

    Its record is written before the lock is given up, unless the state directory cannot be written yet.
    """
    who = identity.identify(record.given)  # never by its old name of the kernel, which may be another disk's by now
    bio_based, state = identity.takes_bios(who), files.directory.parent.parent
    with pins.locked():
        hooks = _loaded(pins.directory_of(state))
        try:
            for index in _unused(hooks, state, files.name):
                hooks.remove(index)
            misses = tracker.count_misses(hooks)
            slot = hooks.add(files.name, who.disk, who.start // SECTOR, (who.start + who.size) // SECTOR,
                             record.block_shift - 9, bio_based)
            taken = Record(record.given, who, record.block_shift, slot, hooks.id, "", bio_based, misses)
            taken = taken.on(slot, hooks.id, misses)
            if write:
                files.write(taken)
        except PermissionError as error:
            raise pins.explain(error) from error
        finally:
            hooks.close()
    if bio_based:
        _wait_for_rest(who)
    return taken


def _loaded(directory: Path) -> Hooks:
    """The set of programs of a state directory, loaded anew if anything of it is gone."""
    try:
        hooks = Hooks(directory)
    except PermissionError as error:  # not ours to replace
        raise pins.explain(error) from error
    except OSError:
        return Hooks.load(directory)
    if hooks.missing():
        hooks.unload()
        return Hooks.load(directory)
    return hooks


def _unused(hooks: Hooks, state: Path, name: str) -> list[int]:
    """Slots that belong to no device, or to this one."""
    used = set()
    for other in set(devicefile.names(state)) - {name}:
        files = DeviceFile(state, other)
        early = files.read_early()
        try:
            records = [files.read(), *([early[0]] if early else [])]
        except StasisError:
            return []  # one of them may be its
        used |= {record.slot for record in records if record.this_boot and record.table == hooks.id}
    return [index for index in hooks.used_slots() if index not in used]


def _wait_for_rest(who: Identity) -> None:
    """See a moment without a write in progress: one that was queued before tracking began cannot be told at its end.

    BusyError if there is none.
    """
    deadline = time.monotonic() + REST_SECONDS
    while identity.writes_in_progress(who):
        if time.monotonic() > deadline:
            raise BusyError(f"{who.path} is written without a pause", hint="start tracking when it is less busy")
        time.sleep(0.001)  # sysfs cannot be waited for


def stop(device: str, state: Path) -> None:
    """Track no longer, and forget what changed. NotFoundError, BusyError."""
    stop_all([device], state)


def stop_all(devices: Sequence[str], state: Path) -> None:
    """The same for several. NotFoundError and BusyError for one of them leave all of them tracked."""
    names = dict.fromkeys(devicefile.find(state, device) for device in devices)
    with contextlib.ExitStack() as held:
        files = [DeviceFile(state, name) for name in names]
        for one in files:
            held.callback(os.close, one.lock())
        for one in files:
            _forget(one)


def _forget(files: DeviceFile) -> None:
    state = files.directory.parent.parent
    with pins.locked():
        try:
            hooks = Hooks(pins.directory_of(state))
        except OSError:
            pins.remove(pins.directory_of(state))
        else:
            _release(hooks, files)
        files.remove()


def _release(hooks: Hooks, files: DeviceFile) -> None:
    try:
        for index in _unused(hooks, files.directory.parent.parent, files.name):
            hooks.remove(index)
        last = not hooks.used_slots()
    finally:
        hooks.close()
    if last:
        pins.remove(hooks.directory)


def tracked(state: Path) -> list[TrackedDevice]:
    """All tracked devices, also those whose tracking was lost."""
    return [inspect(name, state) for name in devicefile.names(state)]


def inspect(device: str, state: Path) -> TrackedDevice:
    """A tracked device as it is now, even while another command has it. NotFoundError, StateError."""
    files = DeviceFile(state, devicefile.find(state, device))
    with Tracker(files, None) as found:
        lost = found.lost
        try:
            changed = sum(-(-length // found.block_size) for _, length in found.changed_since(found.mark))
        except StasisError as error:
            changed, lost = 0, lost or error.message
        return TrackedDevice(files.name, found.identity.path, found.identity.size, found.block_size,
                             found.mark.generation, found.mark.number, changed, lost, found.changes.assumed)
