# SPDX-License-Identifier: Apache-2.0
"""The methods of org.stasis.varlink: they check arguments, call the keepers, and answer with model objects.

Method and parameter names are those of the interface file.
"""

from __future__ import annotations

import base64
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import stasis
from stasis.block import settings as settings_file
from stasis.block.events import EventQueue
from stasis.daemon import maps, model, record
from stasis.daemon.answering import failure, method
from stasis.daemon.datto_methods import DattoMethods
from stasis.daemon.devices import FILTER, DeviceKeeper
from stasis.daemon.engines import Engine, Engines
from stasis.daemon.record import DeviceRecord
from stasis.daemon.snapshots import SnapshotOptions
from stasis.errors import UsageError

__all__ = ["Methods", "failure"]


POLL_SECONDS = 1.0
"""How often a call that streams events looks whether its caller is still there."""

Answer = dict[str, Any]


def _absolute(path: str | None, what: str) -> str:
    if not path or not os.path.isabs(path):
        raise UsageError(f"{what} must be an absolute path", hint="the daemon has another working directory")
    return path


class Methods(DattoMethods):
    """The interface. `stop` is called with True to leave the devices served."""

    def __init__(self, engines: Engines, devices: DeviceKeeper, stop: Callable[[bool], None]) -> None:
        self._engines = engines
        self._devices = devices
        self._stop = stop

    # -- devices ----------------------------------------------------------------------------------

    @method
    def Attach(self, path: str, name: str | None, filter: str | None, kernel: bool | None,  # noqa: A002
               tracking_block: int | None, buffered: bool | None, tcp: str | None, tls_certificates: str | None,
               tls_psk: str | None, bitmaps: list[int] | None, driver: str | None) -> Answer:
        wanted = DeviceRecord(name or record.default_name(path), _absolute(path, "path"), bool(kernel),
                              tracking_block, bool(buffered), tcp, tls_certificates, tls_psk, bitmaps or [],
                              driver=driver or record.SERVED)
        return _device(self._engines.attach(wanted, filter or FILTER), wanted.name)

    @method
    def Detach(self, name: str, force: bool | None, forget: bool | None) -> Answer:
        self._engines.of_device(name).detach(name, force=bool(force), forget=bool(forget))
        return {}

    @method
    def ListDevices(self) -> Answer:
        with self._devices.lock:
            owners = {name: engine for engine in self._engines.all for name in engine.paths()}
            return {"devices": [_device(owners[name], name)["device"] for name in sorted(owners)]}

    @method
    def ShowDevice(self, name: str) -> Answer:
        return _device(self._engines.of_device(name), name, detailed=True)

    @method
    def RefreshDevice(self, name: str) -> Answer:
        engine = self._engines.of_device(name)
        engine.refresh(name)
        return _device(engine, name)

    @method
    def ListFilters(self) -> Answer:
        return {"filters": self._devices.filters.names()}

    @method
    def Control(self, name: str, filter: str, command: str,  # noqa: A002
                argument: Mapping[str, Any] | None) -> Answer:
        engine = self._engines.of_device(name)
        return {"result": engine.ctl(name, filter, command, argument or {})}

    # -- snapshots --------------------------------------------------------------------------------

    @method
    def CreateSnapshot(self, devices: list[str], storage: str | None, storage_fd: int | None, limit: int | None,
                       chunk: int | None, take: bool | None, soon: bool | None, bitmaps: list[int] | None,
                       tcp: str | None, tls_certificates: str | None, tls_psk: str | None,
                       _request: socket.socket) -> Answer:
        fd = None if storage_fd is None else _peer_descriptor(_request, storage_fd)
        try:
            if fd is None and storage != "memory":
                _absolute(storage, "storage")
            options = SnapshotOptions("descriptor" if fd is not None else str(storage), fd, limit, chunk,
                                      bitmaps or [], tcp, tls_certificates, tls_psk, soon=bool(soon))
            engine = self._engines.of_devices(devices)
            return _snapshot(engine, engine.create(options, devices, take=bool(take)))
        finally:
            if fd is not None:
                os.close(fd)

    @method
    def AddDevice(self, id: str, device: str) -> Answer:  # noqa: A002
        return _snapshot(self._engines.add(id, device), id)

    @method
    def TakeSnapshot(self, id: str) -> Answer:  # noqa: A002
        engine = self._engines.of_snapshot(id)
        engine.take(id)
        return _snapshot(engine, id)

    @method
    def ShowSnapshot(self, id: str) -> Answer:  # noqa: A002
        return _snapshot(self._engines.of_snapshot(id), id)

    @method
    def ListSnapshots(self) -> Answer:
        with self._devices.lock:
            return {"snapshots": [_snapshot(engine, uuid)["snapshot"]
                                  for engine in self._engines.all for uuid in engine.uuids()]}

    @method
    def CollectSnapshots(self) -> Answer:
        return {"ids": [uuid for engine in self._engines.all for uuid in engine.uuids()]}

    @method
    def DestroySnapshot(self, id: str) -> Answer:  # noqa: A002
        self._engines.of_snapshot(id).destroy(id)
        return {}

    @method
    def WaitEvents(self, id: str, after: int | None, timeout_ms: int | None,  # noqa: A002
                   _request: socket.socket, _more: bool = False) -> Answer | Iterator[Answer]:
        queue = self._engines.of_snapshot(id).events(id)
        if _more:
            return _stream(queue, after or 0, _request)
        events = queue.wait(after or 0, None if timeout_ms is None else timeout_ms / 1000)
        return {"events": [event.as_dict() for event in events], "gone": queue.closed}

    @method
    def TakeEvent(self, id: str, codes: list[int], timeout_ms: int | None,  # noqa: A002
                  _request: socket.socket) -> Answer:
        engine = self._engines.of_snapshot(id)
        queue = engine.events(id)
        deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        while not _hung_up(_request):  # an event must not be taken for somebody who is gone
            event = engine.take_event(id, codes)
            if event is not None:
                return {"event": event.as_dict()}
            left = POLL_SECONDS if deadline is None else min(POLL_SECONDS, deadline - time.monotonic())
            if left <= 0:
                break
            queue.wait_to_take(codes, left)
        return {}

    @method
    def MakeImageNode(self, id: str, device: str) -> Answer:  # noqa: A002
        return {"node": self._engines.of_snapshot(id).image_node(id, device)}

    # -- maps -------------------------------------------------------------------------------------

    @method
    def GetMapInfo(self, device: str) -> Answer:
        self._engines.of_device(device).update_map(device)
        info = model.from_dict(model.MapInfo, maps.info(self._devices.directories, device))
        return {"info": model.as_dict(info)}

    @method
    def GetChangedExtents(self, device: str, since: int, held: bool | None, generation: str | None) -> Answer:
        self._engines.of_device(device).update_map(device)
        with maps.open_map(self._devices.directories, device) as change_map:
            extents = change_map.changed_extents(since, held=bool(held), generation=generation)
        return {"extents": [{"offset": offset, "length": length} for offset, length in extents]}

    @method
    def ReadMap(self, device: str, offset: int, length: int, held: bool | None) -> Answer:
        self._engines.of_device(device).update_map(device)
        data = maps.read(self._devices.directories, device, offset, length, held=bool(held))
        return {"data": base64.b64encode(data).decode()}

    @method
    def MarkChanged(self, device: str, ranges: Sequence[Mapping[str, int]]) -> Answer:
        self._engines.of_device(device).mark(device, [(entry["offset"], entry["length"]) for entry in ranges])
        return {}

    # -- the daemon -------------------------------------------------------------------------------

    @method
    def GetSettings(self) -> Answer:
        return {"settings": self._devices.settings().as_dict()}

    @method
    def SetSettings(self, settings: dict[str, int]) -> Answer:
        with self._devices.lock:
            path = self._devices.directories.settings
            changed = settings_file.load(path).with_values(settings)
            settings_file.save(path, changed)
        return self.GetSettings()

    @method
    def GetStatus(self) -> Answer:
        directories = self._devices.directories
        status = model.Status(os.getpid(), stasis.__version__, str(directories.run), str(directories.state),
                              sum(len(engine.paths()) for engine in self._engines.all),
                              sum(len(engine.uuids()) for engine in self._engines.all))
        return {"status": model.as_dict(status)}

    @method
    def Stop(self, keep_serving: bool | None) -> Answer:
        self._stop(bool(keep_serving))
        return {}


