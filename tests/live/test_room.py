# SPDX-License-Identifier: Apache-2.0
"""What is written late and does not fit into memory is read in more rounds, also when the freeze was about to come."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.backup.job import CreateOptions, create
from stasis.backup.progress import Progress
from stasis.backup.repo import Repository
from stasis.daemon.live_sources import LiveSources
from stasis.live import tracking
from stasis.live.liveset import LiveSet
from stasis.live.options import LiveOptions
from tests.backup.stored import content_of
from tests.live.difftracker import DiffTracker
from tests.live.disks import MIB, Disk, Setup, back_up
from tests.live.writers import bpf_works, state_directory

pytestmark = [pytest.mark.root, pytest.mark.tool("mkfs.ext4", "losetup")]

OPTIONS = LiveOptions(max_freeze=20, busy_freeze=30, memory=8 * MIB, rounds=2)


@pytest.fixture
def late(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many MiB are written right before what is left is copied into memory, each time that it is."""
    converge, sizes = LiveSet.converge, list[int]()

    def write_and_converge(group: LiveSet) -> None:
        if sizes:
            (disk.directory / "late").write_bytes(os.urandom(sizes.pop(0) * MIB))
            os.sync()
        converge(group)

    monkeypatch.setattr(LiveSet, "converge", write_and_converge)
    return sizes


def test_after_the_rounds(disk: Disk, late: list[int], repository: Repository, tmp_path: Path) -> None:
    late += [12, 1]
    backup = back_up(repository, tmp_path / "state", [(disk.node, disk.image, DiffTracker(disk.image))], Setup(OPTIONS))
    assert not late
    assert backup.stored == backup.contents
    assert backup.result.backups[0].statistics["rounds"] == 2


@pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")
def test_right_before_the_freeze(disk: Disk, late: list[int], repository: Repository, tmp_path: Path) -> None:
    with state_directory(tmp_path / "state") as state:
        tracking.start(disk.node, state).close()
        with LiveSources([("disk", disk.node)], state, OPTIONS, skip_unreadable=False) as live:
            options, progress = CreateOptions(host="host", state_dir=state), Progress()
            precopy = live.begin(repository, options, progress)
            assert precopy.rounds == 1
            late += [12, 1]
            contents = live.take(disk.image.read_bytes)
            result = create(live.planned(), repository, options, progress, precopy=precopy)
        tracking.stop(disk.node, state)
    assert not late
    assert content_of(repository, result.backups[0]) == contents
    assert result.backups[0].statistics["rounds"] == 2
