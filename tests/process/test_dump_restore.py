# SPDX-License-Identifier: Apache-2.0
"""Processes that are dumped, ended and restored go on where they were, as a user does it with the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux import procfs
from tests.process.programs import PATIENCE

pytestmark = pytest.mark.root


VICTIM = """
import hashlib, os, signal, sys, threading, time
os.chdir(sys.argv[1])
os.umask(0o027)
log = open("log", "a", buffering=1)
reader, writer = os.pipe()
os.write(writer, b"in the pipe")
same = os.dup(writer)
data = os.urandom(3 << 20)
digest = hashlib.sha256(data).hexdigest()
handled = []
signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
signal.setitimer(signal.ITIMER_VIRTUAL, 5000)
local = threading.local()
counts = [0, 0, 0]
def count(number):
    local.mine = number
    value = 0.1
    while True:
        value = (value * 3.7 * (1 - value))
        counts[number] += 1
        assert local.mine == number
        time.sleep(0.002)
for number in range(3):
    threading.Thread(target=count, args=(number,), daemon=True).start()
step = 0
while True:
    step += 1
    assert hashlib.sha256(data).hexdigest() == digest
    armed = signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 4000
    log.write(f"{step} {min(counts)} {len(handled)} {os.getcwd()} {armed}\\n")
    if os.path.exists("finish"):
        assert os.read(reader, 100) == b"in the pipe"
        os.write(same, b"again")
        assert os.read(reader, 100) == b"again"
        log.write("finished\\n")
        sys.exit(7)
    time.sleep(0.01)
"""


def stasis(*words: str | Path, status: int = 0) -> str:
    """Run `stasis process`; its output."""
    command = [sys.executable, "-m", "stasis", "process", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done.stdout if status == 0 else done.stderr


def lines(directory: Path) -> list[str]:
    return (directory / "log").read_text().splitlines()


def wait_for_more(directory: Path, known: int, count: int = 5) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(lines(directory)) < known + count:
        assert time.monotonic() < deadline, "the process does not go on"
        time.sleep(0.01)


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while os.path.exists(f"/proc/{pid}"):  # a zombie's pid is taken still
        assert time.monotonic() < deadline, f"process {pid} did not end"
        time.sleep(0.01)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The victim, in a session of its own, at work."""
    (tmp_path / "log").touch()
    command = [sys.executable, "-c", VICTIM, str(tmp_path)]
    with (
        open(os.devnull, "rb") as nothing,
        open(tmp_path / "errors", "ab") as errors,
        subprocess.Popen(command, stdin=nothing, stdout=errors, stderr=errors, start_new_session=True) as process,
    ):
        wait_for_more(tmp_path, 0)
        yield process
        process.kill()


def sizes(layout: list[procfs.Mapping]) -> dict[tuple[str, str], int]:
    """Bytes by path and permissions: neighbours that the kernel kept apart may be one mapping after a restore."""
    found: dict[tuple[str, str], int] = {}
    for mapping in layout:
        if mapping.path.startswith(("/", "[v")):
            key = mapping.path, mapping.permissions
            found[key] = found.get(key, 0) + mapping.length
    return found


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


