# SPDX-License-Identifier: Apache-2.0
"""A dumper that is killed leaves its victim as it was and no images; a restorer that is killed leaves no process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from stasis.linux import procfs, sysvshm
from tests.process.programs import Program, compiled, counts, goes_on, running, wait_for
from tests.process.victims import killed_while

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

KILLS = 2
LONGEST = 0.8

FAMILY = r"""
// Three processes with two threads each, which count; the memory between them is shared.
static volatile long *counts;
static void *count(void *place) {
    volatile long *mine = place;
    while (access("go", F_OK)) { ++*mine; usleep(500); }
    return 0;
}
static void work(int number) {
    pthread_t thread;
    CHECK(!pthread_create(&thread, 0, count, (void *)&counts[2 * number]));
    count((void *)&counts[2 * number + 1]);
    CHECK(!pthread_join(thread, 0));
}
int main(void) {
    counts = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, open("counts", O_RDWR | O_CREAT | O_TRUNC, 0600), 0);
    CHECK(!ftruncate(open("counts", O_RDWR), 4096));
    for (int i = 1; i < 3; i++) if (!fork()) { work(i); _exit(i); }
    touch("ready");
    work(0);
    int status, sum = 0;
    while (wait(&status) > 0) { CHECK(WIFEXITED(status)); sum += WEXITSTATUS(status); }
    CHECK(sum == 3);
    return content();
}
"""

RENAMED = r"""
// Has a file that lost its name and has another one elsewhere.
int main(void) {
    CHECK(!mkdir("here", 0700) && !mkdir("there", 0700));
    int file = open("here/lost", O_RDWR | O_CREAT, 0600);
    CHECK(write(file, "kept", 4) == 4 && !link("here/lost", "there/other") && !unlink("here/lost"));
    touch("ready");
    await("go");
    struct stat mine, its;
    CHECK(!fstat(file, &mine) && !stat("there/other", &its) && mine.st_ino == its.st_ino && mine.st_nlink == 1);
    return content();
}
"""

ATTACHED = r"""
// Has a System V segment that goes with it.
#include <sys/shm.h>
int main(void) {
    int segment = shmget(IPC_PRIVATE, 54321, IPC_CREAT | 0600);
    char *memory = shmat(segment, 0, 0);
    CHECK(!shmctl(segment, IPC_RMID, 0));
    strcpy(memory, "kept");
    touch("ready");
    await("go");
    CHECK(!strcmp(memory, "kept"));
    return content();
}
"""


def _nobody_traces(pids: list[int]) -> bool:
    return all(procfs.status(pid, tid)["TracerPid"] == "0" for pid in pids for tid in procfs.threads(pid))


def test_a_dumper_that_is_killed_leaves_everything_as_it_was(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        pids = program.descendants()
        descriptors = [sorted(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
        for _ in range(KILLS):
            killed_while(draw, LONGEST, "dump", program.pid, "--images", tmp_path / "images", "--leave-running")
            wait_for(lambda: _nobody_traces(pids), "a thread is traced still")
            goes_on(program)
            assert [sorted(os.listdir(f"/proc/{pid}/fd")) for pid in pids] == descriptors
            if (tmp_path / "images").exists():  # it was through
                os.rename(tmp_path / "images", tmp_path / f"images-{draw.random()}")
            wait_for(lambda: not list(tmp_path.glob(".stasis-images-*")), "something is left of the images")
        program.restore(program.dump())
        program.finish()


def test_a_restorer_that_is_killed_leaves_all_processes_or_none(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        images = program.dump()
        for _ in range(KILLS):
            before = counts(tmp_path)
            killed_while(draw, LONGEST, "restore", "--images", images)
            wait_for(partial(settled, program, before), "half of the tree is left")
            if os.path.exists(f"/proc/{program.pid}"):  # it was through
                assert program.descendants() == program.pids
                goes_on(program)
                images = program.dump()
        program.restore(images)
        goes_on(program)
        program.finish()


def test_the_links_of_a_set_that_is_whole_stay(tmp_path: Path) -> None:
    """The dumper dies when the set is in its place."""
    with running(tmp_path, compiled(tmp_path, RENAMED)) as program:
        code = """
import os, signal, sys
from stasis.process.dump import job
from stasis.process.files.options import FileOptions
job.LinkRemaps.keep = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
job.dump(int(sys.argv[1]), sys.argv[2], job.DumpOptions(leave_running=True, files=FileOptions(link_remap=True)))
"""
        subprocess.run([sys.executable, "-c", code, str(program.pid), str(tmp_path / "images")], check=False)
        assert list(tmp_path.glob("here/.stasis-link-*"))
        program.end()
        program.process.wait()
        program.restore(tmp_path / "images")
        program.finish()
        assert not list(tmp_path.glob("here/.stasis-link-*"))


def test_a_segment_goes_with_the_restorer_that_made_it(tmp_path: Path) -> None:
    """It dies while the segment is filled, and when all run."""
    with running(tmp_path, compiled(tmp_path, ATTACHED)) as program:
        images = program.dump()
        for moment, is_left in (("sysvshm._fill", False), ("job._let_go", True)):
            code = f"""
import os, signal, sys
from stasis.process import sysvshm
from stasis.process.restore import job
do = {moment}
{moment} = lambda *words, **more: (do(*words, **more), os.kill(os.getpid(), signal.SIGKILL))
job.restore(sys.argv[1])
"""
            subprocess.run([sys.executable, "-c", code, str(images)], check=False)
            wait_for(lambda: all(one.mode & sysvshm.SHM_DEST for one in _segments()), "a segment is left")
            assert bool(_segments()) == os.path.exists(f"/proc/{program.pid}") == is_left
        program.finish()
        wait_for(lambda: not _segments(), "a segment is left")


def _segments() -> list[sysvshm.Segment]:
    return [one for one in sysvshm.segments().values() if one.size == 54321]


def settled(program: Program, before: list[int]) -> bool:
    """Nothing is there, or everything is and runs without us."""
    there = [pid for pid in program.pids if os.path.exists(f"/proc/{pid}")]
    if not there:
        return True
    try:
        runs = all(now > then for now, then in zip(counts(program.directory), before, strict=True))
        return runs and there == program.pids and _nobody_traces(there)
    except (ProcessLookupError, FileNotFoundError):
        return False
