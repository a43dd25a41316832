# SPDX-License-Identifier: Apache-2.0
"""Who uses a file or a block device, against users that the test makes itself."""

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.linux import blockdev, mounts

root = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@contextlib.contextmanager
def holder(path: str, lock: bool = False) -> Iterator[int]:
    """A process that has path open, and locked if so wanted; gives its pid."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'rb+', buffering=0);"
        f"{lock} and fcntl.flock(f, fcntl.LOCK_EX); print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        yield child.pid
        child.communicate("")


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image with space"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    return str(path)


@pytest.fixture
def loop(image: str) -> Iterator[str]:
    done = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device to be had: {done.stderr.strip()}")
    node = done.stdout.strip()
    yield node
    subprocess.run(["losetup", "--detach", node], check=True)


def test_mounts_agree_with_the_root_directory() -> None:
    found = [mount for mount in mounts.mounts() if mount.target == "/"]
    assert found
    assert found[-1].device == os.stat("/").st_dev or found[-1].fstype in ("btrfs", "overlay")


def test_a_file_that_nobody_uses_has_no_holder(image: str) -> None:
    with open(image, "rb"):  # our own descriptors do not count
        assert mounts.file_holders(image) == []


def test_process_with_the_file_open_is_named(image: str) -> None:
    with holder(image) as pid:
        (found,) = mounts.file_holders(image)
        assert found.endswith(f"(pid {pid})")
        assert mounts.file_holders(image, skip=[pid]) == []


def test_process_with_a_lock_is_named(image: str) -> None:
    with holder(image, lock=True) as pid:
        (found,) = mounts.file_holders(image)
        assert found.startswith("locked by ")
        assert found.endswith(f"(pid {pid})")


def test_waiting_for_a_lock_does_not_confuse(image: str) -> None:
    with open(image, "rb") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        code = (
            "import fcntl, sys; f = open(sys.argv[1], 'rb'); print('up', flush=True);"
            "fcntl.flock(f, fcntl.LOCK_EX)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, image], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            found = mounts.file_holders(image)
            fcntl.flock(ours, fcntl.LOCK_UN)
        assert [phrase for phrase in found if phrase.endswith(f"(pid {child.pid})")] == found


class TestLoop:
    pytestmark = root

    def test_loop_device_holds_its_file(self, image: str, loop: str) -> None:
        assert f"backing file of {loop}" in mounts.file_holders(image)

    def test_mount_is_found_by_target(self, loop: str, tmp_path: Path) -> None:
        subprocess.run(["mkfs.ext4", "-q", loop], check=True)
        target = tmp_path / "mount point"
        target.mkdir()
        number = os.stat(loop).st_rdev
        for options, suffix in (("rw", ""), ("ro", " (read-only)")):
            subprocess.run(["mount", "-o", options, loop, target], check=True)
            try:
                (mount,) = mounts.mounts_of(number)
                assert (mount.source, mount.target, mount.fstype) == (loop, str(target), "ext4")
                assert mount.read_only == bool(suffix)
                assert f"mounted on {target}{suffix}" in mounts.holders_of(number)
            finally:
                subprocess.run(["umount", target], check=True)
        assert mounts.mounts_of(number) == []

    def test_process_with_the_device_open_is_named(self, loop: str) -> None:
        with holder(loop) as pid:
            found = mounts.holders_of(os.stat(loop).st_rdev)
            assert [phrase for phrase in found if phrase.endswith(f"(pid {pid})")]

    def test_swap_is_found(self, loop: str) -> None:
        subprocess.run(["mkswap", loop], check=True, capture_output=True)
        done = subprocess.run(["swapon", loop], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no swap here: {done.stderr.strip()}")
        try:
            assert "used as swap" in mounts.holders_of(os.stat(loop).st_rdev)
        finally:
            subprocess.run(["swapoff", loop], check=True)

    def test_partition_in_use_holds_the_disk(self, loop: str) -> None:
        done = subprocess.run(
            ["addpart", loop, "1", "2048", "4096"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no partitions on loop devices here: {done.stderr.strip()}")
        partition = f"{loop}p1"
        try:
            disk = os.stat(loop).st_rdev
            (related,) = mounts.relatives(disk)
            assert mounts.relatives(related) == [disk]
            if not os.path.exists(partition):
                os.mknod(partition, 0o60600, related)
            with holder(partition) as pid:
                assert [phrase for phrase in mounts.holders_of(disk) if f"(pid {pid})" in phrase]
        finally:
            subprocess.run(["delpart", loop, "1"], check=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partition)

    def test_sizes_and_counters(self, loop: str) -> None:
        fd = os.open(loop, os.O_RDWR)
        try:
            assert blockdev.is_block_device(fd)
            assert blockdev.size(fd) == 64 << 20
            assert blockdev.logical_block_size(fd) == 512
            assert blockdev.physical_block_size(fd) >= 512
            assert not blockdev.is_read_only(fd)
            before = blockdev.write_counters(fd)
            os.pwrite(fd, b"x" * 8192, 4096)
            os.fsync(fd)
            after = blockdev.write_counters(fd)
            assert before is not None
            assert after is not None
            assert after[0] > before[0]
            assert after[1] - before[1] == 16
            blockdev.zero_out(fd, 4096, 4096)
            assert os.pread(fd, 8192, 4096) == bytes(4096) + b"x" * 4096
            blockdev.discard(fd, 8192, 4096)
            assert os.pread(fd, 4096, 8192) == bytes(4096)
            counters = blockdev.write_counters(fd)
            assert counters is not None
            assert counters[1] >= after[1] + 16
        finally:
            os.close(fd)

    def test_disk_sequence_is_new_for_a_new_disk(self, loop: str, image: str) -> None:
        def sequence() -> int | None:
            with open(loop, "rb") as device:
                return blockdev.disk_sequence(device.fileno())

        first = sequence()
        if first is None:
            pytest.skip("Linux before 5.15")
        assert sequence() == first
        subprocess.run(["losetup", "--detach", loop], check=True)
        subprocess.run(["losetup", loop, image], check=True)
        assert sequence() != first


def test_plain_file_has_a_size_and_no_counters(image: str) -> None:
    with open(image, "rb") as file:
        assert blockdev.size(file.fileno()) == 64 << 20
        assert not blockdev.is_block_device(file.fileno())
        assert blockdev.write_counters(file.fileno()) is None
        assert blockdev.disk_sequence(file.fileno()) is None
