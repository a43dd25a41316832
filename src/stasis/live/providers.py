# SPDX-License-Identifier: Apache-2.0
"""Other ways to a point in time than freezing and copying: what the place where data lies can do by itself.

Each is found out by trying. Tracking is ours in any case: these give contents, and know of no changes.
"""

from __future__ import annotations

import os
import stat
import time
from typing import Protocol

from stasis.backup.sources import RawSource
from stasis.linux import reflink
from stasis.live.capabilities import Capability

__all__ = ["PROVIDERS", "Provider", "Reflink", "open_file", "probe_ways"]


class Provider(Protocol):
    """A way to the contents of a file or device at one instant."""

    name: str

    def why_not(self, path: str) -> str:
        """Why it cannot be had there; empty if it can."""

    def take(self, path: str) -> int:
        """A descriptor to read from; nothing of it is left when that is closed. Raises OSError."""


class Reflink:
    """A clone of a regular file on xfs, btrfs and others that share blocks."""

    name = "reflink"

    def why_not(self, path: str) -> str:
        """Tries it."""
        try:
            os.close(self.take(path))
        except OSError as error:
            return str(error.strerror or error)
        return ""

    def take(self, path: str) -> int:
        """An unnamed clone beside the file."""
        return reflink.clone_unnamed(path)


PROVIDERS: list[Provider] = [Reflink()]


class ClonedFile(RawSource):
    """An image file at the instant when it was opened: who writes to it later is not seen."""

    def __init__(self, name: str, path: str, fd: int) -> None:
        """The descriptor passes to the source. Raises what RawSource raises."""
        try:
            super().__init__(name, path)
        except BaseException:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self.taken = fd, time.time()
        self.size = os.fstat(fd).st_size

    def disturbed(self) -> str:
        """Nobody else has the clone."""
        return ""


def open_file(name: str, path: str) -> RawSource:
    """A file or device as a source: at one instant where there is a way, else as it lies there.

    Raises NotFoundError, PermissionDeniedError, UsageError.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        regular = False
    for provider in PROVIDERS if regular else []:
        try:
            fd = provider.take(path)
        except OSError:
            continue
        return ClonedFile(name, path, fd)
    return RawSource(name, path)


def probe_ways(path: str | None) -> list[Capability]:
    """What each provider says of a file or device, or of the file that a loop device is made of."""
    if path is None:
        return []
    beneath = _backing_file(path)
    found = []
    for provider in PROVIDERS:
        why_not = provider.why_not(beneath)
        found.append(Capability(f"point in time by {provider.name}", not why_not, why_not or f"of {beneath}"))
    return found


def _backing_file(path: str) -> str:
    """The file of a loop device; anything else is itself."""
    try:
        with open(f"/sys/class/block/{os.path.basename(os.path.realpath(path))}/loop/backing_file") as file:
            return file.read().removesuffix("\n")
    except OSError:
        return path
