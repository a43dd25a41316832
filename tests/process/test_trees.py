# SPDX-License-Identifier: Apache-2.0
"""Process trees come back as trees: parents, groups, sessions, the dead and the stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux import procfs
from tests.process.programs import compiled, cycle, running, stasis, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

FAMILY = r"""
// A child, a grandchild in a group with it, both on pipes; the parent hears from both, and of their end.
int main(void) {
    int up[2], down[2];
    CHECK(!pipe(up) && !pipe(down));
    pid_t child = fork();
    if (!child) {
        setpgid(0, 0);
        pid_t grandchild = fork();
        if (!grandchild) {
            char byte;
            CHECK(read(down[0], &byte, 1) == 1 && byte == 'x');
            CHECK(getpgid(0) == getppid());
            CHECK(write(up[1], "g", 1) == 1);
            _exit(5);
        }
        touch("child");
        int status;
        CHECK(waitpid(grandchild, &status, 0) == grandchild && WEXITSTATUS(status) == 5);
        CHECK(getpgid(0) == getpid());
        CHECK(write(up[1], "c", 1) == 1);
        _exit(6);
    }
    await("child");
    set_up();
    char bytes[2];
    CHECK(getpgid(child) == child && getsid(child) == getpid());
    CHECK(write(down[1], "x", 1) == 1);
    CHECK(read(up[0], bytes, 1) == 1 && read(up[0], bytes + 1, 1) == 1);
    CHECK(bytes[0] == 'g' && bytes[1] == 'c');
    int status;
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 6);
    return content();
}
"""

SESSIONS = r"""
// A child in a session of its own with two members, and one that was born before its parent made its own.
int main(void) {
    pid_t old_session = getsid(0);
    pid_t leader = fork();
    if (!leader) {
        pid_t early = fork();
        if (!early) { await("go"); _exit(getsid(0) == old_session ? 1 : 2); }
        setsid();
        pid_t late = fork();
        if (!late) { setpgid(0, 0); touch("late"); await("go"); _exit(getsid(0) == getppid() ? 3 : 4); }
        int status;
        await("go");
        CHECK(waitpid(early, &status, 0) == early && WEXITSTATUS(status) == 1);
        CHECK(waitpid(late, &status, 0) == late && WEXITSTATUS(status) == 3);
        CHECK(getsid(0) == getpid());
        _exit(0);
    }
    await("late");
    set_up();
    int status;
    CHECK(waitpid(leader, &status, 0) == leader && status == 0);
    return content();
}
"""

DEAD_LEADERS = r"""
// Two processes whose session's leader is dead, and two whose group's is.
static pid_t group[2];
int main(void) {
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    pid_t leader = fork();
    if (!leader) {
        setsid();
        for (int i = 0; i < 2; i++)
            if (!fork()) { char name[2] = {'0' + i}; touch(name); await("go"); _exit(getsid(0)); }
        await("0"); await("1");
        _exit(0);
    }
    CHECK(waitpid(leader, 0, 0) == leader);
    for (int i = 0; i < 3; i++) {
        pid_t pid = fork();
        if (!i) { if (!pid) { await("end"); _exit(0); } group[0] = pid; CHECK(!setpgid(pid, pid)); continue; }
        if (!pid) { await("go"); _exit(getpgid(0)); }
        CHECK(!setpgid(pid, group[0]));
    }
    touch("end");
    CHECK(waitpid(group[0], 0, 0) == group[0]);
    set_up();
    int of_session = 0, of_group = 0, status;
    while (wait(&status) > 0) {
        of_session += WEXITSTATUS(status) == (leader & 0xff);
        of_group += WEXITSTATUS(status) == (group[0] & 0xff);
    }
    CHECK(of_session == 2 && of_group == 2);
    int found = 0;
    prctl(PR_GET_CHILD_SUBREAPER, &found);
    CHECK(found == 1);
    return content();
}
"""

DAEMON = r"""
// The usual daemon: its own leader is gone, and init is its parent.
int main(void) {
    if (fork()) _exit(0);
    setsid();
    pid_t session = getpid();
    if (fork()) _exit(0);
    while (getppid() == session) usleep(1000);
    dprintf(open("pid", O_CREAT | O_WRONLY, 0600), "%d", getpid());
    set_up();
    CHECK(getsid(0) == session && getpgid(0) == session);
    return content();
}
"""

HEADLESS = r"""
// The first thread ends, another one lives on.
static void *live(void *nothing) { set_up(); exit(content()); }
int main(void) {
    pthread_t thread;
    CHECK(!pthread_create(&thread, 0, live, 0));
    pthread_exit(0);
}
"""

THE_DEAD = r"""
// Zombies with a status, of a signal, and one that leads a group; their signals came and went.
static int heard;
static void hear(int number) { heard++; }
int main(void) {
    pid_t exited = fork();
    if (!exited) { prctl(PR_SET_NAME, "late one"); _exit(42); }
    pid_t killed = fork();
    if (!killed) { raise(SIGUSR2); }
    pid_t slain = fork();
    if (!slain) { setpgid(0, 0); kill(getpid(), SIGKILL); }
    siginfo_t info;
    CHECK(!waitid(P_PID, exited, &info, WEXITED | WNOWAIT));
    CHECK(!waitid(P_PID, killed, &info, WEXITED | WNOWAIT));
    CHECK(!waitid(P_PID, slain, &info, WEXITED | WNOWAIT));
    signal(SIGCHLD, hear);
    set_up();
    int status;
    CHECK(getpgid(slain) == slain);
    CHECK(waitpid(exited, &status, 0) == exited && WIFEXITED(status) && WEXITSTATUS(status) == 42);
    CHECK(waitpid(killed, &status, 0) == killed && WIFSIGNALED(status) && WTERMSIG(status) == SIGUSR2);
    CHECK(waitpid(slain, &status, 0) == slain && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    CHECK(heard == 0);
    return content();
}
"""

STOPPED = r"""
// A stopped child stays so, and goes on when it is told to.
int main(void) {
    pid_t child = fork();
    if (!child) { raise(SIGSTOP); _exit(9); }
    siginfo_t info;
    CHECK(!waitid(P_PID, child, &info, WSTOPPED));
    set_up();
    memset(&info, 0, sizeof info);
    while (info.si_pid != child) CHECK(!waitid(P_PID, child, &info, WSTOPPED | WEXITED | WNOWAIT));
    CHECK(info.si_code == CLD_STOPPED && info.si_status == SIGSTOP);
    CHECK(!kill(child, SIGCONT));
    int status;
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 9);
    return content();
}
"""


@pytest.mark.parametrize("code", [FAMILY, SESSIONS, DEAD_LEADERS, THE_DEAD, STOPPED],
                         ids=["family", "sessions", "dead leaders", "the dead", "stopped"])  # fmt: skip
def test_a_tree_comes_back(tmp_path: Path, code: str) -> None:
    cycle(tmp_path, code, times=2)


def test_a_daemon_comes_back_without_its_leader(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, DAEMON)) as program:
        program.pid = int((tmp_path / "pid").read_text())
        for _ in range(2):
            program.restore(program.dump())
        program.finish()


def test_a_first_thread_that_ended_is_named(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, HEADLESS)) as program:
        wait_for(lambda: procfs.stat(program.pid).state == "Z", "the thread did not end")
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert f"process {program.pid}: threads" in said
        (tmp_path / "go").touch()
        program.process.wait()
        assert (tmp_path / "content").exists()


ENDING = r"""
// Ends as soon as it runs, with children and threads that it takes along.
static void *live(void *nothing) { while (1) pause(); }
int main(void) {
    pthread_t thread;
    for (int i = 0; i < 8; i++) {
        pid_t child = fork();
        if (!child) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (int j = 0; j < 4; j++) pthread_create(&thread, 0, live, 0);
            live(0);
        }
    }
    for (int j = 0; j < 8; j++) pthread_create(&thread, 0, live, 0);
    touch("ready");
    await("go");
    _exit(7);
}
"""


def test_a_tree_that_ends_while_it_is_let_go(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, ENDING)) as program:
        images = program.dump()
        (tmp_path / "go").touch()
        stasis("restore", "--images", images, "--attach", status=7)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in program.pids), "a process is left")
