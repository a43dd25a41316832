# SPDX-License-Identifier: Apache-2.0
"""A thread that gets its own system calls as signals: ours within it would cost it the handler for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.process.programs import compiled, running, stasis

TELLS = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 4)
pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"),
              pytest.mark.skipif(not TELLS, reason="this kernel tells nobody of it")]

DISPATCHING = r"""
static volatile char selector;
static volatile int handled, stop;
static void dispatch(volatile char *selector) {
    if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, selector)) exit(77);
}
static void handle(int number) { handled++; selector = 0; }
static void *second(void *unused) {
    struct sigaction action = {.sa_handler = handle};
    CHECK(!sigaction(SIGSYS, &action, 0));
    dispatch(&selector);
    while (!stop) {
        int before = handled;
        selector = 1;
        for (volatile int i = 0; i < 1000000; i++);  // a stop comes here, nearly always
        syscall(SYS_getppid);
        CHECK(handled == before + 1);
        usleep(300);
    }
    return 0;
}
int main(void) {
    static volatile char always_allowed;
    dispatch(&always_allowed);
    pthread_t thread;
    CHECK(!pthread_create(&thread, 0, second, 0));
    while (!handled) usleep(1000);
    set_up();
    stop = 1;
    CHECK(!pthread_join(thread, 0));
    return content();
}
"""


def test_a_thread_that_handles_its_own_system_calls_is_named_and_unharmed(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, DISPATCHING)) as program:
        for number in range(3):
            stasis("check", program.pid, status=ExitCode.UNSUPPORTED)
            for command in "dump", "pre-dump":
                told = stasis(command, program.pid, "--images", tmp_path / f"{command}-{number}",
                              status=ExitCode.UNSUPPORTED)
                assert "PR_SET_SYSCALL_USER_DISPATCH" in told
        program.finish()
