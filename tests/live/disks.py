# SPDX-License-Identifier: Apache-2.0
"""Loop devices with mounted file systems, programs that write to them, and backups of them without a command line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stasis.backup.job import CreateOptions, CreateResult, SampleOptions, create
from stasis.backup.job.precopy import Precopy
from stasis.backup.progress import Progress
from stasis.backup.repo import Repository
from stasis.live.liveset import FreezeReport, LiveSet
from stasis.live.options import LiveOptions
from stasis.live.source import LiveSource
from stasis.live.staging import StagingArea
from stasis.live.stash import Budget
from tests.backup.stored import content_of
from tests.live.difftracker import DiffTracker
from tests.unmounting import unmount

__all__ = ["CHECK", "MIB", "Backup", "Disk", "Setup", "back_up", "check_file_system", "fast_folder", "formatted",
           "image_file", "loop", "mounted", "put_number", "tool", "writing"]

MIB = 1 << 20
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"], "btrfs": ["mkfs.btrfs", "-q", "-f"],
        "vfat": ["mkfs.vfat"]}
SIZES = {"ext4": 32 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB, "vfat": 32 * MIB}  # about the least that each takes
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"]}
ORPHAN = "Clearing orphaned inode "
"""What e2fsck says of a file that was open and had no name any more; with -n it takes each for an error."""


def tool(*command: str | Path) -> str:
    """Run a program; its output. It has to succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def loop(image: Path) -> Iterator[str]:
    node = tool("losetup", "--find", "--show", "--partscan", image).strip()
    try:
        yield node
    finally:
        tool("losetup", "--detach", node)


@contextlib.contextmanager
def mounted(node: str | Path, directory: Path, *options: str) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    tool("mount", *options, node, directory)
    try:
        yield directory
    finally:
        unmount(directory)


def check_file_system(kind: str, image: Path) -> None:
    """A file system that was frozen is whole, once files without a name that were open are cleared as by a mount."""
    if kind == "ext4" and "First orphan inode:" in tool("dumpe2fs", "-h", image):
        done = subprocess.run(["e2fsck", "-p", image], capture_output=True, text=True, check=False)
        first, *others = [line for line in done.stdout.splitlines() if ORPHAN not in line]
        assert (done.returncode, others) == (0, []), done.stdout
        assert "clean" in first
    tool(*CHECK[kind], image)


@dataclass
class Disk:
    """A file system on a loop device. directory: where it is mounted."""

    kind: str
    image: Path
    node: str
    directory: Path


@contextlib.contextmanager
def fast_folder(where: Path) -> Iterator[Path]:
    """A folder in memory where there is room, else in `where`: the disk below is not what a test should wait for."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and os.statvfs(memory).f_bavail * os.statvfs(memory).f_frsize > 1 << 30
    with tempfile.TemporaryDirectory(dir=memory if room else where) as folder:
        yield Path(folder)


@contextlib.contextmanager
def image_file(where: Path, name: str, size: int) -> Iterator[Path]:
    """A new empty file."""
    with fast_folder(where) as folder:
        image = folder / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(size)
        yield image


@contextlib.contextmanager
def formatted(kind: str, where: Path, name: str = "disk") -> Iterator[Disk]:
    """A new file system on a loop device, mounted on `where`/`name`."""
    with image_file(where, name, SIZES[kind]) as image:
        tool(*MAKE[kind], image)
        with loop(image) as node, mounted(node, where / name) as directory:
            yield Disk(kind, image, node, directory)


@contextlib.contextmanager
def writing(write: Callable[[int], None]) -> Iterator[threading.Event]:
    """`write` is called with 0, 1, ... in a thread until the end; what it raises is raised. Calls set the event."""
    stop, wrote, failures = threading.Event(), threading.Event(), list[BaseException]()

    def work() -> None:
        number = 0
        try:
            while not stop.is_set():
                write(number)
                number += 1
                wrote.set()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert wrote.wait(30) or failures
        yield wrote
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def put_number(path: Path, number: int) -> None:
    """Write it in place and durably: the file holds this number or the one before, whenever it is looked at."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DSYNC)
    try:
        os.pwrite(fd, f"{number:09}".encode(), 0)
    finally:
        os.close(fd)


@dataclass
class Backup:
    """A backup and what the device's file held at the freeze."""

    result: CreateResult
    contents: list[bytes]
    stored: list[bytes]
    report: FreezeReport
    rounds: int = 0
    staged: int = 0


@dataclass
class Setup:
    """What a test may change about a backup."""

    options: LiveOptions = field(default_factory=lambda: LiveOptions(max_freeze=20, busy_freeze=30))
    kind: str = "auto"
    skip_unreadable: bool = False
    at_freeze: Callable[[], None] = lambda: None


def back_up(repository: Repository, state: Path, disks: list[tuple[str, Path, DiffTracker]],
            setup: Setup | None = None) -> Backup:
    """Back up (node, backing file, tracking) in one set. The files are copied while everything rests."""
    setup = setup or Setup()
    options = CreateOptions(host="host", kind=setup.kind, state_dir=state, skip_unreadable=setup.skip_unreadable,
                            sample=SampleOptions(share=0.5))
    where, limit = setup.options.staging, setup.options.staging_limit
    budget = Budget(setup.options.memory, None if where is None else StagingArea(where, limit))
    with contextlib.ExitStack() as stack:
        stack.callback(budget.close)
        sources = [stack.enter_context(LiveSource(os.path.basename(node), node, tracking, budget,
                                                  skip_unreadable=setup.skip_unreadable))
                   for node, _, tracking in disks]
        group = stack.enter_context(LiveSet(sources, setup.options))
        progress = Progress()
        precopy = Precopy(sources, repository, options, progress)
        stack.callback(precopy.close)
        precopy.run(group, setup.options.rounds)

        def inside() -> list[bytes]:
            setup.at_freeze()
            return [image.read_bytes() for _, image, _ in disks]

        contents = group.take(inside)
        precopy.settle()
        result = create(sources, repository, options, progress, precopy=precopy)
        staged = 0 if budget.area is None else budget.area.used
    stored = [content_of(repository, backup) for backup in result.backups]
    return Backup(result, contents, stored, group.report, staged=staged)
