# SPDX-License-Identifier: Apache-2.0
"""The quick start does what it says, command by command."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runner import Stasis

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "quick-start.md"
NOT_HERE = ("source ", "stasis --help", "qemu-system")


def _commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for line in "".join(blocks).splitlines() if not line.startswith(NOT_HERE)]


@pytest.mark.tool("bash", "qemu-img")
def test_the_quick_start_works_as_written(stasis: Stasis, short_dir: Path) -> None:
    command = short_dir / "bin" / "stasis"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m stasis "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{stasis.environment['PATH']}"
    result = subprocess.run(
        [str(shutil.which("bash")), "-euxo", "pipefail", "-c", "\n".join(_commands())],
        cwd=short_dir,
        env={**stasis.environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nbd+unix:///disk?socket=" in result.stdout
    assert result.stdout.count("copied") == 2
    assert (short_dir / "backup.img").stat().st_size == 10 << 30
    assert stasis.daemon_pid() is None


def test_the_python_example_works_as_written(
    stasis: Stasis, short_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("STASIS_RUN_DIR", "STASIS_STATE_DIR"):
        monkeypatch.setenv(name, stasis.environment[name])
    monkeypatch.chdir(short_dir)
    (short_dir / "disk.img").write_bytes(b"x" * (1 << 20))
    # Examples that need a COW file or a certain process are marked `py`, and are shown by other tests.
    example = re.findall(r"^```python\n(.*?)^```", (PAGE.parent / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile("".join(example), "python.md", "exec"), {})
    assert "nbd+unix:///disk.img?socket=" in capsys.readouterr().out
    assert (short_dir / "backup.img").read_bytes() == (short_dir / "disk.img").read_bytes()
