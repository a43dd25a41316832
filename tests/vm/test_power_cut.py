# SPDX-License-Identifier: Apache-2.0
"""Power cuts: everything that reached the disk, origin and state alike, cut at any point; the map covers every change.

One recorded disk holds both the origin and the file system of the state directory, so that the log has one order for
both. Each cut is rebuilt from the log, the state mounted, the origin attached as after a reboot, and the change map
compared with what really differs from the snapshot that was taken in between.
"""

from __future__ import annotations

import contextlib
import os
import random
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.runner import Stasis
from tests.vm.logwrites import WriteLog, logged, mapped, mark
from tests.vm.machine import MIB, Disk, Load, mounted, run

ORIGIN = 96 * MIB
STATE = 64 * MIB
BLOCK = 64 << 10
CUTS = 5
"""Cuts right behind a flush, and as many anywhere else."""


@contextlib.contextmanager
def split(disk: str) -> Iterator[tuple[str, str]]:
    """The origin and the state's device, as linear parts of one disk."""
    with (
        mapped("origin", f"0 {ORIGIN // 512} linear {disk} 0") as origin,
        mapped("state", f"0 {STATE // 512} linear {disk} {ORIGIN // 512}") as state,
    ):
        yield origin, state


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[str]:
    node = run("losetup", "--find", "--show", path).strip()
    try:
        yield node
    finally:
        run("losetup", "--detach", node)


@contextlib.contextmanager
def another_boot(directory: Path) -> Iterator[None]:
    """What stasis takes for the boot's identifier is another one, as it is after a power cut."""
    identifier = directory / "boot_id"
    identifier.write_text(f"{uuid.uuid4()}\n")
    run("mount", "--bind", identifier, "/proc/sys/kernel/random/boot_id")
    try:
        yield
    finally:
        run("umount", "/proc/sys/kernel/random/boot_id")


def record(stasis: Stasis, disks: list[Disk], base: Path, directory: Path) -> tuple[str, int]:
    """Write, snapshot, write on, all recorded; returns generation and change number of the snapshot in base."""
    with logged("recorded", disks[0], disks[1]) as disk, split(disk) as (origin, state):
        run("mkfs.ext4", "-q", state)
        with mounted(state, stasis.state_dir):
            stasis("device", "attach", origin, "--name", "disk", "--kernel")
            (shown,) = stasis.json("device", "list")
            run("mkfs.ext4", "-q", shown["node"])
            with mounted(shown["node"], directory) as target, Load(target) as load:
                load.wait_for_records(20)
                snapshot = stasis("snapshot", "create", "--storage", "memory", "--limit", "64M", "disk", "--take")
                mark("recorded", "taken")
                stasis("snapshot", "copy", snapshot, "disk", base)
                (taken,) = stasis.json("snapshot", "show", snapshot)["devices"]
                mark("recorded", "copied")
                load.wait_for_records(40)
                stasis("snapshot", "destroy", snapshot)
                load.wait_for_records(20)
            mark("recorded", "end")
            stasis("device", "detach", "disk")
            stasis.stop()
    return str(taken["generation"]), int(taken["change_number"])


def differing_blocks(base: Path, origin: str) -> list[int]:
    """Offsets of the tracking blocks in which the origin is not as in base."""
    with base.open("rb") as before, open(origin, "rb") as now:
        return [offset for offset in range(0, ORIGIN, BLOCK) if before.read(BLOCK) != now.read(BLOCK)]


def covered(changed: list[dict[str, int]], offset: int) -> bool:
    return any(
        extent["offset"] <= offset and offset + BLOCK <= extent["offset"] + extent["length"] for extent in changed
    )


def check_cut(stasis: Stasis, node: str, base: Path, generation: str, number: int) -> int:
    """Start on what the cut left; the map covers all differences. Returns how many there are."""
    with split(node) as (origin, state), mounted(state, stasis.state_dir):
        different = differing_blocks(base, origin)
        (shown,) = stasis.json("device", "list")  # the daemon remembers what was attached, and attaches it again
        assert (shown["name"], shown["path"], shown["state"]) == ("disk", origin, "serving")
        try:
            info = stasis.json("map", "info", "disk")
            assert info["generation"] == generation, info
            changed = stasis.json("map", "changed", "disk", "--since", str(number))
        finally:
            stasis("device", "detach", "disk")
            stasis.stop()
        missed = [offset for offset in different if not covered(changed, offset)]
        assert not missed, f"changed blocks that the map misses: {missed}"
        run("e2fsck", "-p", origin)
    return len(different)


def choose_cuts(log: WriteLog, seed: int) -> list[int]:
    """Numbers of entries that reached the disk before the power went, ascending."""
    first, last = log.find_mark("copied"), log.find_mark("end")
    barriers = [index + 1 for index in range(first, last) if log.entries[index].is_barrier]
    others = sorted(set(range(first + 1, last)) - set(barriers))
    draw = random.Random(seed)
    chosen = {cut for cuts in (barriers, others) for cut in draw.sample(cuts, min(CUTS, len(cuts)))}
    return sorted(chosen)


def test_map_covers_every_change_at_every_cut(stasis: Stasis, disks: list[Disk], tmp_path: Path, seed: int) -> None:
    base = tmp_path / "base"
    generation, number = record(stasis, disks, base, tmp_path / "mounted")
    log = WriteLog(disks[1].path)
    cuts = choose_cuts(log, seed)
    image, most = tmp_path / "replayed", 0
    position = 0
    with image.open("wb+") as file:
        file.truncate(ORIGIN + STATE)
        for cut in cuts:
            log.replay(file.fileno(), position, cut)
            position = cut
            scratch = tmp_path / "scratch"
            run("cp", "--sparse=always", image, scratch)  # attaching and mounting write to it
            with loop_device(scratch) as node, another_boot(tmp_path):
                most = max(most, check_cut(stasis, node, base, generation, number))
            os.unlink(scratch)
    log.close()
    assert most > 0, "no cut had any change to find"
