# SPDX-License-Identifier: Apache-2.0
"""Trees whose processes live in different namespaces: each is made again once, and everybody is where they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.process.containers import container, setup_script
from tests.process.programs import compiled, cycle, running, stasis

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

SANDBOXES = r"""
// A parent, two children that share network, host name and objects which are not its own, and a grandchild that went
// back to the names of its grandparent. Sockets are made on one side and used on the other.
#include <netinet/in.h>
#include <net/if.h>
#include <sys/ipc.h>
#include <sys/ioctl.h>
#include <sys/msg.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/utsname.h>
static ino_t net(const char *where) { struct stat found; CHECK(!stat(where, &found)); return found.st_ino; }
static void host(const char *name) { struct utsname found; CHECK(!uname(&found) && !strcmp(found.nodename, name)); }
static int listens(int port) {
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(0x7f000001) };
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(!bind(fd, (void *)&at, sizeof at) && !listen(fd, 5));
    return fd;
}
static int connects(int port) {
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(0x7f000001) };
    int fd = socket(AF_INET, SOCK_STREAM, 0), failed = connect(fd, (void *)&at, sizeof at);
    CHECK(!close(fd));
    return !failed;
}
static int named(void) {
    struct sockaddr_un at = { .sun_family = AF_UNIX, .sun_path = "\0stasis-apart" };
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    CHECK(!bind(fd, (void *)&at, sizeof(sa_family_t) + 13));
    return fd;
}
static void up(void) {
    struct ifreq wanted = { .ifr_name = "lo", .ifr_flags = IFF_UP };
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK(!ioctl(fd, SIOCSIFFLAGS, &wanted) && !close(fd));
}
int main(void) {
    char old[70], name[70];
    gethostname(old, 70);
    int home = open("/proc/self/ns/uts", O_RDONLY), outside = named(), links[2];
    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, links) && write(links[0], "waits", 5) == 5);
    pid_t child = fork();
    if (!child) {
        CHECK(!unshare(CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP));
        up();
        CHECK(!sethostname("inside", 6));
        int listener = listens(4000), inside = named(), queue = msgget(5, IPC_CREAT | 0600);
        int segment = shmget(6, 5000, IPC_CREAT | 0600);
        char *shared = shmat(segment, 0, 0);
        strcpy(shared + 4500, "kept");
        struct { long type; char text[8]; } message = { 7, "message" };
        CHECK(!msgsnd(queue, &message, 8, 0));
        for (int number = 0; number < 2; number++) if (!fork()) {
            if (number) CHECK(!setns(home, CLONE_NEWUTS));
            touch(number ? "up-1" : "up-0");
            await("go");
            sprintf(name, "/proc/%d/ns/net", getppid());
            CHECK(net("/proc/self/ns/net") == net(name));
            host(number ? old : "inside");
            CHECK(connects(4000) && !strcmp(shared + 4500, "kept"));
            _exit(5);
        }
        await("up-0"), await("up-1");
        touch("up");
        await("go");
        int status, first;
        CHECK(wait(&first) > 0 && wait(&status) > 0 && first == status && WIFEXITED(status));
        host("inside");
        char text[9] = "";
        CHECK(connects(4000) && accept(listener, 0, 0) > 0 && inside > 0);
        message.type = 0;
        CHECK(msgget(5, 0) == queue && msgrcv(queue, &message, 8, 0, IPC_NOWAIT) == 8 && message.type == 7);
        CHECK(shmget(6, 0, 0) == segment && read(links[1], text, 9) == 5 && !strcmp(text, "waits"));
        struct sockaddr_un at = { .sun_family = AF_UNIX, .sun_path = "\0stasis-apart" };
        CHECK(sendto(inside, "i", 1, 0, (void *)&at, sizeof(sa_family_t) + 13) == 1);
        CHECK(sendto(outside, "o", 1, 0, (void *)&at, sizeof(sa_family_t) + 13) == 1);
        CHECK(read(inside, text, 9) == 1 && *text == 'i');
        _exit(7);
    }
    await("up");
    set_up();
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
    host(old);
    CHECK(!connects(4000) && msgget(5, 0) < 0 && shmget(6, 0, 0) < 0);
    char text[9];
    CHECK(recv(outside, text, 9, MSG_DONTWAIT) == 1 && *text == 'o');
    CHECK(!setns(home, CLONE_NEWUTS) && !gethostname(name, 70) && !strcmp(name, old));
    return content();
}
"""

CLOCKS = r"""
// A parent with the clocks of the system, and a child whose clock is far ahead.
int main(void) {
    struct timespec now;
    CHECK(!unshare(0x80));
    int file = open("/proc/self/timens_offsets", O_WRONLY);
    CHECK(write(file, "monotonic 5000000 0", 19) == 19 && !close(file));
    pid_t child = fork();
    int home = open("/proc/self/ns/time", O_RDONLY);
    if (child) CHECK(!setns(home, 0x80)); else {
        close(home);
        await("go");
        CHECK(!clock_gettime(CLOCK_MONOTONIC, &now) && now.tv_sec > 5000000 && now.tv_sec < 15000000);
        _exit(3);
    }
    close(home);
    set_up();
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    CHECK(!clock_gettime(CLOCK_MONOTONIC, &now) && now.tv_sec < 5000000);
    return content();
}
"""

CONNECTED = r"""
#include <netinet/in.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
int main(void) {
    pid_t child = fork();
    if (!child) {
        CHECK(!unshare(CLONE_NEWNET));
        struct ifreq wanted = { .ifr_name = "lo", .ifr_flags = IFF_UP };
        struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(4000) };
        at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        int listener = socket(AF_INET, SOCK_STREAM, 0), fd = socket(AF_INET, SOCK_STREAM, 0);
        CHECK(!ioctl(fd, SIOCSIFFLAGS, &wanted) && !bind(listener, (void *)&at, sizeof at) && !listen(listener, 5));
        CHECK(!connect(fd, (void *)&at, sizeof at) && accept(listener, 0, 0) > 0);
        touch("ready");
        await("go");
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && !status);
    return content();
}
"""

LEFT = r"""
#include <sys/socket.h>
int main(void) {
    int home = open("/proc/self/ns/net", O_RDONLY);
    CHECK(!unshare(CLONE_NEWNET) && socket(AF_INET, SOCK_DGRAM, 0) > 0 && !setns(home, CLONE_NEWNET) && !close(home));
    set_up();
    return content();
}
"""


def test_children_in_other_namespaces(tmp_path: Path) -> None:
    cycle(tmp_path, SANDBOXES, times=2 if os.environ.get("STASIS_LONG") else 1)


@pytest.mark.tool("unshare")
def test_children_in_other_namespaces_in_a_container(tmp_path: Path) -> None:
    compiled(tmp_path, SANDBOXES)
    script = setup_script(tmp_path)
    with container(tmp_path, "-pniu", "--mount-proc", "sh", script) as program:
        program.restore(program.dump())
        program.finish()


def test_a_child_with_another_clock(tmp_path: Path) -> None:
    cycle(tmp_path, CLOCKS)


def test_a_connection_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, CONNECTED)) as program:
        said = stasis("dump", program.pid, "--images", tmp_path / "refused", "--tcp", "established",
                      status=ExitCode.UNSUPPORTED)  # fmt: skip
        assert "in another network namespace" in said
        program.restore(program.dump("--tcp", "close"))
        program.finish()


def test_a_socket_of_a_namespace_that_nobody_lives_in_is_named(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, LEFT)) as program:
        said = stasis("dump", program.pid, "--images", tmp_path / "refused", status=ExitCode.UNSUPPORTED)
        assert "in which no process of the tree lives" in said
        program.finish()
