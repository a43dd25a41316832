# SPDX-License-Identifier: Apache-2.0
"""A tracer whose device is served while nobody has it mounted: dormant, its COW file clean, until something is written.

That nothing is written is what the mounts say, and they may be wrong: another namespace, a program that writes to the
node. So it is not believed. Whatever is written first makes the tracer active again, before it is written, and durably.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from errno import EINVAL, EIO
from typing import Any

from stasis.block.control import Connection, Message
from stasis.block.origin import Request
from stasis.block.plugins import Host, Plugin
from stasis.datto import series
from stasis.datto.cowfile import CowFile
from stasis.datto.tracer import Tracer

__all__ = ["Resting", "RestingRequests"]


class Resting:
    """Stands before the writes in the tracer's place."""

    def __init__(self, hosted: RestingRequests, tracer: Tracer) -> None:
        self._hosted, self._tracer = hosted, tracer
        self.is_clean = False
        """Whether the file's clean flag is set, or may be on the disk."""

    @property
    def step(self) -> int:
        return self._tracer.step

    def before(self, requests: Sequence[Request]) -> None:
        """Something is about to be written: the tracer is active from here on. Never raises."""
        self._hosted.end_rest()
        self._hosted.tell_woken()
        self._tracer.before(requests)


class RestingRequests(Plugin):
    """Requests of a tracer's plugin: `rest`, `wake`, and `retire`, which ends one that rests and keeps its file."""

    _host: Host
    tracer: Tracer | None

    @abstractmethod
    def describe(self) -> dict[str, Any]: ...

    @abstractmethod
    def _require(self) -> Tracer: ...

    @abstractmethod
    def _refuse_open(self) -> None: ...

    @abstractmethod
    def _end_image(self) -> None: ...

    @abstractmethod
    def guard(self, cow: CowFile) -> None: ...

    @abstractmethod
    def handed_over(self, cow: CowFile) -> None: ...

    @property
    def rests(self) -> bool:
        """Whether the tracer is dormant."""
        return isinstance(self._host.export.observer, Resting)

    def tell_woken(self) -> None:
        """The daemon learns that a write ended the rest."""
        self._host.post("datto_woke")

    def end_rest(self) -> None:
        """Every write is entered again. Between batches; a file that cannot be written is the end of the tracer."""
        resting, tracer = self._host.export.observer, self.tracer
        if not isinstance(resting, Resting) or tracer is None:
            return
        self._host.export.observer = tracer
        if resting.is_clean and not tracer.error:
            try:
                tracer.cow.write_header()
                tracer.cow.sync()
            except OSError as error:
                tracer.fail(error.errno or EIO)

    def _do_rest(self, connection: Connection, _message: Message) -> None:
        """Leave the file complete and clean, beside the loop. A write meanwhile is the end of the rest."""
        tracer = self._require()
        tracer.catch_up()  # nothing is entered while it rests
        if tracer.error:
            raise OSError(EINVAL, "the tracer has failed")
        resting = self._host.export.observer = Resting(self, tracer)

        def synced(error: OSError | None) -> None:
            if self._host.export.observer is not resting:
                connection.reply(**self.describe())
                return
            try:
                if error is not None:
                    raise error
                resting.is_clean = True
                tracer.cow.write_header(clean=True)
            except OSError as failure:
                tracer.fail(failure.errno or EIO)
            self._host.background.run(tracer.cow.sync, done)

        def done(error: OSError | None) -> None:
            if error is not None:
                tracer.fail(error.errno or EIO)
            connection.reply(**self.describe())

        self._host.background.run(tracer.cow.sync, synced)

    def _do_wake(self, connection: Connection, _message: Message) -> None:
        self.end_rest()
        connection.reply(**self.describe())

    def _do_retire(self, connection: Connection, _message: Message) -> None:
        """End the tracer and keep its file. What is written from here on is not in it: it cannot be taken up again."""
        tracer = self._require()
        self._refuse_open()
        self._end_image()
        tracer.catch_up()  # here, and not beside the loop
        series.forget_log(tracer.log.path)
        self._host.export.observer, self.tracer = None, None
        self.guard(tracer.cow)

        def closed(error: OSError | None) -> None:
            if error is not None:
                print(f"ERROR {tracer.cow.path} was not left in order: {error}", file=sys.stderr, flush=True)
            self.handed_over(tracer.cow)
            tracer.close()
            connection.reply()

        self._host.background.run(tracer.cow.finish, closed)