def test_a_process_goes_on_after_dump_and_restore(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    program.send_signal(signal.SIGUSR1)
    images = tmp_path / "images"
    threads = procfs.threads(program.pid)
    layout = procfs.mappings(program.pid, flags=False)
    stasis("dump", program.pid, "--images", images)
    program.wait()
    before = lines(tmp_path)
    assert oct(images.stat().st_mode & 0o777) == "0o700"
    assert int(stasis("restore", "--images", images)) == program.pid
    wait_for_more(tmp_path, len(before))
    last_before, first_after = before[-1].split(), lines(tmp_path)[len(before)].split()
    assert int(first_after[0]) == int(last_before[0]) + 1
    assert int(first_after[1]) >= int(last_before[1])
    assert first_after[2:] == ["1", str(tmp_path), "True"]
    assert procfs.threads(program.pid) == threads
    assert sizes(procfs.mappings(program.pid, flags=False)) == sizes(layout)
    os.kill(program.pid, signal.SIGUSR1)
    (tmp_path / "finish").touch()
    wait_for_end(program.pid)
    assert lines(tmp_path)[-1] == "finished"
    assert (tmp_path / "errors").read_text() == ""


def test_twice_in_a_row_and_left_running(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("dump", program.pid, "--images", tmp_path / "first", "--leave-running")
    wait_for_more(tmp_path, len(lines(tmp_path)))
    for name in ("second", "third"):
        stasis("dump", program.pid, "--images", tmp_path / name)
        program.poll()  # the first time it is our child
        wait_for_end(program.pid)
        known = len(lines(tmp_path))
        stasis("restore", "--images", tmp_path / name)
        wait_for_more(tmp_path, known)
    end(program.pid)


def test_left_stopped(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("dump", program.pid, "--images", tmp_path / "images", "--leave-stopped")
    deadline = time.monotonic() + PATIENCE
    while procfs.stat(program.pid).state != "T":
        assert time.monotonic() < deadline
    known = len(lines(tmp_path))
    program.send_signal(signal.SIGCONT)
    wait_for_more(tmp_path, known)


def test_the_exit_status_is_passed_on(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("dump", program.pid, "--images", tmp_path / "images")
    program.wait()
    (tmp_path / "finish").touch()
    stasis("restore", "--images", tmp_path / "images", "--attach", status=7)


def test_a_pid_that_is_taken_is_named(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("dump", program.pid, "--images", tmp_path / "images", "--leave-running")
    said = stasis("restore", "--images", tmp_path / "images", status=ExitCode.BUSY)
    assert str(program.pid) in said
    wait_for_more(tmp_path, len(lines(tmp_path)))


def test_what_cannot_be_kept_is_named_and_nothing_happens(tmp_path: Path) -> None:
    code = (
        "import socket, struct, time; ring = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); "
        "ring.setsockopt(263, 5, struct.pack('=4I', 4096, 4, 2048, 8)); print(1, flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        said = stasis("dump", process.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert f"process {process.pid}" in said
        assert "socket:" in said
        assert not (tmp_path / "images").exists()
        assert json.loads(_check(process.pid))[0]["pid"] == process.pid
        assert procfs.stat(process.pid).state in "RS"
        process.kill()


def _check(pid: int) -> str:
    command = [sys.executable, "-m", "stasis", "process", "check", str(pid), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == ExitCode.UNSUPPORTED
    return done.stdout


def test_a_restore_that_fails_leaves_no_process(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("dump", program.pid, "--images", tmp_path / "images")
    program.wait()
    os.rename(tmp_path / "log", tmp_path / "moved")
    said = stasis("restore", "--images", tmp_path / "images", status=ExitCode.STATE)
    assert str(tmp_path / "log") in said
    assert not os.path.exists(f"/proc/{program.pid}")
    mapping = f"{tmp_path / 'log'}={tmp_path / 'moved'}"
    known = len((tmp_path / "moved").read_text().splitlines())
    stasis("restore", "--images", tmp_path / "images", "--map-path", mapping)
    os.rename(tmp_path / "moved", tmp_path / "log")
    wait_for_more(tmp_path, known)
    end(program.pid)


@pytest.mark.parametrize("kind", ["core", "mm", "pagemap", "files", "pstree", "pages-1", "fs", "ids"])
def test_a_damaged_image_leaves_no_process(program: subprocess.Popen[bytes], tmp_path: Path, kind: str) -> None:
    stasis("dump", program.pid, "--images", tmp_path / "images")
    program.wait()
    (image,) = [path for path in (tmp_path / "images").iterdir() if path.stem in (kind, f"{kind}-{program.pid}")]
    image.write_bytes(image.read_bytes()[:-3])
    said = stasis("restore", "--images", tmp_path / "images", status=ExitCode.DAMAGED)
    assert image.name in said
    assert not os.path.exists(f"/proc/{program.pid}")
