# SPDX-License-Identifier: Apache-2.0
"""Trees whose processes live in different mount namespaces, and whose dumper or restorer is killed: they go on, or
nothing of them is there, and nothing is mounted outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from stasis.linux.mountinfo import mount_table
from stasis.process.dump.job import DumpOptions, dump
from stasis.process.restore.job import restore
from tests.process.programs import goes_on, running
from tests.process.sandboxes import compiled_sandboxes
from tests.process.test_every_step import LONG, killed_again_and_again
from tests.process.test_every_step_inside import kill_everybody

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), *([pytest.mark.timeout(7200)] if LONG else [])]

COUNTING = r"""
// Three processes that count, two of them with mounts of their own; one has the other's, too.
int main(void) {
    int file = open("counts", O_RDWR | O_CREAT | O_TRUNC, 0600), number = 0;
    CHECK(!ftruncate(file, 4096) && !mkdir("own", 0700) && !mkdir("other", 0700));
    volatile long *counts = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    while (number < 2 && !fork()) {
        CHECK(!unshare(CLONE_NEWNS));
        if (!number) away();
        CHECK(!mount("own", number ? "other" : "own", "tmpfs", 0, 0));
        if (!number) CHECK(!mount(0, "own", 0, MS_SHARED, 0));
        close(made(number++ ? "other/file" : "own/file", "contents"));
    }
    if (number == 2) touch("ready");
    while (access("go", F_OK)) { ++counts[2 * number]; ++counts[2 * number + 1]; usleep(500); }
    CHECK(is("own/file", "contents") == (number > 0) && is("other/file", "contents") == (number == 2));
    int status;
    if (number < 2) CHECK(wait(&status) > 0 && !status);
    return number ? 0 : content();
}
"""


def _below(directory: Path) -> list[str]:
    return [mount.target for mount in mount_table() if mount.target.startswith(str(directory))]


def test_a_dumper_that_is_killed_at_any_step(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, compiled_sandboxes(tmp_path, COUNTING)) as program:
        options = DumpOptions(leave_running=True)
        killed_again_and_again(program, seed, lambda images: dump(program.pid, images, options))
        program.finish()


def test_any_process_of_the_restore(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, compiled_sandboxes(tmp_path, COUNTING)) as program:
        kill_everybody(program, seed, program.dump(), restore, lambda: program.dump())
        assert not _below(tmp_path)
        goes_on(program)
        program.finish()
