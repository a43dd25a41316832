# SPDX-License-Identifier: Apache-2.0
"""Live disks that fail, vanish, change their size or are made anew: said, and nothing missed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.block.frontend.node import load_module
from stasis.errors import ExitCode
from stasis.linux import loop
from stasis.linux.iobuffer import IoBuffer
from stasis.live import tracking
from tests.live.writers import Mirror, loop_device, state_directory, zram_device
from tests.runner import Stasis
from tests.vm import livedisks
from tests.vm.livedisks import error_table, flakey, linear, reloaded, small_disk
from tests.vm.logwrites import mapped
from tests.vm.machine import MIB, Disk, mounted, run

SIZE = 32 * MIB
SECTOR = 512


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    with state_directory(tmp_path / "state") as path:
        yield path


@pytest.fixture
def tracked_state(stasis: Stasis) -> Iterator[Stasis]:
    with state_directory(stasis.state_dir):
        yield stasis


@contextlib.contextmanager
def writing_whatever_fails(node: str) -> Iterator[list[int]]:
    """Direct writes of 4 to 512 KiB at random places; the list has how many were done and how many failed."""
    counts, stopped = [0, 0], threading.Event()

    def work() -> None:
        fd = os.open(node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        with IoBuffer(512 << 10) as buffer:
            while not stopped.is_set():
                buffer.view[:] = os.urandom(len(buffer.view))
                place, length = (int.from_bytes(os.urandom(4)) for _ in range(2))
                length = (length % 128 + 1) * 4096
                try:
                    os.pwritev(fd, [buffer.view[:length]], place % ((SIZE - length) // 4096) * 4096)
                    counts[0] += 1
                except OSError:
                    counts[1] += 1
        os.close(fd)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield counts
    finally:
        stopped.set()
        thread.join()


def until_more(counts: list[int], which: int, mirrors: list[Mirror]) -> None:
    """Turn until some more writes were done (0) or failed (1)."""
    goal = counts[which] + 20
    while counts[which] < goal:
        for mirror in mirrors:
            mirror.turn()


def test_a_write_that_failed_may_have_changed_something(disks: list[Disk], state: Path) -> None:
    """A disk that fails as a whole, and one that fails in its second half: the copies are what is there."""
    small = Disk(small_disk("disk3"))
    whole = linear(SIZE, small)
    with (
        mapped("sick", whole) as node,
        tracking.start(node, state) as upper,
        tracking.start(small.path, state) as lower,
    ):
        mirrors = [Mirror(upper), Mirror(lower)]
        with writing_whatever_fails(node) as counts:
            for number in range(4):
                until_more(counts, 0, mirrors)
                half = SIZE // SECTOR // 2
                tables = (f"0 {half} linear {small.path} 0\n{half} {half} error", flakey(small, SIZE, "error_writes"))
                reloaded("sick", tables[number % 2])
                until_more(counts, 1, mirrors[1:])
                reloaded("sick", whole)
        for mirror in mirrors:
            mirror.turn()
            assert mirror.missed() == []
    tracking.stop(small.path, state)
    tracking.stop("dm-0", state)


def test_what_cannot_be_read_is_named_and_copied_when_it_can(
    disks: list[Disk], tracked_state: Stasis, tmp_path: Path
) -> None:
    stasis, half = tracked_state, SIZE // SECTOR // 2
    whole = linear(SIZE, disks[0])
    sick = f"0 {half} linear {disks[0].path} 0\n{half} 8 error\n{half + 8} {half - 8} linear {disks[0].path} {half + 8}"
    stasis("repo", "init", tmp_path / "repo", "--no-encryption")
    with mapped("sick", whole) as node:
        Path(node).write_bytes(os.urandom(SIZE))
        stasis("track", "start", node)
        reloaded("sick", sick)
        said = stasis.fail(ExitCode.FAILURE, "backup", "create", node, "--repo", tmp_path / "repo")
        assert f"cannot be read between {SIZE // 2}" in said
        reloaded("sick", whole)
        stasis("backup", "create", node, "--repo", tmp_path / "repo")
        check_restored(stasis, node, tmp_path)
        stasis("track", "stop", node)


def check_restored(stasis: Stasis, node: str, where: Path) -> None:
    restored = where / "restored"
    stasis("backup", "restore", "latest", restored, "--repo", where / "repo", "--overwrite")
    with open(node, "rb") as device, restored.open("rb") as copy:
        while True:
            one, other = device.read(MIB), copy.read(MIB)
            assert one == other
            if not one:
                break


def lost(stasis: Stasis, name: str) -> str:
    (shown,) = (device for device in stasis.json("track", "list") if device["name"] == name)
    return str(shown["lost"])


def check_starts_over(stasis: Stasis, node: str, where: Path) -> None:
    """The next backup says why it is full, and has everything; the one after goes on from it."""
    stasis("backup", "create", node, "--repo", where / "repo", "--name", "disk")
    check_restored(stasis, node, where)
    assert lost(stasis, os.path.basename(os.path.realpath(node))) == ""


def test_a_loop_device_that_was_detached_and_made_anew(tracked_state: Stasis, tmp_path: Path) -> None:
    stasis = tracked_state
    with loop_device(tmp_path / "one", SIZE) as node:
        stasis("track", "start", node)
    assert "gone" in lost(stasis, os.path.basename(node)) or "no size" in lost(stasis, os.path.basename(node))
    (tmp_path / "two").write_bytes(os.urandom(SIZE))
    again = loop.attach(str(tmp_path / "two"), SECTOR, SIZE)
    try:
        assert again == node
        assert lost(stasis, os.path.basename(node)) == "another disk took its place"
    finally:
        loop.detach(again)
    stasis("track", "stop", os.path.basename(node))


def test_a_scsi_disk_that_was_pulled_out_and_put_in_again(tracked_state: Stasis) -> None:
    stasis = tracked_state
    with livedisks.scsi_debug() as node:
        name = os.path.basename(node)
        stasis("track", "start", node)
        host = Path(f"/sys/block/{name}/device").resolve().parent.parent / "scsi_host"
        (host_name,) = os.listdir(host)
        Path(f"/sys/block/{name}/device/delete").write_text("1")
        assert f"there is no device {node}" in lost(stasis, name)
        Path(f"/sys/class/scsi_host/{host_name}/scan").write_text("- - -")
        livedisks.wait_for(node)
        assert lost(stasis, name) == "another disk took its place"
        stasis("track", "stop", name)


def test_a_mirror_that_was_stopped_and_built_anew(disks: list[Disk], tracked_state: Stasis) -> None:
    stasis = tracked_state
    with livedisks.md_raid1(disks[:2], SIZE) as node:
        stasis("track", "start", node)
    assert "there is no device" in lost(stasis, "md7")
    with livedisks.md_raid1([disks[0], disks[2]], SIZE):
        assert lost(stasis, "md7") == "another disk took its place"
    stasis("track", "stop", "md7")


def test_a_zram_disk_that_was_reset_and_set_up_again(tracked_state: Stasis) -> None:
    """The same number, the same size, the same disk sequence number, and all of its contents gone."""
    stasis = tracked_state
    load_module("zram")
    with zram_device(SIZE) as node:
        name = os.path.basename(node)
        Path(node).write_bytes(os.urandom(MIB))
        run("sync", node)
        stasis("track", "start", node)
        Path(f"/sys/block/{name}/reset").write_text("1")
        Path(f"/sys/block/{name}/disksize").write_text(str(SIZE))
        assert lost(stasis, name) == "the disk was set up anew"
        Path(node).write_bytes(os.urandom(4 * MIB))  # more than before the reset: it stays lost
        run("sync", node)
        assert lost(stasis, name) == "the disk was set up anew"
        stasis("track", "stop", name)


def test_a_device_mapper_device_with_another_table(disks: list[Disk], tracked_state: Stasis) -> None:
    """Its contents are another disk's, and no write told of it."""
    stasis = tracked_state
    with mapped("moved", linear(SIZE, disks[0])) as node:
        (started,) = stasis.json("track", "start", node)
        reloaded("moved", linear(SIZE, disks[0]))
        assert lost(stasis, started["name"]) == ""
        reloaded("moved", linear(SIZE, disks[1]))
        assert lost(stasis, started["name"]) == "its device-mapper table was replaced"
        stasis("track", "stop", node)


