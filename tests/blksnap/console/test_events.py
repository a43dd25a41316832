# SPDX-License-Identifier: Apache-2.0
"""Events: each is handed to one who waits, watchers see all of them, and both end by themselves."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import stasis as api
from stasis.nbd.client import Client
from tests.blksnap.console.conftest import Tool
from tests.system.helpers import wait_until

MIB = 1 << 20


@pytest.fixture
def snapshot(blksnap: Tool, short_dir: Path) -> str:
    """A taken snapshot of an image of random bytes, whose storage holds a part of it."""
    (short_dir / "disk.img").write_bytes(os.urandom(4 * MIB))
    (short_dir / "diff").mkdir()
    uuid = blksnap.ok("snapshot_create", "-d", short_dir / "disk.img", "-f", short_dir / "diff", "-l", "1M")
    blksnap.ok("snapshot_take", "-i", uuid)
    return uuid


def _connect(blksnap: Tool) -> api.Client:
    return api.connect(blksnap.stasis.run_dir, blksnap.stasis.state_dir, start_daemon=False)


def _overwrite(blksnap: Tool, length: int) -> None:
    """Write so many bytes to the device, as whoever uses it does."""
    with _connect(blksnap) as client:
        uri = client.devices()[0].uri
    with Client.connect(uri) as disk:
        for offset in range(0, length, 1 << 16):
            disk.pwrite(offset, bytes(1 << 16))
        disk.flush()


def test_waiting(blksnap: Tool, snapshot: str) -> None:
    blksnap.replay(
        """
$ snapshot_waitevent -t 1
! Argument 'id' is missed.
$ snapshot_waitevent -i $ID
! Argument 'timeout' is missed.
$ snapshot_waitevent -i $ID -t soon
! stoi
$ snapshot_waitevent -i $ID -t 1
result=timeout
$ snapshot_waitevent --id $ID --timeout 1 --json
{"result": "timeout"}
$ snapshot_waitevent -i garbage -t 1
result=not found
$ snapshot_watcher
! Argument 'id' is missed.
$ snapshot_watcher -i 11111111-2222-3333-4444-555555555555
Start snapshot watcher.
Snapshot not found
Snapshot watcher finished
""",
        {"ID": snapshot},
    )
    for number in (signal.SIGINT, signal.SIGCONT):
        process = blksnap.popen("snapshot_waitevent", "-i", snapshot, "-t", "100000")
        wait_until(functools.partial(_is_waiting, process.pid), "the wait")
        process.send_signal(number)
        assert (*process.communicate(timeout=60), process.returncode) == ("result=interrupted\n", "", 0)


def test_a_storage_that_fills_up(blksnap: Tool, snapshot: str) -> None:
    """Its limit is told once, then the loss of the image; the disk goes on. A watcher sees it all, and ends."""
    watcher = blksnap.popen("snapshot_watcher", "--id", snapshot)
    _overwrite(blksnap, 3 * MIB)
    blksnap.replay(
        """
