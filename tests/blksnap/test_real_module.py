# SPDX-License-Identifier: Apache-2.0
"""The drivers against the real kernel modules, where one is loaded: mounted ext4 on a loop device, from end to end.

`modprobe blksnap && make test` runs them; without a module they are skipped with the reason. A test that passes against
the fake kernel and fails here has found a mistake of the fake.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux import mounts
from tests.block.loops import loop_device
from tests.runner import Stasis

MIB = 1 << 20
pytestmark = [pytest.mark.root, pytest.mark.tool("losetup", "mkfs.ext4", "mount")]
BOTH = [pytest.param(name, marks=pytest.mark.kernel_module(name)) for name in ("blksnap", "dattobd")]


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True, timeout=120)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loop device of 256 MiB with ext4, and where it is mounted."""
    mount = tmp_path / "mnt"
    mount.mkdir()
    with loop_device(tmp_path / "disk.img", 256 * MIB) as node:
        _run("mkfs.ext4", "-q", "-F", node)
        _run("mount", node, mount)
        try:
            yield node, mount
        finally:
            _run("umount", mount)


@contextlib.contextmanager
def _attached(stasis: Stasis, node: str, driver: str) -> Iterator[str]:
    assert stasis("device", "attach", node, "--driver", driver, "--name", "disk") == f"file://{node}"
    try:
        yield "disk"
    finally:
        stasis("device", "detach", "disk", "--force", "--forget")


def _storage(driver: str, mount: Path, short_dir: Path) -> Path:
    """dattobd keeps old contents on the protected file system, blksnap anywhere else."""
    if driver == "dattobd":
        return mount
    (short_dir / "storage").mkdir(exist_ok=True)
    return short_dir / "storage"


def _fill(mount: Path, draw: random.Random) -> dict[str, str]:
    """Write and remove files; what is there then, by its digest, durably."""
    for _ in range(20):
        path = mount / f"file-{draw.randrange(30)}"
        if draw.randrange(4):
            path.write_bytes(draw.randbytes(draw.randrange(1, 300_000)))
        else:
            path.unlink(missing_ok=True)
    os.sync()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in mount.glob("file-*")}


@contextlib.contextmanager
def _mounted(image: Path, mount: Path) -> Iterator[Path]:
    """A restored image as the file system it holds; its journal is replayed in memory of the loop device's file."""
    mount.mkdir(exist_ok=True)
    _run("mount", "-o", "loop", image, mount)
    try:
        yield mount
    finally:
        mounts.unmount(str(mount))


@pytest.mark.parametrize("driver", BOTH)
def test_backups_of_a_mounted_disk_hold_what_was_there(
    stasis: Stasis, disk: tuple[str, Path], driver: str, short_dir: Path, tmp_path: Path, seed: int
) -> None:
    node, mount = disk
    draw, storage = random.Random(seed), _storage(driver, mount, short_dir)
    stasis("repo", "init", short_dir / "repo", "--no-encryption")
    with _attached(stasis, node, driver):
        for number in range(4):
            files = _fill(mount, draw)
            stasis("backup", "create", "disk", "--repo", short_dir / "repo", "--storage", storage, "--limit", "64M",
                   "--self-check", "100")
            _fill(mount, draw)
            image = tmp_path / f"restored-{number}.img"
            stasis("backup", "restore", "--repo", short_dir / "repo", "latest", image)
            _run("e2fsck", "-p", "-f", image)
            with _mounted(image, tmp_path / "restored") as restored:
                found = restored.glob("file-*")
                assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found} == files
            image.unlink()
        kinds = [entry["kind"] for entry in stasis.json("backup", "list", "--repo", short_dir / "repo")]
        assert sorted(kinds) == ["full", "incremental", "incremental", "incremental"]


@pytest.mark.parametrize("driver", BOTH)
def test_the_image_stays_while_the_disk_is_written(
    stasis: Stasis, disk: tuple[str, Path], driver: str, short_dir: Path, tmp_path: Path, seed: int
) -> None:
    node, mount = disk
    draw, storage = random.Random(seed), _storage(driver, mount, short_dir)
    with _attached(stasis, node, driver):
        _fill(mount, draw)
        uuid = stasis("snapshot", "create", "--storage", storage, "--limit", "64M", "disk", "--take")
        stasis("snapshot", "copy", uuid, "disk", tmp_path / "first.img")
        _fill(mount, draw)
        stasis("snapshot", "copy", uuid, "disk", tmp_path / "second.img")
        assert stasis.json("snapshot", "show", uuid)["error_code"] == 0
        _run("cmp", tmp_path / "first.img", tmp_path / "second.img")
        assert "in the snapshot" in stasis.fail(ExitCode.BUSY, "device", "detach", "disk")
        stasis("snapshot", "destroy", uuid)
        assert stasis.json("snapshot", "list") == []


@pytest.mark.kernel_module("blksnap")
def test_overflow_ends_the_snapshot_and_no_write(stasis: Stasis, disk: tuple[str, Path], short_dir: Path) -> None:
    node, mount = disk
    with _attached(stasis, node, "blksnap"):
        storage = _storage("blksnap", mount, short_dir)
        uuid = stasis("snapshot", "create", "--storage", storage, "--limit", "4M", "disk", "--take")
        watcher = stasis.popen("snapshot", "watch", uuid)
        (mount / "large").write_bytes(os.urandom(64 * MIB))
        os.sync()
        assert stasis.json("snapshot", "show", uuid)["state"] == "corrupted"
        stasis("snapshot", "destroy", uuid)
        assert "corrupted" in watcher.communicate(timeout=60)[0]


@pytest.mark.kernel_module("blksnap")
def test_storage_on_the_disk_itself_is_refused(stasis: Stasis, disk: tuple[str, Path]) -> None:
    node, mount = disk
    with _attached(stasis, node, "blksnap"):
        said = stasis.fail(ExitCode.STORAGE, "snapshot", "create", "--storage", mount, "--limit", "64M", "disk")
        assert "lies on a device of the snapshot" in said
        assert stasis.json("snapshot", "list") == []
