# SPDX-License-Identifier: Apache-2.0
"""System call filters count after a restore as before, for each thread its own, and never for what a dump does."""

from __future__ import annotations

from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.process.programs import compiled, cycle, running, stasis

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

FILTERS = r"""
#include <linux/filter.h>
#include <linux/seccomp.h>
#define BPF(...) (struct sock_filter)__VA_ARGS__
// One call gets an answer of the filter's.
static void answer(int number, unsigned action, unsigned flags) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program) == 0);
}
static int error_of(long result) { return result < 0 ? errno : 0; }
static volatile int stage;
static void *second(void *unused) {
    answer(SYS_getppid, SECCOMP_RET_ERRNO | 78, 0);
    answer(SYS_getuid, SECCOMP_RET_ERRNO | 79, 0);
    stage = 1;
    while (stage != 2) usleep(3000);
    CHECK(error_of(syscall(SYS_getppid)) == 78 && error_of(syscall(SYS_getuid)) == 79);
    CHECK(error_of(syscall(SYS_getgid)) == 77);
    return 0;
}
int main(int argc, char **argv) {
    if (argc > 1) CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    // What a dump does inside: it ends the process if it is not suspended.
    answer(SYS_munmap, SECCOMP_RET_KILL_PROCESS, 0);
    answer(SYS_getitimer, SECCOMP_RET_KILL_PROCESS, 0);
    answer(SYS_getgid, SECCOMP_RET_ERRNO | 77, SECCOMP_FILTER_FLAG_LOG);
    int there[2], back[2];
    CHECK(!pipe(there) && !pipe(back));
    pid_t strict = fork();
    pthread_t thread;
    CHECK(!pthread_create(&thread, 0, second, 0));
    while (stage != 1) usleep(3000);
    set_up();
    CHECK(error_of(syscall(SYS_getgid)) == 77 && error_of(syscall(SYS_getuid)) == 0);
    if (!strict) {
        CHECK(syscall(SYS_getppid) > 0);
        _exit(0);
    }
    stage = 2;
    CHECK(!pthread_join(thread, 0));
    int status;
    CHECK(waitpid(strict, &status, 0) == strict && WIFEXITED(status));
    CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == argc - 1);
    if (!(strict = fork())) syscall(SYS_munmap, 0, 4096);
    CHECK(waitpid(strict, &status, 0) == strict && WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
    return content();
}
"""

STRICT = r"""
#include <linux/seccomp.h>
int main(void) {
    int there[2], back[2], status;
    char byte;
    CHECK(!pipe(there) && !pipe(back));
    pid_t child = fork();
    if (!child) {
        CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0));
        if (write(back[1], "1", 1) != 1 || read(there[0], &byte, 1) != 1 || write(back[1], &byte, 1) != 1)
            syscall(SYS_exit, 1);
        syscall(SYS_getpid);
    }
    CHECK(read(back[0], &byte, 1) == 1);
    set_up();
    CHECK(write(there[1], "x", 1) == 1 && read(back[0], &byte, 1) == 1 && byte == 'x');
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    return content();
}
"""

SUPERVISED = r"""
#include <linux/filter.h>
#include <linux/seccomp.h>
int main(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, code};
    int fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
    CHECK(fd >= 0 && !close(fd));
    set_up();
    return content();
}
"""


@pytest.mark.parametrize("privileged", [True, False])
def test_filters_of_threads_and_children(tmp_path: Path, privileged: bool) -> None:
    with running(tmp_path, compiled(tmp_path, FILTERS), *([] if privileged else ["no_new_privs"])) as program:
        program.restore(program.dump())
        program.finish()


def test_strict_mode(tmp_path: Path) -> None:
    cycle(tmp_path, STRICT)


def test_a_supervisor_is_named(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, SUPERVISED)) as program:
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert "another process decides about its system calls" in said
        program.finish()
