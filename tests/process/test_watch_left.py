# SPDX-License-Identifier: Apache-2.0
"""Pages of ours that nobody knows of any more, as of a keeper that was killed: whoever comes next takes them out, and
takes nothing else for ours."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from stasis.linux import procfs
from stasis.linux.pidfd import Pidfd
from stasis.process import keeper
from stasis.process.dump import predump
from stasis.process.dump.canary import Canary
from stasis.process.dump.predump import pre_dump
from stasis.process.dump.tracking import Tracking
from stasis.process.images.imageset import ImageSet
from stasis.process.remote import Remote
from stasis.process.tree import Tree
from tests.process.test_dump_restore import stasis
from tests.process.test_incremental import (
    WRITER,
    end,
    keeper_of,
    left_to_parent,
    restore_and_check,
    running,
    wait_for_steps,
)
from tests.process.test_soft_dirty import OTHER_WAY, RING, canaries

pytestmark = pytest.mark.root

NAMESAKE = r"""
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_long
fd = os.memfd_create("stasis-watch")
os.write(fd, b"kept" * 2048)
at = libc.mmap(0, 8192, 3, 2, fd, 0)
os.close(fd)
with open(os.path.join(sys.argv[1], "at"), "w") as file:
    file.write(f"{at:x}")
"""
"""Has memory with the name of ours, which is its own."""


def put(pid: int) -> Canary:
    """Give it to a process, as a command does that is killed then."""
    with Tree(pid) as tree:
        tree.freeze()
        with Remote(pid, procfs.mappings(pid)) as remote:
            return Canary.put(remote)


def test_a_dump_takes_out_what_was_left(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, WRITER, str(seed)) as process:
        before = canaries(process.pid)
        left = put(process.pid)
        assert canaries(process.pid) == [*before, left.address]
        stasis("dump", process.pid, "--images", tmp_path / "images", "--leave-running")
        assert canaries(process.pid) == []
        with ImageSet.open(tmp_path / "images") as images:
            assert left.address not in {vma.start for vma in images.one("mm", process.pid).vmas}
        wait_for_steps(tmp_path, process.pid)


def test_what_a_living_keeper_needs_stays(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, WRITER, str(seed)) as process:
        stasis("pre-dump", process.pid, "--images", tmp_path / "before")
        put(process.pid)
        needed = canaries(process.pid)
        stasis("dump", process.pid, "--images", tmp_path / "beside", "--leave-running")
        assert canaries(process.pid) == needed
        stasis("dump", process.pid, "--images", tmp_path / "images", "--parent", tmp_path / "before", "--leave-running")
        assert left_to_parent(tmp_path / "images", process.pid) > 0  # however many were written meanwhile
        assert canaries(process.pid) == []


@OTHER_WAY
def test_what_a_killed_keeper_left_is_taken_out(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, WRITER, str(seed)) as process:
        stasis("pre-dump", process.pid, "--images", tmp_path / "before")
        found = keeper_of(process.pid)
        assert found is not None
        end(found)
        stasis("dump", process.pid, "--images", tmp_path / "images", "--leave-running")
        assert canaries(process.pid) == []
        wait_for_steps(tmp_path, process.pid)


def test_a_process_that_cannot_be_watched_any_more(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, RING + WRITER, str(seed)) as process:
        put(process.pid)
        stasis("pre-dump", process.pid, "--images", tmp_path / "before")
        assert canaries(process.pid) == []
        wait_for_steps(tmp_path, process.pid)


def test_a_pre_dump_that_fails_leaves_nothing(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def take(root: tuple[int, int]) -> Tracking:
        tracking = Tracking()
        tracking.canaries[root] = put(root[0])
        return tracking

    with running(tmp_path, WRITER, str(seed)) as process:
        monkeypatch.setattr(predump, "_copy", full)
        monkeypatch.setattr(keeper, "take", take)
        with pytest.raises(OSError, match="No space"):
            pre_dump(process.pid, tmp_path / "images")
        assert canaries(process.pid) == []
        assert os.listdir(tmp_path).count("images") == 0
        wait_for_steps(tmp_path, process.pid)


def test_the_name_is_free_for_the_next_keeper_when_all_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the old one takes to end."""
    root = os.getpid(), 1
    reached = []

    def send(*_: Any) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.bind(keeper._address(root))
        reached.append(other)

    monkeypatch.setattr(keeper, "_send", send)
    listener, client = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    with listener, client, Pidfd(os.getpid()) as pidfd:
        listener.bind(keeper._address(root))
        listener.listen()
        client.connect(keeper._address(root))
        keeper._serve(listener, pidfd.fd, Tracking())
    assert reached


def test_memory_with_that_name_is_dumped(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, NAMESAKE + WRITER, str(seed)) as process:
        start = int((tmp_path / "at").read_text(), 16)
        stasis("dump", process.pid, "--images", tmp_path / "images")
        restore_and_check(tmp_path / "images", process, tmp_path)
        with open(f"/proc/{process.pid}/mem", "rb") as memory:
            memory.seek(start)
            assert memory.read(8192) == b"kept" * 2048
