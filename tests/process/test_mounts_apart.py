# SPDX-License-Identifier: Apache-2.0
"""Trees whose processes live in different mount namespaces, as services and sandboxes do below who starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux.mountinfo import mount_table
from tests.process.containers import PLACES, container, cycle_of_other_users, setup_script
from tests.process.programs import running, stasis
from tests.process.sandboxes import compiled_sandboxes, rooted_script

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

SANDBOXES = r"""
// The parent has nothing of its own. One child has a temporary directory of its own and a process in there with it; the
// other one has the directory, too, and another root, and a process that went back. A file goes from one to the other.
int main(void) {
    CHECK(!mkdir("private", 0700) && !mkdir("root", 0700));
    char parent[20], name[99];
    sprintf(parent, "%d", getpid());
    int home = open("/proc/self/ns/mnt", O_RDONLY), links[2], directory = open(".", O_RDONLY);
    CHECK(!close(made("private/outside", "outside")));
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, links));
    pid_t child = fork();
    if (!child) {
        CHECK(!unshare(CLONE_NEWNS));
        away();
        CHECK(!mount("own", "private", "tmpfs", MS_NOSUID, "size=1m,mode=755") && !chdir("private"));
        int kept = made("kept", "kept"), gone = made("gone", "ghost");
        CHECK(!unlink("gone") && !fchown(kept, 5, 6) && !setxattr("kept", "trusted.x", "y", 1, 0));
        char *mapped = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, kept, 0);
        int watch = inotify_init1(IN_NONBLOCK), number = inotify_add_watch(watch, "kept", IN_ATTRIB);
        struct sockaddr_un at = { .sun_family = AF_UNIX };
        CHECK(getcwd(name, 99) && snprintf(at.sun_path, 108, "%s/socket", name) < 108);
        int listener = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(!bind(listener, (void *)&at, sizeof at) && !listen(listener, 3));
        CHECK(!connect(client, (void *)&at, sizeof at));
        int server = accept(listener, 0, 0);
        struct iovec byte = { "x", 1 };
        char room[CMSG_SPACE(sizeof kept)] = { 0 };
        struct msghdr message = { .msg_iov = &byte, .msg_iovlen = 1 };
        message.msg_control = room, message.msg_controllen = sizeof room;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        *rights = (struct cmsghdr) { .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(4) };
        memcpy(CMSG_DATA(rights), &kept, 4);
        CHECK(sendmsg(links[0], &message, 0) == 1);
        pid_t inner = fork();
        if (!inner) {
            CHECK(!chdir(".."));
            touch("inner");
            await("go");
            sprintf(name, "%d", getppid());
            CHECK(space("self") == space(name) && space("self") != space(parent));
            while (!is("private/kept", "KEPT")) usleep(3000);
            _exit(4);
        }
        CHECK(!chdir(".."));
        await("inner"), touch("one");
        await("go");
        memcpy(mapped, "KEPT", 4);
        int status;
        struct stat found;
        CHECK(waitpid(inner, &status, 0) == inner && WEXITSTATUS(status) == 4);
        CHECK(mounted(getcwd(name, 99)) == 0 && mounted(strcat(name, "/private")) == 1);
        CHECK(!stat("private/kept", &found) && found.st_uid == 5 && found.st_gid == 6);
        CHECK(getxattr("private/kept", "trusted.x", name, 9) == 1 && access("private/outside", F_OK));
        CHECK(pread(gone, name, 99, 0) == 5 && !memcmp(name, "ghost", 5) && access("private/gone", F_OK));
        CHECK(write(client, "through", 7) == 7 && read(server, name, 9) == 7);
        int another = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(!connect(another, (void *)&at, sizeof at) && accept(listener, 0, 0) >= 0);
        struct inotify_event told;
        CHECK(!chmod("private/kept", 0600) && read(watch, &told, sizeof told) == sizeof told && told.wd == number);
        close(made("private/new", "x"));
        _exit(5);
    }
    char byte, room[CMSG_SPACE(4)];
    struct iovec part = { &byte, 1 };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room };
    CHECK(recvmsg(links[1], &message, 0) == 1);
    int given = *(int *)CMSG_DATA(CMSG_FIRSTHDR(&message));
    pid_t rooted = fork();
    if (!rooted) {
        CHECK(!prctl(PR_SET_PDEATHSIG, SIGKILL));
        CHECK(!unshare(CLONE_NEWNS));
        away();
        CHECK(!mount("root", "root", "tmpfs", 0, 0) && !chdir("root"));
        CHECK(!mkdir("usr", 0755) && !mkdir("proc", 0755) && !mkdir("outer", 0755) && !mkdir("old", 0755));
        CHECK(!mkdir("tmp", 01777) && !mkdir("bound", 0755) && !mkdir("tmp/x", 0755) && !mkdir("etc", 0755));
        CHECK(!mount("/usr", "usr", 0, MS_BIND, 0) && !mount(0, "usr", 0, MS_BIND | MS_REMOUNT | MS_RDONLY, 0));
        CHECK(!mount("proc", "proc", "proc", MS_NOSUID, 0) && !mount("..", "outer", 0, MS_BIND, 0));
        CHECK(!mount("tmp/x", "bound", 0, MS_BIND, 0) && !mount("x", "etc", "tmpfs", MS_RDONLY, 0));
        CHECK(!syscall(SYS_pivot_root, ".", "old") && !chdir("/") && !umount2("/old", MNT_DETACH) && !rmdir("/old"));
        int file = made("/tmp/x/file", "text");
        pid_t back = fork();
        if (!back) {
            CHECK(!setns(home, CLONE_NEWNS) && !fchdir(directory));
            touch("back");
            await("go");
            CHECK(space("self") == space(parent) && is("private/outside", "outside"));
            CHECK(pread(given, name, 9, 0) == 4 && !strncasecmp(name, "kept", 4));
            _exit(7);
        }
        await("/outer/back"), touch("/outer/two");
        await("/outer/go");
        int status;
        CHECK(waitpid(back, &status, 0) == back && WEXITSTATUS(status) == 7);
        CHECK(!strcmp(getcwd(name, 99), "/") && space("self") != space(parent) && is("/bound/file", "text"));
        CHECK(pwrite(file, "TEXT", 4, 0) == 4 && is("/tmp/x/file", "TEXT"));
        CHECK(open("/usr/new", O_CREAT | O_RDWR, 0600) < 0 && errno == EROFS && !access("/usr/bin/env", X_OK));
        CHECK(open("/etc/new", O_CREAT | O_RDWR, 0600) < 0 && errno == EROFS);
        CHECK(is("/outer/private/outside", "outside"));
        _exit(6);
    }
    CHECK(!close(links[0]) && !close(links[1]));
    await("one"), await("two");
    set_up();
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 5);
    CHECK(waitpid(rooted, &status, 0) == rooted && WIFEXITED(status) && WEXITSTATUS(status) == 6);
    CHECK(is("private/outside", "outside") && access("private/new", F_OK) && access("private/kept", F_OK));
    CHECK(pread(given, name, 9, 0) == 4 && !memcmp(name, "KEPT", 4));
    CHECK(!setns(home, CLONE_NEWNS) && !fchdir(directory));
    return content();
}
"""


GROUPS = r"""
// What is mounted outside comes to two namespaces; what is mounted in one of them gets out, and in the other one does
// not, but comes to a third one that is its peer. In a fourth there is a part of what the third has alone.
static int copy(const char *path) { int fd = syscall(428, AT_FDCWD, path, 1); CHECK(fd >= 0); return fd; }
static void put(int fd, const char *path) { CHECK(!syscall(429, fd, "", AT_FDCWD, path, 4) && !close(fd)); }
static const char *const places[] = { "shared/outside", "shared/peer", "shared/slave", "alone/third" };
static void at_home(const char *name, int number) {
    touch(name);
    if (number >= 0) {
        char done[9] = { 'm', '0' + number, 0 };
        await(number ? (char[]) { 'm', '0' + number - 1, 0 } : "go");
        CHECK(!mount("here", places[number], "tmpfs", 0, 0));
        touch(done);
    }
    await("m3");
}
static void sees(int outside, int peer, int slave, int third) {
    int wanted[] = { outside, peer, slave, third };
    char path[300];
    for (int i = 0; i < 4; i++) {
        CHECK(getcwd(path, 200));
        strcat(strcat(path, "/"), places[i]);
        if (mounted(path) != wanted[i]) dprintf(2, "%s: not %d\n", path, wanted[i]), _exit(1);
    }
}
int main(void) {
    CHECK(!mkdir("alone", 0700) && !mkdir("part", 0700));
    for (int i = 0; i < 3; i++) CHECK(!mkdir(places[i], 0700));
    int status, directory = open(".", O_RDONLY);
    pid_t children[3];
    for (int number = 0; number < 2; number++) if (!(children[number] = fork())) {
        int shared = copy("shared");
        CHECK(!unshare(CLONE_NEWNS));
        away();
        put(shared, "shared");
        if (!number) { at_home("peer", 1); sees(1, 1, 0, 0); _exit(0); }
        CHECK(!mount(0, "shared", 0, MS_SLAVE, 0) && !mount(0, "shared", 0, MS_SHARED, 0));
        CHECK(!mount("own", "alone", "tmpfs", 0, 0) && !mount(0, "alone", 0, MS_SHARED, 0));
        CHECK(!mkdir("alone/part", 0700) && !mkdir("alone/third", 0700) && !close(made("alone/part/file", "in it")));
        pid_t third = fork();
        if (!third) { CHECK(!unshare(CLONE_NEWNS)); at_home("third", 3); sees(1, 1, 1, 1); _exit(0); }
        pid_t fourth = fork();
        if (!fourth) {
            await("third");
            int part = copy("alone/part");
            CHECK(!unshare(CLONE_NEWNS));
            away();
            put(part, "part");
            at_home("fourth", -1);
            sees(0, 0, 0, 0);
            CHECK(is("part/file", "in it") && !mkdir("part/seen", 0700));
            _exit(0);
        }
        await("fourth");
        at_home("slave", 2);
        CHECK(waitpid(fourth, &status, 0) == fourth && !status && !access("alone/part/seen", F_OK));
        CHECK(waitpid(third, &status, 0) == third && !status);
        sees(1, 1, 1, 1);
        _exit(0);
    }
    await("peer"), await("slave");
    touch("ready");
    at_home("all", 0);
    for (int number = 0; number < 2; number++)
        CHECK(waitpid(children[number], &status, 0) == children[number] && !status);
    sees(1, 1, 0, 0);
    CHECK(!umount("shared/outside") && !umount("shared/peer"));
    return content();
}
"""

PAST = r"""
// A working directory that a process shares with its grandchild, past a child with mounts and a directory of its own.
static pid_t sharing(void) { return syscall(SYS_clone, CLONE_FS | SIGCHLD, 0, 0, 0, 0); }
int main(void) {
    CHECK(!mkdir("own", 0700) && !mkdir("below", 0700));
    char name[300];
    int status, directory = open(".", O_RDONLY);
    pid_t child = sharing();
    if (!child) {
        pid_t grandchild = sharing();
        if (!grandchild) {
            await("seen");  // its parent's parent looks for files in the same directory
            CHECK(!fchdir(directory) && access("own/file", F_OK) && !chdir("below"));
            _exit(2);
        }
        CHECK(!unshare(CLONE_NEWNS));
        away();
        CHECK(!mount("own", "own", "tmpfs", 0, 0) && !chdir("own"));
        close(made("file", "kept"));
        touch("../up");
        CHECK(waitpid(grandchild, &status, 0) == grandchild && WIFEXITED(status) && WEXITSTATUS(status) == 2);
        CHECK(is("file", "kept") && strstr(getcwd(name, 300), "/own") && !access("../below", F_OK));
        _exit(3);
    }
    await("up");
    set_up();
    touch("seen");
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    CHECK(strstr(getcwd(name, 300), "/below") && !fchdir(directory) && access("own/file", F_OK));
    return content();
}
"""

USERS = r"""
// Users, pids and mounts of its own, and a child with further mounts, in which there is a part of the parent's.
#include <grp.h>
static void map(pid_t pid, const char *name) {
    char path[64];
    sprintf(path, "/proc/%d/%s", pid, name);
    int fd = open(path, O_WRONLY);
    CHECK(write(fd, "0 100000 1000\n", 14) == 14 && !close(fd));
}
static void enter(void) {
    int to[2], from[2];
    char byte;
    CHECK(!pipe(to) && !pipe(from));
    pid_t inside = fork();
    if (inside) {
        CHECK(read(from[0], &byte, 1) == 1);
        map(inside, "uid_map"), map(inside, "gid_map");
        CHECK(write(to[1], "g", 1) == 1);
        waitpid(inside, 0, 0);
        _exit(0);
    }
    CHECK(!unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS));
    CHECK(write(from[1], "m", 1) == 1 && read(to[0], &byte, 1) == 1 && !setgroups(0, 0));
    CHECK(!setresgid(0, 0, 0) && !setresuid(0, 0, 0));
    for (int i = 0; i < 2; i++) close(to[i]), close(from[i]);
    if (fork()) { wait(0); _exit(0); }
    CHECK(!mount("proc", "/proc", "proc", 0, 0) && !mount("data", "data", "tmpfs", 0, 0));
}
int main(void) {
    enter();
    int file = made("data/file", "x"), status;
    CHECK(!fchown(file, 5, 6) && !mkdir("data/part", 0700) && !mkdir("data/over", 0700));
    pid_t child = fork();
    if (!child) {
        CHECK(!unshare(CLONE_NEWNS) && !mount("data/part", "data/over", 0, MS_BIND, 0));
        CHECK(!mount("more", "data/part", "tmpfs", 0, 0));
        int inner = made("data/over/inner", "inner");
        close(made("data/part/hidden", "hidden"));
        touch("data/up");
        await("go");
        struct stat found;
        CHECK(!stat("data/file", &found) && found.st_uid == 5 && found.st_gid == 6 && is("data/part/hidden", "hidden"));
        CHECK(pwrite(inner, "INNER", 5, 0) == 5 && is("data/over/inner", "INNER"));
        _exit(3);
    }
    await("data/up");
    set_up();
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    CHECK(getpid() == 1 && is("data/part/inner", "INNER") && access("data/part/hidden", F_OK));
    CHECK(access("data/over/inner", F_OK));
    return content();
}
"""


def _outside(directory: Path) -> list[tuple[str, ...]]:
    """The mounts here, without those that other programs may have made meanwhile."""
    return [(mount.target, *mount.flags, mount.fstype) for mount in mount_table()
            if not mount.target.startswith(PLACES) or mount.target.startswith(str(directory))]  # fmt: skip


def test_sandboxes_below_a_process_without(tmp_path: Path) -> None:
    before = _outside(tmp_path)
    with running(tmp_path, compiled_sandboxes(tmp_path, SANDBOXES)) as program:
        program.again_and_again()
        assert _outside(tmp_path) == before
        program.finish()
    assert _outside(tmp_path) == before


@pytest.mark.tool("unshare")
def test_sandboxes_in_a_container(tmp_path: Path) -> None:
    before = _outside(tmp_path)
    compiled_sandboxes(tmp_path, SANDBOXES)
    script = setup_script(tmp_path, "mount -t tmpfs more /mnt\n")
    with container(tmp_path, "-pniu", "--mount-proc", "sh", script) as program:
        program.again_and_again()
        program.finish()
    assert _outside(tmp_path) == before


def test_what_is_mounted_gets_where_it_did(tmp_path: Path) -> None:
    """As below the manager of services: their mounts are slaves of those outside, and shared below."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for words in (["-t", "tmpfs", "outside", shared], ["--make-private", shared], ["--make-shared", shared]):
        subprocess.run(["mount", *words], check=True)
    try:
        before = _outside(tmp_path)
        with running(tmp_path, compiled_sandboxes(tmp_path, GROUPS)) as program:
            program.restore(program.dump())
            assert _outside(tmp_path) == before
            program.finish()
        assert _outside(tmp_path) == before
    finally:
        subprocess.run(["umount", "-R", shared], check=True)


