# SPDX-License-Identifier: Apache-2.0
"""The demo that the readme promises comes to its good end, and cleans up after itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "tools" / "demo.py"


def _run(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), *options],
        env={**os.environ, "TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.tool("mkfs.ext4", "debugfs", "e2fsck")
def test_the_demo_checks_every_copy_and_leaves_nothing(short_dir: Path) -> None:
    result = _run(short_dir, "--size", "64M", "--seconds", "0.5")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("64 MiB equal, e2fsck clean") == 4
    assert result.stdout.rstrip().endswith("both disks at one instant.")
    assert list(short_dir.iterdir()) == []


def test_the_demo_says_what_is_missing(short_dir: Path) -> None:
    result = _run(short_dir, "--size", "8000T")
    assert result.returncode == 1
    assert "the demo needs" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(short_dir.iterdir()) == []
