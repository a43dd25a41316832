# SPDX-License-Identifier: Apache-2.0
"""Memory of all kinds is after a restore what it was, and shared where it was shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process.programs import cycle

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

SHARED = r"""
// Shared memory that each process has touched other pages of; private memory that went apart after the fork.
enum { PAGES = 64 };
int main(void) {
    volatile char *shared = mmap(0, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    volatile char *private = mmap(0, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    volatile char *second = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < PAGES; i++) private[i * 4096] = i;
    pid_t child = fork();
    if (!child) {
        for (int i = 1; i < PAGES; i += 2) shared[i * 4096] = i;
        for (int i = 0; i < PAGES; i += 4) private[i * 4096] = 100;
        CHECK(!munmap((void *)shared, 4 * 4096));
        second[4096] = 9;
        touch("child");
        await("go");
        for (int i = 0; i < PAGES; i++) CHECK(private[i * 4096] == (i % 4 ? i : 100));
        for (int i = 4; i < PAGES; i++) CHECK(shared[i * 4096] == i);
        shared[5 * 4096 + 1] = 55;
        _exit(0);
    }
    await("child");
    for (int i = 0; i < PAGES; i += 2) shared[i * 4096] = i;
    set_up();
    for (int i = 0; i < PAGES; i++) CHECK(private[i * 4096] == i && shared[i * 4096] == i);
    int status;
    CHECK(waitpid(child, &status, 0) == child && !status);
    CHECK(shared[5 * 4096 + 1] == 55 && second[4096] == 9 && second[0] == 0);
    return content();
}
"""

KINDS = r"""
// One mapping of each kind; what smaps says of it must be what it said.
enum { LENGTH = 5 * 4096 };
static char *map(int protection, int flags) {
    char *found = mmap(0, LENGTH + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return mmap(found + 4096, LENGTH, protection, flags | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}
static void flags_of(char *where, char *text) {
    char line[256], start[32];
    FILE *file = fopen("/proc/self/smaps", "r");
    sprintf(start, "%lx-", (long)where);
    int here = 0;
    text[0] = 0;
    while (fgets(line, sizeof line, file)) {
        if (strchr("0123456789abcdef", line[0])) here = !strncmp(line, start, strlen(start));
        if (here && !strncmp(line, "VmFlags", 7)) strcpy(text, line);
    }
    fclose(file);
}
static unsigned sum(unsigned char *data, size_t length) {
    unsigned found = 1;
    for (size_t i = 0; i < length; i++) found = found * 31 + data[i];
    return found;
}
static int deep(int levels) { volatile char room[4096]; room[0] = 1; return levels ? deep(levels - 1) + room[0] : 0; }
int main(void) {
    char *maps[12], before[12][256], after[256];
    int count = 0;
    maps[count++] = map(PROT_READ | PROT_WRITE, MAP_PRIVATE);
    strcpy(maps[0] + 4096, "in memory that nobody may read");
    CHECK(!mprotect(maps[0], LENGTH, PROT_NONE));
    maps[count] = map(PROT_READ | PROT_WRITE, MAP_PRIVATE); CHECK(!mlock(maps[count++], LENGTH));
    int advices[] = {MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK, MADV_RANDOM, MADV_SEQUENTIAL, MADV_NOHUGEPAGE};
    for (int i = 0; i < 6; i++) {
        maps[count] = map(PROT_READ | PROT_WRITE, MAP_PRIVATE);
        CHECK(!madvise(maps[count++], LENGTH, advices[i]));
    }
    maps[count++] = map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE);
    maps[count++] = map(PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE);
    maps[count++] = map(PROT_READ, MAP_SHARED);
    for (int i = 1; i < count; i++) if (i != 10) strcpy(maps[i] + 8192, "contents");
    for (int i = 0; i < count; i++) flags_of(maps[i], before[i]);
    // Files: a private mapping with a page of its own, and a shared one.
    int file = open("file", O_RDWR | O_CREAT, 0600);
    CHECK(!ftruncate(file, 3 * 4096) && pwrite(file, "from the file", 14, 4096) == 14);
    char *private = mmap(0, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    char *shared = mmap(0, 2 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 4096);
    strcpy(private, "my own");
    strcpy(shared + 4096, "ours");
    unsigned char *large = mmap(0, 64 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < 64 << 20; i += 8) *(uint64_t *)(large + i) = (i + 1) * 0x9e3779b97f4a7c15;
    memset(large + (10 << 20), 0, 1 << 20);
    unsigned expected = sum(large, 64 << 20);
    void *heap = sbrk(12345);
    close(file);
    set_up();
    for (int i = 0; i < count; i++) {
        flags_of(maps[i], after);
        if (strcmp(before[i], after)) dprintf(2, "mapping %d: %s is now %s", i, before[i], after);
    }
    CHECK(!mprotect(maps[0], LENGTH, PROT_READ) && !strcmp(maps[0] + 4096, "in memory that nobody may read"));
    for (int i = 1; i < count; i++) if (i != 10) CHECK(!strcmp(maps[i] + 8192, "contents"));
    CHECK(!strcmp(private, "my own") && !strcmp(private + 4096, "from the file") && !strcmp(shared, "from the file"));
    strcpy(shared, "to the file");
    char text[14];
    CHECK(pread(open("file", O_RDONLY), text, 14, 4096) == 14 && !strcmp(text, "to the file"));
    CHECK(sum(large, 64 << 20) == expected);
    CHECK((char *)sbrk(0) == (char *)heap + 12345);
    CHECK(deep(500) == 500);
    return content();
}
"""

@pytest.mark.parametrize("code", [SHARED, KINDS], ids=["shared", "kinds"])
def test_memory_is_what_it_was(tmp_path: Path, code: str) -> None:
    cycle(tmp_path, code)
