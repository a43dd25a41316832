# SPDX-License-Identifier: Apache-2.0
"""Switches of stasis-criu that say what is left to whoever restores, and where things come back to."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.linux import nftables
from stasis.linux.mounts import mounts
from stasis.process import cgroups
from tests.process.programs import PATIENCE, Program, compiled, running, wait_for
from tests.process.test_tcp import ECHO, server

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

COMMAND = [sys.executable, "-c", "import sys; from stasis.cli.criu import main; sys.exit(main())"]

WAITING = "int main(void) { set_up(); return content(); }"

LOST_NAMES = r"""
// Two descriptors for a file that is only to be found in another directory by now, one of them mapped, and a fifo.
int main(void) {
    CHECK(!mkdir("here", 0700) && !mkdir("there", 0700));
    int fd = open("here/file", O_RDWR | O_CREAT, 0600), again = open("here/file", O_RDONLY);
    CHECK(write(fd, "what was written", 16) == 16);
    char *mapped = mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(!mkfifo("here/fifo", 0600));
    int fifo = open("here/fifo", O_RDWR);
    CHECK(write(fifo, "waits", 5) == 5);
    CHECK(!link("here/file", "there/file") && !unlink("here/file"));
    CHECK(!link("here/fifo", "there/fifo") && !unlink("here/fifo"));
    set_up();
    char data[32], name[300];
    CHECK(write(fd, "!", 1) == 1 && lseek(again, 0, SEEK_CUR) == 0 && read(again, data, 32) == 17);
    CHECK(!memcmp(data, "what was written!", 17) && !memcmp(mapped, "what was written!", 17));
    CHECK(read(fifo, data, 32) == 5 && !memcmp(data, "waits", 5));
    struct stat ours, theirs;
    CHECK(!fstat(fd, &ours) && !stat("there/file", &theirs) && ours.st_ino == theirs.st_ino && ours.st_nlink == 1);
    CHECK(readlink("/proc/self/fd/3", name, 300) > 0 && strstr(name, "here/file (deleted)"));
    return content();
}
"""

OUTSIDE = r"""
// Its errors go to a file, its input is a terminal whose other end is elsewhere, and 5 a unix socket's.
int main(void) {
    set_up();
    char data[8];
    CHECK(isatty(0) && read(0, data, 6) == 6 && !memcmp(data, "hello\n", 6));
    CHECK(write(4, "to the file", 11) == 11);
    CHECK(write(5, "to the socket", 13) == 13);
    return content();
}
"""

PARENT = """
import os, subprocess, sys
status = subprocess.run([sys.executable, "-c", "import sys; from stasis.cli.criu import main; sys.exit(main())",
                         "restore", "-D", "images", "-d", "-S", "--pidfile", "pid"]).returncode
assert status == 0
pid = int(open("images/pid").read())
open("restored", "w").close()
assert os.waitpid(pid, 0) == (pid, 0), "it is no child of ours"
"""


LISTENER = """
import os, socket, time
from pathlib import Path
listener = socket.create_server(("127.0.0.1", 0))
Path("port").write_text(str(listener.getsockname()[1]))
Path("ready").touch()
while not os.path.exists("go"):
    time.sleep(0.003)
