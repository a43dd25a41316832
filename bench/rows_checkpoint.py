# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of processes: against what the same task or a plain one needs for the same bytes without one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groups import Bench, group
from lab import MIB, Lab, LabError, peak_memory
from report import Row, ratio_row, value_row

ROUNDS = 7
MEMORY_LIMIT = 64 * MIB

LARGE = """
import os, signal, sys, time
data = memoryview(os.urandom(int(sys.argv[1])))
def write(number, frame):
    started = time.monotonic()
    fd = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])
    seconds = time.monotonic() - started
    os.close(fd)
    with open(sys.argv[3] + ".new", "w") as told:
        told.write(str(seconds))
    os.rename(sys.argv[3] + ".new", sys.argv[3])
signal.signal(signal.SIGUSR1, write)
open(sys.argv[3], "w").close()
while True:
    time.sleep(100)
"""
READING = """
import mmap, os, sys, time
started = time.monotonic()
fd, size = os.open(sys.argv[1], os.O_RDONLY), os.stat(sys.argv[1]).st_size
memory = mmap.mmap(-1, size)
view, done = memoryview(memory), 0
while done < size:
    done += os.preadv(fd, [view[done:done + (1 << 30)]], done)
print(time.monotonic() - started)
"""
EVENTFUL = """
import ctypes, os, select, socket, sys, threading, time
libc = ctypes.CDLL(None)
waiting = select.epoll()
signals = (ctypes.c_ulong * 16)(1 << 9)
watching = libc.inotify_init()
libc.inotify_add_watch(watching, b"/tmp", 0x100)
for fd in libc.eventfd(3, 0), libc.timerfd_create(1, 0), libc.signalfd(-1, signals, 0), watching:
    assert fd >= 0
    waiting.register(fd, select.EPOLLIN)
pipe, pair, itself = os.pipe(), socket.socketpair(), os.pidfd_open(os.getpid())
for number in range(4):
    threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
open(sys.argv[1], "w").close()
time.sleep(1e6)
"""
WRITING = """
import mmap, random, sys, time
size = int(sys.argv[1])
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, size, 4096):
    memory[page] = 1
open(sys.argv[2], "w").close()
pages, number, began = size // 4096, 0, time.monotonic()
while True:  # 20 MB/s: 5000 pages in a second
    memory[random.randrange(pages) * 4096] = number & 255
    number += 1
    if number % 50 == 0:
        time.sleep(max(0, began + number / 5000 - time.monotonic()))
"""


@contextmanager
def _victim(lab: Lab, size: int) -> Iterator[tuple[int, Path, Path]]:
    """A process with so much memory: its pid, the file that it writes to on SIGUSR1, the file that tells how long."""
    plain, told = lab.path("plain.bin"), lab.path("told")
    told.unlink(missing_ok=True)
    nothing = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-c", LARGE, str(size), str(plain), str(told)], start_new_session=True,
                               stdin=nothing, stdout=nothing, stderr=nothing)  # fmt: skip
    try:
        _until(told.exists)
        yield process.pid, plain, told
    finally:
        process.kill()
        process.wait()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise LabError("the process to be dumped does not answer")
        time.sleep(0.005)


def _command(lab: Lab, *words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lab.run([sys.executable, "-m", "stasis", "process", *words, "--json"]))
    return found


def _dump(lab: Lab, pid: int, *options: str) -> dict[str, Any]:
    images = lab.directory / "images"
    shutil.rmtree(images, ignore_errors=True)
    os.sync()
    return _command(lab, "dump", str(pid), "--images", images, *options)


@group("process-pages", suite="process")
def pages(bench: Bench) -> list[Row]:
    """Memory to images, against a plain write of the same memory by the same task to the same file system."""
    size = bench.image_size // 2
    ours, plain_rates = [], []
    with bench.lab.scope() as lab, _victim(lab, size) as (pid, plain, told):
        for _ in range(ROUNDS):
            dumped = _dump(lab, pid, "--leave-running")
            ours.append(dumped["pages"] * 4096 / dumped["pages_seconds"])
            plain.unlink(missing_ok=True)
            told.unlink()
            os.sync()
            os.kill(pid, signal.SIGUSR1)
            _until(told.exists)
            plain_rates.append(size / float(told.read_text()))
        shutil.rmtree(lab.directory / "images")
    title = f"memory of a task of {size // MIB} MiB to images / plain write of the same"
    return [ratio_row("process-pages", title, ours, plain_rates, 1.1, ("stasis", "write(2)"), "bytes/s")]


