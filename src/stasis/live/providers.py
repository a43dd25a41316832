# SPDX-License-Identifier: Apache-2.0
"""Other ways to a point in time than freezing and copying: what the place where data lies can do by itself.

Each is found out by trying. Tracking is ours in any case: these give contents, and know of no changes.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence

from stasis.backup.source import Extent
from stasis.backup.sources import RawSource
from stasis.backup.sources.raw import RawReader
from stasis.errors import StasisError
from stasis.linux import blockdev, reflink
from stasis.live.capabilities import Capability
from stasis.live.subvolume import Subvolume
from stasis.live.volume import LogicalVolume
from stasis.live.ways import Point, Provider

__all__ = ["FOR_DEVICES", "FOR_FILES", "Reflink", "open_file", "probe_ways"]


class Reflink:
    """A clone of a regular file on xfs, btrfs and others that share blocks."""

    name = "reflink"

    def why_not(self, path: str) -> str:
        """Tries it."""
        try:
            return self.take(path).close()
        except OSError as error:
            return str(error.strerror or error)

    def take(self, path: str) -> Point:
        """An unnamed clone beside the file; nothing is left of it when it is closed."""
        return Point(reflink.clone_unnamed(path))


FOR_FILES: list[Provider] = [Reflink(), Subvolume()]
FOR_DEVICES: list[Provider] = [LogicalVolume()]


class PointSource(RawSource):
    """A file or device at the instant when it was opened: what is written to it later is not seen."""

    def __init__(self, name: str, path: str, point: Point) -> None:
        """The point passes to the source. Raises what RawSource raises."""
        try:
            super().__init__(name, path)
        except BaseException:
            point.close()
            raise
        os.close(self._fd)
        self._fd, self._point, self.taken = point.fd, point, time.time()
        self.size = blockdev.size(point.fd)

    def close(self) -> None:
        """Take the point away. StasisError if something of it is left."""
        if self._fd < 0:
            return
        self._fd = -1
        if left := self._point.close():
            raise StasisError(f"what {self.path} was read from cannot be removed: {left}",
                              hint="lvs shows it; the next backup of the device tries again")

    def open_reader(self) -> PointReader:
        """A reader that shares the point."""
        return PointReader(self._point, self.path)

    def disturbed(self) -> str:
        """Nobody else writes to it."""
        return ""


class PointReader(RawReader):
    """Reads a point, and knows a failure of the point from one of the device."""

    def __init__(self, point: Point, path: str) -> None:
        super().__init__(point.fd, path)
        self._point = point

    def read_into(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        """As RawReader's. StasisError when the point as a whole is lost: nothing must stand in for that."""
        try:
            super().read_into(extents, buffer)
        except OSError as error:
            if why := self._point.failed():
                raise StasisError(f"the point in time of {self._path} was lost: {why}", errno=error.errno or 0,
                                  hint="choose a time when less is written, or give the volume group more free "
                                       "space") from error
            raise


def open_file(name: str, path: str) -> RawSource:
    """A file or device as a source: at one instant where there is a way, else as it lies there.

    Raises NotFoundError, PermissionDeniedError, UsageError.
    """
    for provider in _providers_for(path):
        try:
            point = provider.take(path)
        except (OSError, StasisError):
            continue
        return PointSource(name, path, point)
    return RawSource(name, path)


def _providers_for(path: str) -> list[Provider]:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return []
    if stat.S_ISREG(mode):
        return FOR_FILES
    return FOR_DEVICES if stat.S_ISBLK(mode) else []


def probe_ways(path: str | None) -> list[Capability]:
    """What each provider says of a file or device, or of the file that a loop device is made of."""
    if path is None:
        return []
    beneath = _backing_file(path)
    found = []
    for provider in (*FOR_FILES, *FOR_DEVICES):
        fitting = provider in _providers_for(beneath)
        why_not = provider.why_not(beneath) if fitting else f"{beneath} is not of its kind"
        found.append(Capability(f"point in time by {provider.name}", not why_not, why_not or f"of {beneath}"))
    return found


def _backing_file(path: str) -> str:
    """The file of a loop device; anything else is itself."""
    try:
        with open(f"/sys/class/block/{os.path.basename(os.path.realpath(path))}/loop/backing_file") as file:
            return file.read().removesuffix("\n")
    except OSError:
        return path
