# SPDX-License-Identifier: Apache-2.0
"""Trees with namespaces of their own: dumped, ended, and made again with what was in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process.containers import contained_cycle

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), pytest.mark.tool("unshare")]

NAMES = r"""
#include <sys/utsname.h>
int main(void) {
    CHECK(!sethostname("somewhere", 9) && !setdomainname("else", 4));
    set_up();
    struct utsname names;
    CHECK(!uname(&names) && !strcmp(names.nodename, "somewhere") && !strcmp(names.domainname, "else"));
    return content();
}
"""

OBJECTS = r"""
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
static int sets, queue, segment, gone;
static struct { long type; char text[100]; } message;
static void send(long type, const char *text) {
    message.type = type;
    strcpy(message.text, text);
    CHECK(!msgsnd(queue, &message, strlen(text) + 1, 0));
}
static void receive(long type, const char *text) {
    CHECK(msgrcv(queue, &message, 100, 0, IPC_NOWAIT) == (ssize_t)strlen(text) + 1);
    CHECK(message.type == type && !strcmp(message.text, text));
}
int main(void) {
    int other = semget(77, 1, IPC_CREAT | 0600);
    sets = semget(78, 3, IPC_CREAT | 0640);
    CHECK(sets >= 0 && !semctl(other, 0, IPC_RMID) && !semctl(sets, 1, SETVAL, 41));
    struct semid_ds owner = { .sem_perm = { .uid = 7, .gid = 8, .mode = 0640 } };
    CHECK(!semctl(sets, 0, IPC_SET, &owner));
    queue = msgget(IPC_PRIVATE, 0600);
    send(3, "first");
    send(1, "");
    send(2, "third");
    segment = shmget(79, 10000, IPC_CREAT | 0600);
    char *memory = shmat(segment, 0, 0), *marked = shmat(gone = shmget(80, 4096, IPC_CREAT | 0600), 0, 0);
    CHECK(!shmctl(gone, IPC_RMID, 0));
    strcpy(memory + 9000, "kept");
    strcpy(marked, "still here");
    shmdt(memory);
    int limit = open("/proc/sys/kernel/msgmax", O_RDWR);
    CHECK(write(limit, "9000", 4) == 4);
    set_up();
    struct semid_ds found;
    CHECK(semget(78, 3, 0) == sets && semctl(sets, 1, GETVAL) == 41 && !semctl(sets, 2, GETVAL));
    CHECK(!semctl(sets, 0, IPC_STAT, &found) && found.sem_perm.uid == 7 && found.sem_perm.gid == 8);
    CHECK(found.sem_perm.mode == 0640);
    receive(3, "first");
    receive(1, "");
    receive(2, "third");
    CHECK(msgrcv(queue, &message, 100, 0, IPC_NOWAIT) < 0 && errno == ENOMSG);
    CHECK(shmget(79, 0, 0) == segment && !strcmp((char *)shmat(segment, 0, 0) + 9000, "kept"));
    CHECK(!strcmp(marked, "still here") && !shmdt(marked) && shmat(gone, 0, 0) == (void *)-1);
    char text[10] = "";
    lseek(limit, 0, SEEK_SET);
    CHECK(read(limit, text, 9) > 0 && atoi(text) == 9000);
    return content();
}
"""

FIRST = r"""
// The first process of its pid namespace, with a child, a grandchild whose parent has ended, and a thread.
static pid_t thread_id;
static void *second(void *unused) { thread_id = syscall(SYS_gettid); while (1) pause(); }
int main(void) {
    CHECK(getpid() == 1);
    pid_t child = fork();
    if (!child) {
        if (!fork()) { setsid(); touch("orphan"); await("go"); CHECK(getppid() == 1); _exit(5); }
        await("end");
        _exit(4);
    }
    await("orphan");
    touch("end");
    int status;
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 4);
    pid_t other = fork();
    if (!other) { await("go"); CHECK(getppid() == 1 && getpid() == 4); _exit(3); }
    CHECK(other == 4);
    pthread_t thread;
    pthread_create(&thread, 0, second, 0);
    while (!thread_id) usleep(3000);
    set_up();
    CHECK(getpid() == 1 && thread_id == 5);
    CHECK(waitpid(other, &status, 0) == other && WEXITSTATUS(status) == 3);
    CHECK(waitpid(3, &status, 0) == 3 && WEXITSTATUS(status) == 5);
    pid_t another = fork();
    if (!another) _exit(0);
    CHECK(another > 0);
    return content();
}
"""


def test_host_name(tmp_path: Path) -> None:
    contained_cycle(tmp_path, NAMES, "--uts", times=2)


def test_system_v_objects(tmp_path: Path) -> None:
    contained_cycle(tmp_path, OBJECTS, "--ipc", times=2)


def test_the_first_of_a_pid_namespace(tmp_path: Path) -> None:
    contained_cycle(tmp_path, FIRST, "--pid", times=2)
