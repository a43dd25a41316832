# SPDX-License-Identifier: Apache-2.0
"""A dumper that is killed in the middle of a remote call leaves its victim as it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

from stasis.linux import procfs
from tests.process.containers import lives
from tests.process.programs import PATIENCE
from tests.process.victims import counting, progress

DUMPER = """
import sys
from stasis.linux import procfs
from stasis.process.guardian import Guardian
from stasis.process.journal import Journal
from stasis.process.remote import Remote
from stasis.process.tree import Tree
pid, journal = int(sys.argv[1]), Journal()
with Guardian(journal) as guardian, Tree(pid) as tree:
    tree.freeze()
    with Remote(pid, procfs.mappings(pid, flags=False), journal) as remote:
        if len(sys.argv) > 2:
            journal.open(remote.leader.slot, int(sys.argv[2]))
        print(guardian.pid, flush=True)
        while True:
            for thread in tree.root.threads:
                remote.call("gettid", tid=thread.tid)
"""


def _kill_in_the_middle(pid: int, seconds: float, *expected: int) -> None:
    command = [sys.executable, "-c", DUMPER, str(pid), *map(str, expected)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dumper:
        assert dumper.stdout is not None
        guardian = int(dumper.stdout.readline())
        time.sleep(seconds)
        dumper.kill()
    # The guardian is nobody's child now: its end shows in /proc.
    deadline = time.monotonic() + PATIENCE
    while lives(guardian):
        assert time.monotonic() < deadline, "the guardian did not end"
        time.sleep(0.001)


def test_a_victim_goes_on_after_its_dumper_was_killed(seed: int) -> None:
    draw = random.Random(seed)
    with counting() as process:
        layout = _layout(process.pid)
        masks = _masks(process.pid)
        for _ in range(10):
            before = progress(process)
            _kill_in_the_middle(process.pid, draw.uniform(0, 0.02))
            assert _layout(process.pid) == layout
            assert _masks(process.pid) == masks
            while progress(process) <= before + 1:
                pass


def _layout(pid: int) -> list[tuple[str, str]]:
    """The mappings that only a system call of the process itself changes: heaps grow by themselves."""
    return [(mapping.path, mapping.permissions) for mapping in procfs.mappings(pid, flags=False) if mapping.path]


def _masks(pid: int) -> list[str]:
    return [procfs.status(pid, tid)["SigBlk"] for tid in procfs.threads(pid)]


def test_a_stopped_victim_stays_stopped() -> None:
    with counting() as process:
        process.send_signal(signal.SIGSTOP)
        while procfs.stat(process.pid).state != "T":
            pass
        _kill_in_the_middle(process.pid, 0.005)
        deadline = time.monotonic() + PATIENCE
        while procfs.stat(process.pid).state != "T":  # let go, it runs for a moment on its way into the stop
            assert time.monotonic() < deadline, "the process is not stopped any more"
        process.send_signal(signal.SIGCONT)
        progress(process)


def test_a_descriptor_that_the_victim_got_itself_stays_open() -> None:
    """It has the number that the dumper expected to get when it died."""
    with counting() as process:
        output = os.readlink(f"/proc/{process.pid}/fd/1")
        before = progress(process)
        _kill_in_the_middle(process.pid, 0.005, 1)
        assert os.readlink(f"/proc/{process.pid}/fd/1") == output
        while progress(process) <= before + 1:
            pass
