# SPDX-License-Identifier: Apache-2.0
"""What most tests of live devices begin with: a repository on a fast disk, and a mounted ext4 on a loop device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.backup.repo import Repository
from tests.backup.restoring import new_repository
from tests.live.disks import Disk, fast_folder, formatted


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with fast_folder(tmp_path) as folder, new_repository(folder / "repo") as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with formatted("ext4", tmp_path) as made:
        yield made