$ snapshot_waitevent -i $ID -t 20000
result=ok
time=<n>
event=no_space
$ snapshot_waitevent -i $ID -t 20000 -j
{"result": "ok", "time": <n>, "event": "corrupted", "device": "<n>:<n>", "error_code": 28}
$ snapshot_waitevent -i $ID -t 1
result=timeout
$ snapshot_info -d $DISK -f error_code
-28
""",
        {"ID": snapshot, "DISK": str(blksnap.directory.parent / "disk.img")},
    )
    assert (blksnap.directory.parent / "disk.img").read_bytes()[: 3 * MIB] == bytes(3 * MIB)
    out, err = watcher.communicate(timeout=60)
    assert (watcher.returncode, err) == (0, "")
    pattern = (
        r"Start snapshot watcher\.\n"
        r"\d+ - The the difference storage already grow up to 1 MiB\. Limit has been reached\.\n"
        r'\d+ - The snapshot was corrupted for device \[\d+:\d+\] with error "No space left on device"\.\n'
        r"Snapshot watcher finished\n"
    )
    assert re.fullmatch(pattern, out), out
    assert all(int(label) < 1 << 32 for label in re.findall(r"^(\d+) -", out, re.MULTILINE))
    assert blksnap.ok("snapshot_watcher", "-i", snapshot) == out.rstrip("\n")  # one that comes late sees the same
    told = [json.loads(line) for line in blksnap.ok("snapshot_watcher", "-i", snapshot, "-j").splitlines()]
    assert [event["event"] for event in told] == ["no_space", "corrupted"]


def test_an_event_that_was_handed_out_is_not_told_again_by_the_next_daemon(blksnap: Tool, snapshot: str) -> None:
    _overwrite(blksnap, 3 * MIB)
    assert "event=no_space" in blksnap.ok("snapshot_waitevent", "-i", snapshot, "-t", "20000")
    with _connect(blksnap) as client:
        client.stop(keep_serving=True)
    wait_until(lambda: blksnap.stasis.daemon_pid() is None, "the end of the daemon")
    assert "event=corrupted" in blksnap.ok("snapshot_waitevent", "-i", snapshot, "-t", "20000")
    assert blksnap.ok("snapshot_waitevent", "-i", snapshot, "-t", "1") == "result=timeout"


def test_of_many_who_wait_each_gets_another_event(blksnap: Tool, snapshot: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        def wait() -> int | None:
            with _connect(blksnap) as client:
                event = client.take_event(snapshot, timeout=2.0, codes=(0, 1))
                return None if event is None else event.code

        waiting = [pool.submit(wait) for _ in range(6)]
        _overwrite(blksnap, 3 * MIB)
        told = [one.result() for one in waiting]
    assert sorted(code for code in told if code is not None) == [0, 1]


def test_nobody_gets_the_event_of_one_who_was_killed(blksnap: Tool, snapshot: str) -> None:
    """An event that comes after a waiting tool was killed goes to the next one."""
    process = blksnap.popen("snapshot_waitevent", "-i", snapshot, "-t", "100000")
    wait_until(lambda: _is_waiting(process.pid), "the wait")
    process.kill()
    process.communicate()
    _overwrite(blksnap, 3 * MIB)
    told = [blksnap.ok("snapshot_waitevent", "-i", snapshot, "-t", "20000") for _ in range(2)]
    assert [text.rpartition("=")[2] for text in told] == ["no_space", "corrupted"]


def _is_waiting(pid: int) -> bool:
    """Whether the process sleeps in a read from a socket with its handlers set."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return bool(caught and int(caught[1], 16) >> (signal.SIGCONT - 1) & 1)


def test_the_end_of_the_snapshot_wakes_who_waits_and_who_watches(blksnap: Tool, snapshot: str) -> None:
    waiting = blksnap.popen("snapshot_waitevent", "-i", snapshot, "-t", "100000")
    watcher = blksnap.popen("snapshot_watcher", "-i", snapshot)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "Start snapshot watcher.\n"
    wait_until(lambda: _is_waiting(waiting.pid), "the wait")
    blksnap.ok("snapshot_destroy", "-i", snapshot)
    assert (*waiting.communicate(timeout=60), waiting.returncode) == ("result=not found\n", "", 0)
    wanted = "Snapshot not found\nSnapshot watcher finished\n"
    assert (*watcher.communicate(timeout=60), watcher.returncode) == (wanted, "", 0)


def test_a_watcher_that_loses_the_daemon_fails(blksnap: Tool, snapshot: str) -> None:
    process = blksnap.popen("snapshot_watcher", "-i", snapshot)
    assert process.stdout is not None
    assert process.stdout.readline() == "Start snapshot watcher.\n"
    os.kill(blksnap.stasis.daemon_pid() or 0, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert re.fullmatch(r"Failed to get event from snapshot: .+\nSnapshot watcher failed\.\n", err)
