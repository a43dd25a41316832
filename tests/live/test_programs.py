# SPDX-License-Identifier: Apache-2.0
"""Disks with real programs on them, tracked by the kernel and backed up again and again by the command line.

Each restored image passes its file system's check, and each program finds everything that it had finished before the
freeze: a hook notes how far they were. STASIS_LONG=1 makes it ten times the backups.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.nbd.client import Client
from tests.live.disks import (
    MIB,
    Disk,
    check_file_system,
    fast_folder,
    formatted,
    loop,
    mounted,
    put_number,
    tool,
    writing,
)
from tests.live.writers import bpf_works, state_directory
from tests.runner import Stasis
from tests.system.helpers import LONG
from tests.unmounting import unmount

pytestmark = [pytest.mark.root, pytest.mark.tool("mkfs.ext4", "mkfs.xfs", "git", "tar", "fio"),
              pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

BACKUPS = {"ext4": 20, "xfs": 20, "btrfs": 20} if LONG else {"ext4": 2, "xfs": 1, "btrfs": 1}
TREE = {f"{folder}/{number}": os.urandom(3000) for folder in "ab" for number in range(10)}
AUTHOR = ("-c", "user.name=test", "-c", "user.email=test@localhost")


class Database:
    """SQLite commits one row after the other."""

    name = "sqlite"

    def __init__(self, where: Path) -> None:
        self._path = where / "database"

    def work(self, number: int) -> None:
        with contextlib.closing(sqlite3.connect(self._path)) as base:
            base.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, text BLOB)")
            base.execute("INSERT INTO rows VALUES (?, ?)", (number, os.urandom(200)))
            base.commit()

    def check(self, finished: int) -> None:
        with contextlib.closing(sqlite3.connect(self._path)) as base:
            assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            numbers = [row[0] for row in base.execute("SELECT number FROM rows ORDER BY number")]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= finished


class Commits:
    """git commits one file after the other."""

    name = "git"

    def __init__(self, where: Path) -> None:
        self._path = where / "repository"

    def work(self, number: int) -> None:
        if not number:
            tool("git", "init", "-q", self._path)
        (self._path / f"file{number % 20}").write_bytes(os.urandom(2000))
        tool("git", *AUTHOR, "-C", self._path, "add", ".")
        tool("git", *AUTHOR, "-C", self._path, "commit", "-q", "-m", str(number))

    def check(self, finished: int) -> None:
        (self._path / ".git" / "index.lock").unlink(missing_ok=True)
        tool("git", "-c", "safe.directory=*", "-C", self._path, "fsck", "--strict")
        count = int(tool("git", "-c", "safe.directory=*", "-C", self._path, "rev-list", "--count", "HEAD"))
        assert count >= finished


class Archive:
    """tar unpacks the same tree into one directory after the other; the older ones go."""

    name = "tar"

    def __init__(self, where: Path) -> None:
        self._where = where / "trees"
        self._where.mkdir(exist_ok=True)
        self._archive = where / "archive.tar"

    def work(self, number: int) -> None:
        if not number:
            self._pack()
        target = self._where / str(number)
        target.mkdir()
        tool("tar", "-xf", self._archive, "-C", target)
        if number >= 3:
            tool("rm", "-r", self._where / str(number - 3))

    def _pack(self) -> None:
        source = self._where.parent / "source"
        for name, data in TREE.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        tool("tar", "-cf", self._archive, "-C", source, ".")

    def check(self, finished: int) -> None:
        newest = max(int(one) for one in os.listdir(self._where))
        assert newest >= finished - 1
        tool("tar", "-df", self._archive, "-C", self._where / str(finished - 1 if newest < finished else newest - 1))


class Blocks:
    """fio writes blocks at random places past the page cache, many at a time; each bears its place and its digest.

    Its own check knows the last run only, so the headers are read here (struct verify_header in fio's verify.h).
    """

    name = "fio"
    HEADER = struct.Struct("<HHIQQ16x16s")  # magic, kind, length, seed, offset; what is not of use; MD5 of the rest

    def __init__(self, where: Path) -> None:
        self._path = where / "blocks"

    def work(self, number: int) -> None:
        how = ("--rw=randwrite", "--randrepeat=0", "--norandommap", "--io_size=1m") if number else ("--rw=write",)
        tool("fio", "--name=job", f"--filename={self._path}", "--size=2m", "--bs=4k", "--direct=1", "--iodepth=16",
             "--ioengine=libaio", "--verify=md5", "--do_verify=0", "--verify_state_save=0", "--end_fsync=1", *how)

    def check(self, finished: int) -> None:
        data = self._path.read_bytes() if finished else b""
        assert len(data) == (2 * MIB if finished else 0)
        for place in range(0, len(data), 4096):
            block = data[place : place + 4096]
            magic, _, length, _, offset, digest = self.HEADER.unpack_from(block)
            assert (magic, length, offset) == (0xACCA, 4096, place)
            assert hashlib.md5(block[self.HEADER.size :]).digest() == digest


PROGRAMS = (Database, Commits, Archive, Blocks)


@contextlib.contextmanager
def working(disk: Disk, notes: Path) -> Iterator[None]:
    """All programs work; `notes` has a file for each with how many pieces of work it finished."""
    with contextlib.ExitStack() as stack:
        for kind in PROGRAMS:
            program, path = kind(disk.directory), notes / kind.name

            def work(number: int, program: Database | Commits | Archive | Blocks = program, path: Path = path) -> None:
                program.work(number)
                new = path.with_suffix(".new")
                new.write_text(str(number + 1))
                new.replace(path)

            stack.enter_context(writing(work))
        yield


@pytest.fixture
def tracked_state(stasis: Stasis) -> Iterator[Stasis]:
    with state_directory(stasis.state_dir):
        yield stasis


def track(stasis: Stasis, node: str) -> contextlib.ExitStack:
    """Track a device until the stack ends."""
    stack = contextlib.ExitStack()
    stasis("track", "start", node)
    stack.callback(stasis, "track", "stop", os.path.basename(node))
    return stack


@pytest.mark.parametrize("kind", ["ext4", "xfs", pytest.param("btrfs", marks=pytest.mark.tool("mkfs.btrfs"))])
def test_restored_disks_have_all_that_was_finished(kind: str, tracked_state: Stasis, tmp_path: Path) -> None:
    stasis = tracked_state
    with fast_folder(tmp_path) as folder, formatted(kind, tmp_path) as disk, track(stasis, disk.node):
        (folder / "notes").mkdir()
        stasis("repo", "init", folder / "repo", "--no-encryption")
        # A file that is replaced while cp reads it ends cp.
        hook = f"rm -rf {folder}/then; until cp -r {folder}/notes {folder}/then; do rm -rf {folder}/then; done"
        for number in range(BACKUPS[kind]):
            with working(disk, folder / "notes"):
                made = json.loads(stasis("backup", "create", disk.node, "--repo", folder / "repo", "--json",
                                         "--max-freeze", "20s", "--busy-freeze", "20s", "--pre-snapshot", hook
                                         ).splitlines()[-1])
            assert made["backups"][0]["kind"] == ("incremental" if number else "full")
            assert made["warnings"] == []
            stasis("backup", "restore", "latest", folder / "restored.img", "--repo", folder / "repo", "--overwrite")
            unmount(disk.directory)  # two file systems of one UUID are not mounted together everywhere
            _check_restored(kind, folder, tmp_path)
            tool("mount", disk.node, disk.directory)
            for directory in disk.directory.iterdir():
                if directory.name != "lost+found":
                    tool("rm", "-rf", directory)


def _check_restored(kind: str, folder: Path, where: Path) -> None:
    if kind != "xfs":  # its log is to be played back before
        check_file_system(kind, folder / "restored.img")
    # A process that made a mount namespace meanwhile may have kept the original mounted there.
    options = ("-o", "nouuid") if kind == "xfs" else ()
    with loop(folder / "restored.img") as node, mounted(node, where / "again", *options) as directory:
        for program in PROGRAMS:
            program(directory).check(int((folder / "then" / program.name).read_text()))
    check_file_system(kind, folder / "restored.img")


def test_a_live_and_a_served_disk_show_one_instant(tracked_state: Stasis, tmp_path: Path) -> None:
    """A number goes to the live disk, durably, then to the served one: it is never ahead there."""
    stasis = tracked_state
    served = tmp_path / "served.img"
    served.write_bytes(bytes(4 * MIB))
    uri = stasis.json("device", "attach", served, "--name", "served")["uri"]
    with formatted("ext4", tmp_path) as disk, track(stasis, disk.node), fast_folder(tmp_path) as folder:
        with Client.connect(uri) as client:
            def write(number: int) -> None:
                put_number(disk.directory / "number", number)
                client.pwrite(0, f"{number:09}".encode().ljust(4096))

            stasis("repo", "init", folder / "repo", "--no-encryption")
            write(0)
            with writing(write):
                stasis("backup", "create", disk.node, "served", "--repo", folder / "repo", "--max-freeze", "20s",
                       "--storage", "memory")
        for name in (os.path.basename(disk.node), "served"):
            stasis("backup", "restore", "latest", folder / name, "--repo", folder / "repo", "--device", name)
        live = int(tool("debugfs", "-R", "cat /number", folder / os.path.basename(disk.node)))
        assert int((folder / "served").read_bytes()[:9]) in (live, live - 1)


def test_a_served_disk_on_the_live_one_is_refused(tracked_state: Stasis, tmp_path: Path) -> None:
    """Its worker would wait for the frozen disk, and the freeze for its worker."""
    stasis = tracked_state
    with formatted("ext4", tmp_path) as disk, track(stasis, disk.node):
        image = disk.directory / "inner.img"
        image.write_bytes(bytes(MIB))
        stasis("repo", "init", tmp_path / "repo", "--no-encryption")
        stasis("device", "attach", image, "--name", "inner")
        said = stasis.fail(ExitCode.BUSY, "backup", "create", disk.node, "inner", "--repo", tmp_path / "repo")
        assert f"lies on {disk.directory}, which must be frozen" in said
        stasis("device", "detach", "inner")


@pytest.mark.parametrize("when", ["pre", "post"] if LONG else ["post"])
def test_a_backup_that_is_killed_leaves_nothing_frozen(tracked_state: Stasis, tmp_path: Path, when: str) -> None:
    """Killed before and after the freeze; inside it is test_watchdog.py's. The next backup goes on."""
    stasis = tracked_state
    with formatted("ext4", tmp_path) as disk, track(stasis, disk.node):
        stasis("repo", "init", tmp_path / "repo", "--no-encryption")
        stasis("backup", "create", disk.node, "--repo", tmp_path / "repo", "--max-freeze", "20s")
        (disk.directory / "file").write_bytes(os.urandom(MIB))
        killed = subprocess.run([*stasis.command, "backup", "create", disk.node, "--repo", tmp_path / "repo",
                                 f"--{when}-snapshot", "kill -9 $PPID"], env=stasis.environment, check=False)
        assert killed.returncode == -9
        (disk.directory / "after").write_text("it takes writes")
        made = json.loads(stasis("backup", "create", disk.node, "--repo", tmp_path / "repo", "--json", "--max-freeze",
                                 "20s").splitlines()[-1])
        assert made["backups"][0]["kind"] == "incremental"
        unmount(disk.directory)
        stasis("backup", "restore", "latest", tmp_path / "out.img", "--repo", tmp_path / "repo")
        tool("mount", disk.node, disk.directory)
        with loop(tmp_path / "out.img") as node, mounted(node, tmp_path / "again") as directory:
            tool("diff", "-r", directory, disk.directory)