def _device(engine: Engine, name: str, *, detailed: bool = False) -> Answer:
    return {"device": model.as_dict(engine.device(name, detailed=detailed))}


def _snapshot(engine: Engine, uuid: str) -> Answer:
    return {"snapshot": model.as_dict(engine.snapshot(uuid))}


def _stream(queue: EventQueue, after: int, request: socket.socket) -> Iterator[Answer]:
    while not _hung_up(request):
        events, gone = queue.wait(after, POLL_SECONDS), queue.closed
        if events or gone:
            after = events[-1].sequence if events else after
            yield {"events": [event.as_dict() for event in events], "gone": gone, "_continues": not gone}
        if gone:
            return


def _hung_up(request: socket.socket) -> bool:
    """Whether the caller closed its end. It sends nothing while it waits, so that readable means closed."""
    poll = select.poll()
    poll.register(request, select.POLLIN | select.POLLRDHUP)
    return bool(poll.poll(0))


def _peer_descriptor(request: socket.socket, number: int) -> int:
    """Open once more what the calling process has open under this number. Raises UsageError.

    Going through /proc needs no support for passing descriptors in the varlink library, and checks permissions again.
    """
    credentials = request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", credentials)[0]
    try:
        return os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"descriptor {number} cannot be used as storage: {error.strerror}", errno=error.errno or 0,
                         hint="it must be open for reading and writing while the call lasts") from error
