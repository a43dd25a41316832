# SPDX-License-Identifier: Apache-2.0
"""The place where a measurement runs: a working directory, processes, loop devices; all given back on every
path."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

__all__ = ["MIB", "Lab", "LabError", "missing_tools", "open_lab", "peak_memory", "stop", "wait_for"]

MIB = 1 << 20
START_SECONDS = 20.0
STOP_SECONDS = 10.0
# stasis' workers raise their priority where they may; what they are compared with gets the same.
PRIORITY = ("nice", "-n", "-5") if os.geteuid() == 0 else ()


class LabError(Exception):
    """Something that a measurement needs is not there or failed; the rows that need it are reported as not
    run."""


def missing_tools(*names: str) -> list[str]:
    """Which of the programs are not installed."""
    return [name for name in names if shutil.which(name) is None]


class Lab:
    """Everything that outlives one measurement.

    `directory` is new and empty. It should be on a disk's file system: tmpfs knows no writeback, and io_uring
    hands every read of it to a thread, so figures from there say little about disks.
    """

    def __init__(self, directory: Path, log: IO[bytes]) -> None:
        self._stack = ExitStack()
        self.directory = directory
        self.log = log

    def scope(self) -> Lab:
        """The same place with a clean-up of its own: ``with lab.scope() as inner``."""
        return Lab(self.directory, self.log)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def on_exit(self, function: Callable[[], object]) -> None:
        """Have the function called at clean-up, last in first out."""
        self._stack.callback(function)

    def path(self, name: str) -> Path:
        """A path in the working directory that is removed at clean-up if it is a file or socket then."""
        path = self.directory / name
        self.on_exit(lambda: path.unlink(missing_ok=True))
        return path

    def start(self, command: Sequence[str | Path], *, server: bool = True) -> subprocess.Popen[bytes]:
        """Start a process, by default with a server's priority; it is stopped at clean-up."""
        words = [*(PRIORITY if server else ()), *(str(word) for word in command)]
        # In a session of its own: a signal to our group must not end it before clean-up has used it.
        process = subprocess.Popen(words, stdout=self.log, stderr=self.log, start_new_session=True)
        self.on_exit(lambda: stop(process))
        return process

    def run(self, command: Sequence[str | Path], timeout: float = 600.0, directory: Path | None = None) -> str:
        """Run a command to its end; its standard output. Raises LabError with what it said."""
        words = [str(word) for word in command]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=True, cwd=directory)
        except subprocess.CalledProcessError as error:
            raise LabError(f"{' '.join(words[:4])} … failed: {error.stderr.strip()[-400:]}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LabError(str(error)) from error
        return done.stdout

    def data_file(self, name: str, size: int) -> Path:
        """A file of ``size`` bytes without a hole and without two equal blocks, warm in the page cache."""
        path = self.path(name)
        with open(path, "wb") as file:
            # Written back before anything is measured, and still in the page cache.
            for start in range(0, size, MIB):
                file.write(os.urandom(min(MIB, size - start)))
            os.fsync(file.fileno())
        return path

    def loop_device(self, backing: Path) -> Path:
        """A loop device over a file, detached at clean-up."""
        device = Path(self.run(["losetup", "--find", "--show", backing]).strip())
        self.on_exit(lambda: self.run(["losetup", "--detach", device]))
        return device


def peak_memory(command: Sequence[str]) -> int:
    """Run a command; its largest resident set in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise LabError(f"{' '.join(command[:4])} … returned {process.returncode}")
    return usage.ru_maxrss << 10


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that this program started: politely, then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Poll until the condition holds. Raises LabError when the process ends or time is up before."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if process is not None and process.poll() is not None:
            raise LabError(f"{what}: the process ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not there after {START_SECONDS} s")
        time.sleep(0.02)


@contextmanager
def open_lab(base: Path | None) -> Iterator[Lab]:
    """A lab that is cleaned up on every way out, SIGTERM and SIGHUP included."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    directory = Path(tempfile.mkdtemp(prefix="sb-", dir=base))
    try:
        with open(directory / "log", "ab") as log, Lab(directory, log) as lab:
            yield lab
    finally:
        shutil.rmtree(directory, ignore_errors=True)
