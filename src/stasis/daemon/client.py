# SPDX-License-Identifier: Apache-2.0
"""The Python API: everything the command line can do, as calls over the control socket.

    import stasis

    with stasis.connect() as client:
        device = client.attach("disk.img")
        snapshot = client.create_snapshot("/var/tmp", [device.name], limit=1 << 30, take=True)
        print(snapshot.device(device.name).uri)

Every call raises a subclass of `stasis.StasisError`. Sizes, offsets and lengths are in bytes.
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from stasis.daemon import model, start
from stasis.daemon.datto_client import TracerCalls
from stasis.daemon.interface import NAME, description
from stasis.daemon.model import Device, Event, Extent, MapInfo, Snapshot, Status
from stasis.daemon.paths import Directories, resolve
from stasis.errors import DaemonError, NotFoundError, StasisError, StateError

if TYPE_CHECKING:
    from stasis.block.copy import CopyOptions, CopyResult, Progress

__all__ = ["Client", "connect"]

StrPath = str | os.PathLike[str]
MAP_PORTION = 1 << 20


def connect(run_dir: StrPath | None = None, state_dir: StrPath | None = None, *, start_daemon: bool = True,
            started: Callable[[int], None] | None = None) -> Client:
    """Connect to the daemon of a run directory, and start one if none runs.

    Directories come from the arguments, then STASIS_RUN_DIR and STASIS_STATE_DIR, then the defaults. With
    `start_daemon` false, DaemonError if none runs. `started` is called with the pid of a daemon that was started.
    """
    directories = resolve(run_dir, state_dir)
    client = Client(directories)
    if not client.try_open():
        if not start_daemon:
            raise DaemonError(f"no daemon runs on {directories.run}", hint="stasis daemon starts one")
        start.start(directories, client.try_open, started)
    return client


class Client(TracerCalls):
    """A connection to the daemon; a context manager. One call at a time; threads use clients of their own."""

    def __init__(self, directories: Directories) -> None:
        self.directories = directories
        self._connection: Any = None

    def try_open(self) -> bool:
        """Connect if a daemon listens."""
        try:
            self._connection = self._open()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise DaemonError(f"cannot connect to {self.directories.control_socket}: {error.strerror or error}",
                              hint="choose another --run-dir", errno=error.errno or 0) from error
        return True

    def _open(self) -> Any:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(self.directories.control_socket))
            import varlink  # here, so that help and completion do not pay for it, nor who finds no daemon

            connector = varlink.Client()
            connector.add_interface(varlink.Interface(description()))
            return connector.open(NAME, connection=sock)
        except BaseException:
            sock.close()  # the library's own way of connecting leaves it open
            raise

    def close(self) -> None:
        """End the connection; devices and snapshots stay."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        given = {name: value for name, value in arguments.items() if value is not None}
        with _translated():
            answer: dict[str, Any] | None = getattr(self._connection, method)(**given)
        return answer or {}

    # -- devices ----------------------------------------------------------------------------------

    def attach(self, path: StrPath, *, name: str | None = None, kernel: bool = False,
               tracking_block: int | None = None, buffered: bool = False, tcp: str | None = None,
               tls_certificates: StrPath | None = None, tls_psk: StrPath | None = None,
               bitmaps: Sequence[int] = (), driver: str = "stasis",
               filter: str = "snapshot") -> Device:  # noqa: A002
        """Put a filter on a block device or image file and serve it.

        `kernel` gives it a block device node; `tracking_block` is the unit of its change map; `buffered` leaves direct
        I/O away; `tcp` ("ADDR:PORT") offers it over TCP too; `bitmaps` are change numbers to offer dirty bitmaps since.
        `driver` "blksnap" or "dattobd" leaves its I/O where it is and has that kernel module track it.
        Raises NotFoundError, PermissionDeniedError, UsageError, or BusyError that names who holds the device.
        """
        answer = self._call("Attach", path=os.path.abspath(path), name=name, filter=filter, kernel=kernel,
                            tracking_block=tracking_block, buffered=buffered, tcp=tcp,
                            tls_certificates=_absolute(tls_certificates), tls_psk=_absolute(tls_psk),
                            bitmaps=list(bitmaps), driver=driver)
        return model.from_dict(Device, answer["device"])

    def detach(self, name: str, *, force: bool = False, forget: bool = False) -> None:
        """Take the filter off; the change map stays, unless `forget`.

        BusyError while the device is in a snapshot; `force` makes its image there unreadable instead.
        """
        self._call("Detach", name=name, force=force, forget=forget)

    def devices(self) -> list[Device]:
        """All attached devices, by name."""
        return [model.from_dict(Device, entry) for entry in self._call("ListDevices").get("devices", [])]

    def device(self, name: str) -> Device:
        """One device, with its worker's counters. NotFoundError."""
        return model.from_dict(Device, self._call("ShowDevice", name=name)["device"])

    def refresh(self, name: str) -> Device:
        """Serve a device that could not be served, and look at its size anew."""
        return model.from_dict(Device, self._call("RefreshDevice", name=name)["device"])

    def filters(self) -> list[str]:
        """Kinds of filters that can be attached."""
        return list(self._call("ListFilters").get("filters", []))

    def control(self, name: str, command: str, argument: Mapping[str, Any] | None = None,
                filter: str = "snapshot") -> dict[str, Any]:  # noqa: A002
        """A command to the filter: cbtinfo, cbtmap, cbtdirty, snapshotadd, snapshotinfo.

        Raises with the errnos of the kernel's filter mechanism: ENOENT without a filter, EINVAL for another one's name,
        ENOTTY for an unknown command, ENODEV if the device is gone.
        """
        answer = self._call("Control", name=name, filter=filter, command=command, argument=dict(argument or {}))
        return dict(answer.get("result") or {})

    # -- snapshots --------------------------------------------------------------------------------

    def create_snapshot(self, storage: StrPath | int, devices: Sequence[str] = (), *, limit: int | None = None,
                        chunk: int | None = None, take: bool = False, soon: bool = False, bitmaps: Sequence[int] = (),
                        tcp: str | None = None, tls_certificates: StrPath | None = None,
                        tls_psk: StrPath | None = None) -> Snapshot:
        """Make a snapshot of some devices; nothing is left behind if that fails.

        `storage` is a file, directory or block device, "memory", or an open descriptor; it grows up to `limit`.
        soon: `take` is going to be called in a moment, so what the images need is started already.
        Raises StorageError, NotFoundError, BusyError, and what `take` raises.
        """
        where: dict[str, Any] = {"storage_fd": storage} if isinstance(storage, int) else {
            "storage": "memory" if storage == "memory" else os.path.abspath(storage)}
        answer = self._call("CreateSnapshot", devices=list(devices), limit=limit, chunk=chunk, take=take, soon=soon,
                            bitmaps=list(bitmaps), tcp=tcp, tls_certificates=_absolute(tls_certificates),
                            tls_psk=_absolute(tls_psk), **where)
        return model.from_dict(Snapshot, answer["snapshot"])

    def add(self, snapshot: str, device: str) -> Snapshot:
        """Add a device to a snapshot that is not taken yet. BusyError if it is in one already."""
        return model.from_dict(Snapshot, self._call("AddDevice", id=snapshot, device=device)["snapshot"])

    def take(self, snapshot: str) -> Snapshot:
        """Take it, on all devices at one instant or on none. StateError (EALREADY) if it is taken already."""
        return model.from_dict(Snapshot, self._call("TakeSnapshot", id=snapshot)["snapshot"])

    def snapshot(self, snapshot: str) -> Snapshot:
        """One snapshot, by its UUID or the beginning of it. NotFoundError."""
        return model.from_dict(Snapshot, self._call("ShowSnapshot", id=snapshot)["snapshot"])

    def snapshots(self) -> list[Snapshot]:
        """All snapshots."""
        return [model.from_dict(Snapshot, entry) for entry in self._call("ListSnapshots").get("snapshots", [])]

    def collect(self) -> list[str]:
        """The UUIDs of all snapshots."""
        return list(self._call("CollectSnapshots").get("ids", []))

    def destroy(self, snapshot: str) -> None:
        """End a snapshot, whether or not its images are in use. NotFoundError."""
        self._call("DestroySnapshot", id=snapshot)

    def wait_events(self, snapshot: str, *, after: int = 0, timeout: float | None = None) -> list[Event]:
        """Events numbered above `after`; waits up to `timeout` seconds (None: for ever) for the first.

        Empty on timeout, and when the snapshot is destroyed meanwhile. NotFoundError if it was so before.
        """
        milliseconds = None if timeout is None else int(timeout * 1000)
        answer = self._call("WaitEvents", id=snapshot, after=after, timeout_ms=milliseconds)
        return [model.from_dict(Event, entry) for entry in answer.get("events", [])]

    def take_event(self, snapshot: str, *, timeout: float | None = None, codes: Sequence[int]) -> Event | None:
        """The oldest event with one of these codes that nobody took yet; nobody else is given it.

        Waits up to `timeout` seconds (None: for ever); None when none came. NotFoundError with ESRCH if the snapshot
        is gone, or goes meanwhile.
        """
        milliseconds = None if timeout is None else int(timeout * 1000)
        event = self._call("TakeEvent", id=snapshot, codes=list(codes), timeout_ms=milliseconds).get("event")
        return None if event is None else model.from_dict(Event, event)

    def image_node(self, snapshot: str, device: str) -> str:
        """A block device node for the image of a device, which goes with the snapshot; made if there is none.

        Raises UnsupportedError or PermissionDeniedError where the host cannot make one, StateError before the take.
        """
        return str(self._call("MakeImageNode", id=snapshot, device=device)["node"])

    def watch(self, snapshot: str, *, after: int = 0) -> Iterator[Event]:
        """All events numbered above `after` as they happen; ends when the snapshot is destroyed.

        On a connection of its own, so that other calls go on meanwhile. NotFoundError at the first step.
        """
        connection = self._open()
        try:
            with _translated():
                for answer in connection.WaitEvents(id=snapshot, after=after, _more=True):
                    for entry in answer.get("events", []):
                        yield model.from_dict(Event, entry)
        finally:
            connection.close()

    def copy(self, snapshot: str, device: str, target: StrPath, *, since: int | None = None,
             generation: str | None = None, options: CopyOptions | None = None,
             progress: Progress | None = None) -> CopyResult:
        """Copy an image to a file or block device: whole, or what changed since the snapshot numbered `since`.

        `generation` is the one that `since` belongs to, where the caller knows it. Runs in the calling process.
        Raises GenerationError, VerifyError, StorageError, and StateError if the snapshot is not taken.
        """
        from stasis.daemon.copying import copy

        return copy(self, snapshot, device, target, since, generation, options, progress)

    # -- change maps ------------------------------------------------------------------------------

    def map_info(self, device: str) -> MapInfo:
        """Figures of a device's change map. NotFoundError."""
        return model.from_dict(MapInfo, self._call("GetMapInfo", device=device)["info"])

    def changed_extents(self, device: str, since: int, *, held: bool = False,
                        generation: str | None = None) -> list[Extent]:
        """What changed after the snapshot numbered `since`, ascending and merged.

        Up to now, or with `held` up to the snapshot that is held. GenerationError if `since` is of another generation.
        """
        answer = self._call("GetChangedExtents", device=device, since=since, held=held, generation=generation)
        return [model.from_dict(Extent, entry) for entry in answer.get("extents", [])]

    def read_map(self, device: str, *, held: bool = False) -> bytes:
        """The change map, one byte per tracking block: the number of the epoch of its last change."""
        count = self.map_info(device).block_count
        portions = []
        for offset in range(0, count, MAP_PORTION):
            length = min(MAP_PORTION, count - offset)
            answer = self._call("ReadMap", device=device, offset=offset, length=length, held=held)
            portions.append(base64.b64decode(answer["data"]))
        return b"".join(portions)

    def mark(self, device: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Mark (offset, length) ranges as changed. All are checked first: UsageError if one is not in the device."""
        self._call("MarkChanged", device=device,
                   ranges=[{"offset": offset, "length": length} for offset, length in ranges])

    # -- the daemon -------------------------------------------------------------------------------

    def settings(self) -> dict[str, int]:
        """All settings; they are used at the next attach or take."""
        return dict(self._call("GetSettings")["settings"])

    def set_settings(self, values: Mapping[str, int]) -> dict[str, int]:
        """Change settings, all or none. UsageError for an unknown name or a value out of range."""
        return dict(self._call("SetSettings", settings=dict(values))["settings"])

    def status(self) -> Status:
        """The daemon's pid, version and directories."""
        return model.from_dict(Status, self._call("GetStatus")["status"])

    def stop(self, *, keep_serving: bool = False) -> None:
        """End the daemon. With `keep_serving` devices and snapshots go on, and a next daemon takes them over."""
        with contextlib.suppress(DaemonError):  # it may be gone before its answer is
            self._call("Stop", keep_serving=keep_serving)

    def require_device(self, snapshot: Snapshot, name: str) -> model.SnapshotDevice:
        """The part of a device in a taken snapshot. NotFoundError, or StateError if it is not taken."""
        try:
            member = snapshot.device(name)
        except KeyError:
            known = ", ".join(device.name for device in snapshot.devices) or "none"
            raise NotFoundError(f"{name} is not in the snapshot {snapshot.id}", hint=f"its devices: {known}") from None
        if member.uri is None:
            raise StateError(f"snapshot {snapshot.id} is not taken yet", hint=f"stasis snapshot take {snapshot.id}")
        return member


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what the varlink library raises into our errors."""
    import varlink

    try:
        yield
    except varlink.VarlinkError as error:
        raise _from_varlink(error) from error
    except OSError as error:
        raise DaemonError("the daemon ended the connection", hint="its log is daemon.log in the run directory",
                          errno=error.errno or 0) from error


def _from_varlink(error: Any) -> StasisError:
    fields = error.as_dict()
    if fields.get("error") == "org.stasis.Failed":
        return StasisError.from_dict(fields.get("parameters", {}))
    return DaemonError(f"the daemon does not understand this call: {fields.get('error')} {fields.get('parameters')}",
                       hint="is it of another version? stasis daemon stop --keep-serving, then try again")


def _absolute(path: StrPath | None) -> str | None:
    return None if path is None else os.path.abspath(path)
