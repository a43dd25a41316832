# SPDX-License-Identifier: Apache-2.0
"""What C programs of tests use that give processes mount namespaces of their own. See `programs.py`."""

from __future__ import annotations

from pathlib import Path

from tests.process.containers import PLACES
from tests.process.programs import compiled

__all__ = ["compiled_sandboxes", "rooted_script"]

HELPERS = r"""
#include <sys/inotify.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/xattr.h>
static int is(const char *path, const char *wanted) {
    char text[100] = "";
    int fd = open(path, O_RDONLY);
    if (fd < 0) return 0;
    CHECK(read(fd, text, 99) >= 0 && !close(fd));
    return !strcmp(text, wanted);
}
static int made(const char *path, const char *text) {
    int fd = open(path, O_RDWR | O_CREAT, 0640);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    return fd;
}
static ino_t space(const char *pid) {
    char path[70];
    struct stat found;
    sprintf(path, "/proc/%s/ns/mnt", pid);
    CHECK(!stat(path, &found));
    return found.st_ino;
}
static int mounted(const char *path) {
    static char table[60000];
    int fd = open("/proc/self/mountinfo", O_RDONLY), got, size = 0, found = 0;
    while ((got = read(fd, table + size, 59999 - size)) > 0) size += got;
    table[size] = 0;
    for (char *at = table; (at = strstr(at, path)); at++) if (at[-1] == ' ' && at[strlen(path)] == ' ') found++;
    return close(fd), found;
}
static void away(void) {  // with what other programs may unmount meanwhile, and with what is shared
    CHECK(!mount(0, "/", 0, MS_REC | MS_PRIVATE, 0));
    static char text[60000], path[500];
    int fd = open("/proc/self/mountinfo", O_RDONLY), got, size = 0;
    while ((got = read(fd, text + size, 59999 - size)) > 0) size += got;
    text[size] = 0, close(fd);
    for (char *save, *line = strtok_r(text, "\n", &save); line; line = strtok_r(0, "\n", &save))
        if (sscanf(line, "%*s %*s %*s %*s %499s", path) == 1)
            for (const char *const *one = (const char *const[]) { PLACES, 0 }; *one; one++)
                if (!strncmp(path, *one, strlen(*one))) umount2(path, MNT_DETACH);
}
"""


ROOTED = r"""
int main(void) {
    setsid();
    pid_t child = fork();
    if (!child) {
        CHECK(!unshare(CLONE_NEWNS) && !mount(0, "/", 0, MS_REC | MS_PRIVATE, 0) && !mount("x", "own", "tmpfs", 0, 0));
        int file = made("own/file", "kept");
        touch("up");
        await("go");
        CHECK(is("own/file", "kept") && pwrite(file, "KEPT", 4, 0) == 4 && is("own/file", "KEPT"));
        _exit(3);
    }
    await("up");
    set_up();
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    CHECK(access("own/file", F_OK) && access("/usr/bin/env", F_OK) == 0 && access("/root", F_OK));
    return content();
}
"""
SCRIPT = """set -e
mkdir own root
mount --bind root root
cd root
mkdir proc dev usr old outer
cp ../program .
mount --bind .. outer
mount -t proc proc proc
mount --bind /usr usr
ln -s usr/lib lib
ln -s usr/lib64 lib64
mount -t tmpfs dev dev
mknod -m 666 dev/null c 1 3
pivot_root . old
cd /outer
umount -l /old
exec /program </dev/null >>errors 2>&1
"""


def rooted_script(directory: Path) -> Path:
    """For a shell in a mount namespace of its own: a program with another root, and a child with further mounts."""
    compiled_sandboxes(directory, ROOTED)
    script = directory / "setup"
    script.write_text(SCRIPT)
    return script


def compiled_sandboxes(directory: Path, code: str) -> Path:
    """The program made of prelude, helpers and `code`."""
    return compiled(directory, HELPERS + code, "-DPLACES=" + ", ".join(f'"{place}"' for place in PLACES))
