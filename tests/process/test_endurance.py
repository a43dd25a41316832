# SPDX-License-Identifier: Apache-2.0
"""Again and again: dumps and restores under load, chains of dumps, a tree that forks while it is stopped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.linux import procfs
from stasis.process.dump.job import DumpOptions, dump
from stasis.process.tree import Tree
from tests.process.programs import compiled, running, stasis, wait_for

LONG = bool(os.environ.get("STASIS_LONG"))

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), *([pytest.mark.timeout(7200)] if LONG else [])]

CYCLES = 200 if LONG else 3
STORM = 200 if LONG else 15
CHAIN = 10

WRITERS = r"""
// Two processes with two threads each, which write pages at random and know what each page must hold: its number, how
// often it was written, and a sum of both. They look at all of it again and again.
enum { PAGES = 512 };
struct page { uint64_t number, writes, sum; };
static char *memory;
static uint32_t written[2][PAGES];
static volatile long *rounds;
static uint64_t mix(uint64_t a, uint64_t b) {
    a ^= b * 0x9e3779b97f4a7c15;
    return (a ^ a >> 29) * 0xbf58476d1ce4e5b9;
}
static void *work(void *which) {
    long me = (long)which;
    unsigned seed = getpid() * 2 + me;
    for (long round = 0; access("go", F_OK); ++round) {
        for (int i = 0; i < 64; i++) {
            uint64_t number = rand_r(&seed) % PAGES;
            struct page *page = (struct page *)(memory + (me * PAGES + number) * 4096);
            page->number = number; page->writes = ++written[me][number]; page->sum = mix(number, page->writes);
        }
        for (uint64_t number = 0; number < PAGES; number++) {
            struct page *page = (struct page *)(memory + (me * PAGES + number) * 4096);
            CHECK(page->writes == written[me][number]);
            CHECK(!page->writes || (page->number == number && page->sum == mix(number, page->writes)));
        }
        rounds[me]++;
        usleep(500);
    }
    return 0;
}
int main(void) {
    int fd = open("rounds", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(!ftruncate(fd, 4096));
    rounds = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    pid_t child = fork();
    rounds += child ? 0 : 2;
    memory = mmap(0, 2L * PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_t thread;
    CHECK(!pthread_create(&thread, 0, work, (void *)1));
    if (child) touch("ready");
    work(0);
    CHECK(!pthread_join(thread, 0));
    if (!child) return 0;
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    return content();
}
"""

FORKING = r"""
// Each process makes others, which do so as well and end soon: there is never an instant without a new one.
static void storm(int depth) {
    while (access("go", F_OK)) {
        pid_t child = fork();
        if (!child) { if (depth < 3) storm(depth + 1); _exit(0); }
        if (depth) _exit(0);
        if (child < 0) usleep(1000);
        while (waitpid(-1, 0, depth ? 0 : WNOHANG) > 0) {}
        usleep(200);
    }
}
int main(void) {
    CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1));
    touch("ready");
    storm(0);
    while (wait(0) > 0) {}
    return content();
}
"""


def _rounds(directory: Path) -> list[int]:
    data = (directory / "rounds").read_bytes()
    return [int.from_bytes(data[8 * number : 8 * number + 8], "little") for number in range(4)]


def _write_on(directory: Path) -> None:
    """Wait until every thread has written, and looked at what it wrote."""
    before = _rounds(directory)
    wait_for(lambda: all(now > then + 1 for now, then in zip(_rounds(directory), before, strict=True)),
             "a thread does not go on")  # fmt: skip


def test_cycles_under_load(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, WRITERS)) as program:
        for number in range(CYCLES):
            _write_on(tmp_path)
            program.restore(program.dump())
            stasis("show", tmp_path / f"images-{number + 1}")
        _write_on(tmp_path)
        program.finish()


def test_a_chain_of_dumps_of_writers(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, WRITERS)) as program:
        parent: list[str] = []
        for number in range(1, CHAIN):
            _write_on(tmp_path)
            stasis("pre-dump", program.pid, "--images", tmp_path / f"ahead-{number}", *parent)
            parent = ["--parent", str(tmp_path / f"ahead-{number}")]
        _write_on(tmp_path)
        images = program.dump(*parent)
        for _ in range(2):
            program.restore(images)
            _write_on(tmp_path)
            program.end()
            wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in program.pids), "a process is left")
        program.restore(images)
        program.finish()


def test_a_storm_of_forks_stands_still(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, FORKING)) as program:
        for number in range(STORM):
            with Tree(program.pid, timeout=60) as tree:
                tree.freeze()
                found = {task.pid for task in tree.tasks}
                assert set(program.descendants()) <= found
                for task in tree.tasks:
                    assert task.is_zombie or procfs.stat(task.pid).state in "tZ"
            if number % 3 == 0:
                dump(program.pid, tmp_path / f"images-{number}", DumpOptions(leave_running=True, timeout=60))
        program.finish()
