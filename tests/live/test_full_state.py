# SPDX-License-Identifier: Apache-2.0
"""A state directory without room fails a backup with the name of the file, and no change is lost by that."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.live.disks import MIB, mounted
from tests.live.writers import bpf_works, loop_device, read_direct, state_directory
from tests.runner import Stasis

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

PAGE = 4096
ROOM = 1 * MIB


@pytest.fixture
def node(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "image", 16 * MIB) as node:
        yield node


def fill(directory: Path) -> Path:
    """A file that takes all of the space."""
    path = directory / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            return path


def change(node: str, number: int) -> None:
    with open(node, "rb+", buffering=0) as device:
        device.seek(number * MIB)
        device.write(os.urandom(PAGE))
        os.fsync(device.fileno())


def test_a_full_state_directory_is_named_and_loses_nothing(stasis: Stasis, node: str, tmp_path: Path) -> None:
    repo, out = tmp_path / "repo", tmp_path / "restored"
    backup = ("backup", "create", node, "--repo", repo, "--self-check", "0")
    with (mounted("none", stasis.state_dir, "-t", "tmpfs", "-o", f"size={ROOM}") as state,
          state_directory(stasis.state_dir)):
        stasis("repo", "init", repo, "--no-encryption")
        stasis("track", "start", node)
        stasis(*backup)
        filler, failed = fill(state), 0
        for pages in range(2):
            os.truncate(filler, filler.stat().st_size - (PAGE if pages else 0))
            change(node, pages)
            done = stasis.run(*backup, "--kind", "full", "--json")
            if done.returncode:
                assert done.returncode == ExitCode.STORAGE, done
                assert json.loads(done.stderr.splitlines()[-1])["message"].startswith(f"the state file {state}")
                failed += 1
        assert failed
        filler.unlink()
        stasis(*backup, "--kind", "incremental")
        stasis("backup", "restore", "latest", out, "--repo", repo)
        assert out.read_bytes() == read_direct(node, 0, 16 * MIB)
        stasis("track", "stop", node)
