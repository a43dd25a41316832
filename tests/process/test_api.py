# SPDX-License-Identifier: Apache-2.0
"""The process engine as a Python library."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

import stasis.process
from stasis.errors import NotFoundError, StasisError, UsageError

pytestmark = pytest.mark.root


def _sleeper() -> subprocess.Popen[bytes]:
    nothing = subprocess.DEVNULL
    return subprocess.Popen(["sleep", "1000"], start_new_session=True, stdin=nothing, stdout=nothing, stderr=nothing)


def test_a_process_is_dumped_and_brought_back(tmp_path: Path) -> None:
    with _sleeper() as process:
        try:
            assert stasis.process.check(process.pid) == []
            copied = stasis.process.pre_dump(process.pid, tmp_path / "1")
            assert copied.pids == [process.pid]
            steps: list[str] = []
            options = stasis.process.DumpOptions(parent=str(tmp_path / "1"), hook=steps.append)
            dumped = stasis.process.dump(process.pid, tmp_path / "2", options)
            assert dumped.pids == [process.pid]
            assert dumped.pages_in_parent > 0
            assert steps == ["pre-dump", "post-dump"]
        finally:
            process.kill()
    chosen = stasis.process.RestoreOptions(hook=lambda step, pid: steps.append(f"{step} {pid}"))
    restored = stasis.process.restore(tmp_path / "2", chosen)
    assert restored.pids == [process.pid]
    assert steps[2:] == ["pre-restore 0", *(f"{step} {process.pid}" for step in
                                            ("post-restore", "pre-resume", "post-resume"))]  # fmt: skip
    os.kill(restored.pid, signal.SIGKILL)
    assert os.waitpid(restored.pid, 0)[0] == process.pid


def test_what_a_hook_raises_undoes_a_restore(tmp_path: Path) -> None:
    with _sleeper() as process:
        stasis.process.dump(process.pid, tmp_path / "images")
        process.wait()

    def refuse(step: str, pid: int) -> None:
        if step == "pre-resume":
            raise StasisError(f"process {pid} is not wanted")

    with pytest.raises(StasisError, match="not wanted"):
        stasis.process.restore(tmp_path / "images", stasis.process.RestoreOptions(hook=refuse))
    assert not os.path.exists(f"/proc/{process.pid}")


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no process 4194305"):
        stasis.process.dump(4194305, tmp_path / "images")
    with pytest.raises(UsageError, match="left running"):
        stasis.process.dump(os.getpid(), tmp_path / "images", stasis.process.DumpOptions(track=True))
    with pytest.raises(AttributeError, match="no attribute 'freeze'"):
        stasis.process.freeze  # noqa: B018
    assert list(tmp_path.iterdir()) == []
