# SPDX-License-Identifier: Apache-2.0
"""System calls that a dump interrupts: they are repeated, or end with EINTR, as after a signal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.process.programs import compiled, running

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

CALLS = r"""
// Threads that wait in system calls: with a time, which may end with EINTR after a restore, and without.
#include <linux/futex.h>
static int word, ends[2];
static volatile int at_work;
static void *in_read(void *nothing) {
    char byte = 0;
    at_work++;
    CHECK(read(ends[0], &byte, 1) == 1 && byte == 'x');
    return 0;
}
static void *in_futex(void *nothing) {
    at_work++;
    while (!__atomic_load_n(&word, __ATOMIC_SEQ_CST))
        CHECK(!syscall(SYS_futex, &word, FUTEX_WAIT, 0, 0, 0, 0) || errno == EAGAIN || errno == EINTR);
    return 0;
}
static void *in_poll(void *nothing) {
    struct pollfd none = {.fd = -1};
    at_work++;
    int found = poll(&none, 1, 1000000);
    CHECK(found == -1 && errno == EINTR);
    return 0;
}
static void *in_sleep(void *nothing) {
    struct timespec time = {1000, 0}, left = {0};
    at_work++;
    CHECK(nanosleep(&time, &left) == -1 && errno == EINTR);
    return 0;
}
static void *in_sigwait(void *nothing) {
    sigset_t set;
    siginfo_t info;
    sigemptyset(&set); sigaddset(&set, SIGUSR1);
    at_work++;
    while (sigwaitinfo(&set, &info) != SIGUSR1) CHECK(errno == EINTR);
    return 0;
}
static void *in_no_call(void *nothing) {
    at_work++;
    while (access("go", F_OK)) for (volatile int i = 0; i < 1000000; i++);
    return 0;
}
int main(void) {
    void *(*works[])(void *) = {in_read, in_futex, in_sigwait, in_no_call, in_poll, in_sleep};
    pthread_t threads[6];
    sigset_t set;
    sigemptyset(&set); sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, 0);
    CHECK(!pipe(ends));
    for (int i = 0; i < 6; i++) CHECK(!pthread_create(&threads[i], 0, works[i], 0));
    while (at_work < 6) usleep(1000);
    usleep(50000);
    set_up();
    CHECK(write(ends[1], "x", 1) == 1);
    __atomic_store_n(&word, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &word, FUTEX_WAKE, 1, 0, 0, 0);
    kill(getpid(), SIGUSR1);
    for (int i = 0; i < 6; i++) CHECK(!pthread_join(threads[i], 0));
    return content();
}
"""


def test_calls_go_on_or_say_that_they_were_interrupted(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, CALLS)) as program:
        program.dump("--leave-running")
        program.restore(program.dump())
        program.finish()


SEQUENCES = r"""
// Two threads of one processor count one counter up in restartable sequences: none may go on with what it had read.
#include <sys/rseq.h>
static volatile uint64_t counter, own[2];
static volatile int stop;
static void add_one(char *area) {
    __asm__ volatile(
        ".pushsection .data.sequences, \"aw\"\n .balign 32\n 9: .long 0, 0\n .quad 2f, 4f - 2f, 5f\n .popsection\n"
        "1: leaq 9b(%%rip), %%rax\n movq %%rax, 8(%[area])\n"
        "2: movq %[counter], %%rcx\n movl $30000, %%edx\n 3: decl %%edx\n jnz 3b\n"
        "incq %%rcx\n movq %%rcx, %[counter]\n"
        "4: jmp 6f\n .long 0x53053053\n 5: jmp 1b\n 6:\n"
        : [counter] "+m"(counter) : [area] "r"(area) : "rax", "rcx", "rdx", "memory", "cc");
}
static void *work(void *number) {
    cpu_set_t set;
    CPU_ZERO(&set); CPU_SET(0, &set);
    CHECK(!sched_setaffinity(0, sizeof set, &set));
    while (!stop) { add_one((char *)__builtin_thread_pointer() + __rseq_offset); own[(long)number]++; }
    return 0;
}
int main(void) {
    pthread_t threads[2];
    if (!__rseq_size) touch("none");
    for (long i = 0; i < 2; i++) CHECK(!pthread_create(&threads[i], 0, work, (void *)i));
    while (__rseq_size && (!own[0] || !own[1])) usleep(1000);
    set_up();
    stop = 1;
    for (int i = 0; i < 2; i++) CHECK(!pthread_join(threads[i], 0));
    CHECK(counter == own[0] + own[1]);
    return content();
}
"""


def test_a_restartable_sequence_begins_again(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, SEQUENCES, "-no-pie")) as program:
        if (tmp_path / "none").exists():
            pytest.skip("this C library does not use rseq")
        for _ in range(4):
            program.dump("--leave-running")
        images = program.dump()
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {0})  # images do not know it, and the restored threads inherit it
        try:
            program.restore(images)
        finally:
            os.sched_setaffinity(0, before)
        program.finish()
