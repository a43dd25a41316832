# SPDX-License-Identifier: Apache-2.0
"""Shared memory in chains of dumps: whoever wrote to it and however, it is what it was; and what is as before is not
written again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.linux import procfs
from stasis.process.dump.shared import Known, shared_memory
from stasis.process.images.imageset import ImageSet
from stasis.process.images.pagemap import PAGE_SIZE, PE_PARENT, PE_PRESENT, Pagemap
from tests.process.programs import Program, compiled, running, stasis, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

SHARING = r"""
// 8 MiB that are shared, a segment, a memory file, and a gigabyte with next to nothing in it. Between dumps they are
// written, also by a child that is gone by then and with write(2), and given back in parts. The sum is noted each time.
#include <sys/shm.h>
enum { SIZE = 8 << 20, PAGE = 4096, LARGE = 1 << 30, FILE_SIZE = 1 << 20 };
static uint64_t add(uint64_t found, const unsigned char *memory, long size) {
    for (long i = 0; i < size; i += 8) found = (found ^ *(uint64_t *)(memory + i)) * 0x9e3779b97f4a7c15;
    return found;
}
int main(void) {
    unsigned char *memory = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsigned char *large = mmap(0, LARGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int segment = shmget(IPC_PRIVATE, 300000, IPC_CREAT | 0600), file = memfd_create("file", 0);
    unsigned char *attached = shmat(segment, 0, 0);
    CHECK(!shmctl(segment, IPC_RMID, 0) && !ftruncate(file, FILE_SIZE));
    unsigned char *mapped = mmap(0, FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    unsigned seed = 1;
    for (long i = 0; i < SIZE; i++) memory[i] = rand_r(&seed) >> 8;
    memset(attached, 3, 300000);
    memset(mapped, 4, FILE_SIZE);
    large[LARGE / 2] = 7;
    uint64_t sum = 0;
    touch("ready");
    for (int round = 1; ; round++) {
        char name[20];
        uint64_t found = add(add(add(0, memory, SIZE), attached, 299999), mapped, FILE_SIZE);
        found += large[LARGE / 2 + round - 1];
        CHECK(round == 1 || found == sum);
        sprintf(name, "told-%d", round);
        while (access(name, F_OK) && access("go", F_OK)) usleep(2000);
        if (access(name, F_OK)) break;
        memory[round * PAGE + 5] ^= 0xff;
        attached[round * 5000 + 299] ^= 0xff;
        pid_t child = fork();
        if (!child) { memory[SIZE - round * PAGE - 1] ^= 0xff; attached[299999] = round; _exit(0); }
        CHECK(waitpid(child, 0, 0) == child && pwrite(file, &round, 4, round * 8192) == 4);
        CHECK(!madvise(memory + (100 + round) * PAGE, PAGE, MADV_REMOVE));
        large[LARGE / 2 + round] = 9;
        sum = add(add(add(0, memory, SIZE), attached, 299999), mapped, FILE_SIZE) + large[LARGE / 2 + round];
        sprintf(name, "done-%d", round);
        touch(name);
    }
    return content();
}
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with running(tmp_path, compiled(tmp_path, SHARING)) as found:
        yield found


def _write(directory: Path, number: int) -> None:
    (directory / f"told-{number}").touch()
    wait_for((directory / f"done-{number}").exists, "it does not write")


def _pages(images: Path, kind: int) -> int:
    """Of shared memory: those that are in the set, or in its parent."""
    with ImageSet.open(images) as found:
        pagemaps = [Pagemap.read(found, number, "pagemap-shmem") for number in found.numbers("pagemap-shmem")]
        return sum((run.end - run.start) // PAGE_SIZE for one in pagemaps if one is not None for run in one
                   if run.flags & kind)  # fmt: skip


def _blocks(pid: int) -> int:
    """What the large region occupies."""
    large = next(one for one in procfs.mappings(pid, flags=False) if one.length == 1 << 30)
    return os.stat(f"/proc/{pid}/map_files/{large.start:x}-{large.end:x}").st_blocks


def test_shared_memory_is_copied_ahead(program: Program, tmp_path: Path) -> None:
    before = _blocks(program.pid)
    stasis("pre-dump", program.pid, "--images", tmp_path / "first")
    _write(tmp_path, 1)
    stasis("pre-dump", program.pid, "--images", tmp_path / "second", "--parent", tmp_path / "first")
    assert _pages(tmp_path / "second", PE_PARENT) > 2000
    assert _pages(tmp_path / "second", PE_PRESENT) < 20
    _write(tmp_path, 2)
    assert _blocks(program.pid) == before, "to look at memory took some"
    images = program.dump("--parent", str(tmp_path / "second"))
    assert _pages(images, PE_PARENT) > 2000
    program.restore(images)
    _write(tmp_path, 3)
    program.restore(program.dump("--pre-copy", "3"))
    program.finish()


def test_a_dump_that_is_watched_on_is_continued(program: Program, tmp_path: Path) -> None:
    stasis("dump", program.pid, "--images", tmp_path / "first", "--leave-running", "--track")
    _write(tmp_path, 1)
    images = program.dump("--parent", str(tmp_path / "first"))
    assert _pages(images, PE_PARENT) > 2000
    program.restore(images)
    program.finish()


def test_each_page_that_differs_is_found(program: Program, tmp_path: Path) -> None:
    """Run by run against what the memory and the set before hold."""
    stasis("dump", program.pid, "--images", tmp_path / "first", "--leave-running")
    _write(tmp_path, 1)
    regions = shared_memory([program.pid])
    with Known(tmp_path / "first", regions) as known:
        for number, path in regions:
            fd = os.open(path, os.O_RDONLY)
            end = min(os.fstat(fd).st_size // PAGE_SIZE * PAGE_SIZE, 8 << 20)
            differing = [start for start, stop, same in known.runs(number, fd, 0, end) for start in
                         range(start, stop, PAGE_SIZE) if not same]  # fmt: skip
            os.close(fd)
            if os.stat(path).st_size == 8 << 20:
                assert differing == [PAGE_SIZE, 101 * PAGE_SIZE, (8 << 20) - 2 * PAGE_SIZE]