@group("process-frozen-small", "process-start-small", suite="process")
def small(bench: Bench) -> list[Row]:
    """A task with one thread and few files: how long it stands still, and how long its restore takes."""
    frozen, started = [], []
    with bench.lab.scope() as lab:
        nothing = subprocess.DEVNULL
        for _ in range(ROUNDS):
            process = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdin=nothing, stdout=nothing,
                                       stderr=nothing)  # fmt: skip
            frozen.append(_dump(lab, process.pid)["frozen_seconds"] * 1000)
            process.wait()
            began = time.monotonic()
            pid = int(lab.run([sys.executable, "-m", "stasis", "process", "restore", "--images",
                               lab.directory / "images"]))  # fmt: skip
            seconds = time.monotonic() - began
            os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            lab.run([sys.executable, "-c", "pass"])
            started.append((seconds - (time.monotonic() - began)) * 1000)
        shutil.rmtree(lab.directory / "images")
    return [
        value_row("process-frozen-small", "frozen time of a small task", frozen, 15.0, "ms"),
        value_row("process-start-small", "restore of a small task beyond the interpreter's start", started, 60.0, "ms"),
    ]


@group("process-frozen-events", suite="process")
def events(bench: Bench) -> list[Row]:
    """A task with five threads, a pipe, a socket pair and a descriptor of each kind of event: how long it stands
    still."""
    frozen = []
    with bench.lab.scope() as lab:
        nothing, told = subprocess.DEVNULL, lab.path("told")
        for _ in range(ROUNDS):
            told.unlink(missing_ok=True)
            process = subprocess.Popen([sys.executable, "-c", EVENTFUL, str(told)], start_new_session=True,
                                       stdin=nothing, stdout=nothing, stderr=nothing)  # fmt: skip
            try:
                _until(told.exists)
                frozen.append(_dump(lab, process.pid)["frozen_seconds"] * 1000)
            finally:
                process.kill()
                process.wait()
        shutil.rmtree(lab.directory / "images")
    title = "frozen time of a task with 5 threads and every event descriptor"
    return [value_row("process-frozen-events", title, frozen, 25.0, "ms")]


@group("process-precopy", suite="process")
def precopy(bench: Bench) -> list[Row]:
    """A task that keeps writing to its memory: how long it stands still with rounds of pre-copy, and without."""
    size = bench.image_size // 2
    ratios = []
    with bench.lab.scope() as lab:
        told, nothing = lab.path("told"), subprocess.DEVNULL
        process = subprocess.Popen([sys.executable, "-c", WRITING, str(size), str(told)], start_new_session=True,
                                   stdin=nothing, stdout=nothing, stderr=nothing)  # fmt: skip
        try:
            _until(told.exists)
            for _ in range(ROUNDS):
                at_once = _dump(lab, process.pid, "--leave-running")["frozen_seconds"]
                ratios.append(
                    _dump(lab, process.pid, "--leave-running", "--pre-copy", "4")["frozen_seconds"] / at_once
                )
        finally:
            process.kill()
            process.wait()
        for images in lab.directory.glob("images*"):
            shutil.rmtree(images)
    title = f"frozen time of {size // MIB} MiB written at 20 MB/s, with --pre-copy / without"
    return [value_row("process-precopy", title, ratios, 0.1, "x")]


@group("process-restore", "process-memory", suite="process")
def large(bench: Bench) -> list[Row]:
    """A large task: its restore against reading the image into fresh memory, and the dumper's own memory."""
    size = bench.image_size // 2
    ratios, peaks = [], []
    with bench.lab.scope() as lab:
        for _ in range(ROUNDS):
            with _victim(lab, size) as (pid, _, _):
                shutil.rmtree(lab.directory / "images", ignore_errors=True)
                peaks.append(peak_memory([sys.executable, "-m", "stasis", "process", "dump", str(pid), "--images",
                                    str(lab.directory / "images")]))  # fmt: skip
            file = max((lab.directory / "images").glob("pages-*.img"), key=lambda path: path.stat().st_size)
            reading = float(lab.run([sys.executable, "-c", READING, file]))
            began = time.monotonic()
            pid = int(lab.run([sys.executable, "-m", "stasis", "process", "restore", "--images",
                               lab.directory / "images"]))  # fmt: skip
            ratios.append((time.monotonic() - began) / reading)
            os.kill(pid, signal.SIGKILL)
            _until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
        shutil.rmtree(lab.directory / "images")
    title = f"restore of {size // MIB} MiB, command and all / reading the image into fresh memory"
    return [
        value_row("process-restore", title, ratios, 1.3, "x"),
        value_row(
            "process-memory", "peak memory of a dump / 64 MiB", [peak / MEMORY_LIMIT for peak in peaks], 1.0, "x"
        ),
    ]
