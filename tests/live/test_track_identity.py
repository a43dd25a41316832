# SPDX-License-Identifier: Apache-2.0
"""A disk that was set up anew under its old name and number is another disk, also where no number of it tells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stasis.errors import NotFoundError
from stasis.live import identity, tracking
from stasis.live.tracker import Tracker
from tests.live.writers import MIB, bpf_works, loop_device, state_directory, zram_device

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

SIZE = 16 * MIB


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    with state_directory(tmp_path / "state") as path:
        yield path


def write(node: str, length: int) -> None:
    fd = os.open(node, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, os.urandom(length), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.skipif(not os.path.exists("/sys/class/zram-control/hot_add"), reason="this kernel has no zram")
def test_a_zram_disk_that_was_reset_is_lost_and_stays_so(state: Path) -> None:
    """The same number, size and disk sequence number, and its contents are gone without a write."""
    with zram_device(SIZE) as node:
        write(node, MIB)
        tracking.start(node, state).close()
        assert tracking.inspect(node, state).lost == ""
        for name, value in (("reset", "1"), ("disksize", str(SIZE))):
            Path(f"/sys/block/{os.path.basename(node)}/{name}").write_text(value)
        assert tracking.inspect(node, state).lost == "the disk was set up anew"
        write(node, 4 * MIB)  # more than before
        assert tracking.inspect(node, state).lost == "the disk was set up anew"
        with Tracker.open(node, state) as tracker:
            tracker.begin_generation("test")
            tracker.check()
        tracking.stop(node, state)


def test_a_name_that_leads_to_another_disk_is_a_loss(state: Path, tmp_path: Path) -> None:
    """As a label or a volume's link: what is tracked is what the user named, and that is what a backup reads."""
    link = tmp_path / "link"
    with loop_device(tmp_path / "one", SIZE) as one, loop_device(tmp_path / "two", SIZE) as two:
        link.symlink_to(one)
        tracking.start(str(link), state).close()
        link.unlink()
        link.symlink_to(two)
        assert tracking.inspect(str(link), state).lost == f"{link} leads to {two} now"
        with pytest.raises(NotFoundError):  # a new generation would be of the other disk
            Tracker.open(one, state)
        with Tracker.open(str(link), state) as tracker:
            tracker.begin_generation("test")
            tracker.check()
            assert tracker.identity.path == two
        tracking.stop(str(link), state)


def test_what_is_counted_of_a_disk_only_grows(state: Path, tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", SIZE) as node, tracking.start(node, state) as tracker:
        before = identity.read_activity(tracker.identity)
        write(node, MIB)
        assert identity.read_activity(tracker.identity) > before
        tracker.check()
    tracking.stop(node, state)


def test_a_record_of_an_older_version_has_no_table() -> None:
    old = identity.Identity("/dev/dm-0", "dm-0", 252, 0, 252, 0, 5, 0, SIZE)
    assert old.difference(replace(old, table="abc")) == ""
    assert replace(old, table="abc").difference(replace(old, table="abd")) == "its device-mapper table was replaced"
