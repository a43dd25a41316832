# SPDX-License-Identifier: Apache-2.0
"""What processes share because a clone said so is shared after a restore: each of them sees what another one does."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stasis.errors import ExitCode
from stasis.linux.kcmp import Kcmp, compare
from stasis.process import tree
from stasis.process.dump.job import DumpOptions, dump
from stasis.process.images.imageset import ImageSet
from stasis.process.sharing import NAMES
from stasis.process.vforks import is_in_vfork
from tests.process.programs import compiled, cycle, running, stasis, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

# What two processes that share nothing but a file can tell each other, and what they find out.
COMMON = r"""
#include <sys/file.h>
#include <sys/mount.h>
static char stacks[8][65536];
static volatile int *board;  // shared memory: one word for each step of a play
static void board_up(void) { board = mmap(0, 4096, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0); CHECK(board != MAP_FAILED); }
static void say(int step, int value) { board[step] = value; }
static int hear(int step) { while (!board[step]) usleep(1000); return board[step]; }
static void number_of(char *name, int fd) { sprintf(name, "/proc/self/fd/%d", fd); }
static int is_open(int fd) { return fcntl(fd, F_GETFD) >= 0; }
static void nothing(int number) { }
static int in_tmp(void) { char name[256]; return getcwd(name, sizeof name) && !strcmp(name, "/tmp"); }
static void end_well(pid_t pid) {
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
"""

PLAY = r"""
// A child that shares what FLAGS say and nothing else: both look at what the other one does.
static int value = 1;
static int *heap;
static int live(void *unused) {
    hear(0);
    int fd = hear(1);
    CHECK(is_open(fd) == !!(FLAGS & CLONE_FILES));
    CHECK(in_tmp() == !!(FLAGS & CLONE_FS));
    struct sigaction action;
    CHECK(!sigaction(SIGUSR1, 0, &action));
    CHECK((action.sa_handler == nothing) == !!(FLAGS & CLONE_SIGHAND));
    CHECK((value == 2) == !!(FLAGS & CLONE_VM));
    CHECK((*heap == 3) == !!(FLAGS & CLONE_VM));
    CHECK(umask(077) == ((FLAGS & CLONE_FS) ? 027 : 022));
    CHECK(dup2(0, 40) == 40 && !chdir("/proc") && signal(SIGUSR2, nothing) != SIG_ERR);
    value = 4;
    say(2, 1);
    return 0;
}
int main(void) {
    board_up();
    heap = calloc(1, 1 << 20);
    umask(022);
    CHECK(open("file", O_CREAT | O_RDWR, 0600) == 3);
    pid_t child = clone(live, stacks[0] + sizeof stacks[0], FLAGS | SIGCHLD, 0);
    CHECK(child > 0);
    set_up();
    say(0, 1);
    int fd = dup(3);
    CHECK(!chdir("/tmp") && signal(SIGUSR1, nothing) == SIG_DFL);
    value = 2;
    *heap = 3;
    umask(027);
    say(1, fd);
    hear(2);
    char name[256];
    CHECK(is_open(40) == !!(FLAGS & CLONE_FILES));
    CHECK(getcwd(name, sizeof name) && !strcmp(name, "/proc") == !!(FLAGS & CLONE_FS));
    struct sigaction action;
    CHECK(!sigaction(SIGUSR2, 0, &action));
    CHECK((action.sa_handler == nothing) == !!(FLAGS & CLONE_SIGHAND));
    CHECK((value == 4) == !!(FLAGS & CLONE_VM));
    end_well(child);
    CHECK(!chdir("/proc/self/fd/3/..") || !chdir(getenv("HERE")));
    return content();
}
"""

FLAGS = {
    "files": "CLONE_FILES", "directory": "CLONE_FS", "files and directory": "CLONE_FILES|CLONE_FS",
    "memory": "CLONE_VM", "memory and files": "CLONE_VM|CLONE_FILES", "memory and directory": "CLONE_VM|CLONE_FS",
    "memory and handlers": "CLONE_VM|CLONE_SIGHAND", "all": "CLONE_VM|CLONE_SIGHAND|CLONE_FILES|CLONE_FS",
}  # fmt: skip


LONG = bool(os.environ.get("STASIS_LONG"))
CHOSEN = list(FLAGS) if LONG else ["files", "memory", "all"]


@pytest.mark.parametrize("flags", [FLAGS[name] for name in CHOSEN], ids=CHOSEN)
def test_what_a_child_shares_is_shared_again(tmp_path: Path, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    cycle(tmp_path, COMMON + PLAY, f"-DFLAGS=({flags})", times=2)


RELATIVES = r"""
// Tables and directories of a grandparent and of siblings, whose parents have others since.
static int open_and_tell(void *step) {
    hear(0);
    int at = (int)(long)step;
    CHECK(is_open(hear(at)) && in_tmp());
    int fd = dup(0);
    CHECK(fd >= 0);
    say(at + 1, fd + 1000);
    hear(9);
    return 0;
}
static int parent(void *unused) {
    pid_t grandchild = clone(open_and_tell, stacks[3] + 60000, CLONE_FILES | CLONE_FS | SIGCHLD, (void *)1);
    CHECK(grandchild > 0 && !unshare(CLONE_FILES | CLONE_FS));
    touch("unshared");
    hear(2);
    CHECK(!is_open(board[1]) && !in_tmp());
    end_well(grandchild);
    return 0;
}
static int elder(void *unused) {
    hear(0);
    int fd = dup(0);
    CHECK(!chdir("/tmp"));
    say(3, fd);
    CHECK(is_open(hear(4) - 1000));
    hear(9);
    return 0;
}
int main(void) {
    board_up();
    for (int fd = 0; fd < 10; fd++) dup2(0, fd + 50);
    pid_t first = clone(parent, stacks[0] + 60000, CLONE_FILES | CLONE_FS | SIGCHLD, 0);
    CHECK(first > 0);
    await("unshared");
    // Two that share with each other, with a process that is born between and shares with none.
    pid_t other = fork();
    if (!other) {
        pid_t one = clone(elder, stacks[1] + 60000, CLONE_FILES | CLONE_FS | SIGCHLD, 0);
        pid_t alone = fork();
        if (!alone) { hear(9); _exit(is_open(board[3]) || in_tmp()); }
        pid_t two = clone(open_and_tell, stacks[2] + 60000, CLONE_FILES | CLONE_FS | SIGCHLD, (void *)3);
        CHECK(one > 0 && two > 0 && !unshare(CLONE_FILES | CLONE_FS));
        touch("two");
        hear(4);
        CHECK(!is_open(board[3]) && !in_tmp());
        end_well(one); end_well(two); end_well(alone);
        _exit(0);
    }
    await("two");
    set_up();
    say(0, 1);
    int fd = dup(0);
    CHECK(!chdir("/tmp"));
    say(1, fd);
    CHECK(is_open(hear(2) - 1000));
    hear(4);
    say(9, 1);
    end_well(first); end_well(other);
    CHECK(!chdir(getenv("HERE")));
    return content();
}
"""

LINUX_THREADS = r"""
// A manager of threads that are processes: all share everything, one has threads of its own kind beside it, one is
// a sibling of those that share its memory, one leads a group, one is stopped.
enum { ALL = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND };
static volatile int counts[4];
static pid_t pids[4];
static _Thread_local int mine = 7;
static void *thread(void *at) { mine = 8; hear(0); CHECK(mine == 8); counts[0]++; return 0; }
static int worker(void *at) {
    int number = (int)(long)at;
    if (number == 1) CHECK(!setpgid(0, 0));
    if (number == 2) raise(SIGSTOP);
    hear(0);
    counts[number]++;
    return number;
}
static int manager(void *unused) {
    pids[1] = clone(worker, stacks[1] + 60000, ALL | SIGCHLD, (void *)1);
    pids[2] = clone(worker, stacks[2] + 60000, ALL | CLONE_PARENT, (void *)2);
    pids[3] = clone(worker, stacks[3] + 60000, CLONE_VM | SIGCHLD, (void *)3);
    int status;
    hear(0);
    CHECK(getpgid(pids[1]) == pids[1]);
    CHECK(waitpid(pids[1], &status, 0) == pids[1] && WEXITSTATUS(status) == 1);
    CHECK(waitpid(pids[3], &status, 0) == pids[3] && WEXITSTATUS(status) == 3);
    return 0;
}
int main(void) {
    board_up();
    pthread_t helper;
    pids[0] = clone(manager, stacks[0] + 60000, ALL | SIGCHLD, 0);
    CHECK(pids[0] > 0 && !pthread_create(&helper, 0, thread, 0));
    while (!pids[2] || !pids[3]) usleep(1000);
    siginfo_t info;
    CHECK(!waitid(P_PID, pids[2], &info, WSTOPPED | WNOWAIT));
    set_up();
    say(0, 1);
    CHECK(!kill(pids[2], SIGCONT) && !pthread_join(helper, 0));
    int status;
    CHECK(waitpid(pids[2], &status, 0) == pids[2] && WEXITSTATUS(status) == 2);
    end_well(pids[0]);
    CHECK(counts[0] == 1 && counts[1] == 1 && counts[2] == 1 && counts[3] == 1);
    return content();
}
"""


@pytest.mark.parametrize("code", [RELATIVES, LINUX_THREADS], ids=["relatives", "processes as threads"])
def test_relatives_share_again(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    cycle(tmp_path, COMMON + code, times=2)


VFORK = r"""
// Waits in the kernel for a child that uses its memory until it is told to go on.
int main(void) {
    touch("ready");
    pid_t child = vfork();
    if (!child) { while (access("exec", F_OK)) usleep(1000); execl("/bin/true", "true", (char *)0); _exit(127); }
    end_well(child);
    touch("over");
    await("go");
    return content();
}
"""


def _asleep(pid: int) -> bool:
    return is_in_vfork(pid, pid)


def test_a_vfork_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        (tmp_path / "exec").touch()
        wait_for((tmp_path / "over").exists, "the program does not run on")

    with running(tmp_path, compiled(tmp_path, COMMON + VFORK)) as program:
        wait_for(lambda: _asleep(program.pid), "there is no vfork")
        monkeypatch.setattr(tree, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))
        dump(program.pid, tmp_path / "images-0", DumpOptions(leave_running=True))
        assert pauses[0] == tree.MOMENTS[0]
        monkeypatch.undo()
        program.restore(program.dump())
        program.finish()


def test_a_vfork_that_goes_on_is_named(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, COMMON + VFORK)) as program:
        wait_for(lambda: _asleep(program.pid), "there is no vfork")
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert f"process {program.pid}: thread {program.pid}: it waits for a child" in said
        child = program.descendants()[-1]
        said = stasis("dump", child, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert f"process {child}: address space: it is shared with process {program.pid}" in said
        for name in "exec", "go":
            (tmp_path / name).touch()
        program.process.wait()


REFUSED = r"""
// A child with the memory of its parent, and a child of its own that has not.
static int live(void *unused) { if (!fork()) { touch("there"); await("go"); _exit(0); } await("go"); return 0; }
int main(void) {
    pid_t child = clone(live, stacks[0] + 60000, CLONE_VM | SIGCHLD, 0);
    CHECK(child > 0 && clone(live, stacks[1] + 60000, CLONE_FILES, 0) > 0);
    await("there");
    set_up();
    while (waitpid(-1, 0, __WALL) > 0);
    return content();
}
"""


def test_what_cannot_be_made_is_named(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, COMMON + REFUSED)) as program:
        wait_for(lambda: len(program.descendants()) == 5, "a process is missing")
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert "which has the address space of process" in said
        assert "its end is told by signal 0" in said
        (tmp_path / "go").touch()
        program.process.wait()


def test_it_is_in_the_images_once_and_shared_while_the_tree_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    with running(tmp_path, compiled(tmp_path, COMMON + PLAY, f"-DFLAGS=({FLAGS['all']})")) as program:
        stasis("pre-dump", program.pid, "--images", tmp_path / "before")
        images = program.dump("--leave-running", "--parent", str(tmp_path / "before"))
        first, second = program.pids
        assert not any(compare(kind, first, second) for kind in (Kcmp.VM, Kcmp.FILES, Kcmp.FS, Kcmp.SIGHAND))
        with ImageSet.open(images) as found:
            ids = [found.one("ids", pid) for pid in program.pids]
            assert [getattr(one, f"{kind}_id") for one in ids for kind in NAMES] == [2] * 8
            assert found.numbers("fdinfo") == [2]
            assert found.numbers("pagemap") == [first]
            assert found.numbers("mm") == sorted(program.pids)
        program.restore(program.dump())
        program.finish()


LOCKS = r"""
// A lock of a table that two processes have, who both map the file; and signals of a pipe that go to a process which
// another one has to make first.
static volatile int heard;
static int live(void *unused) {
    struct sigaction action = {.sa_handler = nothing};
    CHECK(!sigaction(SIGIO, &action, 0));
    hear(0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGIO);
    CHECK(sigwaitinfo(&set, 0) == SIGIO);
    heard = 1;
    return 0;
}
static int map_too(void *unused) { hear(0); CHECK(*(volatile char *)board == 1); return 0; }
int main(void) {
    board_up();
    int fd = open("file", O_CREAT | O_RDWR, 0600), ends[2];
    CHECK(!ftruncate(fd, 4096) && mmap(0, 4096, 3, MAP_SHARED, fd, 0) != MAP_FAILED);
    struct flock lock = {.l_type = F_WRLCK, .l_start = 5, .l_len = 7};
    CHECK(!fcntl(fd, F_SETLK, &lock) && !pipe(ends));
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGIO);
    CHECK(!sigprocmask(SIG_BLOCK, &set, 0));
    int pidfd;
    pid_t first = clone(map_too, stacks[0] + 60000, CLONE_FILES | SIGCHLD, 0);
    pid_t second = clone(live, stacks[1] + 60000, CLONE_VM | CLONE_PIDFD | SIGCHLD, 0, &pidfd);
    CHECK(first > 0 && second > 0 && !fcntl(ends[0], F_SETOWN, second));
    CHECK(!fcntl(ends[0], F_SETFL, O_ASYNC));
    set_up();
    pid_t other = fork();
    if (!other) {
        struct flock found = {.l_type = F_WRLCK};
        CHECK(!fcntl(fd, F_GETLK, &found) && found.l_type == F_WRLCK && found.l_start == 5 && found.l_len == 7);
        _exit(0);
    }
    end_well(other);
    CHECK(fcntl(ends[0], F_GETOWN) == second);
    say(0, 1);
    CHECK(write(ends[1], "x", 1) == 1);
    end_well(first);
    siginfo_t info;
    CHECK(!waitid(3 /* P_PIDFD */, pidfd, &info, WEXITED) && info.si_pid == second && info.si_status == 0);
    CHECK(fcntl(pidfd, F_GETFD) == FD_CLOEXEC);
    CHECK(heard);
    return content();
}
"""


def test_locks_of_a_table_and_descriptors_of_processes_that_are_made_late(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, COMMON + LOCKS)) as program:
        for _ in range(2):
            program.restore(program.dump("--file-locks"))
        program.finish()


def test_a_copy_in_a_pid_namespace_shares_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    with running(tmp_path, compiled(tmp_path, COMMON + LINUX_THREADS)) as program:
        images = program.dump("--leave-running")
        made = json.loads(stasis("restore", "--images", images, "--pid-namespace", "--json"))
        copies = made["pids"]
        program.pids += [made["init"], *copies]
        assert len(copies) == 5
        assert len({compare(Kcmp.VM, copies[0], pid) for pid in copies}) == 1
        assert sum(compare(Kcmp.FILES, copies[0], pid) == 0 for pid in copies) == 4
        assert compare(Kcmp.VM, program.pid, copies[0])
        program.finish()
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in copies), "the copy did not end")
        errors = (tmp_path / "errors").read_text()
        assert not errors, errors
