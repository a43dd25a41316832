# SPDX-License-Identifier: Apache-2.0
"""The transition to the next snapshot in three steps, so that file systems can rest for the one in the middle: its
files are made, the tracer turns to them, the file before is finished."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable
from errno import EINVAL, EIO
from pathlib import Path
from typing import Any

from stasis.block.control import Connection, Message
from stasis.datto import series
from stasis.datto.cowfile import CowFile
from stasis.datto.filing import Files, Filing, Settings

__all__ = ["Following"]


class Following(Filing):
    """Requests `prepare_next`, `follow`, `finish`, and `snapshot`, which is all three."""

    _pending: Files | None
    _unfinished: Files | None
    _settings: Settings | None

    @abstractmethod
    def describe(self) -> dict[str, Any]: ...

    @abstractmethod
    def _require(self) -> Any: ...

    @abstractmethod
    def _log_path(self, cow: CowFile) -> Path: ...

    @abstractmethod
    def _serve_image(self) -> None: ...

    def _do_snapshot(self, connection: Connection, message: Message) -> None:
        def made(files: Files) -> None:
            self._pending = files
            try:
                self._follow()
            except OSError as error:
                connection.refuse(error.errno or EIO, error.strerror or str(error))
            else:
                self._do_finish(connection, message)

        self._make_next(connection, message, made)

    def _do_prepare_next(self, connection: Connection, message: Message) -> None:
        """Make the files; `abort` gives them up again."""

        def made(files: Files) -> None:
            self._pending = files
            connection.reply()

        self._make_next(connection, message, made)

    def _make_next(self, connection: Connection, message: Message, made: Callable[[Files], None]) -> None:
        tracer = self._require()
        assert self._settings is not None
        if self._pending is not None:
            self._discard(self._pending)  # of a transition that was broken off
        if self._unfinished is not None:
            self._finish_late(self._unfinished)
        header = tracer.cow.header
        self._make(connection, self._settings, message, header.uuid, header.seqid + 1, made)

    def _do_follow(self, connection: Connection, _message: Message) -> None:
        self._follow()
        connection.reply(**self.describe())

    def _follow(self) -> None:
        """From here on the next file sees every write. The log of this one goes before the first write that it does not
        see. Between batches; OSError, and the tracer goes on as before or has failed."""
        tracer = self._require()
        files, self._pending = self._pending, None
        if files is None:
            raise OSError(EINVAL, "no next file was made")
        if not tracer.catch_up():  # here, and not beside the loop
            self._discard(files)
            raise OSError(tracer.error, "the tracer failed meanwhile")
        try:
            series.forget_log(self._log_path(tracer.cow))
        except OSError:
            self._discard(files)
            raise
        try:
            self.end_claim(files)
        except OSError as error:
            tracer.fail(error.errno or EIO)  # its log is gone, so that it could not be taken up again
            raise
        self._unfinished = tracer.follow(*files)
        self.guard(self._unfinished[0])
        self._serve_image()

    def _finish_late(self, done: Files) -> None:
        """The daemon died before it asked for it. Beside the loop, as a file system may have to be served for it; and
        before the next files are made, which is done there too."""

        def finished(error: OSError | None) -> None:
            if error is not None:
                print(f"ERROR {done[0].path} was not left in order: {error}", file=sys.stderr, flush=True)
            self._end(done)

        self._host.background.run(lambda: self.hand_over(done[0]), finished)

    def _end(self, done: Files) -> None:
        self.handed_over(done[0])
        for file in done:
            file.close()
        self._unfinished = None

    def _do_finish(self, connection: Connection, _message: Message) -> None:
        """Leave the file before complete, clean and closed."""
        done = self._unfinished
        if done is None:
            raise OSError(EINVAL, "there is no file to finish")

        def finished(error: OSError | None) -> None:
            self._end(done)
            if error is not None:
                connection.refuse(error.errno or EIO, f"the finished COW file was not left in order: {error.strerror}")
            else:
                connection.reply(**self.describe())

        self._host.background.run(lambda: self.hand_over(done[0]), finished)
