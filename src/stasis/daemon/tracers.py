# SPDX-License-Identifier: Apache-2.0
"""dattobd's tracers in the daemon: their registry on file, the status file, and their part in the life of devices."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from errno import ENODEV, ENOTBLK
from typing import Any, Protocol

from stasis.daemon import datto_group, nodes, statefile
from stasis.daemon import record as records
from stasis.daemon.channel import Channel
from stasis.daemon.datto_live import LiveTracers
from stasis.daemon.datto_mounts import MountWatch
from stasis.daemon.datto_nodes import TracerNodes
from stasis.daemon.datto_pins import PinWatch
from stasis.daemon.paths import Directories
from stasis.daemon.record import OriginKey
from stasis.daemon.served import ServedDevice
from stasis.datto import series
from stasis.datto.registry import LIVE, Registry, Target, TracerRecord
from stasis.datto.status import status
from stasis.errors import DaemonError, NotFoundError, StasisError, StateError, UsageError
from stasis.live.atrest import file_systems_at_rest

__all__ = ["Devices", "TracerKeeper"]

PLUGIN = "datto"
MODULE = "stasis.datto.hosted"
MAKES_FILES = ("prepare", "prepare_next")
"""Requests that need to know where the device is mounted: the COW file may lie on it."""
SLOW = 600.0
"""Seconds for a request that may have to make a file of many gigabytes."""

REFRESH_SECONDS = 5.0
"""How often the status file is brought up to date while a tracer is active."""

log = logging.getLogger(__name__)


class Devices(Protocol):
    """What the tracers need to know of devices."""

    lock: threading.RLock
    devices: dict[str, ServedDevice]

    def maximum_tracers(self) -> int: ...


class TracerKeeper:
    """The registry's backend. Every public call takes the daemon's one lock."""

    def __init__(self, directories: Directories, devices: Devices) -> None:
        self._directories, self._devices = directories, devices
        self.lock = devices.lock
        self.registry = Registry(self)
        self.live = LiveTracers(directories, self.registry, self.lock)
        self._ended, self._looking = threading.Event(), threading.Event()
        self._load()
        self.live.wake()
        self.nodes = TracerNodes(directories, self.registry, self, devices.devices, self.lock)
        self.mounts = MountWatch(self.registry, self, devices.devices, self.lock, PinWatch(directories, self))
        self._thread = threading.Thread(target=self._keep_current, name="datto-info", daemon=True)
        self._thread.start()

    # -- on file ----------------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            stored = statefile.read(self._directories.tracers, "remove it; the COW files can be reloaded")
            found = [TracerRecord.from_dict(fields) for fields in stored["tracers"]]
        except FileNotFoundError:
            return
        except (StateError, KeyError, TypeError, ValueError) as error:
            log.error("the tracers are not known any more: %s", error)
            return
        for record in found:
            record.key = records.origin_key(record.bdev) or record.key
            record.device = None
            self.registry.tracers[record.minor] = record
        self.registry.forget()

    def changed(self) -> None:
        """Remember the tracers durably, and write the status file."""
        tracers = [record.as_dict() for _, record in sorted(self.registry.tracers.items())]
        if tracers or self._directories.tracers.exists():
            statefile.write(self._directories.tracers, {"tracers": tracers}, durable=True)
        self._write_status()

    def _write_status(self) -> None:
        path = self._directories.datto_info
        text = json.dumps(status(self.registry.tracers.values()), indent="\t") + "\n"
        temporary = path.with_suffix(".new")
        temporary.write_text(text)
        temporary.chmod(0o444)
        os.replace(temporary, path)

    def _keep_current(self) -> None:
        while not self._ended.is_set():
            self._looking.wait(REFRESH_SECONDS)
            self._looking.clear()
            self.nodes.settle()
            with self.lock:
                self._see_again()
                if not self._ended.is_set() and any(
                        record.state.is_active or record.mark for record in self.registry.tracers.values()):
                    self._refresh_quietly()

    def _refresh_quietly(self) -> None:
        try:
            self.refresh()
        except (StasisError, OSError) as error:
            log.warning("the status file is not up to date: %s", error)

    def close(self) -> None:
        """The daemon ends."""
        self._ended.set()
        self._looking.set()
        self.live.close()
        self.mounts.close()

    def refresh(self) -> list[TracerRecord]:
        """All tracers, with what their workers say of them now; the status file says the same."""
        with self.lock:
            self.live.wake()
            self.mounts.look()
            found = [self.registry.find(minor) for minor in sorted(self.registry.tracers)]
            self._write_status()
            return found

    # -- what the registry needs --------------------------------------------------------------------------

    def limit(self) -> int:
        """How many minors there are."""
        return max(self._devices.maximum_tracers(), 1 + max(self.registry.tracers, default=-1))

    def find(self, path: str) -> Target:
        """A device by its path, by that of its kernel node, or by its name. NotFoundError or UsageError (ENOTBLK)."""
        if path in self._devices.devices:
            return self._target(self._devices.devices[path])
        key = records.origin_key(path)
        if key is None:
            raise NotFoundError(f"{path} does not exist", hint="name a device or an image file that is served")
        for device in self._devices.devices.values():
            if key in (device.key, self._node_key(device)):
                return self._target(device)
        known = any(key == record.key for record in self.registry.tracers.values())
        if not stat.S_ISBLK(os.stat(path).st_mode) and not known and not self._was_attached(path):
            raise UsageError(f"{path} is no block device", errno=ENOTBLK,
                             hint="an image file must have been attached: stasis device attach")
        return Target(os.path.realpath(path), key, None)

    def _node_key(self, device: ServedDevice) -> OriginKey | None:
        return records.origin_key(str(device.node["node"])) if device.node else None

    def _target(self, device: ServedDevice) -> Target:
        return Target(device.record.path, device.key, device.name)

    def _was_attached(self, path: str) -> bool:
        """Whether something is remembered of this image file."""
        real = os.path.realpath(path)
        for directory in self._directories.devices.iterdir():
            try:
                if os.path.realpath(records.load(directory).path) == real:
                    return True
            except (FileNotFoundError, StateError):
                continue
        return False

    def ask(self, device: str, request: str, **fields: Any) -> dict[str, Any]:
        """A request to the tracer in the device's worker. Snapshots are taken with mounted file systems at rest."""
        if device.startswith(LIVE):
            return self.live.ask(device, request, **fields)
        if request == "snapshot":
            return self._next_snapshot(device, fields)
        if request == "begin":
            with self._at_rest([device]):
                return self._ask_worker(device, request, fields)
        return self._ask_worker(device, request, fields)

    def _next_snapshot(self, device: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Files are made before file systems rest, and finished after."""
        self._ask_worker(device, "prepare_next", fields)
        try:
            with self._at_rest([device]):
                self._ask_worker(device, "follow", {})
        except StasisError:
            with contextlib.suppress(StasisError):  # the first failure is the one to tell
                self._ask_worker(device, "abort", {})
            raise
        return self._ask_worker(device, "finish", {})

    def _at_rest(self, names: Sequence[str]) -> contextlib.AbstractContextManager[list[str]]:
        found = [nodes.path_of(self._devices.devices[name].node) for name in names if name in self._devices.devices]
        own = [str(self._directories.run), str(self._directories.state)]
        return file_systems_at_rest([node for node in found if node is not None], own)

    def _ask_worker(self, device: str, request: str, fields: dict[str, Any]) -> dict[str, Any]:
        served = self._devices.devices.get(device)
        if served is None:
            raise NotFoundError(f"{device} is not served any more", errno=ENODEV)
        served.require()
        if request in MAKES_FILES:
            fields = {**fields, "node": nodes.path_of(served.node)}
        try:
            with Channel.connect(self._directories.worker_control(device), device, timeout=SLOW) as channel:
                answer = channel.call(f"{PLUGIN}.{request}", **fields)
        except OSError as error:
            raise DaemonError(f"the worker of {device} cannot be reached: {error.strerror}",
                              errno=error.errno or 0) from error
        return {name: value for name, value in answer.items() if name != "ok"}

    def prepare(self, device: str, minor: int, cow: str, size: int, cache: int) -> None:
        """Make the files of a first snapshot."""
        self.ask(device, "prepare", cow=cow, size=size, **self._place(device, minor, cache))

    def _place(self, device: str, minor: int, cache: int) -> dict[str, Any]:
        return {"minor": minor, "cache": cache, "directory": str(self._directories.device(device)),
                "socket": str(self._directories.nbd_socket(f"datto{minor}"))}

    def exports(self) -> set[str]:
        """Names of the images that are served."""
        return {f"datto{minor}" for minor, record in self.registry.tracers.items() if record.state.is_active}

    def setup(self, members: list[tuple[int, str, str]], fallocated: int, cache: int) -> list[TracerRecord]:
        """Begin series, several at one instant. Raises what Registry.setup_group raises; none is begun then."""
        with self.lock:
            return self.registry.setup_group(members, fallocated, cache, self._begin_all if members[1:] else None)

    def _begin_all(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Hold all workers between two batches, begin on all, let all go."""
        try:
            with self._at_rest(names):
                return datto_group.begin(self._directories, names, PLUGIN)
        except OSError as error:
            raise DaemonError(f"a worker cannot be reached: {error.strerror}", errno=error.errno or 0) from error

    # -- the life of devices ------------------------------------------------------------------------------

    def before_start(self, device: ServedDevice) -> dict[str, Any]:
        """The plugins of a worker that is about to start. Only its tracer's COW file stays up to date from here on."""
        record = self.registry.of_device(device.name, device.record.path, device.key)
        directory = self._directories.device(device.name)
        state = None
        if record is None:
            series.forget_logs(directory)
        else:
            state = {"cow": record.cow, "mode": "snapshot" if record.state.is_snapshot else "incremental",
                     "auto_expand": [size << 20 for size in record.auto_expand] if record.auto_expand else None,
                     "node": nodes.path_of(device.node), **self._place(device.name, record.minor, record.cache)}
            if record.uuid:
                series.forget_logs(directory, series.log_path(directory, bytes.fromhex(record.uuid), record.seqid))
        return {PLUGIN: {"module": MODULE, "state": state}}

    def started(self, device: ServedDevice) -> None:
        """The worker serves: see what became of the tracer."""
        for record in list(self.registry.tracers.values()):
            if record.device == device.name and not record.error:
                try:
                    self._see(record, device)
                    self._looking.set()
                except StasisError as error:
                    log.warning("what tracer %d of %s does is not known yet: %s", record.minor, device.name, error)

    def _see_again(self) -> None:
        """A worker that was too busy to answer when it began is asked once more."""
        for record in self.registry.unseen():
            device = self._devices.devices.get(record.device or "")
            if device is not None:
                with contextlib.suppress(StasisError):  # it was told
                    self._see(record, device)

    def _see(self, record: TracerRecord, device: ServedDevice) -> None:
        described = device.require().call(f"{PLUGIN}.info")
        if described.get("minor") == record.minor:
            self.registry.woke(record, described)
        if record.error:
            log.warning("tracer %d of %s has failed: %s", record.minor, device.name, record.reason or record.error)

    def adopt(self, device: ServedDevice) -> None:
        """The worker outlived its daemon, and the tracer with it."""
        with self.lock:
            device.plugins = {PLUGIN: {"module": MODULE, "state": None}}
            if self.registry.of_device(device.name, device.record.path, device.key) is not None:
                self.started(device)
            else:
                self._drop_unknown(device.name)

    def _drop_unknown(self, name: str) -> None:
        """A tracer that was set up by a daemon that died before it wrote that down; nobody was told of it."""
        try:
            self.ask(name, "abort")
            self.ask(name, "drop")
        except StasisError as error:
            log.error("%s may have a tracer that nobody knows: %s", name, error)

    def stopped(self, name: str) -> None:
        """The device is served no more."""
        if any(record.device == name for record in self.registry.tracers.values()):
            self.registry.slept(name)

    def event(self, name: str, event: Mapping[str, Any]) -> None:
        """A worker reports on its tracer."""
        for record in self.registry.tracers.values():
            if record.device == name and (record.state.is_active or record.resting):
                if event["event"] == "datto_woke":
                    self.registry.woke(record, {})
                elif event["event"] == "datto_failed":
                    record.error = record.error or int(event["error_code"])
                    record.reason = record.reason or os.strerror(-record.error)
                    log.warning("tracer %d of %s has failed: %s", record.minor, name, record.reason)
                else:
                    log.warning("the COW file %s of tracer %d is %d %% full", record.cow, record.minor,
                                int(event["percent"]))
                self.changed()
