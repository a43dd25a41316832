# SPDX-License-Identifier: Apache-2.0
"""Chains of incremental dumps: whatever a process does to its memory between them, a restore has all of it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux import procfs
from stasis.linux.pagemap import PAGE, PageScanner
from stasis.process import keeper
from stasis.process.images.imageset import ImageSet
from stasis.process.images.pagemap import PE_PARENT, Pagemap
from tests.process.test_dump_restore import stasis, wait_for_end

pytestmark = pytest.mark.root

PATIENCE = 90.0

WRITER = r"""
import contextlib, ctypes, hashlib, mmap, os, random, sys, time
os.chdir(sys.argv[1])
draw = random.Random(int(sys.argv[2]))
PAGE, PRIVATE = 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
libc = ctypes.CDLL(None)
areas = []
def area(pages):
    memory = mmap.mmap(-1, pages * PAGE, flags=PRIVATE)
    memory.write(draw.randbytes(pages * PAGE))
    areas.append(memory)
def write():
    memory = draw.choice(areas)
    at = draw.randrange(len(memory) - 100)
    memory[at : at + 100] = draw.randbytes(100)
def drop():
    memory = draw.choice(areas)
    memory.madvise(mmap.MADV_DONTNEED, draw.randrange(len(memory) // PAGE) * PAGE, PAGE)
def resize():
    with contextlib.suppress(OSError):  # the kernel moves only what is one mapping
        draw.choice(areas).resize(draw.randrange(1, 300) * PAGE)
def renew():
    areas.pop(draw.randrange(len(areas))).close()
    area(draw.randrange(1, 300))
def exchange():
    one, other = draw.choice(areas), draw.choice(areas)
    place = ctypes.addressof(ctypes.c_char.from_buffer(one))
    length = min(len(one), len(other)) // PAGE // 2 * PAGE
    if one is not other and length:
        source = ctypes.addressof(ctypes.c_char.from_buffer(other))
        libc.mmap.restype = ctypes.c_long
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        content = other[:length]
        assert libc.mmap(place, length, 3, PRIVATE | 0x10, -1, 0) == place
        one[:length] = content
def protect():
    memory = draw.choice(areas)
    libc.mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))), PAGE, 1)
    libc.mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))), PAGE, 3)
def fork():
    child = os.fork()
    if not child:
        areas[0][:5] = b"child"
        os._exit(0)
    os.waitpid(child, 0)
def digest():
    return hashlib.sha256(b"".join(memory[:] for memory in areas)).hexdigest()
for _ in range(8):
    area(200)
kept = digest()
step = 0
while True:
    assert digest() == kept, "memory is not what it was"
    for _ in range(draw.randrange(40)):
        draw.choice([write] * 30 + [drop, resize, renew, exchange, protect, fork])()
    kept = digest()
    step += 1
    with open("steps", "a") as log:
        log.write(f"{step} {kept}\n")
    time.sleep(0.005)
"""
"""Does everything to its memory that a process may do, and stops when it is not what it was."""

SWEEPING = """
import os, sys, time
os.chdir(sys.argv[1])
data = bytearray(os.urandom(24 << 20))
at = 0
while True:
    at = (at + 4096) % len(data)
    data[at] ^= 255
    if at % (256 << 10) == 0:
        open("steps", "a").write("x\\n")
        time.sleep(0.01)
"""

TURNING = """
import os, sys, time
path, seed, how, code = sys.argv[1:]
data = os.urandom(4 << 20)
open(path + "/steps", "a").write("x\\n" * 3)
while not os.path.exists(path + "/turn"):
    time.sleep(0.005)
if how == "exec":
    os.execv(sys.executable, [sys.executable, "-c", code, path, seed])
if os.fork() == 0:
    sys.argv[1:] = [path + "/child", seed]
