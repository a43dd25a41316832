# SPDX-License-Identifier: Apache-2.0
"""The commands that the snapshot filter answers, under the names and with the errnos of blksnap's filter commands."""

from __future__ import annotations

import base64
import errno
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stasis.daemon import maps
from stasis.daemon.served import ServedDevice
from stasis.errors import StasisError, UsageError

if TYPE_CHECKING:
    from stasis.daemon.snapshots import SnapshotKeeper

__all__ = ["mark", "run"]

RANGES_PER_MESSAGE = 1000
"""So many [offset,length] pairs fit the control socket's message size with room to spare."""


def run(keeper: SnapshotKeeper, device: ServedDevice, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one of the filter's commands; UsageError (EINVAL) for an argument of the wrong shape."""
    try:
        return _COMMANDS[command](keeper, device, argument)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the argument of {command} is wrong: {error}", errno=errno.EINVAL) from error


def _cbtinfo(keeper: SnapshotKeeper, device: ServedDevice, argument: Mapping[str, Any]) -> dict[str, Any]:
    return maps.info(keeper.directories, device.name)


def _cbtmap(keeper: SnapshotKeeper, device: ServedDevice, argument: Mapping[str, Any]) -> dict[str, Any]:
    data = maps.read(keeper.directories, device.name, int(argument["offset"]), int(argument["length"]),
                     held=bool(argument.get("held", False)))
    return {"map": base64.b64encode(data).decode()}


def _cbtdirty(keeper: SnapshotKeeper, device: ServedDevice, argument: Mapping[str, Any]) -> dict[str, Any]:
    mark(device, [(int(offset), int(length)) for offset, length in argument["ranges"]])
    return {}


def _snapshotadd(keeper: SnapshotKeeper, device: ServedDevice, argument: Mapping[str, Any]) -> dict[str, Any]:
    keeper.add(str(argument["id"]), device.name)
    return {}


def _snapshotinfo(keeper: SnapshotKeeper, device: ServedDevice, argument: Mapping[str, Any]) -> dict[str, Any]:
    snapshot, member = keeper.image_of(device.name)
    return {"id": snapshot.id, "error_code": member.error_code, "image": keeper.images.uri(snapshot, member)}


_COMMANDS = {
    "cbtdirty": _cbtdirty,
    "cbtinfo": _cbtinfo,
    "cbtmap": _cbtmap,
    "snapshotadd": _snapshotadd,
    "snapshotinfo": _snapshotinfo,
}


def mark(device: ServedDevice, ranges: Sequence[tuple[int, int]]) -> None:
    """Mark ranges (offset, length) in bytes as changed. All are checked before the first is marked."""
    maps.check_ranges(ranges, device.size, device.name)
    channel = device.require()
    for start in range(0, len(ranges), RANGES_PER_MESSAGE):
        try:
            channel.call("mark", ranges=[list(entry) for entry in ranges[start : start + RANGES_PER_MESSAGE]])
        except StasisError as error:
            if start:
                error.hint = "some ranges were marked before this happened; marking again does no harm"
            raise
