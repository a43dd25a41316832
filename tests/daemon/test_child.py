# SPDX-License-Identifier: Apache-2.0
"""Processes that the daemon ends are really gone when it says so, with all they forked: they hold the origin's lock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import stasis as api
from stasis.daemon.child import Child
from stasis.linux import process
from tests.daemon.helpers import MIB, alive
from tests.runner import Stasis

FORKS = """
import os, signal
if os.fork():
    print(os.getpid(), flush=True)
signal.pause()
"""


def test_what_a_process_forked_ends_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        (forked,) = process.children(started.pid)
        child = Child(started.pid, started)
        child.kill()
        child.close()
    assert not alive(started.pid)
    assert not alive(forked)


def test_a_destroyed_image_is_served_by_nobody(
    stasis: Stasis, client: api.Client, make_image: Callable[..., Path]
) -> None:
    device = client.attach(make_image())
    snapshot = client.create_snapshot("memory", [device.name], limit=64 * MIB, take=True)
    record = json.loads((stasis.run_dir / "snapshots" / snapshot.id / "snapshot.json").read_text())
    server = int(record["members"][0]["image_pid"])
    served_by = [server, *process.children(server)]
    client.destroy(snapshot.id)
    assert [pid for pid in served_by if alive(pid)] == []
