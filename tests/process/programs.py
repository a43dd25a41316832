# SPDX-License-Identifier: Apache-2.0
"""Programs in C that set state up, are dumped, ended and restored, and then look at their own state.

They run in a directory of their own. `set_up()` says that all is there, and waits for the time after the restore;
CHECK() ends the program with the line and the reason. A program that is content ends with 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stasis.linux import procfs
from tests.process.terminals import low_numbers_taken

__all__ = ["PATIENCE", "PRELUDE", "Program", "compiled", "counts", "cycle", "goes_on", "running", "stasis", "wait_for"]

PATIENCE = 200.0
"""Seconds after which something hangs: kernels are emulated by tools/vmtest, on machines that do other work, too."""

PRELUDE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define CHECK(condition) do { if (!(condition)) { \
    dprintf(2, "process %d, line %d: %s (errno %d)\n", getpid(), __LINE__, #condition, errno); _exit(1); } } while (0)
static void touch(const char *name) { close(open(name, O_CREAT | O_WRONLY, 0600)); }
static void await(const char *name) { while (access(name, F_OK)) usleep(3000); }
static void set_up(void) { touch("ready"); await("go"); }
static int content(void) { touch("content"); return 0; }
"""


def stasis(*words: str | Path | int, status: int = 0) -> str:
    """Run `stasis process`; what it printed, or what it complained of."""
    command = [sys.executable, "-m", "stasis", "process", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done.stdout if status == 0 else done.stderr


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def compiled(directory: Path, code: str, *options: str) -> Path:
    """The program made of the prelude and `code`."""
    source, program = directory / "program.c", directory / "program"
    source.write_text(f"{PRELUDE}#line 1\n{code}")
    subprocess.run(["gcc", "-O1", "-pthread", *options, "-o", program, source], check=True, timeout=PATIENCE)
    return program


class Program:
    """A program that is set up. `pids`: all of its tree when it was dumped last."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self.directory = directory
        self.process = process
        self.pid = process.pid
        self.pids = [process.pid]
        self.images = 0

    def descendants(self) -> list[int]:
        """This process and all below it."""
        found = [self.pid]
        for pid in found:
            with _gone_is_fine():
                found += [child for tid in procfs.threads(pid) for child in procfs.children(pid, tid)]
        return found

    def dump(self, *options: str) -> Path:
        """Dump to a new image set; the pids are free afterwards."""
        self.images += 1
        images = self.directory / f"images-{self.images}"
        self.pids = self.descendants()
        stasis("dump", self.pid, "--images", images, *options)
        if "--leave-running" not in options:
            self.process.poll()
            wait_for(lambda: not any(map(_exists, self.pids)), "the processes did not end")
        return images

    def restore(self, images: Path, *options: str) -> None:
        """Bring it back."""
        assert int(stasis("restore", "--images", images, *options)) == self.pid

    def again_and_again(self) -> None:
        """Dump it and let it run on, then dump and restore it; with STASIS_LONG all of it twice."""
        for _ in range(2 if os.environ.get("STASIS_LONG") else 1):
            self.dump("--leave-running")
            self.restore(self.dump())

    def finish(self) -> None:
        """Let the program look at itself; it must be content."""
        (self.directory / "go").touch()
        wait_for(lambda: self.process.poll() is not None and not _lives(self.pid), f"process {self.pid} did not end")
        errors = (self.directory / "errors").read_text()
        assert not errors, errors
        assert (self.directory / "content").exists(), "the program ended before it had looked"

    def end(self) -> None:
        """Kill what is left of it, also what is born meanwhile."""
        self.process.kill()
        wait_for(lambda: not _killed_in(self.directory), "what is left of the program does not end")


def _killed_in(directory: Path) -> list[int]:
    """Kill whoever lives in the directory; who that was. Zombies have none."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with _gone_is_fine(), contextlib.suppress(PermissionError):  # the first process, on some machines
            if os.readlink(f"/proc/{pid}/cwd") == str(directory):
                os.kill(pid, signal.SIGKILL)
                found.append(pid)
    return found


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except (ProcessLookupError, FileNotFoundError):
        return


def _exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def _lives(pid: int) -> bool:
    try:
        return procfs.stat(pid).state not in "ZX"
    except ProcessLookupError:
        return False


@contextmanager
def running(directory: Path, *command: str | Path, **options: object) -> Iterator[Program]:
    """The program, in a session of its own, once it is set up."""
    with (
        low_numbers_taken() as taken,
        open(os.devnull, "rb") as nothing,
        open(directory / "errors", "ab") as errors,
        subprocess.Popen(
            list(map(str, command)), stdin=nothing, stdout=errors, stderr=errors, cwd=directory,
            start_new_session=True, **options,  # type: ignore[call-overload]
        ) as process,
    ):  # fmt: skip
        program = Program(directory, process)
        try:
            ready = directory / "ready"
            wait_for(lambda: ready.exists() or process.poll(), "the program is not set up")
            taken.close()
            assert ready.exists(), (directory / "errors").read_text()
            yield program
        finally:
            program.end()


def counts(directory: Path) -> list[int]:
    """How far each thread and child of a counting program is."""
    data = (directory / "counts").read_bytes()
    return [int.from_bytes(data[8 * number : 8 * number + 8], "little") for number in range(6)]


def goes_on(program: Program) -> None:
    """Wait until all of them have counted on."""
    before = counts(program.directory)
    wait_for(lambda: all(now > then for now, then in zip(counts(program.directory), before, strict=True)),
             "a thread does not go on")  # fmt: skip


def cycle(directory: Path, code: str, *options: str, times: int = 1) -> None:
    """Compile, set up, dump and restore, and let the program look at itself."""
    with running(directory, compiled(directory, code, *options)) as program:
        for _ in range(times):
            program.restore(program.dump())
        program.finish()
