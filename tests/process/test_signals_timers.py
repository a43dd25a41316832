# SPDX-License-Identifier: Apache-2.0
"""Signals, timers, limits, credentials and registers are after a restore what they were."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from tests.process.programs import compiled, cycle, running

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

SIGNALS = r"""
// Handlers with flags and masks, masks and alternate stacks per thread, signals that wait with what came with them.
static volatile int heard[65], values[65];
static void hear(int number, siginfo_t *info, void *context) {
    char here;
    heard[number]++; values[number] = info->si_value.sival_int;
    stack_t stack;
    sigaltstack(0, &stack);
    if (number == SIGRTMIN + 2) CHECK(&here >= (char *)stack.ss_sp && &here < (char *)stack.ss_sp + stack.ss_size);
}
static pthread_barrier_t barrier;
static void *other(void *nothing) {
    sigset_t mask, old;
    stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536}, found;
    CHECK(!sigaltstack(&stack, 0));
    sigemptyset(&mask); sigaddset(&mask, SIGRTMIN + 1); sigaddset(&mask, SIGHUP); sigaddset(&mask, SIGRTMIN + 2);
    sigaddset(&mask, SIGRTMIN); sigaddset(&mask, SIGUSR1);
    CHECK(!pthread_sigmask(SIG_SETMASK, &mask, 0));
    CHECK(!prctl(PR_SET_NAME, "the other one"));
    union sigval value = {.sival_int = 77};
    CHECK(!pthread_sigqueue(pthread_self(), SIGRTMIN + 1, value));
    CHECK(!pthread_kill(pthread_self(), SIGRTMIN + 2));
    pthread_barrier_wait(&barrier);
    await("go");
    CHECK(!heard[SIGRTMIN + 1] && !heard[SIGRTMIN + 2]);
    char name[16];
    CHECK(!prctl(PR_GET_NAME, name) && !strcmp(name, "the other one"));
    CHECK(!sigaltstack(0, &found) && found.ss_sp == stack.ss_sp && found.ss_size == 65536);
    CHECK(!pthread_sigmask(SIG_SETMASK, 0, &old) && !memcmp(&mask, &old, 8));
    sigdelset(&mask, SIGRTMIN + 1); sigdelset(&mask, SIGRTMIN + 2);
    CHECK(!pthread_sigmask(SIG_SETMASK, &mask, 0));
    CHECK(heard[SIGRTMIN + 1] == 1 && values[SIGRTMIN + 1] == 77 && heard[SIGRTMIN + 2] == 1);
    return 0;
}
int main(void) {
    struct sigaction action = {.sa_sigaction = hear, .sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK}, found;
    sigaddset(&action.sa_mask, SIGUSR2);
    for (int number = SIGRTMIN; number < SIGRTMIN + 3; number++) CHECK(!sigaction(number, &action, 0));
    CHECK(!sigaction(SIGUSR1, &action, 0));
    signal(SIGHUP, SIG_IGN);
    action.sa_handler = SIG_DFL; action.sa_flags = SA_NOCLDWAIT;
    CHECK(!sigaction(SIGCHLD, &action, 0));
    pthread_t thread;
    pthread_barrier_init(&barrier, 0, 2);
    CHECK(!pthread_create(&thread, 0, other, 0));
    pthread_barrier_wait(&barrier);
    sigset_t mask;
    sigemptyset(&mask); sigaddset(&mask, SIGUSR1); sigaddset(&mask, SIGRTMIN);
    CHECK(!pthread_sigmask(SIG_SETMASK, &mask, 0));
    for (int i = 1; i < 4; i++) {
        union sigval value = {.sival_int = i};
        CHECK(!sigqueue(getpid(), SIGRTMIN, value));
    }
    kill(getpid(), SIGUSR1);
    prctl(PR_SET_PDEATHSIG, SIGWINCH);
    set_up();
    CHECK(!sigaction(SIGRTMIN, 0, &found) && found.sa_sigaction == hear && found.sa_flags & SA_ONSTACK);
    CHECK(sigismember(&found.sa_mask, SIGUSR2) == 1 && sigismember(&found.sa_mask, SIGTERM) == 0);
    CHECK(!sigaction(SIGHUP, 0, &found) && found.sa_handler == SIG_IGN);
    CHECK(!sigaction(SIGCHLD, 0, &found) && found.sa_handler == SIG_DFL && found.sa_flags & SA_NOCLDWAIT);
    CHECK(!sigaction(SIGTERM, 0, &found) && found.sa_handler == SIG_DFL);
    struct timespec none = {0};
    siginfo_t info;
    sigset_t queued;
    sigemptyset(&queued); sigaddset(&queued, SIGRTMIN);
    for (int i = 1; i < 4; i++)
        CHECK(sigtimedwait(&queued, &info, &none) == SIGRTMIN && info.si_value.sival_int == i
              && info.si_code == SI_QUEUE);
    CHECK(sigtimedwait(&queued, &info, &none) == -1 && errno == EAGAIN);
    CHECK(!heard[SIGUSR1]);
    CHECK(!pthread_sigmask(SIG_UNBLOCK, &mask, 0));
    CHECK(heard[SIGUSR1] == 1);
    int signal_of_death = 0;
    CHECK(!prctl(PR_GET_PDEATHSIG, &signal_of_death) && signal_of_death == SIGWINCH);
    CHECK(!pthread_join(thread, 0));
    return content();
}
"""

TIMERS = r"""
// Interval timers, POSIX timers with gaps in their numbers, for the process and for a thread.
static pid_t tid_of_other;
static pthread_barrier_t barrier;
static volatile int ticks[65];
static volatile pid_t told[65];
static void tick(int number, siginfo_t *info, void *context) { ticks[number]++; told[number] = gettid(); }
static void *other(void *nothing) {
    tid_of_other = gettid();
    pthread_barrier_wait(&barrier);
    await("go");
    while (!ticks[SIGRTMIN + 1]) usleep(1000);
    return 0;
}
int main(void) {
    struct sigaction action = {.sa_sigaction = tick, .sa_flags = SA_SIGINFO | SA_RESTART};
    for (int number = SIGRTMIN; number < SIGRTMIN + 3; number++) CHECK(!sigaction(number, &action, 0));
    CHECK(!sigaction(SIGALRM, &action, 0) && !sigaction(SIGVTALRM, &action, 0));
    pthread_t thread;
    pthread_barrier_init(&barrier, 0, 2);
    CHECK(!pthread_create(&thread, 0, other, 0));
    pthread_barrier_wait(&barrier);
    int ids[6];
    for (int i = 0; i < 6; i++) {
        struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
        event.sigev_value.sival_int = i;
        if (i == 3) {
            event.sigev_notify = SIGEV_THREAD_ID; event.sigev_signo = SIGRTMIN + 1;
            event._sigev_un._tid = tid_of_other;
        }
        if (i == 4) event.sigev_notify = SIGEV_NONE;
        CHECK(!syscall(SYS_timer_create, i == 5 ? CLOCK_REALTIME : CLOCK_MONOTONIC, &event, &ids[i]));
    }
    CHECK(!syscall(SYS_timer_delete, ids[1]) && !syscall(SYS_timer_delete, ids[0]));
    struct itimerspec later = {{500, 5}, {1000, 0}}, found, soon = {{0, 20000000}, {0, 1000000}}, none = {{0}};
    CHECK(!syscall(SYS_timer_settime, ids[2], 0, &later, 0));
    CHECK(!syscall(SYS_timer_settime, ids[4], 0, &later, 0));
    struct itimerval fast = {{0, 20000}, {0, 20000}}, slow = {{7, 0}, {3000, 0}}, value;
    CHECK(!setitimer(ITIMER_REAL, &fast, 0) && !setitimer(ITIMER_PROF, &slow, 0));
    CHECK(!syscall(SYS_timer_settime, ids[3], 0, &none, 0));
    set_up();
    CHECK(syscall(SYS_timer_gettime, ids[1], &found) == -1 && errno == EINVAL);
    CHECK(!syscall(SYS_timer_gettime, ids[2], &found));
    CHECK(found.it_interval.tv_sec == 500 && found.it_interval.tv_nsec == 5);
    CHECK(found.it_value.tv_sec > 800 && found.it_value.tv_sec < 1000);
    CHECK(!syscall(SYS_timer_gettime, ids[4], &found) && found.it_value.tv_sec > 800);
    CHECK(!syscall(SYS_timer_gettime, ids[5], &found) && !found.it_value.tv_sec && !found.it_interval.tv_sec);
    CHECK(!getitimer(ITIMER_PROF, &value) && value.it_interval.tv_sec == 7 && value.it_value.tv_sec > 2000);
    CHECK(!getitimer(ITIMER_REAL, &value) && value.it_interval.tv_usec == 20000);
    int before = ticks[SIGALRM];
    while (ticks[SIGALRM] < before + 3) usleep(1000);
    CHECK(!syscall(SYS_timer_settime, ids[3], 0, &soon, 0));
    CHECK(!pthread_join(thread, 0));
    CHECK(told[SIGRTMIN + 1] == tid_of_other);
    return content();
}
"""

LIMITS = r"""
int main(void) {
    struct rlimit files = {100, 1000}, core = {0, 4096}, stack = {4 << 20, RLIM_INFINITY}, found;
    CHECK(!setrlimit(RLIMIT_NOFILE, &files) && !setrlimit(RLIMIT_CORE, &core));
    CHECK(!getrlimit(RLIMIT_STACK, &stack));
    stack.rlim_cur = 4 << 20;
    CHECK(!setrlimit(RLIMIT_STACK, &stack));
    CHECK(!setpriority(PRIO_PROCESS, 0, 7));
    umask(0136);
    dprintf(open("/proc/self/oom_score_adj", O_WRONLY), "345");
    CHECK(!prctl(PR_SET_NAME, "a) (name"));
    CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1) && !prctl(PR_SET_DUMPABLE, 0));
    enum { BARRIER = 1 << 3, REGISTER = 1 << 4, OTHER_BARRIER = 1 << 5 };  // linux/membarrier.h
    CHECK(!syscall(SYS_membarrier, REGISTER, 0, 0));
    set_up();
    CHECK(!syscall(SYS_membarrier, BARRIER, 0, 0));
    CHECK(syscall(SYS_membarrier, OTHER_BARRIER, 0, 0) == -1 && errno == EPERM);
    CHECK(!getrlimit(RLIMIT_NOFILE, &found) && found.rlim_cur == 100 && found.rlim_max == 1000);
    CHECK(!getrlimit(RLIMIT_CORE, &found) && found.rlim_cur == 0 && found.rlim_max == 4096);
    CHECK(!getrlimit(RLIMIT_STACK, &found) && found.rlim_cur == 4 << 20 && found.rlim_max == stack.rlim_max);
    CHECK(getpriority(PRIO_PROCESS, 0) == 7);
    CHECK(umask(0) == 0136);
    char text[16] = "";
    CHECK(read(open("/proc/self/oom_score_adj", O_RDONLY), text, 16) > 0 && atoi(text) == 345);
    CHECK(!prctl(PR_GET_NAME, text) && !strcmp(text, "a) (name"));
    int reaper = 0;
    CHECK(!prctl(PR_GET_CHILD_SUBREAPER, &reaper) && reaper == 1 && !prctl(PR_GET_DUMPABLE));
    return content();
}
"""

CREDENTIALS = r"""
// What the kernel says of the credentials of each thread is the same before and after.
static void state(char *text, pid_t tid) {
    char path[64], line[256];
    sprintf(path, "/proc/self/task/%d/status", tid);
    FILE *file = fopen(path, "r");
    text[0] = 0;
    while (fgets(line, sizeof line, file))
        if (!strncmp(line, "Uid", 3) || !strncmp(line, "Gid", 3) || !strncmp(line, "Groups", 6) ||
            !strncmp(line, "Cap", 3) || !strncmp(line, "NoNew", 5)) strcat(text, line);
    fclose(file);
    sprintf(line, "%d %d", prctl(PR_GET_SECUREBITS), prctl(PR_GET_DUMPABLE));
    strcat(text, line);
}
static void *other(void *nothing) { await("end"); return 0; }
int main(int count, char **words) {
    char before[2048], after[2048], others[2048];
    pthread_t thread;
    CHECK(!pthread_create(&thread, 0, other, 0));
#ifdef KEEP
    // A user with capabilities: one in use, one inheritable and ambient, one out of bounds.
    struct { uint32_t version; int pid; } head = {0x20080522, 0};
    struct { uint32_t effective, permitted, inheritable; } sets[2] = {{1 << 10, 1 << 10 | 1 << 13, 1 << 13}, {0, 0, 0}};
    gid_t groups[] = {5, 7};
    CHECK(!syscall(SYS_setgroups, 2, groups) && !prctl(PR_CAPBSET_DROP, 2) && !prctl(PR_SET_KEEPCAPS, 1));
    CHECK(!syscall(SYS_setresgid, 1001, 1002, 1003) && !syscall(SYS_setresuid, 1001, 1002, 1003));
    syscall(SYS_setfsuid, 1003);
    CHECK(!syscall(SYS_capset, &head, sets) && !prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 13, 0, 0));
