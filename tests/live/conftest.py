# SPDX-License-Identifier: Apache-2.0
"""What most tests of live devices begin with: a state directory, a repository on a fast disk, a mounted ext4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.backup.repo import Repository
from tests.backup.restoring import new_repository
from tests.live.disks import Disk, fast_folder, formatted
from tests.live.writers import state_directory


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory of the test's own; some files replace it by one that all of their tests share."""
    with state_directory(tmp_path / "state") as path:
        yield path


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with fast_folder(tmp_path) as folder, new_repository(folder / "repo") as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with formatted("ext4", tmp_path) as made:
        yield made
