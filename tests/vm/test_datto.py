# SPDX-License-Identifier: Apache-2.0
"""dattobd's way of working on stock kernels: a mounted disk, a copy of /dev/datto0 by dd, its update by update-img."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.runner import Stasis
from tests.vm.machine import Disk, Load, check_records, mounted, reread, run

KINDS = ("ext4", "xfs")
CHECK = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n")}
IMAGE_OPTIONS = {"ext4": "ro,noload", "xfs": "ro,norecovery,nouuid"}


class Datto:
    """The console scripts, as a script calls them."""

    def __init__(self, stasis: Stasis) -> None:
        self._stasis = stasis

    def _tool(self, module: str, *words: str | Path) -> str:
        command = [sys.executable, "-m", f"stasis.cli.{module}", *map(str, words)]
        done = subprocess.run(command, env=self._stasis.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def dbdctl(self, *words: str | Path) -> None:
        assert self._tool("dbdctl", *words) == ""

    def update(self, *words: str | Path) -> None:
        assert self._tool("update_img", *words).endswith(" 0 errors\n")

    def await_state(self, wanted: str) -> None:
        self._await(lambda: self._stasis.json("datto", "show", "0")["state_name"] == wanted, wanted)

    def await_image(self) -> None:
        self._await(lambda: os.path.exists("/dev/datto0"), "/dev/datto0")

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, (what, self._stasis.json("datto", "show", "0"))
            time.sleep(0.1)


@pytest.fixture
def datto(stasis: Stasis) -> Datto:
    return Datto(stasis)


@pytest.fixture(params=KINDS)
def origin(request: pytest.FixtureRequest, stasis: Stasis, disks: list[Disk]) -> Iterator[tuple[str, str]]:
    """The smallest disk as "disk" with a node and a file system: (kind, node)."""
    stasis("device", "attach", disks[2].path, "--name", "disk", "--kernel")
    (found,) = stasis.json("device", "list")
    run(f"mkfs.{request.param}", "-q", found["node"])
    yield request.param, found["node"]
    stasis("device", "detach", "disk")
    reread(disks[2].path)
    run(*CHECK[request.param], disks[2].path)


def _same(image: str, size: int) -> None:
    run("cmp", "-n", str(size), "/dev/datto0", image)


@pytest.mark.expects_errors("worker of disk .* died")
def test_a_mounted_disk_is_copied_and_the_copy_updated(stasis: Stasis, datto: Datto, origin: tuple[str, str],
                                                       disks: list[Disk], tmp_path: Path) -> None:
    kind, node = origin
    image, size, cow = disks[1].path, disks[2].size, tmp_path / "cow"
    with mounted(node, tmp_path / "mnt") as target:
        with Load(target) as load:
            durable = load.wait_for_records(10)
            datto.dbdctl("setup-snapshot", "-f", "200", node, f"{cow}0", "0")
            load.wait_for_records(5)
            run("dd", "if=/dev/datto0", f"of={image}", "bs=1M", "conv=fsync")
            _same(image, size)
            with mounted("/dev/datto0", tmp_path / "image", IMAGE_OPTIONS[kind]) as inside:
                check_records(inside, durable)
            datto.dbdctl("transition-to-incremental", "0")
            assert not os.path.lexists("/dev/datto0")
            durable = load.wait_for_records(5)
            load.stop()
        run("mount", "-o", "remount,ro", target)
        datto.await_state("dormant incremental")
        run("mount", "-o", "remount,rw", target)
        datto.await_state("active incremental")
        (target / "removed").write_bytes(os.urandom(1 << 20))
    datto.await_state("dormant incremental")
    with mounted(node, tmp_path / "mnt") as target:
        datto.await_state("active incremental")
        (target / "removed").unlink()
        run("fstrim", target)
        datto.dbdctl("transition-to-snapshot", f"{cow}1", "0")
        (target / "later").write_bytes(bytes(1 << 20))
        os.sync()
        datto.update("/dev/datto0", f"{cow}0", image)
        _same(image, size)
        _kill_daemon(stasis, datto)
        _same(image, size)
        _kill_worker(stasis)
        _same(image, size)
    datto.await_state("dormant snapshot")
    with mounted(image, tmp_path / "copy") as copied:
        check_records(copied, durable)
        assert not (copied / "removed").exists()
        assert not (copied / "later").exists()
    datto.dbdctl("destroy", "0")


def _kill_daemon(stasis: Stasis, datto: Datto) -> None:
    pid = stasis.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    stasis("datto", "list")  # starts another one
    datto.await_image()


def _kill_worker(stasis: Stasis) -> None:
    (found,) = stasis.json("device", "list")
    os.kill(found["pid"], signal.SIGKILL)


def test_a_series_goes_on_over_an_end_of_everything(stasis: Stasis, datto: Datto, origin: tuple[str, str],
                                                    disks: list[Disk], tmp_path: Path) -> None:
    """Unmounted, the daemon ended, as at a shutdown; then the daemon alone, as at a boot. The COW file is on the disk
    itself."""
    kind, node = origin
    image, cow = disks[1].path, tmp_path / "mnt" / ".cow"
    with mounted(node, tmp_path / "mnt") as target:
        datto.dbdctl("setup-snapshot", "-f", "200", node, f"{cow}0", "0")
        run("dd", "if=/dev/datto0", f"of={image}", "bs=1M", "conv=fsync")
        datto.dbdctl("transition-to-incremental", "0")
        before = os.urandom(1 << 20)
        (target / "before").write_bytes(before)
    stasis("daemon", "stop")
    deadline = time.monotonic() + 120
    while stasis.daemon_pid() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (found,) = stasis.json("device", "list")
    assert stasis.json("datto", "show", "0")["state_name"] == "active incremental"
    with mounted(found["node"], tmp_path / "mnt") as target:
        after = os.urandom(1 << 20)
        (target / "after").write_bytes(after)
        datto.dbdctl("transition-to-snapshot", f"{cow}1", "0")
        (target / "after").write_bytes(before)
        datto.update("/dev/datto0", f"{cow}0", image)
        with mounted(image, tmp_path / "copy", IMAGE_OPTIONS[kind]) as copied:
            assert ((copied / "before").read_bytes(), (copied / "after").read_bytes()) == (before, after)
    datto.dbdctl("destroy", "0")
