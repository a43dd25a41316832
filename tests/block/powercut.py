# SPDX-License-Identifier: Apache-2.0
"""A disk that remembers what a power cut could leave of the files of one directory.

It stands between the code and `os`: what was written is on the disk for sure once a sync that began later has ended;
until then every 512-byte sector may be there in any version that the page cache held meanwhile, and a file that was
renamed may be the old one or the new one until its directory is synced.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SECTOR = 512

_REAL = {name: getattr(os, name) for name in ("pwrite", "posix_fallocate", "replace")}

Version = tuple[int, bytes]
"""(moment, contents of one sector)."""
Choice = Callable[[int, list[Version]], Version | None]
"""What a cut leaves of the sector that begins at a byte: one of its versions, or None for the durable one."""


class RecordedFile:
    """One file: its durable contents, and for each sector the versions that may be there instead."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)
        self.durable = self.seen = b""
        self.versions: dict[int, list[Version]] = {}
        self.synced_to = 0

    def observe(self, moment: int) -> None:
        """Note what changed in the page cache since the last look."""
        now = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
        if now == self.seen:
            return
        before, self.seen = self.seen.ljust(len(now), b"\0"), now
        self.durable = self.durable.ljust(len(now), b"\0")
        for start in range(0, len(now), SECTOR):
            if now[start : start + SECTOR] != before[start : start + SECTOR]:
                self.versions.setdefault(start, []).append((moment, now[start : start + SECTOR]))

    def synced(self, contents: bytes, began: int) -> None:
        """A sync that began at this moment, over these contents, has ended. One that began later may have before."""
        if began < self.synced_to:
            return
        self.synced_to = began
        self.durable = contents.ljust(len(self.durable), b"\0")
        self.versions = {
            start: later
            for start, versions in self.versions.items()
            if (later := [version for version in versions if version[0] > began])
        }

    def after_cut(self, choose: Choice) -> bytes:
        """What is there after a cut: `choose` picks a version of each sector, or None for the durable one."""
        contents = bytearray(self.durable)
        for start, versions in self.versions.items():
            if (version := choose(start, versions)) is not None:
                contents[start : start + SECTOR] = version[1]
        return bytes(contents)


class Disk:
    """Records the files of `directory`; calls `cut` at every moment at which the power may fail."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, cut: Callable[[], None]) -> None:
        self.directory, self._cut = directory, cut
        self.moment = 0
        self.files: dict[int, RecordedFile] = {}
        self.names: dict[str, list[int]] = {}
        """Inodes that may be behind a name after a cut; the last one is there now."""
        self._syncing: list[tuple[RecordedFile, bytes, int]] = []
        self._late: set[int] = set()
        self.paused = False
        for name in ("fdatasync", "fsync"):
            patch.setattr(os, name, self._sync)
        patch.setattr(os, "pwrite", self._wrap(_REAL["pwrite"]))
        patch.setattr(os, "posix_fallocate", self._wrap(_REAL["posix_fallocate"]))
        patch.setattr(os, "replace", self._replacing(_REAL["replace"]))

    def close(self) -> None:
        for file in self.files.values():
            os.close(file.fd)
        self.files.clear()

    def step(self) -> None:
        """Look at all files, and let the power fail here."""
        if self.paused:
            return
        self.moment += 1
        for file in self.files.values():
            file.observe(self.moment)
        self._cut()

    def _file(self, fd: int) -> RecordedFile | None:
        info = os.fstat(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if not stat.S_ISREG(info.st_mode) or path.parent != self.directory:
            return None
        if info.st_ino not in self.files:
            self.files[info.st_ino] = RecordedFile(fd)
            self.names.setdefault(path.name, []).append(info.st_ino)
        return self.files[info.st_ino]

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *arguments: Any) -> Any:
            if not self.paused:
                self._file(fd)
                self.step()
            result = real(fd, *arguments)
            self.step()
            return result

        return call

    def _replacing(self, real: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def call(old: Any, new: Any) -> None:
            real(old, new)
            if not self.paused:
                moved = self.names.pop(Path(old).name)[-1]
                self.names.setdefault(Path(new).name, []).append(moved)
                self.step()

        return call

    def _sync(self, fd: int) -> None:
        if self.paused:
            return
        self.step()
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self.names = {name: inodes[-1:] for name, inodes in self.names.items()}
        elif (file := self._file(fd)) is not None:
            file.observe(self.moment)
            file.synced(file.seen, self.moment)
        self.step()

    def begin_sync(self, fd: int) -> Callable[[], None]:
        """A sync in another thread: it covers what is there now, and has ended when the result is called."""
        self.step()
        file = self._file(fd)
        assert file is not None
        contents, began = file.seen, self.moment
        return lambda: file.synced(contents, began)

    # -- after the cut ----------------------------------------------------------------------------

    def states(self, random_ones: int, source: random.Random) -> Iterator[dict[str, bytes | None]]:
        """Contents of the directory as a cut could leave them now: the worst cases, then random ones."""
        worst = ((_none, _none), (_newest, _none), (_none, _newest), (_header_only, _none), (_all_but_header, _none))
        chance: Choice = lambda _, versions: source.choice([None, *versions])  # noqa: E731
        for of_map, of_log in (*worst, *[(chance, chance)] * random_ones):
            yield {
                name: self.files[source.choice(inodes)].after_cut(of_map if name == "map" else of_log)
                for name, inodes in self.names.items()
            }


def _none(_start: int, _versions: list[Version]) -> Version | None:
    return None


def _newest(_start: int, versions: list[Version]) -> Version | None:
    return versions[-1]


def _header_only(start: int, versions: list[Version]) -> Version | None:
    return None if start else versions[-1]


def _all_but_header(start: int, versions: list[Version]) -> Version | None:
    return versions[-1] if start else None
