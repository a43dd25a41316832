# SPDX-License-Identifier: Apache-2.0
"""Chains of dumps of a tree with namespaces of its own: what it wrote is known from one command to the next, and its
keeper is none of its processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.process.images.imageset import ImageSet
from stasis.process.images.pagemap import PAGE_SIZE, PE_PARENT, Pagemap
from tests.process.containers import Container, container, setup_script
from tests.process.programs import compiled, stasis, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), pytest.mark.tool("unshare")]

WRITING = r"""
// 4 MiB that a parent and a child have each for themselves, and change a little when they are told.
enum { SIZE = 4 << 20 };
static unsigned char *memory;
static void work(int number) {
    for (int round = 1; round < 4; round++) {
        char name[20];
        for (int i = 0; i < SIZE; i++) CHECK(memory[i] == (i % 40960 < round ? number + i % 40960 : 9));
        sprintf(name, "told-%d", round);
        while (access(name, F_OK) && access("go", F_OK)) usleep(2000);
        if (access(name, F_OK)) break;
        for (int i = round; i < SIZE; i += 40960) memory[i] = number + round;
        sprintf(name, "done-%d-%d", round, number);
        touch(name);
    }
}
int main(void) {
    memory = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(memory, 9, SIZE);
    for (int i = 0; i < SIZE; i += 40960) memory[i] = 1;
    pid_t child = fork();
    if (!child) {
        for (int i = 0; i < SIZE; i += 40960) memory[i] = 5;
        touch("up");
        work(5);
        await("go");
        _exit(3);
    }
    await("up");
    touch("ready");
    work(1);
    await("go");
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    return content();
}
"""


def _write(directory: Path, number: int) -> None:
    (directory / f"told-{number}").touch()
    for who in (1, 5):
        done = directory / f"done-{number}-{who}"
        wait_for(done.exists, "it does not write")


def _left_to_parent(images: Path) -> int:
    """Pages of the tree that are in the parent."""
    with ImageSet.open(images) as found:
        pids = [entry.pid for entry in found.messages("pstree")]
        pagemaps = [Pagemap.read(found, pid) for pid in pids]
        return sum((run.end - run.start) // PAGE_SIZE for pagemap in pagemaps if pagemap is not None for run in pagemap
                   if run.flags & PE_PARENT)  # fmt: skip


def _alone(directory: Path) -> Path:
    compiled(directory, WRITING)
    return setup_script(directory)


def _finish(program: Container, images: Path) -> None:
    wait_for(lambda: not os.path.exists(f"/proc/{program.pid}"), "the first process did not end")
    program.restore(images)
    program.finish()


def test_pre_dumps_of_a_container(tmp_path: Path) -> None:
    with container(tmp_path, "-pmn", "--mount-proc", "sh", _alone(tmp_path)) as program:
        stasis("pre-dump", program.pid, "--images", tmp_path / "first")
        _write(tmp_path, 1)
        stasis("pre-dump", program.pid, "--images", tmp_path / "second", "--parent", tmp_path / "first")
        _write(tmp_path, 2)
        stasis("dump", program.pid, "--images", tmp_path / "last", "--parent", tmp_path / "second")
        assert _left_to_parent(tmp_path / "last") > 1500
        _finish(program, tmp_path / "last")


def test_a_container_is_watched_on(tmp_path: Path) -> None:
    with container(tmp_path, "-pm", "--mount-proc", "sh", _alone(tmp_path)) as program:
        stasis("dump", program.pid, "--images", tmp_path / "first", "--leave-running", "--track")
        _write(tmp_path, 1)
        stasis("dump", program.pid, "--images", tmp_path / "last", "--parent", tmp_path / "first")
        assert _left_to_parent(tmp_path / "last") > 1500
        _finish(program, tmp_path / "last")


def test_a_tree_with_a_network_of_its_own_is_known_by_its_keeper(tmp_path: Path) -> None:
    with container(tmp_path, "-n", compiled(tmp_path, WRITING)) as program:
        stasis("pre-dump", program.pid, "--images", tmp_path / "first")
        _write(tmp_path, 1)
        stasis("dump", program.pid, "--images", tmp_path / "last", "--parent", tmp_path / "first")
        assert _left_to_parent(tmp_path / "last") > 1500
        _finish(program, tmp_path / "last")
