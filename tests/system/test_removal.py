# SPDX-License-Identifier: Apache-2.0
"""A block device that is gone: a loop device of size 0 is what the kernel makes of a removed one.

tests/vm removes a SCSI disk for good.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stasis as api
from stasis.nbd.client import Client
from tests.block.loops import loop_device
from tests.runner import Stasis
from tests.system.helpers import MIB
from tests.system.removal import EXPECTED, check_removal, refused

pytestmark = [pytest.mark.root, pytest.mark.tool("losetup"), pytest.mark.expects_errors(*EXPECTED)]


class Disk:
    """A loop device whose medium comes and goes."""

    def __init__(self, path: str, backing: Path) -> None:
        self.path, self._backing = path, backing

    def resize(self, size: int) -> None:
        os.truncate(self._backing, size)
        subprocess.run(["losetup", "--set-capacity", self.path], check=True)


@pytest.fixture
def disk(short_dir: Path) -> Iterator[Disk]:
    with loop_device(short_dir / "backing", 16 * MIB) as path:
        yield Disk(path, short_dir / "backing")


def test_a_removed_device_answers_errors_and_can_be_detached(disk: Disk, stasis: Stasis) -> None:
    generation = check_removal(stasis, disk.path, lambda: disk.resize(0))
    disk.resize(16 * MIB)
    stasis("device", "attach", disk.path, "--name", "disk")
    assert stasis.json("map", "info", "disk")["generation"] != generation


def test_what_cannot_be_flushed_any_more_is_detached_and_its_map_not_trusted(disk: Disk, stasis: Stasis) -> None:
    uri = stasis("device", "attach", disk.path, "--name", "disk")
    generation = stasis.json("map", "info", "disk")["generation"]
    with Client.connect(uri, timeout=60) as client:
        client.pwrite(0, b"x" * MIB)
        disk.resize(0)
        refused(client.flush)
    stasis("device", "detach", "disk")
    assert not stasis.json("map", "info", "disk")["clean"]
    disk.resize(16 * MIB)
    stasis("device", "attach", disk.path, "--name", "disk")
    assert stasis.json("map", "info", "disk")["generation"] != generation


def test_calls_on_a_removed_device_are_enodev(disk: Disk, stasis: Stasis) -> None:
    stasis("device", "attach", disk.path, "--name", "disk")
    disk.resize(0)
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        calls: list[Callable[[], object]] = [
            lambda: client.control("disk", "cbtinfo"),
            lambda: client.attach(disk.path, name="disk"),
            lambda: client.create_snapshot("memory", ["disk"], limit=64 * MIB, take=True),
            lambda: client.refresh("disk"),
        ]
        for call in calls:
            with pytest.raises(api.StasisError, match=disk.path) as caught:
                call()
            assert caught.value.errno == errno.ENODEV
            assert "detach" in caught.value.hint
        assert client.snapshots() == []
