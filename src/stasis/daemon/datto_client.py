# SPDX-License-Identifier: Apache-2.0
"""dattobd's calls over the control socket; `stasis.Client` has them all."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from stasis.daemon import model
from stasis.daemon.model import Tracer

__all__ = ["TracerCalls"]

StrPath = str | os.PathLike[str]


def _named(bdev: StrPath) -> str:
    """A path that is there as the daemon can use it; anything else may be a device's name."""
    return os.path.abspath(bdev) if os.path.exists(bdev) else os.fspath(bdev)


class TracerCalls(ABC):
    """Sizes have dattobd's units: bytes for caches, MiB for files; 0 is the default. Every errno is dattobd's."""

    @abstractmethod
    def _call(self, method: str, **arguments: Any) -> dict[str, Any]: ...

    def _tracer(self, method: str, **arguments: Any) -> Tracer:
        return model.from_dict(Tracer, self._call(method, **arguments)["tracer"])

    def datto_setup(self, members: Sequence[tuple[int, StrPath, StrPath]], *, fallocated_space: int = 0,
                    cache_size: int = 0) -> list[Tracer]:
        """Begin a series on each of (minor, device, new COW file), at one instant or not at all.

        A device is named by its path, the path of its kernel node, or its name. Raises errors with EINVAL, EBUSY,
        ENOENT, ENOTBLK, EISDIR, EEXIST, and what fallocate has.
        """
        wanted = [{"minor": minor, "bdev": _named(bdev), "cow": os.path.abspath(cow)}
                  for minor, bdev, cow in members]
        answer = self._call("DattoSetupSnapshot", members=wanted, fallocated_space=fallocated_space,
                            cache_size=cache_size)
        return [model.from_dict(Tracer, entry) for entry in answer["tracers"]]

    def datto_setup_live(self, minor: int, bdev: StrPath, cow: StrPath, image: StrPath) -> Tracer:
        """Begin a series in incremental mode on a device that is in use: `image`, a new file, is its first copy.

        Raises as datto_setup, and BusyError if it is written faster than it is copied.
        """
        return self._tracer("DattoSetupLive", minor=minor, bdev=os.path.abspath(bdev), cow=os.path.abspath(cow),
                            image=os.path.abspath(image))

    def datto_reload(self, minor: int, bdev: StrPath, cow: StrPath, *, snapshot: bool, cache_size: int = 0) -> Tracer:
        """Take a COW file up when the device is attached next. EINVAL if it is attached now."""
        return self._tracer("DattoReload", minor=minor, bdev=os.path.abspath(bdev), cow=os.path.abspath(cow),
                            snapshot=snapshot, cache_size=cache_size)

    def datto_destroy(self, minor: int) -> None:
        """End a tracer. EBUSY while its image is read."""
        self._call("DattoDestroy", minor=minor)

    def datto_to_incremental(self, minor: int) -> Tracer:
        """Give the image up and remember only what changes. EBUSY, EINVAL."""
        return self._tracer("DattoTransitionIncremental", minor=minor)

    def datto_to_snapshot(self, minor: int, cow: StrPath, *, fallocated_space: int = 0) -> Tracer:
        """Finish the COW file, and begin the next one of the series with a new image. EBUSY, EINVAL."""
        return self._tracer("DattoTransitionSnapshot", minor=minor, cow=os.path.abspath(cow),
                            fallocated_space=fallocated_space)

    def datto_reconfigure(self, minor: int, cache_size: int) -> Tracer:
        """Bound the memory of the index. EBUSY, EINVAL."""
        return self._tracer("DattoReconfigure", minor=minor, cache_size=cache_size)

    def datto_info(self, minor: int) -> Tracer:
        """One tracer. EINVAL for a minor that cannot be, ENOENT for one that is free."""
        return self._tracer("DattoInfo", minor=minor)

    def datto_free_minor(self) -> int:
        """The lowest free minor. ENOENT."""
        return int(self._call("DattoGetFreeMinor")["minor"])

    def datto_expand(self, minor: int, size: int) -> Tracer:
        """Give the COW file `size` MiB more. EINVAL, or what fallocate has, which also fails the tracer."""
        return self._tracer("DattoExpandCowFile", minor=minor, size=size)

    def datto_auto_expand(self, minor: int, step_size: int, reserved_space: int = 0) -> Tracer:
        """Let a full COW file grow by a step while some space stays free. EINVAL."""
        return self._tracer("DattoReconfigureAutoExpand", minor=minor, step_size=step_size,
                            reserved_space=reserved_space)

    def datto_distrust(self, minor: int) -> None:
        """Let no backup go on from the snapshots of the series so far."""
        self._call("DattoDistrust", minor=minor)

    def datto_list(self) -> list[Tracer]:
        """All tracers. The status file is brought up to date."""
        return [model.from_dict(Tracer, entry) for entry in self._call("DattoList")["tracers"]]
