# SPDX-License-Identifier: Apache-2.0
"""The worker: one process that serves one device.

`python -m stasis.block.worker --config-fd N` reads its configuration (JSON, see `Config`) from a memfd. It
stands on its own: when the daemon dies it goes on, and the next daemon finds it by its control socket.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from errno import EINVAL, EIO, ENODEV, ENOTTY, EPERM
from pathlib import Path
from typing import Any

from stasis.block import settings as settings_module
from stasis.block.background import Background
from stasis.block.control import Connection, ControlSocket, Message
from stasis.block.cow import CopyOnWrite
from stasis.block.exports import ImageWriter, OriginExport
from stasis.block.origin import Origin, describe
from stasis.block.plugins import Plugins
from stasis.block.serving import close_others, listen_inner, read_config, signals_stop, start_servers
from stasis.block.taking import SnapshotRequests
from stasis.block.tracking import Opening, Tracker
from stasis.linux import process
from stasis.linux.eventloop import EventLoop
from stasis.nbd.export import ExportList


class Worker(SnapshotRequests):
    """Everything one device's process owns. See docs/design/architecture.md for the configuration's keys."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.settings = settings_module.Settings().with_values(config.get("settings", {}))
        self.name: str = config["name"]
        self.loop = EventLoop()
        self.origin = Origin(config["path"], config["origin_fd"], config.get("buffered_fd"))
        self.opening: Opening | None = None
        self.tracker = self._open_tracker() if config.get("tracking", True) else None
        self.export = OriginExport(self.name, self.origin, self.tracker, config.get("contexts") or ())
        self.background = Background(self.loop)
        self.snapshot: str | None = None
        self.storage_fd = -1
        self._prepared: tuple[str, CopyOnWrite, int] | None = None
        self._switched = False
        self._is_removed = False
        if config.get("snapshot"):
            self._resume(config["snapshot"])
        elif self.tracker is not None and self.tracker.changes.is_held:
            self.tracker.changes.release_held()
        self.control = ControlSocket(self.loop, config["control_path"], self._handle)
        self.plugins = Plugins(self, config.get("plugins") or {})
        self.servers = start_servers(self.loop, ExportList(self.export), config, self.settings)
        self.writer = ImageWriter(self.export)
        self.servers.append(listen_inner(self.loop, ExportList(self.writer), config["inner_path"]))
        self._start_timers()

    # -- life ---------------------------------------------------------------------------------------

    def _open_tracker(self) -> Tracker:
        directory = Path(self.config["map_path"]).parent
        shift = settings_module.tracking_block_shift(self.origin.size, self.settings, self.config.get("tracking_block"))
        tracker, self.opening = Tracker.open(
            directory,
            self.origin.size,
            shift,
            self.settings.intent_region_shift,
            self.origin.identity(),
            continuous=bool(self.config.get("continuity")),
            fs_mark=self.origin.fs_mark,
        )
        return tracker

    def _start_timers(self) -> None:
        self._timers = [
            self.loop.every(1.0, self._tick),
            self.loop.every(self.settings.intent_clear_seconds, self._clear_intents),
        ]

    def run(self) -> None:
        """Serve until told to stop."""
        with signals_stop(self.loop, self.stop):
            self.loop.run()

    def stop(self) -> None:
        """End in order: no more requests, origin and map durable, the map marked clean."""
        for timer in self._timers:
            timer.cancel()
        for server in self.servers:
            server.close()
        self.servers.clear()
        self.plugins.stopping()
        self.background.close()
        self.plugins.stop()
        self._finish()
        self.control.close()
        self.loop.stop()

    def _finish(self) -> None:
        """Make the origin and the map durable. A map is clean only if what it knows of is on the disk."""
        try:
            self.origin.flush()
            if self.tracker is not None:
                self.tracker.finish(self.origin.identity(), self.origin.fs_mark())
        except OSError as error:
            print(f"ERROR {self.name} did not end in order: {error}", file=sys.stderr, flush=True)
        if self.tracker is not None:
            self.tracker.close()

    # -- timers -------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self.tracker is not None:
            self.tracker.changes.tick()
        size = self.origin.current_size()
        if self.origin.is_device and not size:
            self._removed()
        elif size != self.origin.size:
            self._resized(size)
        self.plugins.tick()
        cow = self.export.cow
        if cow is not None and not cow.table.error:
            try:
                cow.storage.check()
            except OSError as error:
                cow.fail(error.errno or EIO)

    def _removed(self) -> None:
        """The block device is gone: say so once, and answer errors until somebody takes the filter off."""
        if self._is_removed:
            return
        self._is_removed = True
        print(f"ERROR the block device {self.origin.path} was removed", file=sys.stderr, flush=True)
        self._abort()
        if self.export.cow is not None:
            self.export.cow.fail(ENODEV)
        if self.tracker is not None:
            # It may come back with what another machine wrote to it.
            self.tracker.changes.set_broken("the block device was removed")
        self.plugins.resized()

    def _resized(self, size: int) -> None:
        cow = self.export.cow
        if cow is not None and size < cow.table.size:
            cow.fail(EIO)
        self._abort()  # what was prepared is for a device of another size
        reason = f"new generation: the size changed from {self.origin.size} to {size} bytes"
        self.origin.size = self.export.size = self.writer.size = size
        self.plugins.resized()
        if self.tracker is None:
            return
        shift = settings_module.tracking_block_shift(size, self.settings, self.config.get("tracking_block"))
        try:
            self.tracker.begin_anew(size, shift, self.settings.intent_region_shift, self.origin.identity(), reason)
        except OSError as error:
            self.tracker.changes.set_broken(f"the map could not follow a resize ({error.strerror})")
            self.export.tracker = None  # there is no place for marks behind the former end
        self.generation_changed(reason)

    def _clear_intents(self) -> None:
        self.plugins.clear_intents()
        tracker = self.tracker
        if tracker is not None and tracker.start_clearing():
            self.background.run(tracker.changes.sync, lambda error: tracker.end_clearing(error is None))

    # -- events -------------------------------------------------------------------------------------

    def generation_changed(self, reason: str) -> None:
        """Tell everybody that the change map has another generation."""
        self.plugins.generation_changed()
        self.post("generation", reason=reason)

    def post(self, kind: str, **fields: object) -> None:
        """Send an event to whoever subscribed."""
        self.control.broadcast(
            {"event": kind, "snapshot": self.snapshot, "device": self.name, "time": time.monotonic_ns(), **fields}
        )

    # -- requests -----------------------------------------------------------------------------------

    def _handle(self, connection: Connection, message: Message, fds: list[int]) -> None:
        handler = getattr(self, f"_do_{message.get('op', '')}", None)
        keep = message.get("op") == "prepare"
        try:
            if "." in str(message.get("op")):
                self.plugins.handle(connection, message)
            elif handler is None:
                connection.refuse(ENOTTY, f"unknown request {message.get('op')!r}")
            elif keep:
                handler(connection, message, fds)
            else:
                handler(connection, message)
        except OSError as error:
            connection.refuse(error.errno or EIO, error.strerror or str(error))
        finally:
            if not keep:
                close_others(fds)

    def _do_hello(self, connection: Connection, _message: Message) -> None:
        changes = self.tracker.changes if self.tracker else None
        state = None
        if self._prepared is not None:
            state = "prepared"
        elif self.snapshot is not None:
            state = "taken"
        connection.reply(
            pid=os.getpid(),
            name=self.name,
            size=self.origin.size,
            path=self.origin.path,
            generation=changes.generation if changes else None,
            change_number=changes.change_number if changes else 0,
            snapshot=self.snapshot or (self._prepared[0] if self._prepared else None),
            snapshot_state=state,
        )

    def _do_subscribe(self, connection: Connection, _message: Message) -> None:
        connection.reply()
        connection.subscribed = True

    def _do_info(self, connection: Connection, _message: Message) -> None:
        cow = self.export.cow
        fields: dict[str, Any] = {"device": describe(self.origin) | {"name": self.name}}
        if self.tracker is not None:
            fields["map"] = self.tracker.changes.info().as_dict()
            fields["intent_regions"] = len(self.tracker.log.dirty())
        if self.opening is not None:
            fields["opening"] = {"fresh": self.opening.fresh, "reason": self.opening.reason}
        if cow is not None:
            fields["snapshot"] = {"id": self.snapshot, **cow.describe()}
        fields["connections"] = sum(server.connections for server in self.servers)
        connection.reply(**fields)

    def _do_descriptors(self, connection: Connection, _message: Message) -> None:
        fds = [self.config["origin_fd"], self.config["listen_fd"]]
        names = ["origin", "listen"]
        for name, fd in (("buffered", self.config.get("buffered_fd")), ("storage", self.storage_fd)):
            if fd is not None and fd >= 0:
                fds.append(fd)
                names.append(name)
        connection.reply(tuple(fds), descriptors=names)

    def _do_mark(self, connection: Connection, message: Message) -> None:
        if self.tracker is None:
            raise OSError(EPERM, "changes of this device are not tracked")
        ranges = [(int(offset), int(length)) for offset, length in message["ranges"]]
        for offset, length in ranges:
            if offset < 0 or length <= 0 or offset + length > self.origin.size:
                raise OSError(EINVAL, f"range {offset}:{length} is not inside the device")
        self.tracker.mark_both(ranges)
        connection.reply()

    def _do_sync(self, connection: Connection, _message: Message) -> None:
        tracker = self.tracker
        if tracker is None:
            connection.reply()
            return

        def again(error: OSError | None) -> None:
            if error is not None:
                connection.refuse(error.errno or EIO, "the change map cannot be made durable")
            elif tracker.changes.clear_wrapped():
                self.background.run(tracker.changes.sync, again)
            else:
                connection.reply()

        self.background.run(tracker.changes.sync, again)

    def _do_stop(self, connection: Connection, _message: Message) -> None:
        # The answer means that everything is done; the connection's end follows it.
        sock = connection.sock.dup()
        self.stop()
        connection.sock = sock
        connection.reply()
        sock.close()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m stasis.block.worker`."""
    config = read_config(sys.argv[1:] if arguments is None else arguments)
    with contextlib.suppress(OSError):
        # Memory reclaim must not wait for the block device that we are behind. Needs CAP_SYS_RESOURCE.
        process.set_io_flusher()
    Worker(config).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
