# SPDX-License-Identifier: Apache-2.0
"""A SCSI disk that is pulled out while it is served: errors that name it, no hang, and everything is given back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.block.frontend.node import load_module, wait_until
from stasis.nbd.client import Client
from tests.runner import Stasis
from tests.system.removal import EXPECTED, check_removal
from tests.vm.machine import MIB, mounted, run, wait_for

pytestmark = pytest.mark.expects_errors(*EXPECTED, "Input/output error")


@pytest.fixture
def scsi_disk() -> Iterator[str]:
    """A disk of the kernel's SCSI simulator.

    Before the daemon among a test's arguments: the module cannot be unloaded while anybody has the disk open.
    """
    before = set(Path("/sys/block").iterdir())
    load_module("sd_mod")
    run("modprobe", "scsi_debug", "dev_size_mb=64", "delay=0")
    wait_until(lambda: bool(new_disks(before)), 60)
    (name,) = new_disks(before)
    yield wait_for(f"/dev/{name}")
    run("modprobe", "-r", "scsi_debug")


def new_disks(before: set[Path]) -> list[str]:
    return [path.name for path in set(Path("/sys/block").iterdir()) - before if path.name.startswith("sd")]


def pull_out(disk: str) -> None:
    Path(f"/sys/block/{os.path.basename(disk)}/device/delete").write_text("1")


def write_durably(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(bytes(MIB))
        os.fsync(file.fileno())


@pytest.mark.parametrize("options", [(), ("--buffered",)])
def test_a_pulled_disk_answers_errors_and_can_be_detached(
    scsi_disk: str, stasis: Stasis, options: tuple[str, ...]
) -> None:
    check_removal(stasis, scsi_disk, lambda: pull_out(scsi_disk), *options)


def test_a_file_system_on_a_pulled_disk_fails_and_is_unmounted(
    scsi_disk: str, stasis: Stasis, tmp_path: Path
) -> None:
    stasis("device", "attach", scsi_disk, "--name", "disk", "--kernel")
    (shown,) = stasis.json("device", "list")
    run("mkfs.ext4", "-q", shown["node"])
    with mounted(shown["node"], tmp_path / "mounted") as target:
        (target / "file").write_bytes(bytes(MIB))
        os.sync()
        pull_out(scsi_disk)
        with pytest.raises(OSError) as caught:
            write_durably(target / "another")
        assert caught.value.errno in (errno.EIO, errno.EROFS)
    stasis("device", "detach", "disk")
    assert not os.path.exists(stasis.run_dir / "nodes" / "disk")


def test_a_daemon_that_starts_again_knows_of_the_removal(scsi_disk: str, stasis: Stasis) -> None:
    uri = stasis("device", "attach", scsi_disk, "--name", "disk")
    stasis("daemon", "stop", "--keep-serving")
    pull_out(scsi_disk)
    with Client.connect(uri, timeout=60) as client, pytest.raises(OSError) as caught:
        client.pread(0, 4096)
    assert caught.value.errno == errno.EIO
    (shown,) = stasis.json("device", "list")  # starts another daemon, which adopts the worker
    assert (shown["state"], shown["error"]) == ("failed", f"the block device {scsi_disk} of disk was removed")
    stasis("device", "detach", "disk")
