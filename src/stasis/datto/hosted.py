# SPDX-License-Identifier: Apache-2.0
"""The tracer's part of a worker: requests `datto.*` of the control socket, the image of the snapshot as an NBD export.

Requests and answers are in docs/design/datto.md. The daemon has checked what dattobd checks of minors and states; what
is checked here is what only the worker knows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from errno import EBUSY, EINVAL, EIO, ENODEV, ENOENT, ENOTTY
from pathlib import Path
from typing import Any

from stasis.block.control import Connection, Message
from stasis.block.hold import Hold
from stasis.block.plugins import Host
from stasis.block.serving import listen_inner
from stasis.datto import series
from stasis.datto.cowfile import CowFile
from stasis.datto.filing import Files
from stasis.datto.following import Following
from stasis.datto.image import TracerImage
from stasis.datto.layout import CACHE_DEFAULT
from stasis.datto.resting import RestingRequests
from stasis.datto.tracer import Tracer
from stasis.errors import StasisError
from stasis.nbd.export import ExportList
from stasis.nbd.server import Server

__all__ = ["Hosted", "attach"]

MOST_NUMBERS = 1000
"""Of the places of a COW file in an answer, which is bounded."""



def attach(host: Host, state: Mapping[str, Any] | None) -> Hosted:
    """Make the plugin; with a state, go on with the tracer that it describes."""
    return Hosted(host, state)


@dataclass(slots=True)
class _Settings:
    """What the daemon says of the tracer."""

    minor: int
    directory: Path
    socket: str
    cache: int


class Hosted(Following, RestingRequests):
    """At most one tracer, of this worker's device."""

    def __init__(self, host: Host, state: Mapping[str, Any] | None) -> None:
        self._host = host
        self.tracer: Tracer | None = None
        self._server: Server | None = None
        self._settings: _Settings | None = None
        self._pending: Files | None = None
        self._unfinished: Files | None = None
        self._is_busy = False
        self._refused: StasisError | None = None
        self.open_places(state)
        if state is not None:
            self._resume(state)

    # -- life -----------------------------------------------------------------------------------------

    def _site(self, directory: Path) -> series.Site:
        host = self._host
        return series.Site(host.origin.path, host.origin.size, directory, host.settings.intent_region_shift,
                           host.tracker, host.opening)

    def _take_settings(self, message: Mapping[str, Any]) -> _Settings:
        return _Settings(int(message["minor"]), Path(message["directory"]), str(message["socket"]),
                         int(message.get("cache") or 0))

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Take up the file of an earlier worker. What forbids it is kept for `info`; the device is served anyway."""
        self._settings = settings = self._take_settings(state)
        try:
            cow = self.source(settings.directory, str(state["cow"]), str(state.get("node") or ""))
            files = series.take_up(self._site(settings.directory), cow,
                                   index_only=state["mode"] != "snapshot", cache=settings.cache or CACHE_DEFAULT)
            self._begin(settings, files)
        except StasisError as error:
            self._refused = error
        except OSError as error:
            self._refused = StasisError(f"{state['cow']}: {error.strerror}", errno=error.errno or EIO)
        if self.tracer is not None and state.get("auto_expand") and not self.tracer.cow.is_index_only:
            self.tracer.auto_expand = (int(state["auto_expand"][0]), int(state["auto_expand"][1]))
        if self._refused is not None:
            series.forget_logs(settings.directory)  # from here on the device is written behind its file's back
            print(f"WARNING the tracer {settings.minor} of {self._host.name} cannot go on: {self._refused}",
                  file=sys.stderr, flush=True)

    def _begin(self, settings: _Settings, files: Files) -> None:
        """From here on every write is seen, by this file and no other. Between batches. OSError: nothing has begun."""
        self._settings, self._refused = settings, None
        self.end_claim(files)
        try:
            series.forget_logs(settings.directory, self._log_path(files[0]))
        except OSError:
            for file in files:
                file.close()
            raise
        self.tracer = Tracer(self._host.origin, *files, failed=self._failed, low=self._low)
        self._host.export.observer = self.tracer
        self._serve_image()

    def _serve_image(self) -> None:
        assert self.tracer is not None
        assert self._settings is not None
        if not self.tracer.cow.is_index_only:
            image = TracerImage(f"datto{self._settings.minor}", self.tracer)
            self._server = listen_inner(self._host.loop, ExportList(image), self._settings.socket)

    def _end_image(self) -> None:
        if self._server is not None and self._settings is not None:
            self._server.close()
            self._server = None
            Path(self._settings.socket).unlink(missing_ok=True)

    def _log_path(self, cow: CowFile) -> Path:
        assert self._settings is not None
        return series.log_path(self._settings.directory, cow.header.uuid, cow.header.seqid)

    def stop(self) -> None:
        self._end_image()
        if self._pending is not None:
            self._discard(self._pending)
        if self._unfinished is not None:
            self._finish(self._unfinished)
        if self.tracer is not None:
            self._host.export.observer = None
            if not self.tracer.error:
                self._finish((self.tracer.cow, self.tracer.log), close=False)
            self.tracer.close()
            self.tracer = None

    def _finish(self, files: Files, *, close: bool = True) -> None:
        cow, log = files
        try:
            cow.finish()
            log.clear(log.start_clearing())
        except OSError as error:
            print(f"ERROR {cow.path} was not left in order: {error}", file=sys.stderr, flush=True)
        if close:
            cow.close()
            log.close()

    def _discard(self, files: Files) -> None:
        """Files that were made and are not used."""
        cow, log = files
        self.claimed(None)
        cow.unlink()
        series.forget_log(self._log_path(cow))
        cow.close()
        log.close()
        self._pending = None

    # -- what happens to it -----------------------------------------------------------------------------

    def _failed(self, errno: int) -> None:
        """The file goes, as dattobd's does; so does the log, durably, before anything is written untraced."""
        tracer = self.tracer
        if tracer is None:
            return
        try:
            series.forget_log(self._log_path(tracer.cow))
        except OSError as error:
            print(f"ERROR {self._log_path(tracer.cow)} stays: {error}", file=sys.stderr, flush=True)
        tracer.cow.unlink()
        self._host.post("datto_failed", error_code=-errno)

    def _low(self, percent: int) -> None:
        self._host.post("datto_low", percent=percent)

    def tick(self) -> None:
        if self.tracer is not None and not self.tracer.error:
            self.tracer.catch_up()
            try:
                self.tracer.check()
            except OSError:
                pass  # it has told of its end by itself

    def clear_intents(self) -> None:
        tracer = self.tracer
        if tracer is None or tracer.error or self._is_busy:
            return
        log, cow = tracer.log, tracer.cow
        if tracer.catch_up() and (regions := log.start_clearing()):
            self._host.background.run(cow.sync, lambda error: None if error else log.clear(regions))

    def generation_changed(self) -> None:
        tracer = self.tracer
        if tracer is None or self._settings is None or tracer.error:
            return
        try:
            tracer.log.rename_generation(series.generation_of(self._site(self._settings.directory)))
        except OSError as error:
            tracer.fail(error.errno or EIO)

    def resized(self) -> None:
        if self.tracer is not None:
            self.tracer.fail(ENODEV if self._host.origin.is_gone else EIO)

    # -- requests ---------------------------------------------------------------------------------------

    def handle(self, request: str, connection: Connection, message: Message) -> None:
        handler = getattr(self, f"_do_{request}", None)
        if handler is None:
            raise OSError(ENOTTY, f"unknown request 'datto.{request}'")
        handler(connection, message)

    def _require(self) -> Tracer:
        if self.tracer is None:
            raise OSError(ENOENT, "the device has no tracer")
        if self._is_busy:
            raise OSError(EBUSY, "another request is under way")
        self.end_rest()
        return self.tracer

    def _do_info(self, connection: Connection, _message: Message) -> None:
        connection.reply(**self.describe())

    def describe(self) -> dict[str, Any]:
        """What is known of the tracer, for the daemon."""
        fields: dict[str, Any] = {"minor": self._settings.minor if self._settings else None,
                                  "open": self._server.connections if self._server else 0, "error": 0, "reason": "",
                                  "rests": self.rests}
        if self._refused is not None:
            fields |= {"error": -(self._refused.errno or EIO), "reason": str(self._refused)}
        if self.tracer is not None:
            self.tracer.catch_up()
            header = self.tracer.cow.header
            fields |= {
                "error": -self.tracer.error, "mode": "incremental" if header.is_index_only else "snapshot",
                "cow": self.tracer.cow.path, "cow_size": header.fsize, "seqid": header.seqid,
                "uuid": header.uuid.hex(), "version": header.version, "changed": header.changed_blocks,
                "filled": 0 if header.is_index_only else self.tracer.cow.filled_percent,
                "own": [] if header.is_index_only else self.tracer.cow.territory.as_numbers(MOST_NUMBERS),
            }
        return fields

    def _do_prepare(self, connection: Connection, message: Message) -> None:
        """Make the files of a first snapshot; `begin` puts them to use."""
        if self._is_busy or self._pending is not None or self.tracer is not None:
            raise OSError(EBUSY, "the device has a tracer already")
        settings = self._take_settings(message)
        self._settings = settings

        def made(files: Files) -> None:
            self._pending = files
            connection.reply(uuid=files[0].header.uuid.hex())

        self._make(connection, settings, message, os.urandom(16), 1, made)

    def _do_begin(self, connection: Connection, _message: Message) -> None:
        connection.reply(**self._begin_prepared())

    def _begin_prepared(self) -> dict[str, Any]:
        files, self._pending = self._pending, None
        if files is None or self._settings is None:
            raise OSError(EINVAL, "nothing was prepared")
        self._begin(self._settings, files)
        return self.describe()

    def _do_hold(self, connection: Connection, _message: Message) -> None:
        """Wait for `begin` and `release` with everything else at rest; anything else undoes what was prepared."""
        if self._pending is None:
            raise OSError(EINVAL, "nothing was prepared")
        hold = Hold(connection, {"begin": self._begin_prepared, "release": dict, "abort": self._abort})
        connection.reply()
        if not hold.serve(self._host.settings.hold_timeout_ms / 1000):
            self._abort()

    def _abort(self) -> dict[str, Any]:
        """Nothing was written since the hold began, so that ending the tracer is as if it had not been."""
        if self._pending is not None:
            self._discard(self._pending)
        elif self.tracer is not None:
            self._end_image()
            self._host.export.observer = None
            tracer, self.tracer = self.tracer, None
            tracer.cow.unlink()
            series.forget_log(self._log_path(tracer.cow))
            tracer.close()
        return {}

    def _do_abort(self, connection: Connection, _message: Message) -> None:
        """Give up what was prepared; what is still being made for a daemon that died, once it is made."""

        def ended(_error: OSError | None) -> None:
            if self._pending is not None:
                self._discard(self._pending)
            connection.reply()

        self._host.background.run(lambda: None, ended)

    def _do_incremental(self, connection: Connection, _message: Message) -> None:
        tracer = self._require()
        self._refuse_open()
        self._end_image()
        tracer.auto_expand = None
        try:
            tracer.cow.become_index_only()
        except OSError as error:
            tracer.fail(error.errno or EIO)
            raise
        # Behind the cut of a file that its file system has to make.
        self._host.background.run(lambda: None, lambda _: connection.reply(**self.describe()))

    def _refuse_open(self) -> None:
        if self._server is not None and self._server.connections:
            raise OSError(EBUSY, "its image is in use")

    def _do_cache(self, connection: Connection, message: Message) -> None:
        tracer = self._require()
        self._refuse_open()
        tracer.cow.index.set_cache(int(message.get("cache") or 0) or CACHE_DEFAULT)
        connection.reply(**self.describe())

    def _do_expand(self, connection: Connection, message: Message) -> None:
        self._require().expand(int(message["length"]))
        connection.reply(**self.describe())

    def _do_autoexpand(self, connection: Connection, message: Message) -> None:
        step, reserved = int(message["step"]), int(message["reserved"])
        self._require().check_growth()
        self._require().auto_expand = (step, reserved) if step else None
        connection.reply(**self.describe())

    def _do_drop(self, connection: Connection, _message: Message) -> None:
        """End the tracer; its file goes, if it still is ours."""
        if self._is_busy:
            raise OSError(EBUSY, "another request is under way")
        self._refuse_open()
        self._end_image()
        tracer, self.tracer, self._refused = self.tracer, None, None
        if tracer is None:
            connection.reply()
            return
        series.forget_log(self._log_path(tracer.cow))
        self._host.export.observer = None
        tracer.cow.unlink()

        def closed(_error: OSError | None) -> None:
            tracer.close()
            connection.reply()

        # Behind what the background does with its files: clearing the log, finishing the file before.
        self._host.background.run(lambda: None, closed)
