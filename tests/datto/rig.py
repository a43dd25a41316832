# SPDX-License-Identifier: Apache-2.0
"""A device with a tracer, all in the test's own process, that can be stopped, killed and cut from its power.

A power cut keeps of every file what was made durable, and of what was written since, whatever pages it likes. The
origin keeps all that was ever written to it, which is the worst for whoever must know of it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

from stasis.block import mapformat, tracking
from stasis.block.background import Done
from stasis.block.exports import OriginExport
from stasis.block.opening import open_origin
from stasis.block.settings import Settings
from stasis.block.tracking import Tracker
from stasis.datto.cowreader import CowReader
from stasis.datto.hosted import Hosted
from stasis.datto.image import TracerImage
from stasis.linux.eventloop import EventLoop
from stasis.linux.iobuffer import IoBuffer

BLOCK = 4096
SIZE = 600 * BLOCK + 512
ALWAYS = 1 << 62


class Killed(BaseException):
    """The worker dies here."""


def killed_at(patch: pytest.MonkeyPatch, calls: int, action: Callable[[], object]) -> bool:
    """Do something whose worker is killed at its file operation number `calls`; tells whether it came that far."""
    left = calls

    def counted(real: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*arguments)

        return call

    with patch.context() as inner:
        for name in ("pwrite", "pwritev", "fdatasync"):
            inner.setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except Killed:
            return True
    return False


class Refused(Exception):
    """The plugin answered an error: its errno."""


class _Connection:
    def __init__(self) -> None:
        self.answer: dict[str, Any] | None = None
        self.errno = 0

    def reply(self, fds: tuple[int, ...] = (), **fields: Any) -> None:
        self.answer = fields

    def refuse(self, errno: int, message: str) -> None:
        self.errno = errno or EIO


class _Background:
    """Everything at once: the order is that of the real one's single thread."""

    def run(self, job: Any, done: Done) -> None:
        error = None
        try:
            job()
        except OSError as caught:
            error = caught
        done(error)


class _Host:
    name = "disk"
    settings = Settings(intent_region_shift=20)

    def __init__(self, loop: EventLoop, path: Path, directory: Path, *, continuous: bool) -> None:
        self.loop, self.background = loop, _Background()
        self.origin = open_origin(str(path), buffered=True)
        self.tracker, self.opening = Tracker.open(directory, self.origin.size, 16, 20, self.origin.identity(),
                                                  continuous=continuous)
        self.export = OriginExport("disk", self.origin, self.tracker)
        self.events: list[str] = []

    def post(self, kind: str, **fields: object) -> None:
        self.events.append(kind)


