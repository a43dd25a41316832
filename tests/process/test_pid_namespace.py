# SPDX-License-Identifier: Apache-2.0
"""A tree comes back in a pid namespace of its own while its pids are taken, also many times at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux import procfs
from tests.process.programs import PATIENCE, compiled, running, stasis, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

FAMILY = r"""
// Knows its pids and those of its child and its thread, and looks for them in /proc.
static pid_t thread_id;
static void *second(void *unused) { thread_id = syscall(SYS_gettid); while (1) pause(); }
static void look(pid_t pid) {
    char path[64], found[64] = "";
    sprintf(path, "%d", pid);
    CHECK(getpid() == pid && readlink("/proc/self", found, 63) > 0 && !strcmp(found, path));
}
int main(void) {
    pid_t pid = getpid(), child = fork();
    if (!child) {
        pid_t own = getpid();
        await("go");
        CHECK(getppid() == pid);
        look(own);
        _exit(3);
    }
    pthread_t thread;
    pthread_create(&thread, 0, second, 0);
    while (!thread_id) usleep(3000);
    set_up();
    look(pid);
    char path[64];
    int status;
    sprintf(path, "/proc/%d/task/%d", pid, thread_id);
    CHECK(!access(path, F_OK) && waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 3);
    int file = open("count", O_WRONLY | O_CREAT | O_APPEND, 0600);
    CHECK(write(file, ".", 1) == 1);
    return content() + 7;
}
"""


def _inner(pid: int) -> int:
    return int(procfs.status(pid)["NSpid"].split()[-1])


def test_one_image_many_times(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        images = program.dump("--leave-running")
        said = stasis("restore", "--images", images, status=ExitCode.BUSY)
        assert "--pid-namespace" in said
        copies = [int(stasis("restore", "--images", images, "--pid-namespace")) for _ in range(2)]
        try:
            assert [_inner(pid) for pid in copies] == [program.pid] * 2
            assert len({program.pid, *copies}) == 3
            (tmp_path / "go").touch()
            wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in copies), "the copies do not end")
        finally:
            for pid in copies:
                _kill_init_of(pid)
        wait_for(lambda: (tmp_path / "count").stat().st_size == 3, "not all three were content")
        assert program.process.wait(60) == 7
        assert not (tmp_path / "errors").read_text()


def test_a_tree_in_a_namespace_is_dumped_again(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        pid = int(stasis("restore", "--images", program.dump(), "--pid-namespace"))
        again = tmp_path / "again"
        try:
            assert "can be dumped" in stasis("check", pid)
            stasis("dump", pid, "--images", tmp_path / "before", "--leave-running")
            assert "2 processes with 3 threads" in stasis("dump", pid, "--images", again)
            wait_for(lambda: not os.path.exists(f"/proc/{pid}"), "it does not end")
        finally:
            _kill_init_of(pid)
        program.restore(again)
        program.process.wait(60)
        (tmp_path / "go").touch()
        wait_for(lambda: (tmp_path / "content").exists() and not os.path.exists(f"/proc/{program.pid}"), "no end")
        assert not (tmp_path / "errors").read_text()


def test_attached_it_ends_with_the_status_of_the_first(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        images = program.dump()
        (tmp_path / "go").touch()
        command = [sys.executable, "-m", "stasis", "process", "restore", "--images", images, "--pid-namespace"]
        assert subprocess.run([*command, "--attach"], timeout=PATIENCE, check=False).returncode == 7


def test_a_restore_inside_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        images = program.dump()
        os.rename(tmp_path / "program", tmp_path / "elsewhere")
        said = stasis("restore", "--images", images, "--pid-namespace", status=ExitCode.STATE)
        assert "program" in said


def _kill_init_of(pid: int) -> None:
    """The first process of a namespace takes all others with it."""
    try:
        parent = procfs.stat(pid).ppid
    except ProcessLookupError:
        return
    os.kill(parent, 9)
