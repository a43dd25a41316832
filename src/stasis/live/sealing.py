# SPDX-License-Identifier: Apache-2.0
"""Saving the map of the very file system that has the state directory: prepared in time, filled in last."""

from __future__ import annotations

import contextlib
from pathlib import Path

from stasis.block.changemap import ChangeMap
from stasis.errors import StasisError
from stasis.linux import fsmarks, mounts, process
from stasis.live import bitmap, devicefile, seal
from stasis.live.devicefile import DeviceFile
from stasis.live.seal import Seal
from stasis.live.tracker import Tracker

__all__ = ["PREPARED", "finish", "mark_of", "prepare", "take_up"]

PREPARED = "to be saved when its file system is read-only"
SAVED = "saved"
ATTEMPTS = 3

Extent = tuple[int, int]
Told = list[tuple[str, str]]


def prepare(found: Tracker, files: DeviceFile) -> str:
    """At shutdown, of a device that is still mounted: make room for `finish`. Says what became of it."""
    found.turn()
    try:
        seal.prepare(files.seal, len(_bits([], found)))
        seal.extents(files.seal, found.identity.rdev)
    except (OSError, StasisError) as error:
        seal.forget(files.seal)
        return f"not saved: it is mounted, and {error}"
    return PREPARED


def finish(state: Path) -> Told:
    """When file systems are read-only and nobody is left who writes: fill in what `prepare` made room for."""
    told = []
    for name in devicefile.names(state):
        files = DeviceFile(state, name)
        if files.seal.exists():
            try:
                with Tracker(files, None) as found:
                    told.append((name, _finish(found, files)))
            except (OSError, StasisError) as error:
                told.append((name, f"not saved: {error}"))
    return told


def _finish(found: Tracker, files: DeviceFile) -> str:
    node, rdev = found.identity.path, found.identity.rdev
    found.check()
    if any(not mount.read_only for mount in mounts.mounts_of(rdev)):
        return "not saved: it is mounted for writing"
    for _ in range(ATTEMPTS):
        mark = fsmarks.read(node)
        if not mark:
            return "not saved: its file system does not tell of later writes, or was not closed in order"
        bits = _bits(_written(found, files), found)
        current = found.mark
        seal.fill(files.seal, node, rdev, Seal(current.generation, current.number, mark, process.boot_id(),
                                               seal.digest(bits)), bits)
        if _bits(_written(found, files), found) == bits and fsmarks.read(node) == mark:
            found.check()
            return SAVED
    seal.spoil(files.seal, node, rdev)
    return "not saved: it is written to"


def _written(found: Tracker, files: DeviceFile) -> list[Extent]:
    """All that the map's file lacks, with what filling in and the boot loader write."""
    rdev = found.identity.rdev
    return [*found.unsaved(), *seal.extents(files.seal, rdev), *seal.written_by_boot_loader(rdev)]


def _bits(extents: list[Extent], found: Tracker) -> bytes:
    """A bitmap of the device's tracking blocks."""
    size, shift = found.identity.size, found.record.block_shift
    blocks = (size + (1 << shift) - 1) >> shift
    bits = bytearray((blocks + 7) // 8)
    for offset, length in bitmap.merge(extents):
        for block in range(offset >> shift, min((offset + length - 1 >> shift) + 1, blocks)):
            bits[block >> 3] |= 1 << (block & 7)
    return bytes(bits)


# -- boot ---------------------------------------------------------------------------------------------


def mark_of(files: DeviceFile, changes: ChangeMap) -> str:
    """The mark of the file system in a seal that belongs to this map; empty if there is none."""
    found = seal.read(files.seal)
    if found is None or (found[0].generation, found[0].number) != (changes.generation, changes.change_number):
        return ""
    return found[0].mark


def take_up(files: DeviceFile, changes: ChangeMap, rdev: int) -> None:
    """Add what the seal has to the map, and what the boot loader may have written since."""
    extents = [] if changes.is_clean else _sealed(files, changes)
    with contextlib.suppress(OSError):
        extents += seal.written_by_boot_loader(rdev)
    for offset, length in bitmap.merge(extents):
        changes.mark(offset, min(length, changes.capacity - offset))


def _sealed(files: DeviceFile, changes: ChangeMap) -> list[Extent]:
    found = seal.read(files.seal)
    runs = bitmap.bits_to_runs(found[1]) if found else []
    return bitmap.to_extents(runs, changes.block_shift, changes.capacity)
