# SPDX-License-Identifier: Apache-2.0
"""The worker's part in a snapshot: prepare, hold, switch, release, drop, and going on after an earlier worker died."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from errno import EALREADY, EBUSY, EINVAL, EIO, ENOENT, ETIMEDOUT
from functools import partial
from pathlib import Path
from typing import Any

from stasis.block.background import Background
from stasis.block.chunktable import ChunkTable
from stasis.block.control import Connection, Message
from stasis.block.cow import CopyOnWrite
from stasis.block.diffstorage import DiffStorage, private_descriptor
from stasis.block.exports import OriginExport
from stasis.block.hold import Hold
from stasis.block.origin import Origin
from stasis.block.serving import close_others
from stasis.block.settings import Settings
from stasis.block.tracking import Tracker


class SnapshotRequests(ABC):
    """Requests of the control socket that concern a snapshot; the rest of the worker is in worker.py."""

    settings: Settings
    origin: Origin
    export: OriginExport
    tracker: Tracker | None
    background: Background
    snapshot: str | None
    storage_fd: int
    _prepared: tuple[str, CopyOnWrite, int] | None
    _switched: bool

    @abstractmethod
    def post(self, kind: str, **fields: object) -> None:
        """Send an event to whoever subscribed."""

    @abstractmethod
    def generation_changed(self, reason: str) -> None:
        """Tell everybody that the change map has another generation."""

    def _failed(self, errno: int) -> None:
        self.post("corrupted", error_code=-errno)

    def _low(self, storage: DiffStorage) -> None:
        if not storage.is_low() or (growth := storage.request_growth()) is None:
            return
        old, new, limit = growth
        if new == old:
            self.post("no_space", requested=limit)
            return
        self.post("low_space", requested=new)
        self.background.run(
            partial(storage.grow, old, new), lambda error: self.post("no_space", requested=old) if error else None
        )

    # -- snapshots ----------------------------------------------------------------------------------

    def _resume(self, snapshot: dict[str, Any]) -> None:
        """Go on with a snapshot that an earlier worker of this device held."""
        storage = DiffStorage(private_descriptor(snapshot["storage_fd"]), Path(snapshot["storage"]))
        table = ChunkTable.open(Path(snapshot["table"]), writable=True)
        self.export.cow = self._copy_on_write(table, storage)
        self.snapshot, self.storage_fd = snapshot["uuid"], snapshot["storage_fd"]

    def _copy_on_write(self, table: ChunkTable, storage: DiffStorage) -> CopyOnWrite:
        return CopyOnWrite(self.origin, table, storage, failed=self._failed, low=partial(self._low, storage))

    def _do_prepare(self, connection: Connection, message: Message, fds: list[int]) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(close_others, fds)
            uuid, header, path = message["snapshot"], Path(message["storage"]), Path(message["table"])
            shift = int(message["chunk_shift"])
            if self.snapshot is not None or self._prepared is not None:
                raise OSError(EBUSY, "the device is in a snapshot already")
            if len(fds) != 1:
                raise OSError(EINVAL, "one storage descriptor is expected")
            storage = DiffStorage(private_descriptor(fds[0]), header)
            undo.callback(storage.close)
            table = ChunkTable.create(path, self.origin.size, shift)
            undo.pop_all()
        if self.tracker is not None:
            self.tracker.changes.prepare_switch()
        self._prepared = (uuid, self._copy_on_write(table, storage), fds[0])
        connection.reply()

    def _do_hold(self, connection: Connection, message: Message) -> None:
        if self._prepared is None:
            raise OSError(EINVAL, "nothing was prepared")
        self._switched = False
        hold = Hold(connection, {"switch": self._switch, "abort": self._abort, "release": self._release})
        connection.reply()
        if not hold.serve(int(message.get("timeout_ms", self.settings.hold_timeout_ms)) / 1000):
            self._abort()

    def _do_switch(self, _connection: Connection, _message: Message) -> None:
        raise OSError(ETIMEDOUT, "it is not held (any more): a take may hold a device for hold_timeout_ms")

    _do_release = _do_switch  # what a hold is served is not served here

    def _switch(self) -> dict[str, Any]:
        if self._prepared is None or self._switched:
            raise OSError(EALREADY, "switched already")
        result: dict[str, Any] = {"generation": None, "change_number": 0, "wrapped": False}
        if self.tracker is not None:
            switched = self.tracker.switch()
            result = {
                "generation": switched.generation,
                "change_number": switched.change_number,
                "wrapped": switched.wrapped,
            }
        self.export.cow = self._prepared[1]
        self._switched = True
        return result

    def _release(self) -> dict[str, Any]:
        if not self._switched or self._prepared is None:
            raise OSError(EINVAL, "not switched")
        self.snapshot, _, self.storage_fd = self._prepared
        self._prepared, self._switched = None, False
        if self.tracker is not None:
            self.tracker.changes.forget_undo()
            if self.tracker.changes.change_number == 0:
                self.generation_changed("new generation: the change number passed 255")
        return {}

    def _do_abort(self, connection: Connection, _message: Message) -> None:
        self._abort()
        connection.reply()

    def _abort(self) -> dict[str, Any]:
        """Undo prepare, and switch if nothing was written since."""
        if self._prepared is None:
            return {}
        _, cow, fd = self._prepared
        if self._switched and self.tracker is not None:
            self.tracker.changes.undo_switch()
        self._prepared, self._switched, self.export.cow = None, False, None
        cow.close()
        os.close(fd)
        return {}

    def _do_drop(self, connection: Connection, message: Message) -> None:
        cow = self.export.cow
        if self.snapshot is None or self.snapshot != message["snapshot"] or cow is None:
            raise OSError(ENOENT, "the device is not in this snapshot")
        storage_fd, self.storage_fd = self.storage_fd, -1
        self.export.cow, self.snapshot = None, None
        if self.tracker is not None:
            self.tracker.changes.release_held()

        def closed(_error: OSError | None) -> None:
            os.close(storage_fd)
            connection.reply()

        # Behind the growth of the storage that may be under way in the background: it uses the same descriptor.
        self.background.run(cow.close, closed)

    def _do_corrupt(self, connection: Connection, message: Message) -> None:
        """End protection of a taken snapshot by order: its image answers EIO from now on. Tells whether we held one."""
        cow = self.export.cow
        if cow is not None:
            cow.fail(int(message.get("errno", EIO)))
        connection.reply(held=cow is not None)
