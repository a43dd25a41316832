# SPDX-License-Identifier: Apache-2.0
"""COW files on their own devices, when the file systems that they belong to are mounted: the worker is told, so that it
looks whether they lie where they did, and gives back what no tracer uses any more (datto/filing.py)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stasis.daemon import nodes
from stasis.datto.pinned import Pinned
from stasis.errors import StasisError

if TYPE_CHECKING:
    from stasis.daemon.paths import Directories
    from stasis.daemon.served import ServedDevice
    from stasis.datto.registry import Backend

__all__ = ["PinWatch"]

log = logging.getLogger(__name__)


class PinWatch:
    """Knows which mounts it has seen; who calls holds the daemon's lock."""

    def __init__(self, directories: Directories, backend: Backend) -> None:
        self._directories, self._backend = directories, backend
        self._seen: dict[str, set[int]] = {}

    def look(self, devices: Mapping[str, ServedDevice]) -> None:
        """Tell the workers of devices that were mounted since the last call."""
        for name, device in devices.items():
            node = nodes.path_of(device.node)
            found = _mounts_from(node) if node is not None else set()
            before, self._seen[name] = self._seen.get(name, set()), found
            directory = self._directories.device(name)
            if found - before and next(Pinned.all(directory), None) is not None:
                try:
                    self._backend.ask(name, "mounted", node=node, directory=str(directory))
                except StasisError as error:
                    log.warning("COW files on %s are not looked at: %s", name, error)
                    self._seen[name] = before


def _mounts_from(node: str) -> set[int]:
    """The numbers of the mounts of a block device in our namespace."""
    try:
        rdev = os.stat(node).st_rdev
    except OSError:
        return set()
    wanted = f"{os.major(rdev)}:{os.minor(rdev)}"
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        fields = [line.split(" ", 3) for line in file]
    return {int(number) for number, _, device, _ in fields if device == wanted}
