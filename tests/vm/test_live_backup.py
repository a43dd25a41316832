# SPDX-License-Identifier: Apache-2.0
"""Backups of mounted file systems under writes, on stock kernels: restored, checked, with all that was durable."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.disks import CHECK
from tests.live.writers import state_directory
from tests.runner import Stasis
from tests.system.helpers import LONG
from tests.vm.livedisks import linear, md_raid1, small_disk
from tests.vm.logwrites import mapped
from tests.vm.machine import MIB, Disk, Load, check_records, mounted, partition, run

SIZE = {"ext4": 56 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}
FREEZE = ("--max-freeze", "60s", "--busy-freeze", "60s")  # an emulated machine is slow
BACKUPS = 10 if LONG else 3


@pytest.fixture
def tracked_state(stasis: Stasis) -> Iterator[Stasis]:
    with state_directory(stasis.state_dir):
        yield stasis


@contextlib.contextmanager
def device(kind: str, disks: list[Disk], size: int) -> Iterator[str]:
    """A device with a size of its own to put a file system on."""
    if kind == "partition":
        yield partition(disks[0].path, [size])[0]
    elif kind == "nvme":
        yield partition(small_disk("disk4"), [size])[0]
    elif kind == "device-mapper":
        with mapped("data", linear(size // 2, *disks[:2])) as node:
            yield node
    else:
        with md_raid1(disks[:2], size) as node:
            yield node


CASES = [("partition", "ext4"), ("nvme", "ext4"), ("device-mapper", "ext4"), ("md", "xfs"), ("partition", "xfs"),
         ("device-mapper", "btrfs")]


@pytest.mark.parametrize(("kind", "system"), CASES)
def test_a_mounted_file_system_is_backed_up_under_writes(
    kind: str, system: str, disks: list[Disk], tracked_state: Stasis, tmp_path: Path
) -> None:
    stasis, repo, restored = tracked_state, tmp_path / "repo", tmp_path / "restored"
    stasis("repo", "init", repo, "--no-encryption")
    with device(kind, disks, SIZE[system]) as node:
        run(f"mkfs.{system}", "-q", node)
        stasis("track", "start", node)
        for number in range(BACKUPS):
            with mounted(node, tmp_path / "mnt") as target, Load(target) as load:
                durable = load.wait_for_records(5)
                made = json.loads(stasis("backup", "create", node, "--repo", repo, "--name", "disk", *FREEZE, "--json",
                                         timeout=600).splitlines()[-1])
                load.wait_for_records(1)
            assert made["backups"][0]["kind"] == ("incremental" if number else "full")
            assert made["warnings"] == []
            stasis("backup", "restore", "latest", restored, "--repo", repo, "--overwrite", timeout=600)
            check_image(system, restored, tmp_path / "again", durable)
        # Nobody writes now: the last backup is the disk, byte for byte.
        stasis("backup", "create", node, "--repo", repo, "--name", "disk", timeout=600)
        stasis("backup", "restore", "latest", restored, "--repo", repo, "--overwrite", timeout=600)
        run("cmp", restored, node)
        stasis("track", "stop", os.path.realpath(node))


def check_image(system: str, image: Path, where: Path, durable: int) -> None:
    if system == "xfs":  # its log is played back by a mount
        with mounted(str(image), where, "loop,nouuid"):
            pass
    run(*CHECK[system], image)
    with mounted(str(image), where, "loop") as directory:
        check_records(directory, durable)


def test_devices_of_one_set_show_one_instant(disks: list[Disk], tracked_state: Stasis, tmp_path: Path) -> None:
    """Each record is durable on the first before it is written to the second: it is never ahead there."""
    stasis, repo = tracked_state, tmp_path / "repo"
    stasis("repo", "init", repo, "--no-encryption")
    nodes = [*partition(disks[0].path, [SIZE["ext4"]]), *partition(small_disk("disk4"), [SIZE["ext4"]])]
    targets = [tmp_path / "one", tmp_path / "two"]
    for node in nodes:
        run("mkfs.ext4", "-q", node)
    stasis("track", "start", *nodes)
    with mounted(nodes[0], targets[0]), mounted(nodes[1], targets[1]), Load(*targets) as load:
        durable = load.wait_for_records(5)
        stasis("backup", "create", *nodes, "--repo", repo, *FREEZE, timeout=600)
    for number, node in enumerate(nodes):
        name = os.path.basename(node)
        stasis("backup", "restore", "latest", tmp_path / name, "--repo", repo, "--device", name, timeout=600)
        check_image("ext4", tmp_path / name, tmp_path / f"again{number}", durable)
    stasis("track", "stop", *nodes)
    newest = [newest_record(tmp_path / os.path.basename(node), tmp_path / "again") for node in nodes]
    assert newest[0] - newest[1] in (0, 1)


def newest_record(image: Path, where: Path) -> int:
    with mounted(str(image), where, "loop") as directory:
        lines = [line for path in directory.iterdir() if path.is_file() for line in path.read_text().split()]
    return max(map(int, lines))
