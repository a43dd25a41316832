# SPDX-License-Identifier: Apache-2.0
"""Where a tracer's COW files are: elsewhere, or on its own device under the file system. The part of a worker's plugin
that makes them, finds them again, and gives them back."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from errno import EINVAL, EIO, ESTALE
from pathlib import Path
from typing import Any, Protocol

from stasis.block.control import Connection, Message
from stasis.block.intentlog import IntentLog
from stasis.block.plugins import Host, Plugin
from stasis.datto import series
from stasis.datto.claim import Claim, Watch
from stasis.datto.cowfile import CowFile
from stasis.datto.layout import CACHE_DEFAULT, Geometry
from stasis.datto.mapped import MappedCowFile
from stasis.datto.ondevice import MappedSource, Places, new_header
from stasis.datto.opening import FileSource, Source
from stasis.datto.pinned import Pinned
from stasis.datto.tracer import Tracer
from stasis.errors import StasisError, StateError
from stasis.linux import mounts

__all__ = ["Files", "Filing", "Settings"]

Files = tuple[CowFile, IntentLog]

HELPER = "stasis.daemon.cowhelper"


class Settings(Protocol):
    """What a file is made with."""

    @property
    def directory(self) -> Path: ...

    @property
    def cache(self) -> int: ...


class Filing(Plugin):
    """What `Hosted` is made of beside its requests."""

    _host: Host
    tracer: Tracer | None
    _pending: Files | None
    _unfinished: Files | None
    _is_busy: bool

    @abstractmethod
    def _site(self, directory: Path) -> series.Site: ...

    @abstractmethod
    def _discard(self, files: Files) -> None: ...

    def open_places(self, state: Mapping[str, Any] | None) -> None:
        """At the plugin's beginning. What no tracer goes on with is anybody's: it counts as changed."""
        self._places = Places(self._host, HELPER, self.claimed)
        self._claim: Claim | None = None
        if state is not None:
            self._places.directory = Path(state["directory"])

    def source(self, directory: Path, path: str, node: str) -> Source:
        """The COW file that has this name. StateError (EINVAL) for one on the device itself of which nothing is known:
        looking at it would wait for this worker."""
        pinned = Pinned.find(directory, path)
        if pinned is not None:
            return MappedSource(self._places, pinned)
        with contextlib.suppress(OSError):  # no such node: nothing is mounted from it
            if node and mounts.lies_on(path, os.stat(node).st_rdev):
                raise StateError(f"it is not known where {path} lies on its device", errno=EINVAL,
                                 hint="begin a new series with setup-snapshot")
        return FileSource(path)

    # -- making one ---------------------------------------------------------------------------------------

    def _make(self, connection: Connection, settings: Settings, message: Message, uuid: bytes, seqid: int,
              made: Callable[[Files], None], after: Callable[[], None] = lambda: None) -> None:
        """Make files beside the loop, which allocating may hold up; `after` is done there too, once they exist."""
        site, path, size = self._site(settings.directory), str(message["cow"]), int(message.get("size") or 0)
        node, cache = str(message.get("node") or ""), settings.cache or CACHE_DEFAULT
        result: list[Files] = []
        if node:
            self._mark_others(settings.directory)

        def job() -> None:
            try:
                series.refuse_origin(path, os.fstat(self._host.origin.fd))
                cow = self._make_here(site, path, uuid, seqid, size, cache, node) if node else None
                result.append(series.make(site, path, uuid, seqid, size, cache, after, cow))
            except StasisError as error:
                raise OSError(error.errno or EIO, error.message) from error

        def done(error: OSError | None) -> None:
            self._is_busy = False
            if error is not None:
                connection.refuse(error.errno or EIO, error.strerror or str(error))
            else:
                made(result[0])

        self._is_busy = True
        self._host.background.run(job, done)

    def _make_here(self, site: series.Site, path: str, uuid: bytes, seqid: int, size: int, cache: int, node: str
                   ) -> MappedCowFile | None:
        self._places.directory = site.directory
        self._places.sweep(site.directory, node, self._records(site.directory))
        geometry, own = Geometry(site.size), self._pinned()
        header = new_header(uuid, seqid, size, geometry)
        return self._places.make(path, header, geometry, cache, node, own.inode if own else 0)

    def _pinned(self) -> Pinned | None:
        """What the tracer's present COW file is on the device, if it is there."""
        cow = self.tracer.cow if self.tracer is not None else None
        return cow.pinned if isinstance(cow, MappedCowFile) else None

    def _records(self, directory: Path) -> set[Path]:
        """Of the files that are in use, about to be, or about to be given back."""
        used = [pair[0] for pair in (self._pending, self._unfinished) if pair is not None]
        used += [self.tracer.cow] if self.tracer is not None else []
        return {cow.pinned.place(directory) for cow in used if isinstance(cow, MappedCowFile)}

    # -- claims --------------------------------------------------------------------------------------------

    def claimed(self, claim: Claim | None) -> None:
        """Have every write watched for the sake of a claim, or for none any more. From any thread."""
        self._claim = claim
        if self.tracer is not None:
            self.tracer.claim = claim
        elif claim is not None:
            self._host.export.observer = Watch(claim)
        elif isinstance(self._host.export.observer, Watch):
            self._host.export.observer = None

    def end_claim(self, files: Files) -> None:
        """The file is the tracer's from here on, which watches it. OSError if somebody else wrote to its blocks: it is
        gone then."""
        claim, cow = self._claim, files[0]
        self.claimed(None)
        if isinstance(cow, MappedCowFile):
            cow.watch(None)
        try:
            if claim is not None:
                claim.require(files[0].path)
        except StateError as error:
            self._discard(files)
            raise OSError(error.errno or ESTALE, error.message) from error

    # -- giving them back --------------------------------------------------------------------------------------

    def guard(self, cow: CowFile) -> None:
        """The file is going to be finished beside the loop; its blocks are watched until `handed_over`."""
        if isinstance(cow, MappedCowFile):
            claim = Claim(cow.territory)
            claim.is_filling = False
            cow.watch(claim)
            self.claimed(claim)

    def hand_over(self, cow: CowFile) -> None:
        """Finish a file, beside the loop: from here on it is a file like any other. OSError."""
        cow.finish()
        cow.release()

    def handed_over(self, cow: CowFile) -> None:
        """In the loop, after that."""
        if isinstance(cow, MappedCowFile):
            if self._claim is cow.claim:  # and not already that of the next file
                self.claimed(None)
            self._places.mark(cow.pinned)

    def stopping(self) -> None:
        self._places.cancel()

    def _do_mounted(self, connection: Connection, message: Message) -> None:
        """The device's file system is mounted: see whether the COW file is where it was, and give back older ones."""
        directory, node, own, tracer = Path(message["directory"]), str(message["node"]), self._pinned(), self.tracer
        self._mark_others(directory)
        used = self._records(directory)

        def job() -> None:
            self._places.sweep(directory, node, used)
            if own is not None:
                self._places.verify(own, node)

        def done(error: OSError | None) -> None:
            if error is not None and tracer is not None and tracer is self.tracer and own == self._pinned():
                tracer.fail(error.errno or ESTALE)

        self._host.background.run(job, done)
        connection.reply()

    def _mark_others(self, directory: Path) -> None:
        """What earlier tracers left pinned is about to be anybody's."""
        used = self._records(directory)
        for pinned in Pinned.all(directory):
            if pinned.place(directory) not in used:
                self._places.mark(pinned)
