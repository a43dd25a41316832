# SPDX-License-Identifier: Apache-2.0
"""`--on-busy throttle` with the kernel's own io.max: who writes is slowed, and goes on as before at the end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.linux import iomax
from stasis.live.freezer import Freezer
from stasis.live.throttle import LOWEST, Throttle
from tests.live.writers import state_directory
from tests.runner import Stasis
from tests.system.helpers import wait_until
from tests.vm.machine import MIB, Disk, mounted, run

CGROUPS = Path("/sys/fs/cgroup")
OURS = "8:0 rbps=max wbps=900000000 riops=max wiops=max"
WRITER = """
import mmap, os, sys
with open(sys.argv[2] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT | os.O_CREAT)
os.ftruncate(fd, max(os.fstat(fd).st_size, 64 << 20)) if os.path.isfile(sys.argv[1]) else None
buffer = mmap.mmap(-1, 1 << 20)
place = 0
while True:
    buffer[:8] = os.urandom(8)
    os.pwritev(fd, [buffer], place)
    place = (place + (1 << 20)) % (64 << 20)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup with limits of its own."""
    (CGROUPS / "cgroup.subtree_control").write_text("+io")
    path = CGROUPS / "busy"
    path.mkdir()
    yield path
    wait_until(lambda: not (path / "cgroup.procs").read_text(), "the cgroup is empty")
    path.rmdir()


@contextlib.contextmanager
def writer(where: str | Path, group: Path, disk: int) -> Iterator[None]:
    """Writes 1 MiB after the other past the page cache, from within the cgroup."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(where), str(group)]) as process:
        try:
            wait_until(lambda: iomax.written(group, disk) > 0, "the cgroup writes")
            yield
        finally:
            process.kill()


def limit(group: Path, disk: int) -> str:
    return iomax.limit_line(group, disk)


def test_a_writer_is_slowed_and_let_go(disks: list[Disk], group: Path) -> None:
    rdev = os.stat(disks[0].path).st_rdev
    before = OURS.replace("8:0", f"{os.major(rdev)}:{os.minor(rdev)}")
    (group / "io.max").write_text(before)
    with writer(disks[0].path, group, rdev):
        with Freezer([]) as keeper:
            throttle = Throttle(keeper, [rdev])
            while throttle.tighten(1e12) and throttle.limits[group, rdev] > LOWEST:
                pass
            assert f"wbps={LOWEST} " in limit(group, rdev)
            start = iomax.written(group, rdev)
            for _ in range(8):  # a bucket of the kernel's is filled for a slice of time ahead
                throttle._pause(0.5)
            slow = iomax.written(group, rdev) - start
            assert slow <= 8 * 0.5 * LOWEST * 2 + 2 * MIB
        assert limit(group, rdev) == before
        start = iomax.written(group, rdev)
        wait_until(lambda: iomax.written(group, rdev) - start > slow, "it writes as before")


def test_a_backup_slows_who_writes_too_much(stasis: Stasis, disks: list[Disk], group: Path, tmp_path: Path) -> None:
    """With 8 MiB of memory for what is written meanwhile, and a writer that rewrites 64 MiB as fast as it can."""
    node, rdev = disks[2].path, os.stat(disks[2].path).st_rdev
    run("mkfs.ext4", "-q", node)
    stasis("repo", "init", tmp_path / "repo", "--no-encryption")
    with mounted(node, tmp_path / "mounted") as directory, state_directory(stasis.state_dir):
        stasis("track", "start", node)
        with writer(directory / "file", group, rdev):
            made = json.loads(stasis("backup", "create", node, "--repo", tmp_path / "repo", "--on-busy", "throttle",
                                     "--max-freeze", "30s", "--freeze-memory", "8M", "--json",
                                     timeout=900).splitlines()[-1])
        assert made["backups"][0]["consistency"] == "frozen"
        assert made["backups"][0]["statistics"]["rounds"] > 1
        assert limit(group, rdev).endswith(iomax.UNLIMITED)
        stasis("track", "stop", node)
    stasis("backup", "restore", "latest", tmp_path / "out.img", "--repo", tmp_path / "repo", timeout=900)
    run("e2fsck", "-fn", tmp_path / "out.img")
