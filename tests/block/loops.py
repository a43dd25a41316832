# SPDX-License-Identifier: Apache-2.0
"""Loop devices for tests: made for a `with` statement, gone after it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def loop_device(path: Path, size: int, sector: int = 512) -> Iterator[str]:
    """A loop device of `size` bytes over a new sparse file, with this logical sector size."""
    with path.open("wb") as file:
        file.truncate(size)
    command = ["losetup", "--find", "--show", "--sector-size", str(sector), str(path)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