exec(code)
"""
"""Becomes a writer, or two of them, when it is told to."""


def steps(directory: Path) -> int:
    return len((directory / "steps").read_text().splitlines())


def wait_for_steps(directory: Path, pid: int, count: int = 3, *, since: int | None = None) -> None:
    """Wait until the process has gone on, or fail with what it complained about. `since`: steps that it had taken."""
    wanted, deadline = (steps(directory) if since is None else since) + count, time.monotonic() + PATIENCE
    while steps(directory) < wanted:
        assert _is_alive(pid), f"the process ended: {(directory / 'errors').read_text()}"
        assert time.monotonic() < deadline, f"the process does not go on: {procfs.status(pid)}"
        time.sleep(0.005)


def _is_alive(pid: int) -> bool:
    try:
        return procfs.stat(pid).state not in "ZX"
    except ProcessLookupError:
        return False


@contextmanager
def running(directory: Path, code: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A writer in a session of its own; whatever has its pid in the end is ended."""
    (directory / "steps").touch()
    before = steps(directory)  # one that takes no more than three at first is not asked for others
    with (
        open(directory / "errors", "ab") as errors,
        subprocess.Popen([sys.executable, "-c", code, str(directory), *words], stdin=subprocess.DEVNULL,
                         stdout=errors, stderr=errors, start_new_session=True) as process,
    ):  # fmt: skip
        try:
            wait_for_steps(directory, process.pid, since=before)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pid in _session_of(process.pid):
                end(pid)


@pytest.fixture
def writer(tmp_path: Path, seed: int) -> Iterator[subprocess.Popen[bytes]]:
    with running(tmp_path, WRITER, str(seed)) as process:
        yield process


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


def restore_and_check(images: Path, process: subprocess.Popen[bytes], directory: Path) -> None:
    """The restored process looks at its own memory before each step."""
    process.wait()
    wait_for_orphans(process.pid)
    stasis("restore", "--images", images)
    wait_for_steps(directory, process.pid)


def wait_for_orphans(session: int) -> None:
    """A child that was ended with its parent may be a zombie until init has waited for it."""
    deadline = time.monotonic() + PATIENCE
    while _session_of(session):
        assert time.monotonic() < deadline, f"session {session} does not end"
        time.sleep(0.01)


def _session_of(session: int) -> list[int]:
    """Its processes."""
    return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _session(pid) == session]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def left_to_parent(images: Path, pid: int) -> int:
    """Pages."""
    with ImageSet.open(images) as opened:
        pagemap = Pagemap.read(opened, pid)
    assert pagemap is not None
    return sum((run.end - run.start) // 4096 for run in map(pagemap.__getitem__, range(len(pagemap)))
               if run.flags & PE_PARENT)  # fmt: skip


def keeper_of(pid: int) -> int | None:
    """The pid of the process that keeps what is known of a tree."""
    name = keeper._address((pid, procfs.stat(pid).start_time))[1:]
    for line in Path("/proc/net/unix").read_text().splitlines():
        if line.endswith(f"@{name}"):
            inode = line.split()[6]
            return next((other for other in map(int, filter(str.isdecimal, os.listdir("/proc")))
                         if _has_socket(other, inode)), None)  # fmt: skip
    return None


def _has_socket(pid: int, inode: str) -> bool:
    try:
        return any(os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]" for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


