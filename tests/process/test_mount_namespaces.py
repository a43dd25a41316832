# SPDX-License-Identifier: Apache-2.0
"""Trees with a mount namespace of their own: mount tables, contents, other roots; and a whole container."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux import procfs
from stasis.linux.mountinfo import mount_table
from tests.process.containers import PLACES, WITHOUT_OTHERS, container, setup_script
from tests.process.programs import compiled, cycle, stasis, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), pytest.mark.tool("unshare")]

SCRIPT = """set -e
mkdir root lower upper working
echo below > lower/file
mount -t tmpfs -o size=30m,mode=755 here root
cd root
mkdir proc sys dev outer old usr tmp etc shared shared/peer over
cp ../program ../program.c .
mount --bind .. outer
mount -t proc -o nosuid,hidepid=invisible proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 dev dev
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/tty c 5 0
mkdir dev/pts dev/mqueue
mount -t devpts -o newinstance,mode=620,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t mqueue mqueue dev/mqueue
mount --bind /usr usr
mount -o remount,bind,ro,nosuid,noatime usr
mount -t overlay -o lowerdir=$PWD/../lower,upperdir=$PWD/../upper,workdir=$PWD/../working over over
mount -t tmpfs data tmp
mkdir tmp/a
mount --make-shared tmp
mount --bind tmp/a shared
mount --make-slave shared
mount --bind tmp shared/peer 2>/dev/null || { mkdir tmp/a/peer; mount --bind tmp shared/peer; }
pivot_root . old
cd /outer
exec /program </dev/null >>errors 2>&1
"""

INSIDE = r"""
#include <sys/mount.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/xattr.h>
static char before[20000], after[20000];
static void read_all(const char *path, char *into) {
    int fd = open(path, O_RDONLY), got, size = 0;
    CHECK(fd >= 0);
    while ((got = read(fd, into + size, 19999 - size)) > 0) size += got;
    into[size] = 0;
    close(fd);
}
// Mount numbers and device numbers are others after a restore; the rest is not.
static void table(char *into) {
    static char raw[20000];
    char *line, *at, *save;
    read_all("/proc/self/mountinfo", raw);
    *into = 0;
    for (line = strtok_r(raw, "\n", &save); line; line = strtok_r(0, "\n", &save)) {
        char root[200], target[200], flags[200];
        CHECK(sscanf(line, "%*d %*d %*s %199s %199s %199s", root, target, flags) == 3);
        at = strstr(line, " - ");
        sprintf(into + strlen(into), "%s %s %s %s%s%s\n", root, target, flags, strstr(line, "shared:") ? "shared" : "",
                strstr(line, "master:") ? "slave" : "", at);
    }
}
int main(void) {
    CHECK(!umount2("/old", MNT_DETACH) && !rmdir("/old"));
    CHECK(!sethostname("inside", 6));
    int file = open("/tmp/kept", O_RDWR | O_CREAT, 0640), gone = open("/tmp/gone", O_RDWR | O_CREAT, 0600);
    CHECK(write(file, "some text", 9) == 9 && !fchown(file, 5, 6) && !unlink("/tmp/gone"));
    CHECK(write(gone, "ghost", 5) == 5 && !link("/tmp/kept", "/tmp/a/other") && !symlink("/etc/x", "/tmp/link"));
    CHECK(!mknod("/tmp/device", S_IFCHR | 0604, makedev(1, 5)) && !mkfifo("/tmp/fifo", 0622));
    CHECK(!setxattr("/tmp/kept", "trusted.colour", "blue", 4, 0));
    int changed = open("/over/file", O_RDWR | O_APPEND), master = posix_openpt(O_RDWR | O_NOCTTY);
    CHECK(changed >= 0 && write(changed, "above", 5) == 5 && master >= 0 && !grantpt(master) && !unlockpt(master));
    int slave = open(ptsname(master), O_RDWR | O_NOCTTY);
    CHECK(slave >= 0);
    char *mapped = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    pid_t child = fork();
    if (!child) {
        CHECK(!chroot("/shared") && !chdir("/"));
        int inside = open("/in the root", O_RDWR | O_CREAT, 0600);
        CHECK(inside >= 0);
        kill(getppid(), SIGCONT);
        int found = open("/dev/null", O_RDONLY);
        CHECK(found < 0);
        for (int i = 0; i < 2000 && access("/peer/go on", F_OK); i++) usleep(10000);
        CHECK(!access("/in the root", F_OK) && write(inside, "x", 1) == 1);
        _exit(6);
    }
    while (access("/tmp/a/in the root", F_OK)) usleep(3000);
    table(before);
    set_up();
    table(after);
    CHECK(strlen(before) == strlen(after));  // in another order
    for (char *save, *line = strtok_r(before, "\n", &save); line; line = strtok_r(0, "\n", &save))
        if (!strstr(after, line)) { dprintf(2, "%s\n---\n%s\n", line, after); _exit(1); }
    struct utsname names;
    CHECK(getpid() == 1 && !uname(&names) && !strcmp(names.nodename, "inside"));
    struct stat status, other;
    CHECK(!stat("/tmp/kept", &status) && !stat("/tmp/a/other", &other) && status.st_ino == other.st_ino);
    CHECK(status.st_uid == 5 && status.st_gid == 6 && (status.st_mode & 07777) == 0640 && status.st_size == 9);
    char text[100] = "";
    CHECK(getxattr("/tmp/kept", "trusted.colour", text, 100) == 4 && !strcmp(text, "blue"));
    memcpy(mapped, "SOME", 4);
    CHECK(pread(file, text, 99, 0) == 9 && !strcmp(text, "SOME text"));
    memset(text, 0, 100);
    CHECK(pread(gone, text, 99, 0) == 5 && !strcmp(text, "ghost") && access("/tmp/gone", F_OK));
    CHECK(readlink("/tmp/link", text, 99) == 6 && !lstat("/tmp/device", &status) && status.st_rdev == makedev(1, 5));
    CHECK(open("/usr/written", O_CREAT | O_RDWR, 0600) < 0 && errno == EROFS);
    CHECK(write(slave, "typed\n", 6) == 6 && read(master, text, 99) == 7 && !memcmp(text, "typed\r\n", 7));
    CHECK(posix_openpt(O_RDWR | O_NOCTTY) >= 0 && !access("/dev/pts/0", F_OK) && !access("/dev/pts/1", F_OK));
    memset(text, 0, 100);
    CHECK(pread(changed, text, 99, 0) == 11 && !strcmp(text, "below\nabove") && !access("/outer/upper/file", F_OK));
    CHECK(write(changed, "!", 1) == 1);
    // What is mounted in the group comes to its slave.
    CHECK(!mkdir("/tmp/a/more", 0700) && !mount("x", "/tmp/a/more", "tmpfs", 0, 0));
    int status_of;
    touch("/tmp/go on");
    CHECK(waitpid(child, &status_of, 0) == child && WEXITSTATUS(status_of) == 6);
    return content();
}
"""

ROOTED = r"""
int main(void) {
    CHECK(!mkdir("below", 0700) && !mkdir("below/deep", 0700));
    touch("below/file");
    int directory = open(".", O_RDONLY), file = open("below/file", O_RDWR);
    pid_t child = fork();
    if (!child) {
        CHECK(!chroot("below") && !chdir("/deep"));
        int inner = open("/own", O_RDWR | O_CREAT, 0600);
        CHECK(!fchdir(directory));
        touch("rooted");
        await("go");
        struct stat one, other;
        CHECK(!access("/file", F_OK) && !fstat(inner, &one) && !stat("/own", &other) && one.st_ino == other.st_ino);
        CHECK(!access("below/file", F_OK) && write(file, "x", 1) == 1);
        _exit(9);
    }
    await("rooted");
    set_up();
    int status;
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 9);
    return content();
}
"""


def _contained(directory: Path, *flags: str) -> Path:
    compiled(directory, INSIDE, "-static")
    (directory / "setup").write_text(SCRIPT)
    return directory / "setup"


def _outside(directory: Path) -> list[tuple[str, ...]]:
    """The mounts here, without those that other programs may have made meanwhile."""
    return [(mount.target, *mount.flags, mount.fstype) for mount in mount_table()
            if not mount.target.startswith(PLACES) or mount.target.startswith(str(directory))]  # fmt: skip


def test_a_container(tmp_path: Path) -> None:
    before = _outside(tmp_path)
    script = _contained(tmp_path)
    with container(tmp_path, "-pmiun", "sh", script) as program:
        assert os.readlink(f"/proc/{program.pid}/exe") == "/program"
        program.again_and_again()
        assert _outside(tmp_path) == before
        program.finish()
    assert _outside(tmp_path) == before


def test_all_mounts_of_the_system_and_one_more(tmp_path: Path) -> None:
    before = _outside(tmp_path)
    (tmp_path / "more").mkdir()
    script = tmp_path / "setup"
    compiled(tmp_path, 'int main(void) { int fd = open("more/file", O_RDWR | O_CREAT, 0600); set_up();'
                       'CHECK(write(fd, "x", 1) == 1 && !access("more/file", F_OK)); return content(); }')
    script.write_text(f"{WITHOUT_OTHERS}mount -t tmpfs more more\nexec ./program\n")
    with container(tmp_path, "--mount", "--propagation", "slave", "sh", script) as program:
        program.again_and_again()
        program.finish()
    assert _outside(tmp_path) == before


def test_another_root_directory(tmp_path: Path) -> None:
    cycle(tmp_path, ROOTED)


def test_a_mount_that_cannot_be_made_again_is_named(tmp_path: Path) -> None:
    script = tmp_path / "setup"
    compiled(tmp_path, "int main(void) { set_up(); return content(); }")
    script.write_text("mkdir gone more\nmount -t tmpfs x more\nmkdir more/x\nmount --bind more/x gone\nrmdir more/x\n"
                      "exec ./program\n")
    with container(tmp_path, "--mount", "sh", script) as program:
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        program.finish()
    assert f"mount {tmp_path}/gone (tmpfs): the directory or file that it shows was deleted" in said


def test_a_container_is_copied_ahead(tmp_path: Path) -> None:
    compiled(tmp_path, 'int main(void) { char *big = malloc(9 << 20); memset(big, 7, 9 << 20); set_up();'
                       'CHECK(big[8 << 20] == 7 && getpid() == 1); return content(); }')
    script = setup_script(tmp_path)
    with container(tmp_path, "-pm", "--mount-proc", "sh", script) as program:
        program.restore(program.dump("--pre-copy", "2"))
        program.finish()


def test_a_process_that_has_entered_is_named(tmp_path: Path) -> None:
    compiled(tmp_path, "int main(void) { set_up(); return content(); }")
    script = setup_script(tmp_path)
    with container(tmp_path, "-pm", "--mount-proc", "sh", script) as program:
        command = ["nsenter", "-t", str(program.pid), "-p", "-m", "sleep", "1000"]
        with subprocess.Popen(command) as stranger:
            wait_for(lambda: procfs.children(stranger.pid, stranger.pid), "nsenter does not fork")
            try:
                said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
            finally:
                for pid in procfs.children(stranger.pid, stranger.pid):
                    os.kill(pid, 9)
        assert "sleep has entered it and is not in the tree" in said
        program.finish()


def test_many_of_one_container(tmp_path: Path) -> None:
    compiled(tmp_path, 'int main(void) { set_up(); int file = open("count", O_WRONLY | O_CREAT | O_APPEND, 0600);'
                       'CHECK(getpid() == 1 && write(file, ".", 1) == 1); return content(); }')
    script = setup_script(tmp_path)
    with container(tmp_path, "-pmiun", "--mount-proc", "sh", script) as program:
        images = program.dump("--leave-running")
        copies = [int(stasis("restore", "--images", images, *option)) for option in ((), ("--pid-namespace",))]
        program.finish()
        stasis("restore", "--images", images, "--attach")
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in copies), "the copies do not end")
    assert (tmp_path / "count").read_text() == "...."


SHELL = """set -e
mkdir root && cd root
mkdir bin proc dev old
cp "$(command -v busybox)" bin/busybox
mount --bind . .
cd .
mount -t proc proc proc
mount -t tmpfs dev dev
mknod -m 666 dev/null c 1 3
pivot_root . old
exec bin/busybox sh -c '
    busybox() { /bin/busybox "$@"; }
    cd / && busybox umount -l old && busybox hostname inside && number=0
    exec </dev/null >>out 2>&1
    trap "echo told; exit 0" TERM
    while :; do
        number=$((number + 1))
        echo $number $$ $(busybox hostname) | busybox cat
        busybox sleep 0.01
        [ $number != 3 ] || echo > ready
    done'
"""


@pytest.mark.tool("busybox")
def test_a_shell_in_a_directory(tmp_path: Path) -> None:
    """Its pipelines come and go while it is dumped; the directory is outside, too, and what it writes stays there."""
    script, out = tmp_path / "setup", tmp_path / "root/out"
    script.write_text(WITHOUT_OTHERS + SHELL)
    (tmp_path / "ready").symlink_to("root/ready")
    with container(tmp_path, "-pmiun", "sh", script) as program:
        for _ in range(2 if os.environ.get("STASIS_LONG") else 1):
            program.restore(program.dump())
            lines = len(out.read_text().splitlines())
            wait_for(lambda lines=lines: len(out.read_text().splitlines()) > lines + 2, "it stands still")  # type: ignore[misc]
        os.kill(program.pid, signal.SIGTERM)
        wait_for(lambda: not os.path.exists(f"/proc/{program.pid}"), "it does not end")
    *counted, told = out.read_text().splitlines()
    assert counted == [f"{number} 1 inside" for number in range(1, len(counted) + 1)]
    assert told == "told"
