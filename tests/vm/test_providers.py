# SPDX-License-Identifier: Apache-2.0
"""Volumes of LVM that are not tracked are read from a snapshot, of which nothing is left in any case."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.block.frontend.node import load_module
from stasis.errors import StasisError
from stasis.linux import process
from stasis.live.providers import PointSource, open_file
from tests.live.disks import put_number, writing
from tests.runner import Stasis
from tests.system.helpers import wait_until
from tests.vm.machine import MIB, Disk, mounted, run

pytestmark = pytest.mark.tool("lvcreate")

GROUP = "stasistest"
SIZE = 128 * MIB


@pytest.fixture
def group(disks: list[Disk], stasis: Stasis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A volume group on the first disk. Without udev LVM makes the nodes itself; it is to start no monitor."""
    for module in ("dm-snapshot", "dm-thin-pool"):
        load_module(module)
    settings = tmp_path / "lvm"
    settings.mkdir()
    (settings / "lvm.conf").write_text("activation { monitoring = 0 }\n")
    for name, value in (("LVM_SUPPRESS_FD_WARNINGS", "1"), ("DM_DISABLE_UDEV", "1"), ("LVM_SYSTEM_DIR", str(settings))):
        monkeypatch.setenv(name, value)
        stasis.environment[name] = value
    run("pvcreate", "--yes", disks[0].path)
    run("vgcreate", GROUP, disks[0].path)
    try:
        yield GROUP
    finally:
        run("vgremove", "--yes", GROUP)
        run("pvremove", disks[0].path)
        for pid in process.processes():  # thin pools have it started all the same
            if process.name(pid) == "dmeventd":
                os.kill(pid, signal.SIGTERM)


@contextlib.contextmanager
def volume(kind: str, group: str) -> Iterator[str]:
    if kind == "thin":
        run("lvcreate", "--yes", "--size", f"{2 * SIZE}b", "--thinpool", "pool", group)
        run("lvcreate", "--yes", "--virtualsize", f"{SIZE}b", "--thin", "--name", "data", f"{group}/pool")
    else:
        run("lvcreate", "--yes", "--size", f"{SIZE}b", "--name", "data", group)
    yield f"/dev/{group}/data"


def volumes(group: str) -> set[str]:
    """Names of the volumes; those in brackets are LVM's own."""
    names = run("lvs", "--noheadings", "-o", "lv_name", group).split()
    return {name for name in names if not name.startswith("[")}


@pytest.mark.parametrize("kind", ["linear", "thin"])
def test_a_mounted_volume_is_read_at_one_instant(kind: str, stasis: Stasis, group: str, tmp_path: Path) -> None:
    """A number goes to one file, durably, then to the other: it is never ahead there."""
    with volume(kind, group) as node:
        before = volumes(group)
        run("mkfs.ext4", "-q", node)
        stasis("repo", "init", tmp_path / "repo", "--no-encryption")
        with mounted(node, tmp_path / "mounted") as directory:
            def write(number: int) -> None:
                for name in ("first", "second"):
                    put_number(directory / name, number)

            write(0)
            with writing(write):
                made = json.loads(stasis("backup", "create", node, "--repo", tmp_path / "repo", "--json",
                                         timeout=600).splitlines()[-1])
            assert made["warnings"] == []
            assert volumes(group) == before
        stasis("backup", "restore", "latest", tmp_path / "out.img", "--repo", tmp_path / "repo", timeout=600)
        run("e2fsck", "-fn", tmp_path / "out.img")
        first, second = (int(run("debugfs", "-R", f"cat /{name}", tmp_path / "out.img"))
                         for name in ("first", "second"))
        assert first - second in (0, 1)
        shown = {one["name"]: one for one in json.loads(stasis("track", "show", "--capabilities", node, "--json"))}
        assert shown["point in time by LVM snapshot"]["available"], shown


def test_a_backup_that_is_killed_leaves_no_snapshot(stasis: Stasis, group: str, tmp_path: Path) -> None:
    with volume("linear", group) as node:
        stasis("repo", "init", tmp_path / "repo", "--no-encryption")
        killed = subprocess.run([*stasis.command, "backup", "create", node, "--repo", tmp_path / "repo",
                                 "--post-snapshot", f"lvs {group} > {tmp_path}/seen; kill -9 $PPID"],
                                env=stasis.environment, check=False)
        assert killed.returncode == -9
        assert "stasis_" in (tmp_path / "seen").read_text()
        wait_until(lambda: volumes(group) == {"data"}, "the snapshot is removed")


def test_a_snapshot_that_runs_full_fails_the_backup(group: str) -> None:
    """The group has room for a part of the volume only."""
    with volume("linear", group) as node:
        run("lvcreate", "--yes", "--extents", "100%FREE", "--name", "filler", group)
        run("lvreduce", "--yes", "--size", f"-{8 * MIB}b", f"{group}/filler")
        with open_file("data", node) as source:
            assert isinstance(source, PointSource)
            with open(node, "rb+", buffering=0) as device:
                device.write(os.urandom(32 * MIB))
                os.fsync(device.fileno())
            reader = source.open_reader()
            with pytest.raises(StasisError, match="ran full"):
                reader.read_into([(64 * MIB, MIB)], memoryview(bytearray(MIB)))
            reader.close()
        assert volumes(group) == {"data", "filler"}
