# SPDX-License-Identifier: Apache-2.0
"""The tutorial does what it says, command by command."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runner import Stasis

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "backup-tutorial.md"


def _commands() -> list[str]:
    """All lines but those that change the machine."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for line in "".join(blocks).splitlines() if not line.startswith("sudo ")]


@pytest.mark.tool("bash", "qemu-io", "mkfs.ext4", "e2fsck")
def test_the_tutorial_works_as_written(stasis: Stasis, short_dir: Path) -> None:
    command = short_dir / "bin" / "stasis"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m stasis "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{stasis.environment['PATH']}"
    work = short_dir / "work"
    work.mkdir()
    result = subprocess.run([str(shutil.which("bash")), "-euxo", "pipefail", "-c", "\n".join(_commands())],
                            cwd=work, env={**stasis.environment, "PATH": path}, capture_output=True, text=True,
                            timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    kinds = re.findall(r"disk: (full|incremental)", result.stdout)
    assert kinds == ["full", "incremental", "incremental", "incremental"], result.stdout  # the third is the dry run
    assert "1 MiB changed of 256 MiB" in result.stdout
    assert (work / "rescued.img").stat().st_size == 256 << 20
    assert stasis.daemon_pid() is None
