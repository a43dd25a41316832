# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the system tests: disks of an own daemon, and a place for difference storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runner import Stasis
from tests.system.helpers import MIB, Disk

MakeDisk = Callable[..., Disk]


@pytest.fixture
def make_disk(stasis: Stasis, short_dir: Path, seed: int) -> MakeDisk:
    """Attach an image file with random contents: make_disk(NAME, SIZE, OPTION...)."""

    def make(name: str = "disk.img", size: int = 16 * MIB, *options: str) -> Disk:
        return Disk(stasis, short_dir / name, size, seed, *options)

    return make


@pytest.fixture
def storage(short_dir: Path) -> Path:
    path = short_dir / "storage"
    path.mkdir()
    return path
