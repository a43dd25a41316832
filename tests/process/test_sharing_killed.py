# SPDX-License-Identifier: Apache-2.0
"""Processes with one address space and one descriptor table: whatever step a dump or restore is killed at, what was
brought into them is there once, and goes once."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest

from stasis.process.dump.job import DumpOptions, dump
from stasis.process.restore.job import restore
from tests.process.injector import count_steps_of_all, kill_at
from tests.process.programs import compiled, counts, goes_on, running, wait_for
from tests.process.test_every_step import LONG, SAMPLE, end, killed_again_and_again
from tests.process.test_killed import settled

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), *([pytest.mark.timeout(7200)] if LONG else [])]

FAMILY = r"""
// Three processes with two threads each, which count: one with the memory and all else of the first one, one with its
// memory and descriptors and no more; and a fourth, with the descriptors alone, that waits.
static volatile long *counts;
static char stacks[3][65536];
static void *count(void *place) {
    volatile long *mine = place;
    while (access("go", F_OK)) { ++*mine; usleep(500); }
    return 0;
}
static int work(void *at) {
    long number = (long)at;
    count((void *)&counts[2 * number]);
    return number;
}
static int idle(void *unused) { await("go"); return 0; }
int main(void) {
    counts = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, open("counts", O_RDWR | O_CREAT | O_TRUNC, 0600), 0);
    CHECK(!ftruncate(open("counts", O_RDWR), 4096));
    int all = CLONE_VM | CLONE_FILES | CLONE_FS | CLONE_SIGHAND | SIGCHLD;
    CHECK(clone(work, stacks[0] + 60000, all, (void *)1) > 0);
    CHECK(clone(work, stacks[1] + 60000, CLONE_VM | CLONE_FILES | SIGCHLD, (void *)2) > 0);
    CHECK(clone(idle, stacks[2] + 60000, CLONE_FILES | SIGCHLD, 0) > 0);
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) CHECK(!pthread_create(&threads[i], 0, count, (void *)&counts[2 * i + 1]));
    touch("ready");
    work(0);
    for (int i = 0; i < 3; i++) CHECK(!pthread_join(threads[i], 0));
    int status, sum = 0;
    while (waitpid(-1, &status, 0) > 0) { CHECK(WIFEXITED(status)); sum += WEXITSTATUS(status); }
    CHECK(sum == 3);
    return content();
}
"""


def test_a_dumper_that_is_killed_at_any_step(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        options = DumpOptions(leave_running=True)
        killed_again_and_again(program, seed, lambda images: dump(program.pid, images, options))
        program.restore(program.dump())
        program.finish()


def test_any_process_of_such_a_restore_is_killed(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        images = program.dump()
        all_steps = count_steps_of_all(lambda: restore(images))
        found = [(process, step) for process, total in sorted(all_steps.items()) for step in range(1, total + 1)]
        for process, step in found if LONG else random.Random(seed).sample(found, SAMPLE):
            images = end(program, images)
            kill_at(step, lambda images=images: restore(images), process)
            before = counts(tmp_path)
            where = f"process {process} was killed at step {step} of {all_steps[process]}"
            wait_for(partial(settled, program, before), f"{where}: half of the tree is left")
        program.restore(end(program, images))
        goes_on(program)
        program.finish()
