# SPDX-License-Identifier: Apache-2.0
"""Who is told of what happens on a description is told after a restore: a process, a group, a single thread."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process.programs import cycle

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

OWNERS = r"""
// Pipes that belong to a thread, to a process that is the child, and to the group; each has a signal of its own.
static volatile sig_atomic_t heard[65];
static volatile pid_t tid, told;
static void hear(int number, siginfo_t *info, void *context) { told = gettid(); heard[number] = info->si_fd + 1; }
static void *wait_in_thread(void *nothing) { tid = gettid(); while (1) pause(); }
static int owned(int kind, pid_t who, int number) {
    int ends[2];
    struct f_owner_ex owner = {kind, who};
    CHECK(!pipe(ends) && !fcntl(ends[0], F_SETOWN_EX, &owner) && !fcntl(ends[0], F_SETSIG, number));
    CHECK(!fcntl(ends[0], F_SETFL, O_ASYNC | O_NONBLOCK));
    return ends[0];
}
static void is_owned(int fd, int kind, pid_t who, int number) {
    struct f_owner_ex owner;
    CHECK(!fcntl(fd, F_GETOWN_EX, &owner) && owner.type == kind && owner.pid == who);
    CHECK(fcntl(fd, F_GETSIG) == number && fcntl(fd, F_GETFL) & O_ASYNC);
    CHECK(write(fd + 1, "x", 1) == 1);
}
int main(void) {
    struct sigaction action = {.sa_sigaction = hear, .sa_flags = SA_SIGINFO};
    for (int number = SIGRTMIN; number < SIGRTMIN + 4; number++) CHECK(!sigaction(number, &action, 0));
    pid_t child = fork();
    if (!child) {
        touch("child");
        while (!heard[SIGRTMIN + 1]) usleep(1000);
        touch("child-heard");
        await("go");
        _exit(0);
    }
    pthread_t thread;
    CHECK(!pthread_create(&thread, 0, wait_in_thread, 0));
    await("child");
    while (!tid) usleep(1000);
    int of_thread = owned(F_OWNER_TID, tid, SIGRTMIN), of_child = owned(F_OWNER_PID, child, SIGRTMIN + 1);
    int of_group = owned(F_OWNER_PGRP, getpgrp(), SIGRTMIN + 2);
    set_up();
    is_owned(of_thread, F_OWNER_TID, tid, SIGRTMIN);
    while (!heard[SIGRTMIN]) usleep(1000);
    CHECK(told == tid && heard[SIGRTMIN] == of_thread + 1);
    is_owned(of_child, F_OWNER_PID, child, SIGRTMIN + 1);
    await("child-heard");
    is_owned(of_group, F_OWNER_PGRP, getpgrp(), SIGRTMIN + 2);
    while (!heard[SIGRTMIN + 2]) usleep(1000);
    return content();
}
"""


def test_who_owns_a_description_is_told(tmp_path: Path) -> None:
    cycle(tmp_path, OWNERS)
