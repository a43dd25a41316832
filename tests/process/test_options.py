# SPDX-License-Identifier: Apache-2.0
"""The options that a finding names get around it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.process.programs import PATIENCE

pytestmark = pytest.mark.root

LOCKING = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
sys.stdout.write("ready\\n")
sys.stdout.flush()
time.sleep(1000)
"""


def _process(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stasis", "process", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)


def test_a_lock_is_kept_when_asked_for(tmp_path: Path) -> None:
    path, images = tmp_path / "locked", tmp_path / "images"
    command = [sys.executable, "-c", LOCKING, str(path)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            refused = _process("check", process.pid, "--json")
            assert refused.returncode == ExitCode.UNSUPPORTED
            assert [finding["option"] for finding in json.loads(refused.stdout)] == ["--file-locks"]
            assert _process("check", process.pid, "--file-locks").returncode == 0
            done = _process("dump", process.pid, "--images", images, "--file-locks")
            assert done.returncode == 0, done.stderr
        finally:
            process.kill()
    done = _process("restore", "--images", images)
    assert done.returncode == 0, done.stderr
    with open(path) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(int(done.stdout), 9)


@pytest.mark.parametrize("text", ["3", "x=pipe:[1]", "3="])
def test_a_wrong_inherited_descriptor_is_named(text: str, tmp_path: Path) -> None:
    done = _process("restore", "--images", tmp_path, "--inherit-fd", text)
    assert done.returncode == ExitCode.USAGE
    assert "inherited descriptor" in done.stderr
