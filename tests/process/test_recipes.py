# SPDX-License-Identifier: Apache-2.0
"""The recipes do what they say, command by command."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stasis.linux import procfs
from tests.process.programs import wait_for

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "process-recipes.md"


@pytest.mark.root
@pytest.mark.tool("bash")
def test_the_recipes_work_as_written(tmp_path: Path) -> None:
    command = tmp_path / "bin" / "stasis"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m stasis "$@"\n')
    command.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        done = subprocess.run([str(shutil.which("bash")), "-euo", "pipefail", "-c", "".join(blocks)], cwd=work,
                              env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=240,
                              stdin=subprocess.DEVNULL)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "can be dumped" in done.stdout
        assert re.search(r"^State:\s+T", done.stdout, re.MULTILINE)
        assert len((work / "copies.pids").read_text().split()) == 3
        for log in work.glob("*.log"):
            assert re.fullmatch(r"(\d+ 300000\n)+", log.read_text()), log
    finally:
        _end_all(work)


def _end_all(work: Path) -> None:
    """What is left of the recipes' processes. Those of a pid namespace end soon after its first one."""
    for pid in _living(work):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not _living(work), "they do not end")


def _living(work: Path) -> list[int]:
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd") == str(work) and procfs.stat(pid).state != "Z":
                found.append(pid)
    return found