@pytest.mark.tool("setpriv")
def test_what_is_lost_of_a_sandbox_is_named(tmp_path: Path) -> None:
    code = """
int main(void) {
    CHECK(!mkdir("own", 0700) && !mkdir("own/here", 0700) && !mkdir("own/there", 0700));
    pid_t child = fork();
    if (!child) {
        CHECK(!unshare(CLONE_NEWNS));
        away();
        CHECK(!mount("own", "own", "tmpfs", 0, 0) && !mkdir("own/here", 0700) && !mkdir("own/there", 0700));
        CHECK(made("own/here/file", "x") > 0 && !link("own/here/file", "own/there/file") && !unlink("own/here/file"));
        touch("up");
        await("go");
        _exit(0);
    }
    await("up");
    set_up();
    int status;
    CHECK(waitpid(child, &status, 0) == child && !status);
    return content();
}
"""
    with running(tmp_path, compiled_sandboxes(tmp_path, code)) as program:
        said = stasis("dump", program.pid, "--images", tmp_path / "images", "--link-remap", status=ExitCode.UNSUPPORTED)
        assert "own/here/file (deleted)): the file lost the name it was opened by, and its mount namespace" in said
        assert not list((tmp_path / "own").glob("*/.stasis*"))
        command = [sys.executable, "-m", "stasis", "process", "check", str(program.pid)]
        weak = subprocess.run(["setpriv", "--bounding-set=-sys_admin", *command], capture_output=True, text=True)
        assert weak.returncode == ExitCode.UNSUPPORTED, weak
        assert "mnt namespace: it is another one than that of the first process, and entering it needs" in weak.stdout
        program.finish()


def test_a_directory_that_is_shared_past_a_sandbox(tmp_path: Path) -> None:
    with running(tmp_path, compiled_sandboxes(tmp_path, PAST)) as program:
        program.restore(program.dump())
        program.finish()


@pytest.mark.tool("unshare")
def test_a_sandbox_below_another_root(tmp_path: Path) -> None:
    with container(tmp_path, "-pm", "sh", rooted_script(tmp_path)) as program:
        program.again_and_again()
        program.finish()


@pytest.mark.tool("unshare")
def test_sandboxes_of_other_users(short_dir: Path) -> None:
    compiled_sandboxes(short_dir, USERS)
    cycle_of_other_users(short_dir)