#endif
    CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    pid_t tid = 0;
    char name[16];
    state(before, getpid());
    set_up();
    state(after, getpid());
    if (strcmp(before, after)) dprintf(2, "was\n%s\nis\n%s\n", before, after);
    touch("end");
    CHECK(!pthread_join(thread, 0));
    return content();
}
"""

REGISTERS = r"""
// x87, SSE and AVX registers, the rounding mode and the direction flag, in a loop without a system call.
int main(void) {
    __attribute__((aligned(32))) uint64_t wide[4] = {1, 2, 3, 4}, seen[4] = {0};
    double value = 1.0 / 3, back = 0;
    unsigned control = 0x7f80, found = 0;
    volatile int *stop = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, open("stop", O_RDWR | O_CREAT, 0600), 0);
    CHECK(!ftruncate(open("stop", O_RDWR), 4096));
    touch("ready");
    __asm__ volatile(
        "ldmxcsr %[control]\n fldl %[value]\n fldl %[value]\n vmovdqa %[wide], %%ymm9\n std\n"
        "1: cmpl $0, (%[stop])\n pause\n je 1b\n"
        "cld\n vmovdqa %%ymm9, %[seen]\n faddp\n fstpl %[back]\n stmxcsr %[found]\n vzeroupper\n"
        : [seen] "=m"(seen), [back] "=m"(back), [found] "=m"(found)
        : [control] "m"(control), [value] "m"(value), [wide] "m"(wide), [stop] "r"(stop)
        : "xmm9", "st", "st(1)", "memory", "cc");
    CHECK(!memcmp(wide, seen, 32));
    CHECK(back == value + value);
    CHECK(found == control);
    return content();
}
"""


@pytest.mark.parametrize("code", [SIGNALS, TIMERS, LIMITS], ids=["signals", "timers", "limits"])
def test_state_is_what_it_was(tmp_path: Path, code: str) -> None:
    cycle(tmp_path, code)


@pytest.mark.parametrize("user", ["root", "nobody", "capable"])
def test_credentials_are_what_they_were(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, user: str) -> None:
    os.chmod(tmp_path, 0o777)
    base = tmp_path_factory.getbasetemp()  # may be a place of the caller's: --basetemp
    base = base.parent if base.name.startswith("popen-") else base  # of one of several test processes
    for directory in tmp_path.parents:
        if directory.is_relative_to(base) or any(name.startswith("pytest-of-") for name in directory.parts):
            os.chmod(directory, 0o755)
    program = compiled(tmp_path, CREDENTIALS, *(["-DKEEP"] if user == "capable" else []))
    nobody = pwd.getpwnam("nobody")
    who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [nobody.pw_gid]} if user == "nobody" else {}
    with running(tmp_path, program, **who) as victim:
        for _ in range(2):
            victim.restore(victim.dump())
        victim.finish()


def test_registers_are_what_they_were(tmp_path: Path) -> None:
    with open("/proc/cpuinfo") as file:
        if " avx " not in file.read():
            pytest.skip("needs a processor with AVX")
    with running(tmp_path, compiled(tmp_path, REGISTERS)) as program:
        program.dump("--leave-running")
        program.restore(program.dump())
        with open(tmp_path / "stop", "r+b") as file:
            file.write(b"\1")
        program.finish()
