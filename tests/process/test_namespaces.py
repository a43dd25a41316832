# SPDX-License-Identifier: Apache-2.0
"""Trees with namespaces of their own: dumped, ended, and made again with what was in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux.mountinfo import mount_table
from tests.process.containers import contained_cycle, container, cycle_of_other_users
from tests.process.programs import compiled, stasis, wait_for

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
    contained_cycle(tmp_path, NAMES, "--uts")


def test_system_v_objects(tmp_path: Path) -> None:
    contained_cycle(tmp_path, OBJECTS, "--ipc")


def test_the_first_of_a_pid_namespace(tmp_path: Path) -> None:
    contained_cycle(tmp_path, FIRST, "--pid")

NETWORK = r"""
#include <arpa/inet.h>
#include <net/if.h>
#include <sys/socket.h>
static int listener, connected, accepted, datagrams;
static struct sockaddr_in at(const char *address, int port) {
    struct sockaddr_in found = { .sin_family = AF_INET, .sin_port = htons(port) };
    inet_pton(AF_INET, address, &found.sin_addr);
    return found;
}
static void tells(const char *command, const char *expected) {
    char text[500] = "";
    FILE *told = popen(command, "r");
    fread(text, 1, sizeof(text) - 1, told);
    if (pclose(told) || !strstr(text, expected)) { dprintf(2, "%s: %s\n", command, text); _exit(1); }
}
int main(void) {
    CHECK(!system("ip link set lo up mtu 30000"));
    CHECK(!system("ip link add name inner type veth peer name other && ip link add name bridge type bridge"));
    CHECK(!system("ip link set other master bridge up && ip link set bridge up"));
    CHECK(!system("ip link set inner address 02:11:22:33:44:55 up"));
    CHECK(!system("ip address add 10.7.0.1/24 dev inner && ip address add 10.7.0.2/24 dev bridge"));
    CHECK(!system("ip -6 address add fd00:7::1/64 dev inner nodad"));
    CHECK(!system("ip route add 10.8.0.0/16 via 10.7.0.9 metric 7 && ip route add 10.9.0.0/16 dev bridge table 50"));
    CHECK(!system("ip rule add from 10.7.0.1 table 50 priority 99"));
    CHECK(!system("echo 1 > /proc/sys/net/ipv4/conf/inner/arp_ignore && echo 77 > /proc/sys/net/unix/max_dgram_qlen"));
    CHECK(!system("echo 0 > /proc/sys/net/ipv4/conf/all/accept_redirects"));
    struct sockaddr_in here = at("10.7.0.1", 4000), there = at("10.7.0.2", 4001);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    datagrams = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK(!bind(listener, (void *)&here, sizeof(here)) && !listen(listener, 5));
    CHECK(!bind(datagrams, (void *)&there, sizeof(there)));
    set_up();
    tells("ip -o link show lo", "mtu 30000");
    tells("ip -o link show inner", "02:11:22:33:44:55");
    tells("ip -o link show inner", ",UP");
    tells("ip -o link show other", "master bridge");
    tells("ip address show inner", "inet6 fd00:7::1/64");
    tells("ip route", "10.8.0.0/16 via 10.7.0.9 dev inner metric 7");
    tells("ip route show table 50", "10.9.0.0/16 dev bridge");
    tells("ip rule", "99:\tfrom 10.7.0.1 lookup 50");
    tells("cat /proc/sys/net/ipv4/conf/inner/arp_ignore", "1");
    tells("cat /proc/sys/net/unix/max_dgram_qlen", "77");
    tells("cat /proc/sys/net/ipv4/conf/all/accept_redirects", "0");
    connected = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(!connect(connected, (void *)&here, sizeof(here)) && (accepted = accept(listener, 0, 0)) >= 0);
    char byte;
    CHECK(write(connected, "x", 1) == 1 && read(accepted, &byte, 1) == 1 && byte == 'x');
    CHECK(sendto(accepted, "y", 1, 0, 0, 0) == 1 && sendto(datagrams, "z", 1, 0, (void *)&there, sizeof(there)) == 1);
    CHECK(read(datagrams, &byte, 1) == 1 && byte == 'z');
    return content();
}
"""

OUTWARDS = r"""
int main(int count, char **words) {
    char command[200];
    sprintf(command, "ip link add name eth0 type veth peer name stasis-out netns %s", words[1]);
    CHECK(!system(command) && !system("ip link set eth0 up && ip address add 10.7.1.2/24 dev eth0"));
    CHECK(!system("nft add table ip mine && nft add chain ip mine theirs && nft add rule ip mine theirs counter drop"));
    set_up();
    CHECK(!system("ip -o link show eth0 | grep -q link-netns"));
    CHECK(!system("ip address show eth0 | grep -q 10.7.1.2/24"));
    CHECK(!system("nft list chain ip mine theirs | grep -q drop"));
    return content();
}
"""
STRANGE = r"""
int main(void) {
    CHECK(!system("ip link add name inner type veth peer name other"));
    CHECK(!system("ip link add link inner name strange type macvlan"));
    set_up();
    return content();
}
"""

CLOCKS = r"""
int main(void) {
    struct timespec then, now, boot;
    CHECK(!clock_gettime(CLOCK_MONOTONIC, &then) && then.tv_sec > 5000000);
    set_up();
    CHECK(!clock_gettime(CLOCK_MONOTONIC, &now) && !clock_gettime(CLOCK_BOOTTIME, &boot));
    CHECK(now.tv_sec >= then.tv_sec && now.tv_sec < then.tv_sec + 300 && boot.tv_sec > 9000000);
    struct timespec raw;  // from the kernel, and not from the memory that it shares
    CHECK(!syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &raw));
    CHECK(raw.tv_sec >= now.tv_sec && raw.tv_sec < now.tv_sec + 99);
    return content();
}
"""
GROUPS = r"""
static void groups(char *text) {
    int fd = open("/proc/self/cgroup", O_RDONLY);
    CHECK(fd >= 0 && read(fd, text, 1999) > 0 && !close(fd));
}
int main(void) {
    char before[2000] = "", after[2000] = "";
    groups(before);
    set_up();
    groups(after);
    if (strcmp(before, after)) { dprintf(2, "%s\n%s\n", before, after); _exit(1); }
    return content();
}
"""
USERS = r"""
#include <sys/mount.h>
#include <grp.h>
static void map(pid_t pid, const char *name) {
    char path[64];
    sprintf(path, "/proc/%d/%s", pid, name);
    int fd = open(path, O_WRONLY);
    CHECK(write(fd, "0 100000 1000\n5000 7 1\n", 23) == 23 && !close(fd));
}
// Makes the namespaces, with another process outside that says who is who.
static void enter(void) {
    int to[2], from[2];
    char byte;
    CHECK(!pipe(to) && !pipe(from));
    pid_t inside = fork();
    if (inside) {
        CHECK(read(from[0], &byte, 1) == 1);
        map(inside, "uid_map");
        map(inside, "gid_map");
        CHECK(write(to[1], "g", 1) == 1);
        waitpid(inside, 0, 0);
        _exit(0);
    }
    CHECK(!unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET));
    CHECK(write(from[1], "m", 1) == 1 && read(to[0], &byte, 1) == 1 && !setgroups(0, 0));
    CHECK(!setresgid(0, 0, 0) && !setresuid(0, 0, 0));
    for (int i = 0; i < 2; i++) close(to[i]), close(from[i]);
    if (fork()) { wait(0); _exit(0); }
    CHECK(!mount("proc", "/proc", "proc", 0, 0) && !mount("data", "data", "tmpfs", 0, 0));
}
int main(void) {
    enter();
    CHECK(!sethostname("users", 5));
    int file = open("data/file", O_RDWR | O_CREAT, 0640), gone = open("data/gone", O_RDWR | O_CREAT, 0600);
    CHECK(!fchown(file, 5, 6) && write(file, "x", 1) == 1 && !fchown(gone, 7, 5000) && !unlink("data/gone"));
    int *shared = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    *shared = 1;
    gid_t groups[] = {3, 5000}, found[5];
    CHECK(!setgroups(2, groups));
    pid_t child = fork();
    if (!child) {
        CHECK(!setresgid(8, 8, 8) && !setresuid(9, 10, 11));
        *shared = 2;
        while (*shared != 3) usleep(3000);
        uid_t uid, euid, suid;
        CHECK(!getresuid(&uid, &euid, &suid) && uid == 9 && euid == 10 && suid == 11 && getgid() == 8);
        CHECK(setresuid(0, 0, 0) < 0);
        _exit(7);
    }
    while (*shared != 2) usleep(3000);
    set_up();
    *shared = 3;
    struct stat status;
    int code;
    CHECK(getpid() == 1 && !getuid() && getgroups(5, found) == 2 && found[0] + found[1] == 5003);
    CHECK(!stat("data/file", &status) && status.st_uid == 5 && status.st_gid == 6);
    CHECK(!fstat(gone, &status) && status.st_uid == 7 && status.st_gid == 5000 && !status.st_nlink);
    CHECK(waitpid(child, &code, 0) == child && WEXITSTATUS(code) == 7);
    CHECK(!sethostname("others", 6) && !mount("more", "data", "tmpfs", 0, 0));
    return content();
}
"""


@pytest.mark.tool("ip")
def test_network(tmp_path: Path) -> None:
    contained_cycle(tmp_path, NETWORK, "--net")


@pytest.mark.tool("ip")
@pytest.mark.tool("nft")
def test_a_network_device_that_leads_outside(tmp_path: Path) -> None:
    outside = Path("/sys/class/net/stasis-out")
    with container(tmp_path, "--net", compiled(tmp_path, OUTWARDS), str(os.getpid())) as program:
        images = program.dump()
        wait_for(lambda: not outside.exists(), "the old device is there still")
        assert "--veth eth0=NAME" in stasis("restore", "--images", images, status=ExitCode.USAGE)
        program.restore(images, "--veth", "eth0=stasis-out")
        assert outside.exists()
        program.finish()
    wait_for(lambda: not outside.exists(), "the device does not go")


@pytest.mark.tool("ip")
def test_a_network_device_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with container(tmp_path, "--net", compiled(tmp_path, STRANGE)) as program:
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        program.finish()
    assert "network device strange: devices of the kind macvlan" in said


def test_clocks(tmp_path: Path) -> None:
    contained_cycle(tmp_path, CLOCKS, "--time", "--monotonic", "5000000", "--boottime", "9000000")


def test_groups_that_are_seen_as_roots(tmp_path: Path) -> None:
    top = next(mount.target for mount in mount_table() if mount.fstype == "cgroup2")
    group = Path(top) / "stasis-test-roots"
    (group / "below").mkdir(parents=True)
    script = tmp_path / "setup"
    compiled(tmp_path, GROUPS)
    script.write_text(f"echo $$ > {group}/cgroup.procs\nexec unshare --cgroup sh inside\n")
    (tmp_path / "inside").write_text(f"echo $$ > {group}/below/cgroup.procs\nexec ./program\n")
    try:
        with container(tmp_path, "sh", script) as program:
            program.restore(program.dump())
            assert (group / "below/cgroup.procs").read_text().split() == [str(program.pid)]
            program.finish()
    finally:
        for directory in (group / "below", group):
            wait_for(lambda directory=directory: not (directory / "cgroup.procs").read_text(), "it is in use")  # type: ignore[misc]
            directory.rmdir()


def test_users(short_dir: Path) -> None:
    compiled(short_dir, USERS)
    cycle_of_other_users(short_dir)
