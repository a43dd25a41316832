# SPDX-License-Identifier: Apache-2.0
"""Reading the change maps of devices. A map is a shared file: readers open it beside its worker and take no lock."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stasis.block.changemap import ChangeMap
from stasis.daemon.paths import Directories
from stasis.errors import NotFoundError, StasisError, UsageError

__all__ = ["LARGEST_READ", "check_ranges", "info", "open_map", "read"]

LARGEST_READ = 1 << 20
"""Bytes of a map given out by one call."""


def open_map(directories: Directories, name: str) -> ChangeMap:
    """The change map of a device, read-only. NotFoundError with ESRCH, as CBTINFO has it; StateError if damaged."""
    path: Path = directories.device(name) / "map"
    try:
        if "/" in name:  # a path is no name, and must not lead out of the state directory
            raise FileNotFoundError(errno.ENOENT, "not a name", name)
        return ChangeMap.open_readonly(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no change map of a device {name}", hint="stasis device list shows the devices",
                            errno=errno.ESRCH) from error


def info(directories: Directories, name: str) -> dict[str, Any]:
    """The figures of a map."""
    with open_map(directories, name) as change_map:
        return change_map.info().as_dict()


def read(directories: Directories, name: str, offset: int, length: int, *, held: bool) -> bytes:
    """Bytes `offset` to `offset + length` of a map, one per tracking block.

    StasisError with ENODATA for a range that does not lie within the map, as CBTMAP has it.
    """
    with open_map(directories, name) as change_map:
        if held and not change_map.is_held:
            raise UsageError(f"no snapshot holds the map of {name}", hint="leave out --held")
        if offset < 0 or length < 0 or offset + length > change_map.block_count:
            raise StasisError(f"blocks {offset} to {offset + length} are not all within the map of {name}",
                              hint=f"it has {change_map.block_count}", errno=errno.ENODATA)
        view = change_map.held if held else change_map.active
        return bytes(view[offset : offset + min(length, LARGEST_READ)])


def check_ranges(ranges: Sequence[tuple[int, int]], size: int, name: str) -> None:
    """UsageError (EINVAL) unless every (offset, length) in bytes lies within a device of `size` bytes."""
    for offset, length in ranges:
        if offset < 0 or length <= 0 or offset + length > size:
            raise UsageError(f"the range {offset}:{length} does not lie within {name}, which has {size} bytes",
                             hint="no range was marked")
