# SPDX-License-Identifier: Apache-2.0
"""A daemon on directories of the test's own, through the Python API."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stasis as api
from tests.daemon.helpers import MIB
from tests.runner import Stasis


@pytest.fixture
def client(stasis: Stasis) -> Iterator[api.Client]:
    """A client of a daemon that this test has for itself."""
    with api.connect(stasis.run_dir, stasis.state_dir) as connected:
        yield connected


@pytest.fixture
def make_image(short_dir: Path) -> Callable[..., Path]:
    """Make an image file with random contents."""

    def make(name: str = "disk.img", size: int = 4 * MIB) -> Path:
        path = short_dir / name
        path.write_bytes(os.urandom(size))
        return path

    return make


@pytest.fixture
def storage(short_dir: Path) -> Path:
    path = short_dir / "storage"
    path.mkdir()
    return path
