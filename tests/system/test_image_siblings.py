# SPDX-License-Identifier: Apache-2.0
"""An image is served by two processes; clients never notice which one, nor the death of either."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from stasis.nbd.client import Client
from tests import leaks
from tests.runner import Stasis
from tests.system.conftest import MakeDisk
from tests.system.helpers import MIB, snapshot, wait_until

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor: one process serves")


def _image_servers() -> tuple[int, int]:
    """The process that accepts and the one that clients are handed to."""
    wait_until(lambda: len(_processes()) == 2, "the start of both image servers")
    first, second = _processes()
    parent = int(Path(f"/proc/{second}/stat").read_text().rpartition(")")[2].split()[1])
    return (first, second) if parent == first else (second, first)


def _processes() -> list[int]:
    return [pid for pid in leaks.session_processes() if b"imageserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _sockets(pid: int) -> int:
    """Open sockets of a process."""
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(link.startswith("socket:") for link in links)


def test_clients_are_spread_over_both(stasis: Stasis, make_disk: MakeDisk, storage: Path) -> None:
    disk = make_disk("disk.img", MIB)
    with snapshot(stasis, storage, disk.name) as shown:
        pids = _image_servers()
        warm = [Client.connect(shown["devices"][0]["uri"]) for _ in range(2)]  # both serve: their sockets are all there
        before = [_sockets(pid) for pid in pids]
        clients = [Client.connect(shown["devices"][0]["uri"]) for _ in range(4)]
        assert [_sockets(pid) - count for pid, count in zip(pids, before, strict=True)] == [2, 2]
        clients += warm
        for client in clients:
            with closing(client):
                assert client.pread(0, MIB) == disk.expected


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.expects_errors("the image server of .* ended")
def test_after_the_death_of_either_clients_are_served(
    stasis: Stasis, make_disk: MakeDisk, storage: Path, which: int
) -> None:
    disk = make_disk("disk.img", MIB)
    with snapshot(stasis, storage, disk.name) as shown:
        pids = _image_servers()
        os.kill(pids[which], signal.SIGKILL)
        if which == 0:
            wait_until(lambda: not leaks.session_processes() & set(pids), "the second process to end with the first")
        for _ in range(4):
            assert disk.read(shown["devices"][0]["uri"]) == disk.expected
