# SPDX-License-Identifier: Apache-2.0
"""Memory that mmap(2) of nothing or of a file with a name does not make: memory files, System V segments, huge pages,
guard pages, memory that may be dropped, rings of asynchronous I/O."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux import sysvshm
from tests.process.programs import compiled, cycle, running, stasis

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

MEMFD = r"""
// A memory file that two processes map, one of them without a descriptor; one that is sealed; a private mapping.
int main(void) {
    int file = memfd_create("shared", MFD_ALLOW_SEALING), sealed = memfd_create("sealed", MFD_ALLOW_SEALING);
    CHECK(!ftruncate(file, 5 * 4096) && pwrite(file, "in the file", 12, 3 * 4096) == 12);
    char *whole = mmap(0, 5 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    char *part = mmap(0, 4096, PROT_READ, MAP_SHARED, file, 3 * 4096);
    char *own = mmap(0, 2 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 3 * 4096);
    strcpy(own + 4096, "my own");
    CHECK(write(sealed, "cannot change", 14) == 14);
    CHECK(!fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL));
    char *fixed = mmap(0, 4096, PROT_READ, MAP_SHARED, sealed, 0);
    pid_t child = fork();
    if (!child) {
        close(file);
        close(sealed);
        await("go");
        strcpy(whole, "from the child");
        CHECK(!strcmp(fixed, "cannot change"));
        _exit(0);
    }
    set_up();
    int status;
    CHECK(waitpid(child, &status, 0) == child && !status);
    char text[20];
    CHECK(!strcmp(whole, "from the child") && pread(file, text, 15, 0) == 15 && !strcmp(text, "from the child"));
    CHECK(!strcmp(part, "in the file") && !strcmp(own, "in the file") && !strcmp(own + 4096, "my own"));
    CHECK(fcntl(sealed, F_GET_SEALS) == (F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL));
    CHECK(!strcmp(fixed, "cannot change") && write(sealed, "x", 1) < 0);
    return content();
}
"""

PROGRAM = r"""
// A program that has itself in a memory file, and nowhere else.
int main(int argc, char **argv) {
    char data[1 << 16], link[64] = "";
    if (argc == 1) {
        int from = open("/proc/self/exe", O_RDONLY), file = memfd_create("program", MFD_CLOEXEC);
        for (ssize_t length; (length = read(from, data, sizeof data)) > 0;) CHECK(write(file, data, length) == length);
        char *words[] = {"in memory", "again", 0}, *none[] = {0};
        fexecve(file, words, none);
        CHECK(!"fexecve");
    }
    set_up();
    CHECK(readlink("/proc/self/exe", link, 63) > 0 && !strncmp(link, "/memfd:program", 14));
    return content();
}
"""

KEY = 0x57000000 + os.getpid()  # tests that run beside these in other processes share the namespace
SYSV = r"""
#include <sys/shm.h>
// One segment with a key that stays, one that goes with its last user; one for reading only.
int main(void) {
    int named = shmget(KEY, 3 * 4096, IPC_CREAT | IPC_EXCL | 0640), gone = shmget(IPC_PRIVATE, 10000, 0600);
    CHECK(named >= 0 && gone >= 0);
    char *first = shmat(named, 0, 0), *second = shmat(named, 0, SHM_RDONLY), *third = shmat(gone, 0, 0);
    CHECK(!shmctl(gone, IPC_RMID, 0));
    strcpy(first + 4096, "named");
    strcpy(third + 9000, "gone");
    strcpy(third + 12000, "behind its end");
    CHECK(!mprotect(first + 8192, 4096, PROT_READ));
    pid_t child = fork();
    if (!child) {
        await("go");
        strcpy(third, "from the child");
        _exit(0);
    }
    set_up();
    int status;
    struct shmid_ds info;
    CHECK(waitpid(child, &status, 0) == child && !status);
    CHECK(!strcmp(first + 4096, "named") && !strcmp(second + 4096, "named"));
    CHECK(!strcmp(third + 9000, "gone") && !strcmp(third + 12000, "behind its end"));
    CHECK(!strcmp(third, "from the child"));
    CHECK(shmget(KEY, 0, 0) == named && !shmctl(named, IPC_STAT, &info) && info.shm_nattch == 3);
    CHECK((info.shm_perm.mode & 0777) == 0640 && info.shm_segsz == 3 * 4096);
    CHECK(!shmctl(gone, IPC_STAT, &info) && info.shm_nattch == 1 && info.shm_perm.mode & SHM_DEST);
    CHECK(!shmdt(first) && !shmdt(second) && !shmdt(third) && !shmctl(named, IPC_RMID, 0));
    return content();
}
""".replace("KEY", str(KEY))

HUGE = r"""
#define SIZE (2l << 20)
int main(void) {
    int huge = MAP_HUGETLB | (21 << 26);
    char *private = mmap(0, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | huge, -1, 0);
    char *shared = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | huge, -1, 0);
    int file = memfd_create("huge", MFD_HUGETLB | (21 << 26));
    CHECK(private != MAP_FAILED && shared != MAP_FAILED && file >= 0 && !ftruncate(file, SIZE));
    char *mapped = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    strcpy(private + SIZE + 12345, "private");
    strcpy(shared + 54321, "shared");
    strcpy(mapped + 4096, "file");
    pid_t child = fork();
    if (!child) {
        await("go");
        CHECK(!strcmp(shared + 54321, "shared"));
        strcpy(shared, "child");
        _exit(0);
    }
    set_up();
    int status;
    CHECK(waitpid(child, &status, 0) == child && !status && !strcmp(shared, "child"));
    CHECK(!strcmp(private + SIZE + 12345, "private") && !private[0] && !strcmp(mapped + 4096, "file"));
    char line[256];
    int pages = 0;
    FILE *maps = fopen("/proc/self/smaps", "r");
    while (fgets(line, sizeof line, maps)) pages += !strcmp(line, "KernelPageSize:     2048 kB\n");
    CHECK(pages == 3);
    return content();
}
"""

GUARDED = r"""
static char *memory, *again;
static void fault(int number) { touch("content"); _exit(0); }
int main(void) {
    memory = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(memory, 1, 65536);
    again = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (madvise(memory + 8192, 8192, 102) || madvise(again, 4096, 102)) touch("none");
    set_up();
    CHECK(memory[4096] == 1 && memory[16384] == 1 && again[4096] == 0);
    CHECK(!madvise(again, 4096, 103) && again[0] == 0);
    signal(SIGSEGV, fault);
    memory[12288] = 1;
    return 1;
}
"""

DROPPABLE = r"""
int main(void) {
    char *memory = mmap(0, 65536, PROT_READ | PROT_WRITE, 8 | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) touch("none"); else strcpy(memory, "may be dropped");
    set_up();
    CHECK(!memory[0] || !strcmp(memory, "may be dropped"));
    memory[4096] = 1;
    pid_t child = fork();
    if (!child) _exit(memory[4096]);
    int status;
    CHECK(waitpid(child, &status, 0) == child && !status);
    return content();
}
"""

RINGS = r"""
#include <linux/aio_abi.h>
static int ask(aio_context_t ring, int file) {
    struct iocb request = {.aio_fildes = file, .aio_lio_opcode = IOCB_CMD_PWRITE, .aio_buf = (uint64_t)"data",
                           .aio_nbytes = 4, .aio_data = 17}, *requests[] = {&request};
    return syscall(SYS_io_submit, ring, 1, requests);
}
int main(int argc, char **argv) {
    aio_context_t rings[3] = {0};
    int sizes[] = {1, 128, 1000}, file = open("file", O_CREAT | O_RDWR, 0600);
    struct io_event event;
    for (int i = 0; i < 3; i++) CHECK(!syscall(SYS_io_setup, sizes[i], &rings[i]));
    for (int i = 0; i < 5; i++)
        CHECK(ask(rings[1], file) == 1 && syscall(SYS_io_getevents, rings[1], 1, 1, &event, 0) == 1);
    if (argc > 1) CHECK(ask(rings[1], file) == 1);
    set_up();
    for (int i = 0; i < 3; i++) {
        CHECK(ask(rings[i], file) == 1);
        CHECK(syscall(SYS_io_getevents, rings[i], 1, 1, &event, 0) == 1 && event.data == 17 && event.res == 4);
        CHECK(!syscall(SYS_io_destroy, rings[i]));
    }
    return content();
}
"""

IO_URING = r"""
#include <linux/io_uring.h>
int main(void) {
    struct io_uring_params parameters = {0};
    int fd = syscall(SYS_io_uring_setup, 4, &parameters);
    if (fd < 0) touch("none");
    else CHECK(mmap(0, 4096, PROT_READ, MAP_SHARED, fd, IORING_OFF_SQ_RING) != MAP_FAILED);
    set_up();
    return content();
}
"""


@pytest.fixture
def _no_segments() -> Iterator[None]:
    """They outlive processes: none is left by a test that fails."""
    yield
    for segment in sysvshm.segments().values():
        if segment.key == KEY:
            sysvshm.remove(segment.id)


@pytest.mark.parametrize("code", [MEMFD, PROGRAM], ids=["mapped", "program"])
def test_memory_files(tmp_path: Path, code: str) -> None:
    cycle(tmp_path, code)


@pytest.mark.usefixtures("_no_segments")
@pytest.mark.parametrize("removed", [True, False])
def test_system_v_segments(tmp_path: Path, removed: bool) -> None:
    """Made again where they are gone, filled again where they are there and nobody uses them."""
    with running(tmp_path, compiled(tmp_path, SYSV)) as program:
        images = program.dump()
        (named,) = (one for one in sysvshm.segments().values() if one.key == KEY)
        if removed:
            sysvshm.remove(named.id)
        program.restore(images)
        program.finish()


@pytest.fixture
def huge_pages() -> Iterator[None]:
    count = Path("/proc/sys/vm/nr_hugepages")
    before = count.read_text()
    try:
        count.write_text(str(int(before) + 8))
        if int(count.read_text()) < int(before) + 8:
            pytest.skip("the machine has no memory left for huge pages")
        yield
    finally:
        count.write_text(before)


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages(tmp_path: Path) -> None:
    cycle(tmp_path, HUGE)


@pytest.mark.parametrize(("code", "kernel"), [(GUARDED, "6.15"), (DROPPABLE, "6.11")], ids=["guarded", "droppable"])
def test_newer_kernels_memory(tmp_path: Path, code: str, kernel: str) -> None:
    with running(tmp_path, compiled(tmp_path, code)) as program:
        if (tmp_path / "none").exists():
            pytest.skip(f"needs Linux {kernel}")
        program.restore(program.dump())
        program.finish()


def test_rings_of_asynchronous_io(tmp_path: Path) -> None:
    cycle(tmp_path, RINGS)


def test_events_that_were_not_fetched_are_named(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, RINGS), "ask") as program:
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert "events that were not fetched" in said


def test_io_uring_is_named(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, IO_URING)) as program:
        if (tmp_path / "none").exists():
            pytest.skip("this kernel has no io_uring")
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert "io_uring" in said


@pytest.mark.usefixtures("_no_segments")
def test_a_segment_of_others_is_left_alone(tmp_path: Path) -> None:
    """Its id was given away meanwhile: nothing is restored, and it is not touched."""
    with running(tmp_path, compiled(tmp_path, SYSV)) as program:
        before = sysvshm.segments()
        (named,) = (one for one in before.values() if one.key == KEY)
        images = program.dump()
        sysvshm.remove(named.id)
        sysvshm.make(named._replace(key=0, size=4096))
        try:
            said = stasis("restore", "--images", images, status=ExitCode.BUSY)
            assert f"segment {named.id}" in said
            assert sysvshm.segments()[named.id].size == 4096
        finally:
            sysvshm.remove(named.id)
        program.restore(images)
        program.finish()
