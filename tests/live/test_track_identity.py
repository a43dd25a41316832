# SPDX-License-Identifier: Apache-2.0
"""A disk that was set up anew under its old name and number is another disk, also where no number of it tells."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from stasis.daemon.live_sources import is_tracked
from stasis.errors import NotFoundError
from stasis.linux import ioctl, loop
from stasis.live import identity, tracking
from stasis.live.tracker import Tracker
from tests.live.writers import MIB, bpf_works, loop_device, zram_device

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

SIZE = 16 * MIB
LOOP_SET_STATUS64 = 0x4C04


def write(node: str, length: int) -> None:
    fd = os.open(node, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, os.urandom(length), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def is_good_anew(device: str, state: Path, node: str) -> None:
    """A new generation, of the disk that the name is of now, ends the loss."""
    with Tracker.open(device, state) as tracker:
        tracker.begin_generation("test")
        tracker.check()
        assert tracker.identity.path == node
    tracking.stop(device, state)


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
        is_good_anew(node, state, node)


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
        is_good_anew(str(link), state, two)


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


def test_a_loop_device_that_shows_another_part_of_its_file_is_lost(state: Path, tmp_path: Path) -> None:
    """The same number, size and disk sequence number, and not a block of it is what it was."""
    with loop_device(tmp_path / "image", SIZE) as node:
        os.truncate(tmp_path / "image", SIZE + MIB)
        tracking.start(node, state).close()
        assert tracking.inspect(node, state).lost == ""
        begin_at(node, MIB)
        assert tracking.inspect(node, state).lost == "it shows another part of its file"
        is_good_anew(node, state, node)


def begin_at(node: str, offset: int) -> None:
    """Move a loop device along its file, as programs may while it is in use."""
    with open(node, "rb+", buffering=0) as device:
        status = bytearray(loop.LoopInfo64())
        ioctl.call(device.fileno(), "LOOP_GET_STATUS64", loop.LOOP_GET_STATUS64, status)
        loop.LoopInfo64.from_buffer(status).lo_offset = offset
        ioctl.call(device.fileno(), "LOOP_SET_STATUS64", LOOP_SET_STATUS64, status)


def test_a_backup_goes_on_where_the_tracked_name_leads_now(state: Path, tmp_path: Path) -> None:
    """A disk that came back under another node is not read as one that nobody tracks."""
    link = tmp_path / "link"
    with loop_device(tmp_path / "one", SIZE) as one, loop_device(tmp_path / "two", SIZE) as two:
        link.symlink_to(one)
        tracking.start(str(link), state).close()
        link.unlink()
        link.symlink_to(two)
        assert is_tracked(os.path.relpath(link), state)
        with Tracker.open(os.path.relpath(link), state) as tracker:
            assert tracker.lost
        assert not is_tracked(two, state)
        with pytest.raises(NotFoundError, match=f"was tracked as {link}, which leads to {two} now"):
            Tracker.open(one, state)
        tracking.stop(str(link), state)
