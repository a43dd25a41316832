# SPDX-License-Identifier: Apache-2.0
"""Whatever becomes of the one who copies, the file system is thawed and its writers go on."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import BusyError, StasisError
from stasis.linux import freeze
from stasis.live.freezer import FreezeExpired, Freezer
from stasis.live.stack import FileSystem, Stack
from tests.live.disks import Disk, loop, mounted, tool
from tests.system.helpers import wait_until

pytestmark = [pytest.mark.root, pytest.mark.tool("mkfs.ext4", "losetup")]

LONG = 60.0
"""Seconds that no test waits for: a freeze that ends by itself after so long has failed it."""

COPIER = """
import os, signal, sys
from stasis.live.freezer import Freezer
from stasis.live.stack import FileSystem, Stack
node, stage, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
with Stack([os.stat(node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
    print(freezer.pid, flush=True)
    if stage == "before":
        os.kill(os.getpid(), signal.SIGSTOP)
    if stage == "asked":
        freezer._send({"do": "freeze", "seconds": seconds, "attempt": 1})
        os.kill(os.getpid(), signal.SIGSTOP)
    freezer.freeze(seconds)
    if stage == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    freezer.thaw()
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@contextlib.contextmanager
def frozen_at_end(disk: Disk) -> Iterator[None]:
    """Whatever the test found, nothing stays frozen."""
    fd = os.open(disk.directory, os.O_RDONLY)
    try:
        yield
    finally:
        freeze.thaw(fd)
        os.close(fd)


def write(disk: Disk) -> None:
    """Returns once the file system takes writes."""
    (disk.directory / "written").write_text("by a writer that waits as long as it must")


def is_frozen(disk: Disk) -> bool:
    """Whether somebody has it frozen: a second freeze is refused then, and undone if it is not."""
    fd = os.open(disk.directory, os.O_RDONLY)
    try:
        freeze.freeze(fd)
    except OSError:
        return True
    else:
        freeze.thaw(fd)
        return False
    finally:
        os.close(fd)


@contextlib.contextmanager
def copier(disk: Disk, stage: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A copier that stops itself (SIGSTOP) at a stage."""
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(
            [sys.executable, "-c", COPIER, disk.node, stage, str(seconds)], stdout=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        assert process.stdout is not None
        watchdog = os.pidfd_open(int(process.stdout.readline()))
        stack.callback(os.close, watchdog)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        yield process
        process.kill()
        assert select.select([watchdog], [], [], LONG)[0]  # it ends with its copier


@pytest.mark.parametrize("stage", ["before", "asked", "frozen", "thawed"])
def test_a_copier_that_is_killed_thaws(disk: Disk, stage: str) -> None:
    with frozen_at_end(disk):
        with copier(disk, stage, LONG) as process:
            process.kill()
            process.wait()
            write(disk)
        assert not is_frozen(disk)


@pytest.mark.parametrize("stage", ["asked", "frozen"])
def test_a_copier_that_is_stopped_thaws_at_the_deadline(disk: Disk, stage: str) -> None:
    with frozen_at_end(disk), copier(disk, stage, 0.3) as process:
        wait_until(lambda: not is_frozen(disk), f"{disk.directory} is thawed")
        write(disk)
        os.kill(process.pid, signal.SIGCONT)
        if stage == "frozen":
            assert process.wait(LONG) != 0  # it learns that its copy is worth nothing


def test_a_slow_copier_is_told(disk: Disk) -> None:
    with frozen_at_end(disk), Stack([os.stat(disk.node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
        freezer.freeze(0.2)
        write(disk)
        with pytest.raises(FreezeExpired, match="had to end after"):
            freezer.thaw()
        freezer.freeze(LONG)  # the next attempt is not disturbed by the one before
        freezer.thaw()
        write(disk)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_watchdogs_own_end_thaws(disk: Disk, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stasis.live.freezer.GRACE_SECONDS", 0.2)
    with frozen_at_end(disk), Stack([os.stat(disk.node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
        freezer.freeze(LONG)
        monkeypatch.setattr("stasis.live.freezer.START_SECONDS", 0.2)
        os.kill(freezer.pid, number)
        with pytest.raises(StasisError, match="watchdog"):
            freezer.thaw()
        write(disk)


def test_a_freeze_of_somebody_else_is_left_alone(disk: Disk) -> None:
    with frozen_at_end(disk), Stack([os.stat(disk.node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
        freeze.freeze(stack.file_systems[0].fd)
        with pytest.raises(BusyError, match="frozen already by somebody else"):
            freezer.freeze(LONG)
        assert is_frozen(disk)
        freeze.thaw(stack.file_systems[0].fd)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_watchdog_that_ends_early_leaves_it_alone_too(disk: Disk, number: signal.Signals,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was frozen by us yet: what rests then is what somebody else keeps at rest."""
    with frozen_at_end(disk), Stack([os.stat(disk.node).st_rdev]) as stack:
        with Freezer(stack.file_systems) as freezer:
            freezer.await_start()
            monkeypatch.setattr("stasis.live.freezer.START_SECONDS", 0.2)
            freeze.freeze(stack.file_systems[0].fd)
            os.kill(freezer.pid, number)
            os.waitid(os.P_PID, freezer.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
            if number == signal.SIGKILL:
                with pytest.raises(StasisError, match="before anything was frozen"):
                    freezer.restore_later(stack.file_systems[0].fd, "")
        assert is_frozen(disk)


def test_somebody_who_thaws_is_noticed(disk: Disk) -> None:
    with frozen_at_end(disk), Stack([os.stat(disk.node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
        freezer.freeze(LONG)
        tool("fsfreeze", "-u", disk.directory)
        with pytest.raises(StasisError, match="somebody else thawed"):
            freezer.thaw()


def test_what_cannot_be_frozen_is_named(disk: Disk, tmp_path: Path) -> None:
    """As vfat, tmpfs knows no freezing; the others are frozen all the same."""
    with mounted("none", tmp_path / "other", "-t", "tmpfs") as directory, \
            Stack([os.stat(disk.node).st_rdev]) as stack:
        fd = os.open(directory, os.O_RDONLY)
        other = FileSystem(str(directory), "tmpfs", False, 0, 1, fd)
        with Freezer([other, *stack.file_systems]) as freezer:
            found = freezer.freeze(LONG)
            assert found.unable == (other,)
            assert found.resting == tuple(stack.file_systems)
            freezer.thaw()
        os.close(fd)


def test_a_stack_is_frozen_from_its_top(disk: Disk, tmp_path: Path) -> None:
    """A file system in a file of another one: the other way round, freezing would wait for itself."""
    inner = disk.directory / "inner.img"
    with inner.open("wb") as file:
        file.truncate(16 << 20)
    tool("mkfs.ext4", "-q", "-F", inner)
    with loop(inner) as node, mounted(node, tmp_path / "inner") as directory, \
            Stack([os.stat(disk.node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
        assert [one.target for one in stack.file_systems] == [str(directory), str(disk.directory)]
        (directory / "file").write_bytes(bytes(1 << 20))
        assert len(freezer.freeze(LONG).resting) == 2
        freezer.thaw()
        write(disk)


def test_a_loop_device_is_where_its_file_is_also_without_a_name(disk: Disk, tmp_path: Path) -> None:
    image = _formatted_image(disk.directory)
    with loop(image) as node, mounted(node, tmp_path / "inner") as directory:
        image.unlink()
        with Stack([os.stat(disk.node).st_rdev]) as stack:
            assert [one.target for one in stack.file_systems] == [str(directory), str(disk.directory)]


@pytest.mark.tool("unshare")
def test_a_path_of_another_namespace_is_no_path_of_ours(disk: Disk) -> None:
    """The file lies in a memory file system that is mounted on the disk there, where we see an empty directory."""
    hidden = disk.directory / "hidden"
    hidden.mkdir()
    script = (f"mount --make-rprivate / && mount -t tmpfs none {hidden} && truncate -s 16M {hidden}/image "
              f"&& node=$(losetup --find --show {hidden}/image) && echo $node && read x; losetup -d $node")
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout is not None
        number = os.stat(process.stdout.readline().strip()).st_rdev
        with Stack([os.stat(disk.node).st_rdev]) as stack:
            assert number not in stack.levels
        process.communicate("\n")


def test_mounts_of_other_namespaces_are_found(disk: Disk, tmp_path: Path) -> None:
    with loop(_formatted_image(tmp_path)) as node:
        (tmp_path / "apart").mkdir()
        code = f"mount --make-rprivate / && mount {node} {tmp_path}/apart && echo up && read x; umount {tmp_path}/apart"
        with subprocess.Popen(["unshare", "--mount", "sh", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            with Stack([os.stat(node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
                assert [one.target for one in stack.file_systems] == [f"{tmp_path}/apart"]
                assert len(freezer.freeze(LONG).resting) == 1
                freezer.thaw()
            process.communicate("\n")


def _formatted_image(where: Path) -> Path:
    image = where / "apart.img"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    tool("mkfs.ext4", "-q", "-F", image)
    return image


def test_a_bind_mount_is_enough(disk: Disk, tmp_path: Path) -> None:
    (disk.directory / "part").mkdir()
    with mounted(disk.directory / "part", tmp_path / "bound", "--bind"):
        with Stack([os.stat(disk.node).st_rdev]) as stack:
            assert len(stack.file_systems) == 1  # one file system, however many mounts
        tool("umount", disk.directory)
        try:
            with Stack([os.stat(disk.node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
                assert [one.target for one in stack.file_systems] == [str(tmp_path / "bound")]
                assert len(freezer.freeze(LONG).resting) == 1
                freezer.thaw()
        finally:
            tool("mount", disk.node, disk.directory)


def test_a_hidden_mount_is_refused(disk: Disk) -> None:
    tool("mount", "-t", "tmpfs", "over", disk.directory)
    try:
        with pytest.raises(BusyError, match="cannot be reached"):
            Stack([os.stat(disk.node).st_rdev])
    finally:
        tool("umount", disk.directory)


def test_writers_wait_while_it_is_frozen(disk: Disk) -> None:
    with frozen_at_end(disk), Stack([os.stat(disk.node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
        freezer.freeze(LONG)
        writer = threading.Thread(target=write, args=(disk,))
        writer.start()
        assert not (disk.directory / "written").exists()
        freezer.thaw()
        writer.join()
        assert (disk.directory / "written").exists()


def test_what_it_keeps_is_written_once_a_freeze_has_begun(disk: Disk, tmp_path: Path) -> None:
    """Who is held to little writes on for the time that it takes to come to rest."""
    limits = tmp_path / "io.max"
    limits.write_text("low")
    with frozen_at_end(disk), Stack([os.stat(disk.node).st_rdev]) as stack, Freezer(stack.file_systems) as freezer:
        with limits.open("r+b") as file:
            freezer.restore_later(file.fileno(), "max")
        freezer.freeze(LONG)
        freezer.thaw()
        assert limits.read_text() == "low"
        freezer.freeze(LONG, release=True)
        wait_until(lambda: limits.read_text() == "max", "the limits are written")
        assert is_frozen(disk)
        limits.write_text("low")
        freezer.thaw()
    assert limits.read_text() == "low"
