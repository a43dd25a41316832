# SPDX-License-Identifier: Apache-2.0
"""Memory that processes have had in common since a fork is there once, before a dump and after a restore."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from stasis.process.restore.job import restore
from tests.process.programs import Program, compiled, running, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

MIB = 1 << 20
LONG = bool(os.environ.get("STASIS_LONG"))

SHARING = r"""
// 64 MiB that four children and a grandchild have from their parent; each one writes a few pages of its own.
enum { SIZE = 64 << 20, PAGE = 4096 };
static unsigned char *memory;
static uint64_t sum(void) {
    uint64_t found = 0;
    for (long i = 0; i < SIZE; i += 8) found = (found ^ *(uint64_t *)(memory + i)) * 0x9e3779b97f4a7c15;
    return found;
}
static int live(int number, int children) {
    for (int i = 0; i < 64; i++) memory[(number * 64 + i) * PAGE] ^= 0xff;
    CHECK(!madvise(memory + (1000 + number * 4) * PAGE, 4 * PAGE, MADV_DONTNEED));
    CHECK(!mprotect(memory + (2000 + number) * PAGE, PAGE, PROT_READ));
    uint64_t expected = sum();
    for (int i = 0; i < children; i++) if (!fork()) return live(number * 4 + i + 1, !number && !i);
    if (!number) set_up(); else { char name[9]; sprintf(name, "up-%d", number); touch(name); await("go"); }
    CHECK(sum() == expected);
    memory[number * PAGE] ^= 1;
    CHECK(sum() != expected);
    memory[number * PAGE] ^= 1;
    for (int i = 0; i < children; i++) { int status; CHECK(wait(&status) > 0 && !status); }
    CHECK(sum() == expected);
    return number ? 0 : content();
}
int main(void) {
    memory = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int random = open("/dev/urandom", O_RDONLY);
    for (long done = 0; done < SIZE; done += 1 << 20) CHECK(read(random, memory + done, 1 << 20) == 1 << 20);
    return live(0, 4);
}
"""

FORKED = r"""
// Processes that do to their memory what comes to mind, fork, and go on: each knows the sum of what it has.
enum { PAGE = 4096, AREAS = 12, PAGES = 200 };
static char *areas[AREAS];
static char mapped[AREAS][PAGES];
static unsigned seed;
static int draw(int below) { return rand_r(&seed) % below; }
static uint64_t sum(void) {
    uint64_t found = 0;
    for (int area = 0; area < AREAS; area++) for (int page = 0; page < PAGES; page++) if (mapped[area][page]) {
        uint64_t *words = (uint64_t *)(areas[area] + page * PAGE);
        for (int i = 0; i < PAGE / 8; i++) found = (found ^ words[i]) * 0x9e3779b97f4a7c15;
    }
    return found;
}
static char *map(char *at, long size, int flags, int fd) {
    return mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | flags, fd, 0);
}
static void change(void) {
    int area = draw(AREAS), first = draw(PAGES), count = 1 + draw(PAGES - first);
    for (int page = first; page < first + count; page++) if (!mapped[area][page]) return;
    char *start = areas[area] + first * PAGE;
    switch (draw(8)) {
    case 0: CHECK(!munmap(start, count * PAGE)); memset(mapped[area] + first, 0, count); break;
    case 1: CHECK(!madvise(start, count * PAGE, MADV_DONTNEED)); break;
    case 2: CHECK(!mprotect(start, count * PAGE, PROT_READ)); break;
    case 3: CHECK(map(start, count * PAGE, MAP_ANONYMOUS | MAP_FIXED, -1) == start); break;
    case 4: CHECK(!mprotect(start, PAGE, PROT_READ | PROT_WRITE)); memset(start, 0, PAGE); // fall through
    default: CHECK(!mprotect(start, count * PAGE, PROT_READ | PROT_WRITE));
             for (int page = 0; page < count; page += 1 + draw(5)) start[page * PAGE + draw(PAGE)] = draw(256);
    }
}
static int live(int depth, int who) {
    char name[40];
    seed = seed * 31 + who;
    for (int i = 0; i < 60; i++) change();
    int children = depth < 3 ? draw(3) + !depth : 0;
    for (int i = 0; i < children; i++) {
        if (!fork()) return live(depth + 1, who * 4 + i + 1);
        for (int j = 0; j < 10; j++) change();
    }
    uint64_t expected = sum();
    sprintf(name, "up-%d", getpid());
    touch(name);
    if (!depth) {
        touch("ready");
    }
    await("go");
    CHECK(sum() == expected);
    for (int i = 0; i < 10; i++) change();
    for (int i = 0; i < children; i++) { int status; CHECK(wait(&status) > 0 && !status); }
    return depth ? 0 : content();
}
int main(int count, char **words) {
    seed = atoi(words[1]);
    int file = open("areas", O_RDWR | O_CREAT, 0600);
    for (int i = 0; i < PAGES * PAGE; i++) { char c = i / 7; CHECK(i % PAGE || pwrite(file, &c, 1, i) == 1); }
    CHECK(!ftruncate(file, PAGES * PAGE));
    for (int i = 0; i < AREAS; i++) {
        areas[i] = i % 3 ? map(0, PAGES * PAGE, MAP_ANONYMOUS, -1) : map(0, PAGES * PAGE, 0, file);
        memset(mapped[i], 1, PAGES);
        for (int page = 0; page < PAGES; page += 1 + draw(3)) areas[i][page * PAGE + draw(PAGE)] = draw(256);
    }
    return live(0, 1);
}
"""


def _proportional(pids: list[int]) -> int:
    """Bytes that processes have, each shared page once (Pss)."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[0]) for text in texts) * 1024


def _is_up(program: Program, processes: int) -> bool:
    return len(list(program.directory.glob("up-*"))) >= processes


def test_what_was_one_copy_is_one_copy(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, SHARING)) as program:
        wait_for(lambda: _is_up(program, 5), "the children are not there")
        before = _proportional(program.descendants())
        made = restore(program.dump())
        assert len(program.descendants()) == 6
        assert before - 4 * MIB < _proportional(program.descendants()) < before + 4 * MIB
        assert made.pages_compared > 5 * 60 * MIB // 4096
        assert made.pages_compared > made.pages_shared > made.pages_compared - 10 * 200
        program.finish()
        os.waitpid(made.pid, 0)


@pytest.mark.parametrize("number", range(50 if LONG else 1))
def test_whatever_was_done_to_it(tmp_path: Path, seed: int, number: int) -> None:
    with running(tmp_path, compiled(tmp_path, FORKED), str(seed + number)) as program:
        wait_for(lambda: _is_up(program, len(program.descendants())), "a child is not there")
        for _ in range(2 if LONG else 1):
            program.restore(program.dump())
        program.finish()
