# SPDX-License-Identifier: Apache-2.0
"""The kernel's count of discards moves with a discard and with nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.linux import blockdev
from tests.block.loops import loop_device


@pytest.mark.root
@pytest.mark.tool("losetup")
def test_discards_are_counted_and_writes_are_not(tmp_path: Path) -> None:
    with loop_device(tmp_path / "disk.img", 4 << 20) as node:
        fd = os.open(node, os.O_RDWR)
        try:
            before = blockdev.discarded_sectors(fd)
            os.pwrite(fd, bytes(4096), 0)
            os.fsync(fd)
            assert blockdev.discarded_sectors(fd) == before
            blockdev.discard(fd, 0, 1 << 20)
            assert blockdev.discarded_sectors(fd) == (before or 0) + 2048
        finally:
            os.close(fd)


def test_a_file_has_no_such_count(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert blockdev.discarded_sectors(file.fileno()) is None
