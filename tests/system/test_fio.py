# SPDX-License-Identifier: Apache-2.0
"""What fio writes it reads back right, however many snapshots are made, taken and destroyed meanwhile."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from stasis.nbd.client import Client
from tests.runner import Stasis
from tests.system.conftest import MakeDisk
from tests.system.helpers import LONG, MIB, Disk, fio_command, fio_result

PATTERNS = {
    "random": ["--rw=randwrite", "--bs=4k", "--iodepth=16"],
    "mixed": ["--rw=randrw", "--bsrange=4k-128k", "--iodepth=8"],
    "sequential": ["--rw=write", "--bs=1m", "--iodepth=4"],
}


def _one_life(stasis: Stasis, disk: Disk, storage: str | Path) -> None:
    """A snapshot from create to destroy; its image gives the same bytes at its beginning and at its end."""
    uuid = stasis("snapshot", "create", "--storage", storage, "--limit", "256M", disk.name)
    stasis("snapshot", "take", uuid)
    image = stasis.json("snapshot", "show", uuid)["devices"][0]["uri"]
    first, second = disk.read(image), disk.read(image)
    stasis("snapshot", "destroy", uuid)
    assert first == second


@pytest.mark.tool("fio")
@pytest.mark.parametrize("options", [(), ("--buffered",)], ids=["direct", "buffered"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_fio_verifies_while_snapshots_come_and_go(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, pattern: str, options: tuple[str, ...]
) -> None:
    disk = make_disk("disk.img", 32 * MIB, *options)
    loops = 40 if LONG else 2
    command = fio_command(disk.uri, *PATTERNS[pattern], "--size=32m", f"--loops={loops}", "--rate=24m")
    lives = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        while job.poll() is None:
            _one_life(stasis, disk, "memory" if lives % 2 else storage)
            lives += 1
        assert job.stdout is not None
        assert fio_result(job.stdout.read())["write"]["total_ios"] > 0
        assert job.returncode == 0
    assert lives > 1
    with Client.connect(disk.uri) as client:
        client.flush()
    assert disk.path.read_bytes() == disk.read()
