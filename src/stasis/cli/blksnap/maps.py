# SPDX-License-Identifier: Apache-2.0
"""`blksnap cbtinfo`, `readcbtmap`, `markdirtyblock` and the older `tracker_collect`.

What is shown is the map as the last snapshot left it, with that snapshot's number, which is what blksnap calls its
read map. Once the snapshot is gone stasis keeps the running map only; a block written since then stands in it with
the next number, and is given out with the last one: it may be taken for changed once too often, and never too seldom.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stasis.blksnap.console.numbers import SECTOR, sector_ranges
from stasis.cli.blksnap.session import Session, device_number, failing
from stasis.errors import StasisError, UsageError

if TYPE_CHECKING:
    from stasis.daemon.client import Client
    from stasis.daemon.model import Device

__all__ = ["cbtinfo", "markdirtyblock", "readcbtmap", "tracker_collect"]

ATTEMPTS = 10


@dataclass(frozen=True)
class _Figures:
    """What CBTINFO tells. Sizes in bytes."""

    block_size: int
    device_capacity: int
    block_count: int
    generation_id: str
    changes_number: int
    is_held: bool
    is_broken: bool

    @classmethod
    def of(cls, client: Client, device: Device) -> _Figures:
        info = client.control(device.name, "cbtinfo")
        is_held = info.get("held_change_number") is not None
        prefix = "held_" if is_held else ""
        return cls(info["block_size"], info["capacity"], info["block_count"], info[f"{prefix}generation"],
                   info[f"{prefix}change_number"], is_held, bool(info["broken"]))  # fmt: skip

    def as_dict(self) -> dict[str, int | str]:
        names = ("block_size", "device_capacity", "block_count", "generation_id", "changes_number")
        return {name: getattr(self, name) for name in names}


def cbtinfo(session: Session) -> None:
    """Print the figures of a map."""
    device = session.device(session.require("device"))
    with failing():
        figures = _Figures.of(session.client, device).as_dict()
    session.show(figures, *[f"{name}={value}" for name, value in figures.items()])


def readcbtmap(session: Session) -> None:
    """Write a map to a file."""
    device = session.device(session.require("device"))
    with failing():
        _Figures.of(session.client, device)
    path = session.require("file")
    with failing():
        data = _read(session.client, device)
        with open(path, "wb") as file:
            file.write(data)
    session.show({"file": os.path.abspath(path), "block_count": len(data)})


def _read(client: Client, device: Device) -> bytes:
    """The map that belongs to the figures: read again if a snapshot came or went meanwhile."""
    for _ in range(ATTEMPTS):
        figures = _Figures.of(client, device)
        if figures.is_broken:
            raise StasisError(f"the change map of {device.name} misses changes", errno=errno.EFAULT)
        try:
            data = client.read_map(device.name, held=figures.is_held)
        except UsageError:
            continue
        if _Figures.of(client, device) == figures:
            return data if figures.is_held else data.translate(_at_most(figures.changes_number))
    raise StasisError(f"snapshots of {device.name} come and go faster than its map can be read", errno=errno.EAGAIN)


def _at_most(number: int) -> bytes:
    return bytes(min(value, number) for value in range(256))


def markdirtyblock(session: Session) -> None:
    """Mark ranges of a device, or the blocks of a file, as changed in this snapshot and in the next."""
    if session.has("file"):
        _mark_file(session, session.require("file"))
        return
    path = session.require("device")
    ranges = sector_ranges(session.require_all("ranges"))
    device = session.device(path)
    with failing():
        session.client.mark(device.name, _in_bytes(ranges))
    session.show(_as_json(device.path, ranges))


def _mark_file(session: Session, path: str) -> None:
    from stasis.cli.blksnap import location

    found = location.of_file(path)
    lines = [f"allocate range: ofs={sector} cnt={count}" for sector, count in found.ranges]
    session.show(_as_json(found.node, found.ranges), f"device path: '{found.node}'", *lines)
    with failing():
        device, start = location.device_below(session, found)
        session.client.mark(device.name, _in_bytes([(start + sector, count) for sector, count in found.ranges]))


def _in_bytes(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Refuses what no device has: beyond 63 bits the daemon could not be asked."""
    if any((sector + count) * SECTOR >> 63 for sector, count in ranges):
        raise UsageError("a range lies beyond the end of every device")
    return [(sector * SECTOR, count * SECTOR) for sector, count in ranges]


def _as_json(path: str, ranges: list[tuple[int, int]]) -> dict[str, object]:
    return {"device": path, "ranges": [{"sector": sector, "count": count} for sector, count in ranges]}


def tracker_collect(session: Session) -> None:
    """Print the figures of all devices in the layout of stable-v1.0."""
    client = session.client
    with failing("Failed to collect block devices with change tracking"):
        found = [(device, _Figures.of(client, device)) for device in client.devices()]
    lines = [f"count={len(found)}"]
    for device, figures in found:
        lines += [",", *_record(device, figures)]
    values = [{"device": device.path, "number": device_number(device), **figures.as_dict()}
              for device, figures in found]  # fmt: skip
    session.show({"devices": values}, *lines, ".")


def _record(device: Device, figures: _Figures) -> list[str]:
    return [
        f"device={device_number(device)}",
        f"blk_size={figures.block_size}",
        f"device_capacity={figures.device_capacity}",
        f"blk_count={figures.block_count}",
        f"generationId={figures.generation_id}",
        f"snap_number={figures.changes_number}",
    ]
