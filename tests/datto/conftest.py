# SPDX-License-Identifier: Apache-2.0
"""What tests of tracers share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.datto.disk import Disk, mounted_disk
from tests.minors import free_minor


@pytest.fixture
def disk(short_dir: Path) -> Iterator[Disk]:
    with mounted_disk(short_dir, "ext4") as disk:
        yield disk


@pytest.fixture
def minor() -> Iterator[int]:
    with free_minor() as minor:
        yield minor
