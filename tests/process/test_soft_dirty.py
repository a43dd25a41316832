# SPDX-License-Identifier: Apache-2.0
"""What marks of written pages can be lost by: moved and merged pages, zero pages, others who clear them.

All of it holds for both ways to mark pages; tools/vmtest runs it on kernels that have only soft-dirty bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from stasis.errors import UnsupportedError
from stasis.linux import procfs, softdirty, userfaultfd
from stasis.linux.pagemap import PAGE, PageScanner
from stasis.process import features
from stasis.process.dump.canary import is_canary, merged_pages
from stasis.process.dump.predump import pre_dump
from tests.process.test_dump_restore import stasis
from tests.process.test_incremental import (
    WRITER,
    left_to_parent,
    restore_and_check,
    running,
    wait_for_steps,
)

pytestmark = pytest.mark.root

KSM = Path("/sys/kernel/mm/ksm")
IS_LONG = bool(os.environ.get("STASIS_LONG"))
CHAIN = 10 if IS_LONG else 2
OTHER_WAY = pytest.mark.skipif(userfaultfd.has_async() and not IS_LONG, reason="for kernels with soft-dirty bits only")

MOVER = r"""
import ctypes, hashlib, mmap, os, random, sys, time
os.chdir(sys.argv[1])
draw = random.Random(int(sys.argv[2]))
PAGE, HUGE, SLOTS = 4096, 2 << 20, 3
libc = ctypes.CDLL(None, use_errno=True)
for name in ("mmap", "mremap"):
    getattr(libc, name).restype = ctypes.c_long
    getattr(libc, name).argtypes = [ctypes.c_long] * (6 if name == "mmap" else 5)
libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_long] * 3
libc.mincore.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_char_p]
told = ctypes.create_string_buffer(1)
FIXED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
room = libc.mmap(0, (SLOTS + 1) * HUGE, 3, FIXED & ~0x10, -1, 0)
first = -(-room // HUGE) * HUGE
def slot():
    return first + draw.randrange(SLOTS) * HUGE
def page():
    return slot() + draw.randrange(HUGE // PAGE) * PAGE
def checked(done, *good):
    assert done in good, (done, os.strerror(ctypes.get_errno()))
def write():
    text = draw.randbytes(20)
    ctypes.memmove(page() + draw.randrange(PAGE - 20), text, 20)
def drop_and_look():
    place, length = draw.choice([(page(), PAGE), (slot(), HUGE)])
    checked(libc.madvise(place, length, 4), 0)
    if draw.random() < 0.7:
        assert ctypes.string_at(place, 1) == b"\0"
def exchange(source, target, length):
    if source != target:
        moved = libc.mremap(source, length, length, 3, target)  # only what is one mapping
        free = source if moved == target else target
        checked(libc.mmap(free, length, 3, FIXED, -1, 0), free)
        if moved != target:  # of two mappings Linux 6.17 may have moved the first one
            for at in range(source, source + length, PAGE):
                if libc.mincore(at, PAGE, told):
                    checked(libc.mmap(at, PAGE, 3, FIXED, -1, 0), at)
def move():
    exchange(slot(), slot(), HUGE)
def move_a_page():
    exchange(page(), page(), PAGE)
def renew():
    place = slot()
    kept = ctypes.string_at(place, HUGE)
    checked(libc.mmap(place, HUGE, 3, FIXED, -1, 0), place)
    for at in range(0, HUGE, PAGE):
        if kept[at : at + PAGE] != bytes(PAGE):
            ctypes.memmove(place + at, kept[at : at + PAGE], PAGE)
def protect():
    place = page()
    checked(libc.mprotect(place, PAGE, 1), 0)
    checked(libc.mprotect(place, PAGE, 3), 0)
    ctypes.memset(place + draw.randrange(PAGE), draw.randrange(256), 1)
def huge():
    checked(libc.madvise(slot(), HUGE, draw.choice([14, 15])), 0)
def out():
    libc.madvise(slot(), HUGE, 21)
def merge():
    libc.madvise(slot(), HUGE, draw.choice([12, 13]))
def fork():
    child = os.fork()
    if not child:
        os._exit(0)
    write()
    os.waitpid(child, 0)
def digest():
    return hashlib.blake2b(ctypes.string_at(first, SLOTS * HUGE)).hexdigest()
for _ in range(200):
    write()
RARE = [drop_and_look, drop_and_look, move, move, renew, move_a_page, protect, huge, out, merge, fork]
kept = digest()
step = 0
while True:
    assert digest() == kept, "memory is not what it was"
    for _ in range(draw.randrange(30)):
        draw.choice([write] * 20 + RARE)()
    kept = digest()
    step += 1
    with open("steps", "a") as log:
        log.write(f"{step} {kept}\n")
    time.sleep(0.005)
"""
"""Moves memory over other memory, drops it and looks at it, and stops when it is not what it was."""


RING = """
import ctypes
context = ctypes.c_ulong()
assert ctypes.CDLL(None).syscall(206, 8, ctypes.byref(context)) == 0
"""


def canaries(pid: int) -> list[int]:
    return [mapping.start for mapping in procfs.mappings(pid, flags=False) if is_canary(mapping)]


def test_memory_that_is_moved_dropped_and_merged(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with running(tmp_path, MOVER, str(seed)) as process:
        before: list[str | Path] = []
        for number in range(CHAIN):
            stasis("pre-dump", process.pid, "--images", tmp_path / f"images-{number}", *before)
            before = ["--parent", tmp_path / f"images-{number}"]
            wait_for_steps(tmp_path, process.pid, draw.randrange(3))
        stasis("dump", process.pid, "--images", tmp_path / "images", *before)
        restore_and_check(tmp_path / "images", process, tmp_path)
        assert canaries(process.pid) == []


@OTHER_WAY
def test_dumps_that_continue_each_other_while_memory_moves(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, MOVER, str(seed)) as process:
        before: list[str | Path] = []
        for number in range(CHAIN):
            images = tmp_path / f"images-{number}"
            stasis("dump", process.pid, "--images", images, "--leave-running", "--track", *before)
            before = ["--parent", images]
            wait_for_steps(tmp_path, process.pid, 1)
        stasis("dump", process.pid, "--images", tmp_path / "images", *before)
        restore_and_check(tmp_path / "images", process, tmp_path)


@OTHER_WAY
def test_marks_that_somebody_else_cleared_are_not_believed(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, WRITER, str(seed)) as process:
        stasis("pre-dump", process.pid, "--images", tmp_path / "before")
        wait_for_steps(tmp_path, process.pid)
        softdirty.clear(process.pid)
        told = json.loads(stasis("dump", process.pid, "--images", tmp_path / "images", "--parent", tmp_path / "before",
                                 "--json"))  # fmt: skip
        if userfaultfd.has_async():
            assert left_to_parent(tmp_path / "images", process.pid) > 500  # the marks are others
        else:
            assert "somebody else cleared" in told["warnings"][0]
            assert left_to_parent(tmp_path / "images", process.pid) == 0
        restore_and_check(tmp_path / "images", process, tmp_path)


@OTHER_WAY
def test_nothing_stays_in_a_process_that_is_not_watched_on(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, WRITER, str(seed)) as process:
        stasis("pre-dump", process.pid, "--images", tmp_path / "before")
        assert len(canaries(process.pid)) == (0 if userfaultfd.has_async() else 1)
        stasis("dump", process.pid, "--images", tmp_path / "images", "--parent", tmp_path / "before", "--leave-running")
        assert canaries(process.pid) == []
        wait_for_steps(tmp_path, process.pid)


def test_a_ring_of_asynchronous_io_is_not_watched(tmp_path: Path, seed: int) -> None:
    """What was asked for earlier is written past the page table."""
    with running(tmp_path, RING + WRITER, str(seed)) as process:
        stasis("pre-dump", process.pid, "--images", tmp_path / "before")
        wait_for_steps(tmp_path, process.pid)
        stasis("dump", process.pid, "--images", tmp_path / "images", "--parent", tmp_path / "before")
        assert left_to_parent(tmp_path / "images", process.pid) == 0
        restore_and_check(tmp_path / "images", process, tmp_path)


def test_the_feature_is_told_truly(tmp_path: Path, seed: int) -> None:
    """A pre-dump works exactly where it is said to."""
    with running(tmp_path, WRITER, str(seed)) as process:
        done = subprocess.run(
            [sys.executable, "-m", "stasis", "process", "pre-dump", str(process.pid), "--images", tmp_path / "images"],
            capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == features.has("mem_dirty_track")


def test_without_a_scan_the_same_pages_are_found() -> None:
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory[0] = memory[3 * PAGE] = memory[4 * PAGE] = memory[63 * PAGE] = 1
        assert memory[10 * PAGE] == 0  # the zero page
        with PageScanner(os.getpid()) as scanner:
            scanner.has_scan = False
            found = list(scanner.own_pages(start, start + len(memory)))
        assert found == [(start, PAGE), (start + 3 * PAGE, 2 * PAGE), (start + 63 * PAGE, PAGE)]


@pytest.mark.skipif(features._soft_dirty(), reason="this kernel has soft-dirty bits")
def test_a_kernel_without_bits_is_told(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the order to clear them, and shows every page as not written."""
    monkeypatch.setattr(userfaultfd, "has_async", lambda: False)
    with running(tmp_path, WRITER, str(seed)) as process:
        with pytest.raises(UnsupportedError, match="cannot be watched"):
            pre_dump(process.pid, tmp_path / "images")
        assert canaries(process.pid) == []
        assert not any("uw" in mapping.flags for mapping in procfs.mappings(process.pid))
        wait_for_steps(tmp_path, process.pid)


@pytest.mark.skipif(not features._soft_dirty(), reason="this kernel has no soft-dirty bits")
def test_a_zero_page_counts_as_written() -> None:
    """It may have come in place of contents, and nobody wrote to it."""
    with mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory[:] = b"x" * len(memory)
        with PageScanner(os.getpid()) as scanner:
            softdirty.clear(os.getpid())
            memory[PAGE] = 1
            memory.madvise(mmap.MADV_DONTNEED, 4 * PAGE, 2 * PAGE)
            assert memory[4 * PAGE] == 0
            found = softdirty.states(scanner, start, start + len(memory))
        assert found[:5] == bytes((1, 3, 1, 1, 3)), found
        assert found[5] in (0, softdirty.TOUCHED)
        assert found[6:] == bytes((1, 1))


@pytest.mark.skipif(not features._soft_dirty() or not KSM.exists(), reason="needs soft-dirty bits and KSM")
def test_equal_pages_that_were_merged_are_written(tmp_path: Path) -> None:
    with running(tmp_path, MERGED) as process, merging():
        stasis("pre-dump", process.pid, "--images", tmp_path / "before")
        before = merged_pages()
        (tmp_path / "go").touch()
        wait_for_steps(tmp_path, process.pid, 1)
        assert merged_pages() > before, "nothing was merged"
        stasis("dump", process.pid, "--images", tmp_path / "images", "--parent", tmp_path / "before")
        (tmp_path / "look").touch()
        restore_and_check(tmp_path / "images", process, tmp_path)


MERGED = r"""
import ctypes, mmap, os, sys, time
os.chdir(sys.argv[1])
memory = mmap.mmap(-1, 256 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = os.urandom(len(memory))
def step(number=1):
    open("steps", "a").write("x\n" * number)
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
step(3)
wait_for("go")
memory[:] = b"m" * len(memory)
memory.madvise(12)
count = lambda: int(open("/sys/kernel/mm/ksm/full_scans").read())
last = count() + 4
while count() < last:
    time.sleep(0.01)
memory.madvise(13)
step()
wait_for("look")
assert memory[:] == b"m" * len(memory)
while True:
    step()
    time.sleep(0.01)
"""
"""Writes, has its pages merged and split again."""


@contextlib.contextmanager
def merging():
    kept = {name: (KSM / name).read_text() for name in ("run", "sleep_millisecs", "pages_to_scan")}
    try:
        for name, value in (("sleep_millisecs", "5"), ("pages_to_scan", "5000"), ("run", "1")):
            (KSM / name).write_text(value)
        yield
    finally:
        for name, value in kept.items():
            (KSM / name).write_text(value)
