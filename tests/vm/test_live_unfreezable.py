# SPDX-License-Identifier: Apache-2.0
"""A live disk whose file system cannot be frozen (vfat): as after a power cut when it rests, and refused when not."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.live.writers import state_directory
from tests.runner import Stasis
from tests.system.helpers import wait_until
from tests.vm.logwrites import mapped
from tests.vm.machine import MIB, SECTOR, Disk, mounted, run

pytestmark = pytest.mark.tool("mkfs.vfat", "dmsetup")

SIZE = 48 * MIB
READ_DELAY = 200  # milliseconds: nothing is copied so fast that a slow machine's writer does not come in between

WRITER = """
import os, sys
number = 0
while True:
    fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_DSYNC)
    os.pwrite(fd, b"%09d" % number, 0)
    os.close(fd)
    number += 1
"""


@pytest.fixture
def tracked_state(stasis: Stasis) -> Iterator[Stasis]:
    with state_directory(stasis.state_dir):
        yield stasis


@contextlib.contextmanager
def writer(path: Path) -> Iterator[int]:
    """A program that never pauses; its process id."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as process:
        try:
            wait_until(path.exists, "it writes")
            yield process.pid
        finally:
            process.kill()


def test_a_file_system_that_cannot_be_frozen(disks: list[Disk], tracked_state: Stasis, tmp_path: Path) -> None:
    stasis = tracked_state
    stasis("repo", "init", tmp_path / "repo", "--no-encryption")
    path = disks[0].path
    with mapped("slow", f"0 {SIZE // SECTOR} delay {path} 0 {READ_DELAY} {path} 0 0") as node:
        run("mkfs.vfat", node)
        check_backups(node, stasis, tmp_path)


def check_backups(node: str, stasis: Stasis, tmp_path: Path) -> None:
    create = ("backup", "create", node, "--repo", tmp_path / "repo", "--json", "--max-freeze", "60s", "--busy-freeze",
              "60s")
    with mounted(node, tmp_path / "mounted") as directory:
        stasis("track", "start", node)
        (directory / "big").write_bytes(os.urandom(4 * MIB))
        made = json.loads(stasis(*create, timeout=600).splitlines()[-1])
        assert made["backups"][0]["consistency"] == "crash"
        assert f"{directory} (vfat) cannot be frozen" in made["warnings"][0]
        with writer(directory / "number") as pid:
            said = stasis.fail(ExitCode.BUSY, *create, timeout=600)
            assert "was written to while it should have rested" in said
            assert "--pre-snapshot" in said
            stopped = f"until grep -q 'State:.T' /proc/{pid}/status; do :; done"  # a write may still be under way
            hooks = ("--pre-snapshot", f"kill -STOP {pid}; {stopped}; cat {directory}/number > {tmp_path}/then",
                     "--post-snapshot", f"kill -CONT {pid}")
            made = json.loads(stasis(*create, *hooks, timeout=600).splitlines()[-1])
            assert (made["backups"][0]["kind"], made["backups"][0]["consistency"]) == ("incremental", "hooks")
        stasis("backup", "restore", "latest", tmp_path / "out.img", "--repo", tmp_path / "repo", timeout=600)
        with mounted(str(tmp_path / "out.img"), tmp_path / "again", "ro,loop") as again:
            assert (again / "number").read_text() == (tmp_path / "then").read_text()
            assert (again / "big").read_bytes() == (directory / "big").read_bytes()
        stasis("track", "stop", node)