listener.settimeout(60)
listener.accept()[0].sendall(b"hello")
Path("content").touch()
"""


def _run(directory: Path, *words: object, status: int = 0, **options: object) -> str:
    done = subprocess.run([*COMMAND, *map(str, words)], cwd=directory, capture_output=True, text=True, timeout=PATIENCE,
                          stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]  # fmt: skip
    assert done.returncode == status, done.stderr
    return str(done.stderr)


def _dumped(program: Program, *words: object) -> None:
    program.pids = program.descendants()
    _run(program.directory, "dump", "-t", program.pid, "-D", "images", *words)
    program.process.wait()


@contextlib.contextmanager
def _group(kind: str, name: str = "") -> Iterator[Path]:
    """A new control group: of version 2, or of a hierarchy of version 1."""
    found = [mount.target for mount in mounts() if mount.fstype == kind and str(mount.target).endswith(name)]
    path = Path(found[0], f"stasis-switches-{os.getpid()}") if found else Path()
    try:
        path.mkdir()
    except OSError:
        pytest.skip(f"there are no groups of {kind} {name} to make here")
    try:
        yield path
    finally:
        for group in (*path.glob("*/"), path):
            wait_for(lambda group=group: not (group / "cgroup.procs").read_text(), "the group is not empty")
            group.rmdir()


def test_links_are_made_for_files_that_lost_their_names(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, LOST_NAMES)) as program:
        said = _run(tmp_path, "dump", "-t", program.pid, "-D", "images", status=1)
        assert "--link-remap" in said
        assert not list(tmp_path.glob("here/.*"))
        _dumped(program, "--link-remap")
        assert len(list(tmp_path.glob("here/.stasis-link-*"))) == 2
        _run(tmp_path, "restore", "-D", "images", "-d")
        assert not list(tmp_path.glob("here/.*"))
        program.finish()


def test_a_dump_that_fails_takes_its_links_back(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-dump ]\n')
    script.chmod(0o755)
    with running(tmp_path, compiled(tmp_path, LOST_NAMES)) as program:
        _run(tmp_path, "dump", "-t", program.pid, "-D", "images", "--link-remap", "--action-script", script, status=1)
        assert not list(tmp_path.glob("here/.*"))


def test_a_dumper_that_is_killed_leaves_a_set_with_its_links_and_no_frozen_group(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-dump ] || kill -9 $PPID\n')
    script.chmod(0o755)
    with _group("cgroup2") as group, running(tmp_path, compiled(tmp_path, LOST_NAMES)) as program:
        (group / "cgroup.procs").write_text(str(program.pid))
        (group / "cgroup.freeze").write_text("1")
        _run(tmp_path, "dump", "-t", program.pid, "-D", "images", "--link-remap", "--freeze-cgroup", group,
             "--action-script", script, status=-signal.SIGKILL)  # fmt: skip
        assert (tmp_path / "images" / "inventory.img").exists()
        links = list(tmp_path.glob("here/.stasis-link-*"))
        assert len(links) == 2
        for link in links:
            link.unlink()  # the program looks for them
        wait_for(lambda: "frozen 1" in (group / "cgroup.events").read_text(), "the group is not frozen as it was")
        (group / "cgroup.freeze").write_text("0")
        program.finish()


def test_what_is_left_outside_is_brought_by_the_restorer(tmp_path: Path) -> None:
    program = compiled(tmp_path, OUTSIDE)
    with contextlib.ExitStack() as cleanup:
        master, slave = os.openpty()
        ours, theirs = socket.socketpair()
        cleanup.callback(os.close, master)
        cleanup.enter_context(ours)
        file = os.open(tmp_path / "old", os.O_RDWR | os.O_CREAT)
        mount = next(line.split()[1] for line in Path(f"/proc/self/fdinfo/{file}").read_text().splitlines()
                     if line.startswith("mnt_id"))  # fmt: skip
        place = f"file[{int(mount):x}:{os.fstat(file).st_ino:x}]"
        terminal = f"tty[{os.fstat(slave).st_rdev:x}:{os.fstat(slave).st_dev:x}]"
        inode = os.fstat(theirs.fileno()).st_ino
        start = f"exec {program} <&{slave} 4<&{file} 5<&{theirs.fileno()}"
        kept = (slave, file, theirs.fileno())
        started = cleanup.enter_context(running(tmp_path, "bash", "-c", start, pass_fds=kept))
        os.close(slave)
        theirs.close()
        os.close(file)
        outside = ("--external", place, "--external", terminal, "--external", f"unix[{inode}]")
        assert "is not implemented" in _run(tmp_path, "dump", "-t", "1", "--external", "mnt[]:m", status=1)
        _dumped(started, *outside)
        assert "left to the restorer" in _run(tmp_path, "restore", "-D", "images", "-d", status=1)
        new, (new_ours, new_theirs) = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT), socket.socketpair()
        new_master, new_slave = os.openpty()
        brought = {place: new, terminal: new_slave, f"socket:[{inode}]": new_theirs.fileno()}
        words = [word for name, fd in brought.items() for word in ("--inherit-fd", f"fd[{fd}]:{name}")]
        _run(tmp_path, "restore", "-D", "images", "-d", *words, pass_fds=tuple(brought.values()))
        os.write(new_master, b"hello\n")
        started.finish()
        assert (tmp_path / "new").read_bytes() == b"to the file"
        assert new_ours.recv(100) == b"to the socket"
        for fd in (new, new_master, new_slave):
            os.close(fd)
        new_ours.close()
        new_theirs.close()


def test_what_nobody_accepted_is_left_behind(tmp_path: Path) -> None:
    with running(tmp_path, sys.executable, "-c", LISTENER) as program:
        place = "127.0.0.1", int((tmp_path / "port").read_text())
        with socket.create_connection(place, timeout=60) as first:
            said = _run(tmp_path, "dump", "-t", program.pid, "-D", "images", "--tcp-established", status=1)
            assert "--skip-in-flight" in said
            _dumped(program, "--tcp-established", "--skip-in-flight")
            with pytest.raises(ConnectionResetError):
                first.recv(1)
        _run(tmp_path, "restore", "-D", "images", "-d", "--tcp-established")
        with socket.create_connection(place, timeout=60) as second:
            (tmp_path / "go").touch()
            assert second.recv(100) == b"hello"
        program.finish()


def test_who_keeps_packets_away_needs_no_lock(tmp_path: Path) -> None:
    with server(tmp_path, ECHO, before=b"before ") as case:
        before = nftables.tables()
        _dumped(case.program, "--tcp-established", "--network-lock", "skip")
        assert nftables.tables() == before
        _run(tmp_path, "restore", "-D", "images", "-d", "--tcp-established")
        case.client.sendall(b"after")
        case.client.shutdown(socket.SHUT_WR)
        case.go()
        assert case.client.recv(100) == b"before after"[::-1]
        case.program.finish()


def test_groups_come_back_below_another_one(tmp_path: Path) -> None:
    with _group("cgroup2") as group, running(tmp_path, compiled(tmp_path, WAITING)) as program:
        (group / "old").mkdir()
        (group / "old" / "cgroup.procs").write_text(str(program.pid))
        _dumped(program, "--manage-cgroups")
        said = _run(tmp_path, "restore", "-D", "images", "-d", "--cgroup-root", f"/{group.name}/new", status=1)
        assert "needs --manage-cgroups" in said
        _run(tmp_path, "restore", "-D", "images", "-d", "--manage-cgroups", "--cgroup-root", f"/{group.name}/new")
        assert dict(cgroups.groups_of(program.pid))[""] == f"/{group.name}/new"
        program.finish()


FREEZERS = [("cgroup2", "", "cgroup.freeze"), ("cgroup", "freezer", "freezer.state")]


@pytest.mark.parametrize(("kind", "name", "file"), FREEZERS)
def test_a_group_stands_still_while_it_is_stopped(tmp_path: Path, kind: str, name: str, file: str) -> None:
    with _group(kind, name) as group, running(tmp_path, compiled(tmp_path, WAITING)) as program:
        (group / "cgroup.procs").write_text(str(program.pid))
        thawed = (group / file).read_text()
        _run(tmp_path, "dump", "-t", program.pid, "-D", "running", "-R", "--freeze-cgroup", group)
        assert (group / file).read_text() == thawed
        (group / file).write_text("1" if kind == "cgroup2" else "FROZEN")
        wait_for(lambda: (group / file).read_text().strip() in ("1", "FROZEN"), "the group does not freeze")
        frozen = (group / file).read_text()
        _run(tmp_path, "dump", "-t", program.pid, "-D", "frozen", "-R", "--freeze-cgroup", group)
        assert (group / file).read_text() == frozen
        (group / file).write_text(thawed)
        _dumped(program, "--freeze-cgroup", group)
        _run(tmp_path, "restore", "-D", "images", "-d")
        program.finish()
    assert "is no control group" in _run(tmp_path, "dump", "-t", "1", "-D", ".", "--freeze-cgroup", tmp_path, status=1)


def test_the_first_process_is_a_child_of_who_had_it_restored(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, WAITING)) as program:
        _dumped(program)
        assert "needs --restore-detached" in _run(tmp_path, "restore", "-D", "images", "-S", status=1)
        with subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path) as parent:
            wait_for((tmp_path / "restored").exists, "it is not restored")
            program.finish()
            assert parent.wait(60) == 0


def test_a_sibling_ends_with_the_restore_that_fails(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]\n')
    script.chmod(0o755)
    with running(tmp_path, compiled(tmp_path, WAITING)) as program:
        _dumped(program)
        _run(tmp_path, "restore", "-D", "images", "-d", "-S", "--action-script", script, status=1)
        with contextlib.suppress(ChildProcessError):
            assert os.WTERMSIG(os.waitpid(program.pid, 0)[1]) == signal.SIGKILL  # it was our child
        assert not os.path.exists(f"/proc/{program.pid}")
        _run(tmp_path, "restore", "-D", "images", "-d")
        program.finish()
