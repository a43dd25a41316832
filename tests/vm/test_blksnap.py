# SPDX-License-Identifier: Apache-2.0
"""blksnap's tool on stock kernels, over the kernel's own NBD client: partitions rest, images end under their mounts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.blksnap.console.conftest import Tool
from tests.runner import Stasis
from tests.vm.machine import MIB, Disk, Load, check_records, mounted, partition, partitions, run

KINDS = ("ext4", "xfs")
PARTITION = 320 * MIB


def test_a_disk_with_partitions_by_blksnaps_words(
    stasis: Stasis, disks: list[Disk], tmp_path: Path, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STASIS_RUN_DIR", "STASIS_STATE_DIR"):
        monkeypatch.setenv(name, stasis.environment[name])
    blksnap = Tool(stasis, short_dir)
    node = json.loads(blksnap.ok("attach", "-d", disks[0].path, "-j"))["node"]
    assert node.startswith("/dev/nbd")
    parts = partition(node, [PARTITION] * len(KINDS))
    for kind, part in zip(KINDS, parts, strict=True):
        run(f"mkfs.{kind}", "-q", part)
    targets = [tmp_path / kind for kind in KINDS]
    with mounted(parts[0], targets[0]), mounted(parts[1], targets[1]):
        with Load(*targets) as load:
            durable = load.wait_for_records(10)
            for target in targets:
                (target / "cached").write_text("not on the disk yet")
            uuid = blksnap.ok("snapshot_create", "--device", node, "--file", disks[2].path, "--limit", "1G")
            frozen = json.loads(blksnap.ok("snapshot_take", "--id", uuid, "--json"))["frozen"]
            assert sorted(frozen) == sorted(map(str, targets))
            load.wait_for_records(10)
        marked = blksnap.ok("markdirtyblock", "-f", targets[0] / "cached").splitlines()
        assert marked[0].startswith("device path: '/dev/block/")
        _compare(blksnap, node, uuid, tmp_path, durable)
    assert blksnap.ok("detach", "-d", disks[0].path) == ""


def _compare(blksnap: Tool, node: str, uuid: str, directory: Path, durable: int) -> None:
    """The image's file systems hold all that was written before; it ends while one of them is mounted."""
    image = blksnap.ok("snapshot_info", "-d", node, "--field", "image")
    ext4, xfs = partitions(image, len(KINDS))
    run("e2fsck", "-fn", ext4)
    with mounted(ext4, directory / "image-ext4") as one, mounted(xfs, directory / "image-xfs", "nouuid") as other:
        for target in (one, other):
            check_records(target, durable)
            assert (target / "cached").read_text() == "not on the disk yet"
        blksnap.ok("snapshot_destroy", "-i", uuid)
        for target in (one, other):
            with pytest.raises(OSError, match=r"error|Read-only"):
                _write(target / "new")


def _write(path: Path) -> None:
    with path.open("wb") as file:
        file.write(bytes(MIB))
        file.flush()
        os.fsync(file.fileno())
