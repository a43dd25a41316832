# SPDX-License-Identifier: Apache-2.0
"""Long commands tell how far they are: to people, to programs, and to whoever sends SIGUSR1."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
from argparse import Namespace

import pytest

from stasis.backup.progress import Progress
from stasis.cli.backup.reporting import report
from stasis.errors import DamagedError, ExitCode


class Clock:
    """A clock that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left_follow_the_last_seconds() -> None:
    progress = Progress(clock=(clock := Clock()))
    progress.phase("reading", 1000)
    for _ in range(40):
        clock.now += 1
        progress.add(1)
        progress.status()
    for _ in range(20):
        clock.now += 1
        progress.add(10)
        status = progress.status()
    assert status.bytes_per_second == 10
    assert status.seconds_remaining == (1000 - 240) // 10
    assert status.percent == 24.0


def test_work_of_an_earlier_run_counts_as_done_but_not_as_fast() -> None:
    progress = Progress(clock=(clock := Clock()))
    progress.phase("reading", 1000)
    progress.skip(500)
    clock.now += 10
    progress.add(50)
    status = progress.status()
    assert (status.bytes_done, status.bytes_per_second, status.seconds_remaining) == (550, 5, 90)
    progress.phase("copying")
    progress(400, 1000)
    clock.now += 10
    progress(500, 1000)
    assert progress.status().bytes_per_second == 10


def test_nothing_is_invented_while_the_total_is_unknown() -> None:
    progress = Progress()
    assert "starting" in str(progress.status())
    progress.phase("reading")
    progress.add(1 << 20)
    status = progress.status()
    assert (status.percent, status.bytes_total, status.seconds_remaining) == (None, None, None)
    progress.expect(4 << 20, items=4)
    assert progress.status().percent == 25.0
    assert "1 MiB of 4 MiB (25.0 %), 0 of 4 items" in str(progress.status())


def test_many_threads_count_without_losing_any() -> None:
    progress = Progress()
    progress.phase("reading", 4000)
    threads = [threading.Thread(target=lambda: [progress.add(1, items=1) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    status = progress.status()
    assert (status.bytes_done, status.items_done, status.percent) == (4000, 4000, 100.0)


def test_json_lines_are_status_error_and_a_final_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with report(Namespace(json=True)) as reporter:
        reporter.progress.phase("reading", 100, items=2)
        reporter.progress.add(100, items=2)
        reporter.progress.error(DamagedError("chunk ab is cut off"))
        reporter.finish({"bytes_read": 100}, "read 100 bytes")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [record["message_type"] for record in records]
    assert kinds[-1] == "summary"
    assert kinds.count("error") == 1
    assert set(kinds) == {"status", "error", "summary"}
    assert records[-1] == {"message_type": "summary", "bytes_read": 100}
    assert records[-2]["percent"] == 100.0
    assert next(record for record in records if record["message_type"] == "error")["message"] == "chunk ab is cut off"


def test_an_error_that_ends_a_command_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DamagedError), report(Namespace(json=True)):
        raise DamagedError("chunk ab is missing")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["message_type"], last["exit_code"]) == ("error", ExitCode.DAMAGED)


def test_without_a_terminal_only_the_result_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with report(Namespace(json=False)) as reporter:
        reporter.progress.phase("reading", 100)
        reporter.progress.add(100)
        reporter.finish({"bytes_read": 100}, "read 100 bytes")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("read 100 bytes\n", "")


JOB = """
import argparse, signal, sys
from stasis.cli.backup.reporting import report
with report(argparse.Namespace(json=False)) as reporter:
    reporter.progress.phase("reading", 4096)
    reporter.progress.add(1024)
    print("ready", flush=True)
    sys.stdin.readline()
    reporter.finish({}, "done")
print(signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL)
"""


def test_sigusr1_prints_one_status_line_and_the_job_goes_on() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", JOB], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as job:
        assert job.stdin is not None
        assert job.stdout is not None
        assert job.stderr is not None
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGUSR1)
        line = job.stderr.readline()
        job.stdin.write("\n")
        job.stdin.flush()
        assert job.stdout.read() == "done\nTrue\n"
        assert job.stderr.read() == ""
    assert line.startswith("stasis: reading: 1 KiB of 4 KiB (25.0 %), ")
    assert job.returncode == 0


def test_a_terminal_shows_a_bar_that_is_gone_when_the_result_is_printed() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    try:
        with subprocess.Popen([sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs) as job:
            os.close(theirs)
            shown = b""
            while b"reading:  25%" not in shown:
                assert select.select([ours], [], [], 60)[0], shown
                shown += os.read(ours, 4096)
            job.communicate(b"\n")
        while b"True" not in shown:
            shown += os.read(ours, 4096)
        assert job.returncode == 0
        assert re.search(rb"\r +\rdone\r\n", shown), shown
    finally:
        os.close(ours)
