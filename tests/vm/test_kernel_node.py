# SPDX-License-Identifier: Apache-2.0
"""`stasis device attach --kernel` on stock kernels: a disk with partitions and file systems, used while it is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stasis.block import frontend
from stasis.errors import ExitCode
from tests.runner import Stasis
from tests.vm.machine import MIB, Disk, Load, check_records, mounted, partition, partitions, reread, run

KINDS = ("ext4", "xfs")
PARTITION = 320 * MIB  # xfs wants at least 300 MiB


def device(stasis: Stasis, name: str) -> dict[str, Any]:
    (found,) = [entry for entry in stasis.json("device", "list") if entry["name"] == name]
    return dict(found)


@pytest.fixture
def node(stasis: Stasis, disks: list[Disk]) -> Iterator[str]:
    """The first disk attached as "disk" with a node that has an ext4 and an xfs partition."""
    stasis("device", "attach", disks[0].path, "--name", "disk", "--kernel")
    path = str(device(stasis, "disk")["node"])
    for kind, part in zip(KINDS, partition(path, [PARTITION] * len(KINDS)), strict=True):
        run(f"mkfs.{kind}", "-q", part)
    yield path
    stasis("device", "detach", "disk")
    assert not os.path.exists(f"{path}p1")
    reread(disks[0].path)
    check_file_systems(disks[0].path)


@contextlib.contextmanager
def file_systems(node: str, directory: Path, xfs_options: str = "rw") -> Iterator[list[Path]]:
    """Both partitions of a node mounted below directory."""
    directory.mkdir()
    ext4, xfs = partitions(node, len(KINDS))
    with mounted(ext4, directory / "ext4") as one, mounted(xfs, directory / "xfs", xfs_options) as other:
        yield [one, other]


def check_file_systems(node: str) -> None:
    ext4, xfs = partitions(node, len(KINDS))
    run("e2fsck", "-fn", ext4)
    run("xfs_repair", "-n", xfs)


@contextlib.contextmanager
def image_node(stasis: Stasis, snapshot: str, directory: Path) -> Iterator[str]:
    """A node for the image of a snapshot's only device."""
    (shown,) = stasis.json("snapshot", "show", snapshot)["devices"]
    made = frontend.connect(shown["uri"], name="image", directory=directory)
    try:
        yield made.path
    finally:
        frontend.disconnect(made.state)


def test_node_is_the_kernels_own_client(node: str) -> None:
    assert node.startswith("/dev/nbd")


def test_snapshot_under_load_is_mounted_beside_its_origin(
    stasis: Stasis, node: str, disks: list[Disk], tmp_path: Path, short_dir: Path
) -> None:
    with file_systems(node, tmp_path / "origin") as targets, Load(*targets) as load:
        durable = load.wait_for_records(30)
        snapshot = stasis("snapshot", "create", "--storage", disks[2].path, "disk", "--take")
        load.wait_for_records(30)
        with (
            image_node(stasis, snapshot, short_dir / "node") as image,
            file_systems(image, tmp_path / "image", "nouuid") as images,
        ):
            for target, saved in zip(targets, images, strict=True):
                check_records(saved, durable)
                (saved / "scratch").write_bytes(b"s" * MIB)
                assert not (target / "scratch").exists()
            os.sync()
            later = load.wait_for_records(20)
        with image_node(stasis, snapshot, short_dir / "node") as image:
            check_file_systems(image)
        assert stasis.json("snapshot", "show", snapshot)["error_code"] == 0
        stasis("snapshot", "destroy", snapshot)
        assert load.stop() >= later
        for target in targets:
            check_records(target, later)


def test_device_in_use_is_not_detached(stasis: Stasis, node: str, tmp_path: Path) -> None:
    with file_systems(node, tmp_path / "origin") as targets, Load(*targets) as load:
        load.wait_for_records(1)
        message = stasis.fail(ExitCode.BUSY, "device", "detach", "disk")
        assert str(targets[0]) in message
        load.wait_for_records(1)
    assert device(stasis, "disk")["node"] == node


def test_daemon_that_is_killed_is_replaced_under_a_mounted_device(stasis: Stasis, node: str, tmp_path: Path) -> None:
    with file_systems(node, tmp_path / "origin") as targets, Load(*targets) as load:
        load.wait_for_records(5)
        pid = stasis.daemon_pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        load.wait_for_records(5)
        assert device(stasis, "disk")["node"] == node  # starts another daemon
        assert stasis.daemon_pid() != pid
        durable = load.wait_for_records(5)
        load.stop()
        for target in targets:
            check_records(target, durable)


@pytest.mark.expects_errors("worker of disk .* died")
def test_worker_that_is_killed_is_replaced_under_a_mounted_device(stasis: Stasis, node: str, tmp_path: Path) -> None:
    with file_systems(node, tmp_path / "origin") as targets, Load(*targets) as load:
        load.wait_for_records(5)
        pid = int(device(stasis, "disk")["pid"])
        os.kill(pid, signal.SIGKILL)
        durable = load.wait_for_records(20)
        assert device(stasis, "disk")["pid"] != pid
        load.stop()
        for target in targets:
            check_records(target, durable)


def test_daemon_ends_and_returns_with_a_mounted_device(stasis: Stasis, node: str, tmp_path: Path) -> None:
    with file_systems(node, tmp_path / "origin") as targets, Load(*targets) as load:
        load.wait_for_records(5)
        stasis("daemon", "stop", "--keep-serving")
        deadline = time.monotonic() + 60
        while stasis.daemon_pid() is not None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        load.wait_for_records(5)
        assert device(stasis, "disk")["node"] == node
        durable = load.wait_for_records(5)
        load.stop()
        for target in targets:
            check_records(target, durable)