class Rig:
    """The device, its tracer, and the image that `update-img` would keep."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, seed: int) -> None:
        self.random = random.Random(seed)
        self.directory, self.boots = directory, 1
        self.durable: dict[int, bytes] = {}
        """By inode: what would be there after a power cut."""
        patch.setattr(mapformat, "this_boot", lambda: self.boots.to_bytes(16, "big"))
        patch.setattr(tracking, "_boot_time", lambda: ALWAYS)
        self._real_sync = os.fsync
        patch.setattr(os, "fsync", self._sync)
        patch.setattr(os, "fdatasync", self._sync)
        self.path = directory / "disk"
        self.path.write_bytes(self.random.randbytes(SIZE))
        self.buffer, self.loop = IoBuffer(4 << 20), EventLoop()
        self.number = 0
        self.mode = "snapshot"
        self.start(None, continuous=False)
        self.ask("prepare", cow=str(self.cow()), size=1 << 23, **self._place())
        self.ask("begin")
        self.image = self.copied = self.path.read_bytes()

    def _place(self) -> dict[str, Any]:
        return {"minor": 0, "directory": str(self.directory), "socket": str(self.directory / "d.sock"), "cache": 0}

    def cow(self) -> Path:
        return self.directory / f"cow{self.number}"

    def _sync(self, fd: int) -> None:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isfile(name):
            with open(name, "rb") as file:
                self.durable[os.fstat(fd).st_ino] = file.read()

    # -- requests and writes ------------------------------------------------------------------------------

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        connection = _Connection()
        try:
            self.hosted.handle(request, connection, {"op": request, **fields})  # type: ignore[arg-type]
        except OSError as error:
            raise Refused(error.errno) from error
        if connection.errno:
            raise Refused(connection.errno)
        assert connection.answer is not None
        return connection.answer

    def write(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        self.buffer.view[:length] = self.random.randbytes(length)
        self.host.export.write(self.buffer, [(offset, length, 0)])

    def discard(self, offset: int, length: int) -> None:
        for _ in self.host.export.trim(offset, min(length, SIZE - offset)):
            pass

    def zero(self, offset: int, length: int) -> None:
        for _ in self.host.export.write_zeroes(offset, min(length, SIZE - offset), punch=False, fast=False):
            pass

    def read_image(self) -> bytes:
        assert self.hosted.tracer is not None
        image = TracerImage("datto0", self.hosted.tracer)
        parts = []
        for offset in range(0, SIZE, 70000):
            length = min(70000, SIZE - offset)
            image.read(self.buffer, [(offset, length, 0)])
            parts.append(bytes(self.buffer.view[:length]))
        return b"".join(parts)

    # -- transitions --------------------------------------------------------------------------------------

    def to_incremental(self) -> None:
        self.ask("incremental")
        self.mode = "incremental"

    def to_snapshot(self) -> None:
        """And bring the copied image up to date, by the file that is finished now."""
        finished = self.cow()
        self.number += 1
        self.ask("snapshot", cow=str(self.cow()), size=1 << 23)
        self.mode = "snapshot"
        self.image = self.path.read_bytes()
        copied, now = bytearray(self.copied), self.read_image()
        with CowReader(str(finished), SIZE) as reader:
            assert reader.header.is_clean
            assert reader.header.is_index_only
            for offset, length in reader.extents():
                copied[offset : offset + length] = now[offset : offset + length]
        self.copied = bytes(copied)

    # -- ends and beginnings --------------------------------------------------------------------------------

    def start(self, state: dict[str, Any] | None, *, continuous: bool) -> None:
        self.host = _Host(self.loop, self.path, self.directory, continuous=continuous)
        self.hosted = Hosted(self.host, state)  # type: ignore[arg-type]

    def _state(self) -> dict[str, Any]:
        return {"cow": str(self.cow()), "mode": self.mode, **self._place()}

    def restart(self) -> None:
        """Stop in order, and begin again."""
        self.hosted.stop()
        self.host.tracker.finish(self.host.origin.identity())
        self.host.tracker.close()
        self.host.origin.close()
        self.start(self._state(), continuous=False)

    def _die(self) -> None:
        tracer = self.hosted.tracer
        if tracer is not None:
            tracer.close()
        self.hosted._end_image()
        self.host.tracker.close()

    def die(self) -> None:
        """The worker is killed; the daemon holds the origin and starts the next one."""
        self._die()
        self.host.origin.close()
        self.start(self._state(), continuous=True)

    def rest(self) -> None:
        """The device was unmounted. If this or a write ends it, nobody notices."""
        assert self.ask("rest")["rests"]

    def cut(self) -> None:
        """The power goes, and comes back. A snapshot is lost then unless it rested; the series is not."""
        rested = self.hosted.rests
        self._die()
        for name in ("map", "intent", *(path.name for path in self.directory.glob("datto-*")), self.cow().name):
            self._lose(self.directory / name, 512 if name.startswith(("intent", "datto-")) else BLOCK)
        self.host.origin.close()
        self.boots += 1
        self.mode = self.mode if rested else "incremental"
        self.start(self._state(), continuous=False)

    def _lose(self, path: Path, page: int) -> None:
        now, kept = path.read_bytes(), self.durable.get(path.stat().st_ino, b"").ljust(1 << 23, b"\0")
        pages = [source[start : start + page] for start in range(0, len(now), page)
                 for source in [now if self.random.random() < 0.5 else kept]]
        with path.open("r+b") as file:
            file.write(b"".join(pages)[: len(now)])

    def close(self) -> None:
        self.hosted.stop()
        self.host.tracker.close()
        self.host.origin.close()
        self.buffer.close()
        self.loop.close()


def live_through_a_series(rig: Rig, choose: random.Random, step: Callable[[Any, random.Random], None]) -> None:
    """Steps of a tracer in both modes, with restarts, deaths, rests and power cuts between them at random."""
    for mode in ("snapshot", "incremental"):
        if mode != rig.mode:
            rig.to_incremental()
        for _ in range(choose.randrange(6)):
            step(rig, choose)
            if choose.random() < 0.3:
                choose.choice((rig.restart, rig.die, rig.rest))()
        if rig.mode == "snapshot":
            assert rig.read_image() == rig.image
        if choose.random() < 0.3:
            rig.cut()
            assert rig.hosted.tracer is not None, rig.hosted.describe()
            assert rig.hosted.tracer.cow.is_index_only == (rig.mode == "incremental")