@pytest.mark.parametrize("pages", [300, 511, 512, 513, 700, 1023, 1024, 1025, 1500, 2500])
def test_scattered_pages_are_listed_once(pages: int) -> None:
    """The kernel lists 512 at a time, and we ask for 1024."""
    with mmap.mmap(-1, 2 * pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for number in range(pages):
            memory[2 * number * PAGE] = 1
        with PageScanner(os.getpid()) as scanner:
            found = list(scanner.own_pages(start, start + len(memory)))
        assert found == [(start + 2 * number * PAGE, PAGE) for number in range(pages)]


@pytest.mark.parametrize("length", [1, 4])
def test_a_chain_has_all_memory(
    writer: subprocess.Popen[bytes], tmp_path: Path, seed: int, length: int
) -> None:
    draw = random.Random(seed)
    before: list[str | Path] = []
    for number in range(length):
        stasis("pre-dump", writer.pid, "--images", tmp_path / f"images-{number}", *before)
        before = ["--parent", tmp_path / f"images-{number}"]
        wait_for_steps(tmp_path, writer.pid, draw.randrange(3))
    stasis("dump", writer.pid, "--images", tmp_path / "images", *before)
    assert left_to_parent(tmp_path / "images", writer.pid) > 500
    restore_and_check(tmp_path / "images", writer, tmp_path)


def test_a_chain_goes_on_after_a_restore(writer: subprocess.Popen[bytes], tmp_path: Path) -> None:
    for number in range(2):
        stasis("pre-dump", writer.pid, "--images", tmp_path / f"before-{number}")
        stasis("dump", writer.pid, "--images", tmp_path / f"images-{number}", "--parent", tmp_path / f"before-{number}")
        writer.poll()
        wait_for_end(writer.pid)
        restore_and_check(tmp_path / f"images-{number}", writer, tmp_path)


@pytest.mark.parametrize("how", ["exec", "fork"])
def test_a_process_that_turns_into_another(tmp_path: Path, seed: int, how: str) -> None:
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "steps").write_text("")
    with running(tmp_path, TURNING, str(seed), how, WRITER) as process:
        stasis("pre-dump", process.pid, "--images", tmp_path / "first")
        (tmp_path / "turn").touch()
        wait_for_steps(tmp_path, process.pid)
        stasis("pre-dump", process.pid, "--images", tmp_path / "second", "--parent", tmp_path / "first")
        wait_for_steps(tmp_path, process.pid)
        stasis("dump", process.pid, "--images", tmp_path / "images", "--parent", tmp_path / "second")
        restore_and_check(tmp_path / "images", process, tmp_path)
        if how == "fork":
            wait_for_steps(tmp_path / "child", process.pid)


def test_without_its_keeper_everything_is_dumped(writer: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("pre-dump", writer.pid, "--images", tmp_path / "before")
    found = keeper_of(writer.pid)
    assert found is not None
    end(found)
    wait_for_steps(tmp_path, writer.pid)
    told = json.loads(stasis("dump", writer.pid, "--images", tmp_path / "images", "--parent", tmp_path / "before",
                             "--json"))  # fmt: skip
    assert "nothing is known" in told["warnings"][0]
    shutil.rmtree(tmp_path / "before")  # it is not needed
    restore_and_check(tmp_path / "images", writer, tmp_path)


def test_another_parent_than_the_last_is_not_believed(writer: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("pre-dump", writer.pid, "--images", tmp_path / "first")
    wait_for_steps(tmp_path, writer.pid)
    stasis("pre-dump", writer.pid, "--images", tmp_path / "second", "--parent", tmp_path / "first")
    told = json.loads(stasis("dump", writer.pid, "--images", tmp_path / "images", "--parent", tmp_path / "first",
                             "--json"))  # fmt: skip
    assert "nothing is known" in told["warnings"][0]
    assert left_to_parent(tmp_path / "images", writer.pid) == 0
    restore_and_check(tmp_path / "images", writer, tmp_path)


def test_copied_in_rounds(tmp_path: Path) -> None:
    with running(tmp_path, SWEEPING) as process:
        told = json.loads(stasis("dump", process.pid, "--images", tmp_path / "images", "--pre-copy", "5", "--json"))
        assert left_to_parent(tmp_path / "images", process.pid) > told["pages"]
        assert (tmp_path / "images" / "pre-copy-1").is_dir()
        moved = tmp_path / "elsewhere"
        (tmp_path / "images").rename(moved)
        restore_and_check(moved, process, tmp_path)


def test_rounds_continue_a_pre_dump(writer: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("pre-dump", writer.pid, "--images", tmp_path / "before")
    stasis("dump", writer.pid, "--images", tmp_path / "images", "--parent", tmp_path / "before", "--pre-copy", "2")
    assert (tmp_path / "images" / "pre-copy-1" / "parent").samefile(tmp_path / "before")
    restore_and_check(tmp_path / "images", writer, tmp_path)


def test_the_keeper_ends_with_the_process(writer: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("pre-dump", writer.pid, "--images", tmp_path / "before")
    found = keeper_of(writer.pid)
    assert found is not None
    writer.kill()
    writer.wait()
    wait_for_end(found)


def test_a_pre_dump_is_refused_whole(writer: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stasis("pre-dump", writer.pid, "--images", tmp_path / "images", "--parent", tmp_path / "none",
           status=ExitCode.NOT_FOUND)  # fmt: skip
    assert not (tmp_path / "images").exists()
    assert keeper_of(writer.pid) is None
    wait_for_steps(tmp_path, writer.pid)