def test_a_snapshot_of_a_volume_is_no_other_table(disks: list[Disk], tracked_state: Stasis) -> None:
    """What LVM does to make and remove a snapshot: the volume becomes the origin of one, over its own table."""
    stasis, plain = tracked_state, linear(SIZE, disks[0])
    run("modprobe", "dm-snapshot")
    with mapped("volume", plain) as node:
        stasis("track", "start", node)
        with mapped("real", plain) as real:
            try:
                reloaded("volume", f"0 {SIZE // SECTOR} snapshot-origin {real}")
                assert lost(stasis, "dm-0") == ""
            finally:
                reloaded("volume", plain)
        assert lost(stasis, "dm-0") == ""
        stasis("track", "stop", node)


def test_a_device_that_grew(disks: list[Disk], tracked_state: Stasis, tmp_path: Path) -> None:
    stasis = tracked_state
    stasis("repo", "init", tmp_path / "repo", "--no-encryption")
    with mapped("grown", linear(SIZE, disks[0])) as node:
        run("mkfs.ext4", "-q", node)
        stasis("track", "start", node)
        with mounted(node, tmp_path / "mnt") as target:
            (target / "file").write_bytes(os.urandom(MIB))
            reloaded("grown", linear(2 * SIZE, disks[0]))
            run("resize2fs", node)
            assert f"its size changed from {SIZE} to {2 * SIZE} bytes" in lost(stasis, "dm-0")
            stasis("backup", "create", node, "--repo", tmp_path / "repo", "--max-freeze", "20s")
            assert lost(stasis, "dm-0") == ""
        stasis("backup", "create", node, "--repo", tmp_path / "repo")
        check_restored(stasis, node, tmp_path)
        stasis("track", "stop", "dm-0")


def test_a_disk_that_vanishes_during_a_backup(tracked_state: Stasis, tmp_path: Path) -> None:
    stasis = tracked_state
    stasis("repo", "init", tmp_path / "repo", "--no-encryption")
    with livedisks.scsi_debug() as node:
        name = os.path.basename(node)
        stasis("track", "start", node)
        pull = f"echo 1 > /sys/block/{name}/device/delete"
        said = stasis.fail(ExitCode.GENERATION, "backup", "create", node, "--repo", tmp_path / "repo",
                           "--pre-snapshot", pull)
        assert node in said
        stasis("track", "stop", name)


def test_an_error_table_ends_in_one_sentence(disks: list[Disk], tracked_state: Stasis, tmp_path: Path) -> None:
    stasis = tracked_state
    stasis("repo", "init", tmp_path / "repo", "--no-encryption")
    with mapped("dead", linear(SIZE, disks[0])) as node:
        stasis("track", "start", node)
        reloaded("dead", error_table(SIZE))
        said = stasis.fail(ExitCode.FAILURE, "backup", "create", node, "--repo", tmp_path / "repo")
        assert node in said
        stasis("track", "stop", node)
